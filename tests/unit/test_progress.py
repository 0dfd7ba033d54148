"""A bar that comes only where there is someone to see it, and something to wait for."""

from __future__ import annotations

import io
import threading

import pytest

from zinf_cli.screen import Screen
from zinf_cli.screens import progress as module
from zinf_cli.screens.progress import progress


def screen(*, terminal: bool, **environment: str) -> Screen:
    return Screen(file=io.StringIO(), force_terminal=terminal, _environ=environment, width=80)


def shown(console: Screen) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_what_takes_long_has_a_bar_that_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    console, began = screen(terminal=True, TERM="xterm"), threading.Event()
    with progress(console, "reading the model") as tell:
        tell(0.5, "tokenising the text")
        while "tokenising the text" not in shown(console):
            began.wait(0.01)
    assert "0:00:0" in shown(console)
    assert shown(console).endswith("\x1b[2K"), "the line is clean again"


def test_what_is_soon_over_shows_nothing() -> None:
    console = screen(terminal=True, TERM="xterm")
    with progress(console, "reading") as tell:
        tell(1.0)
    assert shown(console) == ""


@pytest.mark.parametrize(("terminal", "term"), [(False, "xterm"), (True, "dumb")])
def test_a_log_has_no_bar(*, terminal: bool, term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    console = screen(terminal=terminal, TERM=term)
    with progress(console, "reading") as tell:
        tell(0.5)
        threading.Event().wait(0.05)
    assert shown(console) == ""
