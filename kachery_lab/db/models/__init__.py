"""The tables, one file per noun; importing this package registers all of them with `metadata`."""

from __future__ import annotations

from kachery_lab.db.models.base import metadata
from kachery_lab.db.models.blobs import blobs
from kachery_lab.db.models.feeds import feed_names, feeds, subfeeds
from kachery_lab.db.models.links import links
from kachery_lab.db.models.messages import append_requests, messages
from kachery_lab.db.models.meta import meta
from kachery_lab.db.models.mutables import mutables
from kachery_lab.db.models.tokens import tokens
from kachery_lab.db.models.users import users

__all__ = [
    "append_requests",
    "blobs",
    "feed_names",
    "feeds",
    "links",
    "messages",
    "meta",
    "metadata",
    "mutables",
    "subfeeds",
    "tokens",
    "users",
]
