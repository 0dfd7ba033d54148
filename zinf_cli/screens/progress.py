"""How a terminal shows that something takes its time: a bar, once that has taken two seconds. A log shows nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PATIENCE_S = 2.0


class Bar(Protocol):
    """Takes the share of the work that is done, from 0 to 1, and what is being done now, if that has a name."""

    def __call__(self, share: float, doing: str | None = None, /) -> None: ...


@contextmanager
def progress(console: Console, what: str) -> Iterator[Bar]:
    """A bar while the body runs. Until the body tells how much is done, it only shows that something is."""
    if not console.is_interactive:
        yield lambda share, doing=None: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=None)

    def tell(share: float, doing: str | None = None, /) -> None:
        bar.update(task, total=1.0, completed=min(1.0, share), description=doing or what)

    begin = threading.Timer(PATIENCE_S, bar.start)
    begin.daemon = True
    begin.start()
    try:
        yield tell
    finally:
        begin.cancel()
        begin.join()
        bar.stop()
