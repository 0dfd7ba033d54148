"""Whatever ranks, hosts and file names are made of, the terminal gets text."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from zinf_cli.errors import RankError
from zinf_cli.launch.failure import Failure
from zinf_cli.launch.logs import LogLine
from zinf_cli.launch.preflight import Preflight, Row
from zinf_cli.recipe.hosts import Host
from zinf_cli.screen import Screen, outside, printable
from zinf_cli.screens.launch import failure_screen, log_line, preflight_screen

EVIL = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x1b]0;title\x9c\x9b31m\x08\x7f\r\u202e\u2066[bold]x[/nothing]"
CONTROLS = {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
STEERS = CONTROLS | set("\u202a\u202b\u202d\u202e\u2066\u2067\u2069")


def shown(what: RenderableType) -> str:
    """What a file that is no terminal gets: without styles of ours, so no control character is right."""
    out = io.StringIO()
    Screen(file=out, width=300).print(what)
    return out.getvalue()


@given(st.text(st.characters(exclude_categories=())))
def test_no_text_steers_a_terminal(text: str) -> None:
    safe = printable(text)
    assert not STEERS & set(safe)
    safe.encode()
    assert printable(safe) == safe


def test_tabs_and_newlines_and_all_that_is_written_stay() -> None:
    text = "a\tb\nnaïve 漢字 کتاب\u200cها 👩\u200d💻 │ ✗"
    assert printable(text) == text
    assert printable("\x1b\r\x9b\u202e\udc80") == r"\x1b\r\x9b\u202e\udc80"


@pytest.mark.parametrize("way", ["str", "text", "cell", "title", "live"])
def test_nothing_gets_through_by_any_way(way: str) -> None:
    table = Table(EVIL)
    table.add_row(EVIL, Text(EVIL))
    ways: dict[str, RenderableType] = {
        "str": EVIL, "text": Text(EVIL), "cell": table, "title": Panel(EVIL, title=outside(EVIL)),
        "live": Live(table).get_renderable(),
    }  # fmt: skip
    what = ways[way]
    out = shown(what)
    assert not STEERS & set(out)
    assert "[bold]x[/nothing]" in out
    assert r"\x1b]52;c;" in out


def test_screens_of_hosts_and_ranks(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    log.write_text(f"before\n{EVIL}\n")
    row = Row(Host(EVIL, (0,)))
    row.note("by", "no", EVIL)
    screens = [
        log_line(LogLine(EVIL, 0, EVIL)),
        failure_screen(Failure(0, EVIL, 0, RankError(EVIL, where=EVIL, hint=EVIL), log), EVIL),
        preflight_screen(Preflight([row], None, [])),
    ]
    for screen in screens:
        out = shown(screen)
        assert not STEERS & set(out)
        assert r"\x07" in out  # shown, not only left out
    assert EVIL.encode() in log.read_bytes()


def zinf(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "zinf_cli.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    assert done.returncode == 2
    return (done.stdout + done.stderr).decode()


@pytest.mark.parametrize(
    "arguments",
    [["launch", f"{EVIL}.yaml"], ["trace", EVIL], ["launch", "a.yaml", f"--{EVIL}"], ["--debug", "launch", EVIL]],
)
def test_names_in_errors_of_the_command_line(tmp_path: Path, arguments: list[str]) -> None:
    assert not STEERS & set(zinf(*arguments, cwd=tmp_path))


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\x1b[31m.yaml")
    (tmp_path / name).write_text("nothing: here\n")
    assert r"\udcff\x1b[31m.yaml" in zinf("launch", name, cwd=tmp_path)
