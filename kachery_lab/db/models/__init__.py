"""The tables, one file per noun; importing this package registers all of them with `metadata`."""

from __future__ import annotations

from kachery_lab.db.models.audit import audit
from kachery_lab.db.models.base import metadata
from kachery_lab.db.models.blobs import blob_origins, blobs
from kachery_lab.db.models.buckets import bucket_objects, bucket_totals, tombstones
from kachery_lab.db.models.channels import authorizations, channels, membership_passcodes, memberships, passcodes
from kachery_lab.db.models.clients import client_answers, clients, enrolment_codes
from kachery_lab.db.models.feed_channels import feed_channels, subfeed_checkpoints
from kachery_lab.db.models.feeds import feed_names, feeds, subfeeds
from kachery_lab.db.models.links import links, resource_files
from kachery_lab.db.models.messages import append_requests, messages
from kachery_lab.db.models.meta import meta
from kachery_lab.db.models.mutables import mutables
from kachery_lab.db.models.nodes import nodes
from kachery_lab.db.models.tasks import task_functions, task_grants, task_reports, tasks
from kachery_lab.db.models.tokens import tokens
from kachery_lab.db.models.uploads import pending_uploads, quotas, usage_days
from kachery_lab.db.models.users import user_profiles, users

__all__ = [
    "append_requests",
    "audit",
    "authorizations",
    "blob_origins",
    "blobs",
    "bucket_objects",
    "bucket_totals",
    "channels",
    "client_answers",
    "clients",
    "enrolment_codes",
    "feed_channels",
    "feed_names",
    "feeds",
    "links",
    "membership_passcodes",
    "memberships",
    "messages",
    "meta",
    "metadata",
    "mutables",
    "nodes",
    "passcodes",
    "pending_uploads",
    "quotas",
    "resource_files",
    "subfeed_checkpoints",
    "subfeeds",
    "task_functions",
    "task_grants",
    "task_reports",
    "tasks",
    "tokens",
    "tombstones",
    "usage_days",
    "user_profiles",
    "users",
]
