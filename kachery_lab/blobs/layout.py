"""The only path builder.

<storage>/
  .kachery-volume                  id of the volume, one line
  .kachery-owner                   which process writes here: host, pid, boot, heartbeat
  kachery-node-id  owner           published to clients that mount the directory
  client-auth                      code of the local lab client, 0640
  public.pem  private.pem          node key, 0600, unless KACHERY_LAB_NODE_KEY_FILE names another place
  sha1/aa/bb/cc/<sha1>             blob, 0644; exists only complete
  sha1/aa/bb/cc/<sha1>.link        link record, JSON
  sha1-trash/aa/bb/cc/<sha1>       deleted blobs
  sha1-quarantine/aa/bb/cc/<sha1>  blobs and link records found to be wrong
  tmp/kachery-lab.<token>.<n>.tmp  drafts of the running process, 0600
  feeds-log/  records-log/         append-only logs, 0700
  access.json                      copy of users, channels and rights, 0600; secrets hashed or encrypted
  .kachery-lab/                    metadata, when no other place is named and the disk is local
<metadata>/
  kachery-lab.db  backups/         index and its backups before upgrades
  lock  admin.sock  admin-token    one process; local administration; first admin token, 0600
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DRAFT_PREFIX = "kachery-lab."
DRAFT_SUFFIX = ".tmp"
_BLOB_NAME = re.compile(r"[0-9a-f]{40}", re.ASCII)


def shard(sha1: str) -> str:
    """`aa/bb/cc` of a blob's name."""
    return f"{sha1[0:2]}/{sha1[2:4]}/{sha1[4:6]}"


def is_blob_name(name: str) -> bool:
    """Whether a file name is a blob's; everything else in a `sha1` directory is a link record or not ours."""
    return _BLOB_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class StorageLayout:
    """Paths below the storage directory."""

    root: Path

    @property
    def blobs(self) -> Path:
        return self.root / "sha1"

    @property
    def trash(self) -> Path:
        return self.root / "sha1-trash"

    @property
    def quarantine(self) -> Path:
        return self.root / "sha1-quarantine"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def volume_id(self) -> Path:
        return self.root / ".kachery-volume"

    @property
    def owner_process(self) -> Path:
        return self.root / ".kachery-owner"

    @property
    def node_id(self) -> Path:
        return self.root / "kachery-node-id"

    @property
    def owner(self) -> Path:
        return self.root / "owner"

    @property
    def client_auth(self) -> Path:
        return self.root / "client-auth"

    @property
    def public_key(self) -> Path:
        return self.root / "public.pem"

    @property
    def private_key(self) -> Path:
        return self.root / "private.pem"

    @property
    def feeds_log(self) -> Path:
        return self.root / "feeds-log"

    @property
    def records_log(self) -> Path:
        return self.root / "records-log"

    @property
    def access(self) -> Path:
        return self.root / "access.json"

    @property
    def default_metadata(self) -> Path:
        return self.root / ".kachery-lab"

    def blob(self, sha1: str) -> str:
        """Final path of a blob, as text: this is built once for each request."""
        return f"{self.root}/sha1/{shard(sha1)}/{sha1}"

    def link(self, sha1: str) -> str:
        """Path of a link record."""
        return self.blob(sha1) + ".link"

    def draft(self, token: str, number: int) -> str:
        """Path of a temporary file; `token` names the process that made it."""
        return f"{self.root}/tmp/{DRAFT_PREFIX}{token}.{number}{DRAFT_SUFFIX}"


@dataclass(frozen=True, slots=True)
class MetadataLayout:
    """Paths below the metadata directory."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "kachery-lab.db"

    @property
    def backups(self) -> Path:
        return self.root / "backups"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def admin_socket(self) -> Path:
        return self.root / "admin.sock"

    @property
    def admin_token(self) -> Path:
        return self.root / "admin-token"
