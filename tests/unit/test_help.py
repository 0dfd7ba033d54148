"""What `--help` shows of each command: all of what its options say, and commands in the order of their use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from zinf_cli import cli
from zinf_cli.cli import app
from zinf_cli.errors import RecipeError


def commands(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *words, name)


@pytest.mark.parametrize(("words", "command"), [*commands(get_command(app))])
def test_nothing_that_an_option_says_is_lost(words: tuple[str, ...], command: Any) -> None:
    """rich takes a word in square brackets for a style."""
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert shown.exit_code == 0
    for param in command.params:
        assert param.help in shown.output


def test_commands_stand_in_the_order_of_their_use() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output.split("Commands")[1]
    names = [words[1] for words in map(str.split, shown.splitlines()) if len(words) > 2]
    assert names == ["init", "launch", "report", "export", "estimate", "doctor", "bench", "trace", "clean", "recipe"]


@pytest.mark.parametrize("place", range(3))
def test_debug_may_stand_anywhere(place: int) -> None:
    words = ["launch", "missing.yaml"]
    ended = CliRunner().invoke(app, [*words[:place], "--debug", *words[place:]])
    assert isinstance(ended.exception, RecipeError)
    assert cli._debug
