"""Whatever a person can set, type or be told is in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kachery_lab import errors
from kachery_lab.client.problems import error_classes
from kachery_lab.settings import Settings, is_secret, variable
from tests.commands import all_commands

ROOT = Path(__file__).parents[1]


_CHOICE = re.compile(r"(kachery-lab(?: \w+)+) (\w+(?:\|\w+)+)")


def documentation() -> str:
    """All pages; `kachery-lab noun a|b` also counts as `kachery-lab noun a` and `kachery-lab noun b`."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(path.read_text("utf-8") for path in paths)
    spelled = [f"{head} {word}" for head, words in _CHOICE.findall(text) for word in words.split("|")]
    return "\n".join([text, *spelled])


def variables() -> list[str]:
    names = [variable(field) for field in Settings.model_fields]
    return names + [variable(field) + "_FILE" for field in Settings.model_fields if is_secret(field)]


CODES = sorted({kind.code for kind in error_classes() if kind.__module__ == errors.__name__} - {"error"})
"""The base class is never raised itself, so nobody is told its code."""


def mentions(text: str, word: str) -> bool:
    """Whether a whole word is there; the end of a longer name does not count."""
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", text) is not None


@pytest.mark.parametrize("name", variables())
def test_every_setting(name):
    assert mentions(documentation(), name)


COMMANDS = [f"kachery-lab {words}" for words, _ in all_commands()]


@pytest.mark.parametrize("name", [*COMMANDS, "kachery-daemon-start", "kachery-daemon-info"])
def test_every_command(name):
    assert mentions(documentation(), name)


@pytest.mark.parametrize("code", CODES)
def test_every_error_code(code):
    assert mentions(documentation(), code)


def test_no_setting_is_documented_that_is_none():
    named = set(re.findall(r"(?<![A-Z_])KACHERY_LAB_[A-Z0-9_]*[A-Z0-9]", documentation()))
    for_development = {"KACHERY_LAB_BENCH_DIR", "KACHERY_LAB_SHARED_VECTORS"}
    assert named - for_development <= set(variables())
