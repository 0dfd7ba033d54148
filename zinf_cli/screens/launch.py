"""What a launch on many hosts puts on the screen: the preflight table, and the failure that ended a run."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from zinf_cli.launch.failure import Failure
from zinf_cli.launch.logs import LogLine
from zinf_cli.launch.preflight import COLUMNS, Preflight, problems_of
from zinf_cli.run_folder.log_end import last_lines
from zinf_cli.screen import outside, printable

_LAST_LINES = 12
_MOST_ROWS = 64
_COLOURS = ("cyan", "magenta", "green", "blue", "yellow", "bright_cyan", "bright_magenta", "bright_green")


def preflight_screen(preflight: Preflight) -> RenderableType:
    """A row for each host, and below it everything that is wrong. Of very many hosts, those to look at come first."""
    rows = [*preflight.rows, *preflight.absent]
    shown = rows if len(rows) <= _MOST_ROWS else sorted(rows, key=lambda row: not row.problems)[:_MOST_ROWS]
    columns = [column for column in COLUMNS if any(column in row.cells for row in rows)]
    table = Table(box=None, pad_edge=False)
    table.add_column("host")
    for column in columns:
        table.add_column(column)
    for row in shown:
        cells = [outside(row.cells.get(column, ""), "bold red" if column in row.problems else "") for column in columns]
        table.add_row(row.host.name, *cells)
    hidden = len(rows) - len(shown)
    more = [Text(f"... and {hidden} more hosts")] if hidden else []
    problems = [outside(f"✗ {problem}", "red") for problem in preflight.problems]
    problems += [outside(f"- {problem}", "yellow") for problem in problems_of(preflight.absent, "left out: ")]
    return Group(table, *more, *([Text(), *problems] if problems else []))


def log_line(line: LogLine) -> Text:
    """`host:rank │ text`, each rank in a colour that stays the same."""
    prefix = outside(f"{line.host}:{line.rank} │ ", _COLOURS[line.rank % len(_COLOURS)])
    return prefix.append(printable(line.text), style="default")


def failure_screen(failure: Failure, others: str) -> RenderableType:
    """Who failed first, its last lines, where the rest of them is, and what became of the others."""
    who = failure.host
    if failure.rank is not None:
        local = "" if failure.local_rank is None else f", local {failure.local_rank}"
        who = f"rank {failure.rank} ({failure.host}{local})"
    lines: list[RenderableType] = [outside(f"{who}: {failure.error.line()}", "bold")]
    last = last_lines(failure.log, _LAST_LINES)
    if last:
        lines += [Text(), *(Text(printable(line), style="dim", overflow="ellipsis", no_wrap=True) for line in last)]
    lines += [Text(), Text(printable(f"log     {failure.log}"), overflow="fold")]
    if others:
        lines.append(outside(f"others  {others}"))
    return Panel(Group(*lines), title="the first failure", border_style="red", expand=False)
