"""Results of benchmarks are files, and the tables of benchmarks/README.md are made from them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.rows import markdown


def test_the_tables_in_the_readme_are_what_the_files_give() -> None:
    text = tables.README.read_text()
    assert tables.filled(text) == text, "python -m benchmarks.tables writes them"
    assert not re.search(r"^\|", tables.MARKED.sub("", text), re.MULTILINE), "a table that was typed in"


def test_every_result_is_in_a_table() -> None:
    named = {name for found in tables.MARKED.finditer(tables.README.read_text()) for name in found[2].split()}
    assert named == {path.stem for path in results.RESULTS.iterdir()}


def test_a_report_is_saved_beside_an_earlier_one_with_machine_versions_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["/anywhere/benchmarks/run.py", "--cases", "8x16", "--save"])
    results.report("8×16, no recompute", [{"step_s": 5.0}], save=False)
    assert not (tmp_path / "results").exists()
    for seconds in (4.0, 3.0):
        results.report("8×16, no recompute", [{"step_s": seconds}], save=True, measured=[seconds])
    first, second = sorted((tmp_path / "results").iterdir(), key=lambda path: len(path.name))
    assert first.stem.endswith("-run-8x16-no-recompute")
    assert second.stem == f"{first.stem}-2"
    found = results.read(second)
    assert (found.rows, found.measured) == ([{"step_s": 3.0}], [3.0])
    assert found.command == "python -m benchmarks.run --cases 8x16 --save"
    assert found.machine["cores"] > 0
    assert found.machine["memory_bytes"] > 0
    assert found.versions["torch"] is not None
    assert "3.00 s" in capsys.readouterr().out


def test_the_end_of_a_key_is_its_unit() -> None:
    rows = [
        {
            "contender": "a",
            "step_s": 0.25,
            "peak_memory_bytes": 1024,
            "waiting_share": 0.29,
            "drive_bytes_per_s": 1.5e9,
        },
        {
            "contender": "b",
            "pairs": 4,
            "losses_apart": 2.4e-7,
            "ratio": 1.5,
            "memory_bytes": (1000, 800),
            "step_s": 35.5,
        },
    ]
    heading, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(rows).splitlines())
    assert [dict(zip(heading, line, strict=True)) for line in lines] == [
        {"contender": "a", "step": "250 ms", "peak memory": "1.00 KiB", "waiting": "29 %", "drive": "1.50 GB/s"}
        | dict.fromkeys(("pairs", "losses apart", "ratio", "memory"), ""),
        {"contender": "b", "step": "35.5 s", "pairs": "4", "losses apart": "2.4e-07", "ratio": "1.50"}
        | {"memory": "1000 B → 800 B (+25 %)"}
        | dict.fromkeys(("peak memory", "waiting", "drive"), ""),
    ]
