"""The tables, one file per noun; importing this package registers all of them with `metadata`."""

from __future__ import annotations

from kachery_lab.db.models.audit import audit
from kachery_lab.db.models.base import metadata
from kachery_lab.db.models.blobs import blob_origins, blobs
from kachery_lab.db.models.buckets import bucket_objects, tombstones
from kachery_lab.db.models.channels import authorizations, channels, membership_passcodes, memberships, passcodes
from kachery_lab.db.models.feeds import feed_names, feeds, subfeeds
from kachery_lab.db.models.links import links
from kachery_lab.db.models.messages import append_requests, messages
from kachery_lab.db.models.meta import meta
from kachery_lab.db.models.mutables import mutables
from kachery_lab.db.models.nodes import nodes
from kachery_lab.db.models.tokens import tokens
from kachery_lab.db.models.users import users

__all__ = [
    "append_requests",
    "audit",
    "authorizations",
    "blob_origins",
    "blobs",
    "bucket_objects",
    "channels",
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
    "subfeeds",
    "tokens",
    "tombstones",
    "users",
]
