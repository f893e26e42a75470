"""What was found, as a table: for the terminal and for docs/bench.md."""

from __future__ import annotations

import os
import platform
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kachery_lab.db.filesystem import file_system_of

BEGIN = "<!-- table: written by tests.bench -->"
END = "<!-- end of table -->"
HEAD = ("what", "ours", "reference", "found", "demanded", "met")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `found` and `limit` have the same unit: a ratio, or what `unit` says."""

    what: str
    ours: str
    reference: str
    found: float
    limit: float
    unit: str = "x"
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the demand is met."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    def cells(self) -> tuple[str, ...]:
        """The row as texts."""
        sign = "<=" if self.at_most else ">="
        found, limit = (f"{_short(value)} {self.unit}" for value in (self.found, self.limit))
        return self.what, self.ours, self.reference, found, f"{sign} {limit}", "met" if self.met else "NOT MET"


def ratio(what: str, ours: float, reference: float, limit: float, unit: str, scale: float = 1.0) -> Row:
    """A row for two rates of the same kind."""
    return Row(what, f"{_short(ours / scale)} {unit}", f"{_short(reference / scale)} {unit}", ours / reference, limit)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table that is aligned for reading as text too."""
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def machine(work: Path) -> str:
    """What the figures were measured on."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"{os.cpu_count()} processors ({platform.machine()}), {pages / (1 << 30):.0f} GiB of memory, "
        f"{platform.system()} {platform.release().split('-')[0]}, {file_system_of(work)[0]}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def write_markdown(path: Path, rows: Sequence[Row], work: Path, rounds: int, quick: bool) -> None:
    """Replace what stands between the two marks of a document."""
    text = path.read_text()
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{path} lacks the marks {BEGIN} and {END}")
    command = f"python -m tests.bench {'--quick ' if quick else ''}--markdown docs/{path.name}"
    table = f"{as_markdown(rows)}\n\n`{command}`, best of {rounds} rounds, on {machine(work)}.\n"
    path.write_text(f"{before}{BEGIN}\n{table}{END}{after}")
