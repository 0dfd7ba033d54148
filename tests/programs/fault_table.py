"""Prints what `make test-faults` took, as the table of docs/faults.md, from the files that --junitxml has written."""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from xml.etree import ElementTree

from host_faults import Seen


def main(files: Sequence[str]) -> None:
    """A row for each fault and what reached the hosts: medians and largest of its moments, in seconds."""
    rows: dict[tuple[str, str], list[Seen]] = defaultdict(list)
    for file in files:
        for found in ElementTree.parse(file).iter("property"):
            by, name, *seconds = ast.literal_eval(found.attrib["value"])
            rows[name, by].append(Seen(*seconds))
    print("| fault | by | moments | the launcher told of it | it ended | nothing was left |\n|---|---|---|---|---|---|")
    for (name, by), seen in sorted(rows.items()):
        columns: list[list[float | None]] = [
            [one.told_s for one in seen],
            [one.ended_s for one in seen],
            [one.gone_s for one in seen],
        ]
        print(f"| {name} | {by} | {len(seen)} | {' | '.join(map(_seconds, columns))} |")


def _seconds(taken: Sequence[float | None]) -> str:
    known = [seconds for seconds in taken if seconds is not None]
    return f"{statistics.median(known):.1f} ({max(known):.1f})" if known else ""


if __name__ == "__main__":
    main(sys.argv[1:])
