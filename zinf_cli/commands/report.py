"""`zinf report`: one page of curves and pictures of runs; and the page that a run leaves when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from zinf_cli.commands.options import AsJson
from zinf_cli.errors import UsageError
from zinf_cli.run_folder.names import REPORT

_LIBRARIES = ("matplotlib", "jinja2")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, ended or not.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; else report.html in the folder of the run, of several runs here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one page of curves and pictures that opens offline; several runs lie over each other."""
    from zinf_cli.report.run import read_runs

    found = read_runs(runs)
    if as_json:
        print(json.dumps({"runs": [run.to_json() for run in found]}, indent=2))
        return
    if not _drawable():
        raise UsageError("curves are drawn by matplotlib, which is not installed", hint="pip install 'zinf[report]'")
    from zinf_cli.report.page import MOST_RUNS, write_page
    from zinf_cli.screen import printable

    if len(found) > MOST_RUNS:
        raise UsageError(f"a page has colours for {MOST_RUNS} runs, not for {len(found)}", hint="give fewer, or --json")
    path = out or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    try:
        write_page(found, path)
    except OSError as error:
        hint = "give --out a file in another folder"
        raise UsageError(f"can't be written: {error.strerror or error}", where=str(path), hint=hint) from error
    print(printable(str(path)))


def leave_report(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Write the page of a run that has ended, if that can be done here; its path. Whatever goes wrong ends no run."""
    if not _drawable():
        return None
    try:
        from zinf_cli.report.page import write_page
        from zinf_cli.report.run import read_run

        write_page([read_run(run_dir)], run_dir / REPORT)
    except (Exception, KeyboardInterrupt) as error:
        say(f"{run_dir / REPORT}: not written: {str(error) or type(error).__name__}")
        return None
    return run_dir / REPORT


def _drawable() -> bool:
    """Whether what the extra `report` installs is there."""
    return all(map(find_spec, _LIBRARIES))
