"""The page: one HTML file that asks for nothing else, and runs no code."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from zinf_cli.durable import write_durably
from zinf_cli.errors import UsageError
from zinf_cli.report import curves
from zinf_cli.report.facts import described, differences, facts, headline
from zinf_cli.report.ink import PALETTE, Picture, own_look, style_sheet
from zinf_cli.report.lanes import lanes
from zinf_cli.report.places import places
from zinf_cli.report.run import Run
from zinf_cli.run_folder.names import TRACE
from zinf_cli.screen import printable

MOST_RUNS = len(PALETTE)
"""More can't be told apart by their colours."""


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write the report of `runs`, 1 to MOST_RUNS; OSError leaves what was there."""
    environment = Environment(
        loader=PackageLoader("zinf_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with own_look():
        sections = [
            ("Learning", list(curves.learning(runs))),
            ("Time", list(curves.time(runs))),
            ("Memory", list(curves.memory(runs))),
        ]
        views = [_view(run, role) for run, role in zip(runs, PALETTE, strict=False)]
    page = environment.get_template("page.html.jinja").render(
        title=" · ".join(run.name for run in runs),
        style=style_sheet(),
        runs=views,
        sections=[(title, pictures) for title, pictures in sections if any(run.lines for run in runs)],
        differences=differences(runs) if len(runs) > 1 else [],
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    write_durably(path, page)


def _view(run: Run, role: str) -> dict[str, Any]:
    """What the page says of one run alone."""
    pictures: list[Picture] = list(places(run.plan)) if run.plan is not None else []
    with suppress(UsageError):
        pictures += lanes(run.folder / TRACE)
    return {
        "name": run.name,
        "folder": run.folder.absolute(),
        "role": role,
        "status": run.status,
        "headline": headline(run),
        "described": described(run),
        "facts": list(facts(run)),
        "failed": run.failed,
        "hosts": run.hosts if len(run.hosts) > 1 else [],
        "steps": len(run.steps),
        "pictures": pictures,
        "recipe": run.recipe_text,
    }


def _plain(value: Any) -> Any:
    """What is shown of a text from outside: no character turns others around or hides."""
    return value if isinstance(value, Markup) else printable(str(value))
