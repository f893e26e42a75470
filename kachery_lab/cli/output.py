"""How commands print what they got. Text of other people never reaches the terminal raw."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import click


def moment(ms: int | None) -> str:
    """A time in ms since 1970, in local time; `-` for none."""
    return "-" if ms is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(ms / 1000))


def words(value: object) -> str:
    """One cell: lists with spaces, nothing as `-`, characters that a terminal would obey as `?`."""
    if value is None or value == [] or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = " ".join(str(one) for one in value) if isinstance(value, list) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def table(rows: Iterable[Mapping[str, Any]], **columns: str) -> None:
    """Print rows below a heading. `columns`: heading -> key; times are those whose key ends in `At` or is `at`."""
    lines = [list(columns)]
    for row in rows:
        cells = [moment(row[key]) if key == "at" or key.endswith("At") else words(row[key]) for key in columns.values()]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def more(option: str, following: object) -> None:
    """Say, not in the output itself, how to see the rest of a list that has one."""
    if following is not None:
        click.echo(f"there is more: {option} {words(following)}", err=True)


def fields(row: Mapping[str, Any]) -> None:
    """Print one thing, a field a line."""
    for key, value in row.items():
        click.echo(f"{key:18}{moment(value) if key.endswith('At') else words(value)}")
