"""What the screen shows of hosts, and of a run before its first step is over."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from zinf_cli.launch.logs import LogLine
from zinf_cli.launch.vitals import Vitals
from zinf_cli.screens.launch import log_line
from zinf_cli.screens.run import RunView, hosts_table
from zinf_cli.train.stragglers import straggler_of


def shown(renderable: object) -> list[str]:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text().splitlines()


def test_hosts_by_memory_and_what_went_to_and_from_their_drives() -> None:
    before = Vitals("node1", 2**29, 0, 2**20, time=10.0)
    now = Vitals("node1", 2**30, 2**30, 2**20, time=12.0)
    heading, line = shown(hosts_table([(before, now)], slow="node2"))
    assert heading.split() == ["host", "memory", "read", "write"]
    assert line.split() == ["node1", "1.00", "GiB", "537", "MB/s", "0", "kB/s"]
    assert shown(hosts_table([(before, now)], slow="node1"))[1].endswith("the others wait for it")


def test_the_slowest_rank_is_the_one_that_waits_least() -> None:
    assert straggler_of([0.9, 0.1, 0.8, 1.0], step_s=2.0) == 1
    assert straggler_of([0.9, 0.8, 0.8, 1.0], step_s=2.0) is None
    assert straggler_of([0.3], step_s=2.0) is None


def test_a_line_of_a_rank_says_where_it_comes_from() -> None:
    line = log_line(LogLine("node1", 3, "[bold] stays as it is"))
    assert shown(line) == ["node1:3 │ [bold] stays as it is"]
    assert line.style == log_line(LogLine("node1", 3, "another")).style


def test_a_terminal_shows_that_what_was_read_is_at_work() -> None:
    """Between the last bytes that are read and the end of the first step, an evaluation may take minutes."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    plan: Any = SimpleNamespace(max_steps=12, hosts=())
    view = RunView(console, plan, interval=1)
    seen: list[str] = []
    view.start()
    told: list[Callable[[], None]] = [
        lambda: view.loading(0.97),
        lambda: view.begun(0),
        lambda: view.show({"step": 0, "eval_loss": 3.199}),
        lambda: view.begun(0),
    ]
    for tell in told:
        tell()
        assert view._live is not None
        view._live.refresh()
        seen.append(file.getvalue().splitlines()[-1])
        file.truncate(0)
    view.stop()
    assert "reading the model" in seen[0]
    assert "97%" in seen[0]
    assert "step 1 of 12 ..." in seen[1]
    assert "held-out 3.1990   step 1 of 12 ..." in seen[3]
