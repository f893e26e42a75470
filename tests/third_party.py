"""Test data of other projects: read in place, not part of this repository.

It lies where KACHERY_LAB_SHARED_VECTORS says, or in `shared/vectors` next to the repository. Tests that need it are
skipped without it, except in CI, where they fail.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE_THE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "vectors"


def shared_vectors(name: str) -> Path:
    """The folder or file of that name; skips the test if it is absent."""
    path = Path(os.environ.get("KACHERY_LAB_SHARED_VECTORS") or _BESIDE_THE_REPOSITORY) / name
    if not path.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"third-party test data {name} is missing")
        pytest.skip(f"third-party test data {name} is absent; set KACHERY_LAB_SHARED_VECTORS")
    return path
