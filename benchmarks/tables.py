"""`python -m benchmarks.tables`: write the tables of benchmarks/README.md from the files in benchmarks/results/.

A table stands between `<!-- results: NAME NAME ... -->` and `<!-- end -->`. The names are those of files, without
.json, in the order of the table. Lines above it say when, on which machine and with which versions was measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.results import RESULTS, Result, read
from benchmarks.rows import markdown

README = Path(__file__).parent / "README.md"
MARKED = re.compile(r"(<!-- results:([^>]*)-->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text with each of its tables as the files give it."""

    def table(found: re.Match[str]) -> str:
        return found[1] + _table([read(RESULTS / f"{name}.json") for name in found[2].split()]) + found[3]

    return MARKED.sub(table, text)


def _table(results: Sequence[Result]) -> str:
    """Of several files, the first row of each names its case."""
    several = len(results) > 1
    rows = [
        {**({"case": "" if number else result.case} if several else {}), **row}
        for result in results
        for number, row in enumerate(result.rows)
    ]
    return f"\n*{_sources(results)}*\n\n{markdown(rows)}\n\n"


def _sources(results: Sequence[Result]) -> str:
    """Where the files differ in zinf's commit only, they share a line, which names all commits."""
    commits: dict[str, list[str]] = {}
    for result in results:
        elsewhere = replace(result, versions={**result.versions, "zinf": None}).source
        commits.setdefault(elsewhere, []).append(result.versions.get("zinf") or "")
    sources = []
    for elsewhere, of_zinf in commits.items():
        named = ", ".join(dict.fromkeys(filter(None, of_zinf)))
        sources.append(elsewhere + (f", zinf {named}" if named else ""))
    return "; ".join(sources)


def main() -> None:
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()
