"""The node's key, and what it publishes about itself on the volume."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from kachery_lab.blobs.durable import write_file
from kachery_lab.blobs.layout import StorageLayout
from kachery_lab.core.ids import NodeId
from kachery_lab.core.keys import PrivateKey, PublicKey
from kachery_lab.errors import InvalidInput, StartRefused


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is. The private key appears in no text made of this."""

    key: PrivateKey
    label: str
    owner: str | None

    @property
    def node_id(self) -> NodeId:
        """The public key, 64 hex digits."""
        return NodeId(self.key.public_hex)


def open_identity(layout: StorageLayout, key_file: Path | None, label: str, owner: str | None) -> Identity:
    """Blocking: load the node's key or make one, and publish node id and owner for clients that mount the directory.

    Raises StartRefused for a key that others can read, a half or broken pair, naming the file and the way out. An owner
    that is not given is the one written down at an earlier start.
    """
    private_path = key_file or layout.private_key
    public_path = layout.public_key if key_file is None else key_file.with_name("public.pem")
    key = _load(private_path, public_path)
    if key is None:
        key = PrivateKey.generate()
        private_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(private_path, key.to_pem().encode(), 0o600)
        write_file(public_path, PublicKey.parse(key.public_hex).to_pem().encode(), 0o600)
    write_file(layout.node_id, key.public_hex.encode(), 0o644)
    if owner is not None:
        write_file(layout.owner, owner.encode(), 0o644)
    elif layout.owner.exists():
        owner = layout.owner.read_text(encoding="utf-8").strip() or None
    return Identity(key, label, owner)


def _load(private_path: Path, public_path: Path) -> PrivateKey | None:
    if not private_path.exists():
        if public_path.exists():
            raise StartRefused(
                f"{public_path} is there but {private_path} is not",
                hint="Restore the private key from a backup; a node without it cannot prove who it is",
            )
        return None
    mode = stat.S_IMODE(private_path.stat().st_mode)
    if mode & 0o077:
        raise StartRefused(
            f"{private_path} can be read by others (mode {mode:04o})",
            hint=f"chmod 600 {private_path}, or keep the key elsewhere and name it in KACHERY_LAB_NODE_KEY_FILE",
        )
    if not os.access(private_path, os.R_OK):
        raise StartRefused(f"{private_path} cannot be read", hint=f"chown {os.getuid()}:{os.getgid()} {private_path}")
    try:
        key = PrivateKey.from_pem(private_path.read_text(encoding="ascii"))
        public = PublicKey.from_pem(public_path.read_text(encoding="ascii")).hex if public_path.exists() else None
    except (InvalidInput, UnicodeDecodeError) as error:
        raise StartRefused(
            f"{private_path} and {public_path} are not a key pair that this program can read",
            hint="Restore both from a backup",
        ) from error
    if public is None:
        write_file(public_path, PublicKey.parse(key.public_hex).to_pem().encode(), 0o600)
    elif public != key.public_hex:
        raise StartRefused(f"{private_path} and {public_path} do not belong together", hint="Restore the right pair")
    return key
