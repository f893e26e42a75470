"""`python -m tests.bench`: measure, print the table, end with 1 when a demand is not met."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench import (
    lines_bands,
    lines_blobs,
    lines_bounds,
    lines_federation,
    lines_feeds,
    lines_hub,
    lines_zones,
)
from tests.bench.place import Place, open_place
from tests.bench.table import Row, as_markdown, machine, write_markdown

LINES: dict[str, Callable[[Place], Iterator[Row]]] = {
    "store-large": lines_blobs.store_large,
    "read-large": lines_blobs.read_large,
    "store-small": lines_blobs.store_small,
    "read-small": lines_blobs.read_small,
    "append-single": lines_feeds.append_single,
    "append-many": lines_feeds.append_many,
    "hub-load": lines_hub.load_from_hub,
    "bucket-large": lines_hub.bucket_large,
    "decisions": lines_hub.decisions,
    "zone-small": lines_zones.small,
    "zone-upload": lines_zones.uploads,
    "zone-ranges": lines_zones.ranges,
    "bands": lines_bands.fan_out,
    "file-on-demand": lines_federation.file_on_demand,
    "feed-delivery": lines_federation.append_to_delivery,
    "task": lines_federation.trivial_task,
    "upload-memory": lines_bounds.upload_memory,
    "start": lines_bounds.start,
}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=LINES, metavar="NAME", help=f"one of: {', '.join(LINES)}")
    parser.add_argument("--quick", action="store_true", help="two rounds instead of five, fewer small requests")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table between the marks of this file")
    given = parser.parse_args()
    if given.markdown and given.only:
        parser.error("--markdown takes a whole table, not --only")
    place = open_place(given.quick)
    rows: list[Row] = []
    print(f"{place.rounds} rounds on {machine(place.work)}", flush=True)
    try:
        for name in given.only or LINES:
            for row in LINES[name](place):
                print("  ".join(cell for cell in row.cells() if cell), flush=True)
                rows.append(row)
        print("\n" + as_markdown(rows))
        if given.markdown:
            write_markdown(given.markdown, rows, place.work, place.rounds, place.quick)
    finally:
        shutil.rmtree(place.work, ignore_errors=True)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
