"""Asks a process on one of the hosts for the figures of a recipe (train/question.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from zinf_cli.errors import HostError, RankError, ReportedError
from zinf_cli.launch.connection import Connection
from zinf_cli.plan.layout import Figures
from zinf_cli.recipe.hosts import Host
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.search_path import module_command

_MOST_S = 24 * 3600.0
"""Tokenising may take long; Ctrl-C ends it."""


def question(recipe: Recipe, slots: int | None, hosts: Sequence[Host], most: int | None = None) -> str:
    """The question as a line of JSON: for `slots` ranks on this machine, or for the ranks of `hosts`.

    With `most`, the model is cut into parts of `most` elements.
    """
    counts = [len(host.slots) for host in hosts]
    asked: dict[str, Any] = {"recipe": dump_recipe(recipe), "slots": slots, "world_size": None, "most": most}
    if hosts:
        asked |= {"slots": max(counts), "world_size": sum(counts)}
    return json.dumps(asked) + "\n"


def figures_from(
    connection: Connection, recipe: Recipe, slots: int | None, hosts: Sequence[Host], *, asked: bool = False
) -> Callable[[int | None], Figures]:
    """What finds the figures of a recipe: of its model cut into parts of so many elements, or whole for None.

    `asked` says that the agent behind the connection was asked for those of the whole model when it was started.
    """

    def figures_of(most: int | None) -> Figures:
        if asked and most is None:
            return _overheard(connection)
        return _ask(question(recipe, slots, hosts, most), connection)

    return figures_of


def _ask(asked: str, connection: Connection) -> Figures:
    """Ask a process on that host, which builds the model on the meta device or finds the answer in its cache.

    The errors are those of `find_figures` (train/figures.py); RankError where the process fell.
    """
    command = module_command("zinf_cli.train.question")
    done = connection.capture(command, within=_MOST_S, text=asked)
    return _figures(done["output"], done["errors"], done["code"])


def _overheard(connection: Connection) -> Figures:
    """The answer of that host's agent, which was asked when it was started.

    Errors are those of `_ask`; HostError where the host is lost.
    """
    while (event := connection.hear(_MOST_S)) is not None:
        if event["event"] == "said":
            return _figures(event["line"], "", 0)
        if event["event"] == "fell":
            return _figures("", event["errors"], event["code"])
    raise HostError(connection.lost or "no answer about the recipe", where=connection.host.name)


def _figures(output: str, errors: str, code: int) -> Figures:
    try:
        document = json.loads(output)
    except json.JSONDecodeError as error:
        last = errors.strip().splitlines()[-1:] or [f"exit code {code}"]
        raise RankError(f"the model could not be read: {last[0]}", hint=errors.strip()) from error
    if "error" in document:
        raise ReportedError(**document["error"])
    return Figures.from_json(document)
