"""Asks a process on one of the hosts for the figures of a recipe (train/question.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from zinf_cli.errors import HostError, RankError, ReportedError
from zinf_cli.launch.connection import Connection
from zinf_cli.plan.layout import Figures
from zinf_cli.recipe.hosts import Host
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.search_path import module_command
from zinf_cli.told import Tell, nobody


class FiguresOf(Protocol):
    """The figures of a model that is cut into parts of so many elements, or of the whole one for None.

    `tell` gets the share of the text that is tokenised, if an agent tells it.
    """

    def __call__(self, most: int | None, tell: Tell = ...) -> Figures: ...


_MOST_S = 24 * 3600.0
"""Tokenising may take long; Ctrl-C ends it."""


def question(
    recipe: Recipe, slots: int | None, hosts: Sequence[Host], most: int | None = None, *, in_part: bool = False
) -> str:
    """The question as a line of JSON: for `slots` ranks on this machine, or for the ranks of `hosts`.

    With `most`, the model is cut into parts of `most` elements. `in_part`, a part of a long text is enough.
    """
    counts = [len(host.slots) for host in hosts]
    asked: dict[str, Any] = {
        "recipe": dump_recipe(recipe), "slots": slots, "world_size": None, "most": most, "in_part": in_part,
    }  # fmt: skip
    if hosts:
        asked |= {"slots": max(counts), "world_size": sum(counts)}
    return json.dumps(asked) + "\n"


def figures_from(
    connection: Connection,
    recipe: Recipe,
    slots: int | None,
    hosts: Sequence[Host],
    *,
    asked: bool = False,
    in_part: bool = False,
) -> FiguresOf:
    """What finds the figures of a recipe.

    `asked` says that an agent stands by behind the connection, and was asked for those of the whole model when it was
    started. It is asked for those of parts as well: it has imported what that takes. `in_part`, a part of a long text
    is enough.
    """

    def figures_of(most: int | None, tell: Tell = nobody) -> Figures:
        text = question(recipe, slots, hosts, most, in_part=in_part)
        if not asked:
            return _ask(text, connection)
        if most is not None:
            connection.request("ask", text=text)
        return _overheard(connection, tell)

    return figures_of


def _ask(asked: str, connection: Connection) -> Figures:
    """Ask a process on that host, which builds the model on the meta device or finds the answer in its cache.

    The errors are those of `find_figures` (train/figures.py); RankError where the process fell.
    """
    command = module_command("zinf_cli.train.question")
    done = connection.capture(command, within=_MOST_S, text=asked)
    return _figures(done["output"], done["errors"], done["code"])


def _overheard(connection: Connection, tell: Tell) -> Figures:
    """The answer of that host's agent, which was asked.

    Errors are those of `_ask`; HostError where the host is lost.
    """
    while (event := connection.hear_event(_MOST_S)) is not None:
        if event["event"] == "said":
            if (share := _tokenised(event["line"])) is None:
                return _figures(event["line"], "", 0)
            tell(share)
        if event["event"] == "fell":
            return _figures("", event["errors"], event["code"])
    raise HostError(connection.lost or "no answer about the recipe", where=connection.host.name)


def _tokenised(line: str) -> float | None:
    """The share that a line tells; None if it is the answer."""
    with suppress(ValueError):
        document = json.loads(line)
        return document.get("tokenised") if isinstance(document, dict) else None
    return None


def _figures(output: str, errors: str, code: int) -> Figures:
    try:
        document = json.loads(output.strip().rpartition("\n")[2])
    except json.JSONDecodeError as error:
        last = errors.strip().splitlines()[-1:] or [f"exit code {code}"]
        raise RankError(f"the model could not be read: {last[0]}", hint=errors.strip()) from error
    if "error" in document:
        raise ReportedError(**document["error"])
    return Figures.from_json(document)
