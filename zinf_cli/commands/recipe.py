"""`zinf recipe`: what a recipe may say."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from zinf_cli.commands.options import AsJson

recipes = typer.Typer(help="What a recipe may say.", no_args_is_help=True)


@recipes.command("keys")
def recipe_keys(
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a page of Markdown, on stdout.")] = False,
) -> None:
    """Every key of a recipe: what it takes, its default, its meaning."""
    from zinf_cli.recipe.keys import markdown, sections
    from zinf_cli.screen import Screen
    from zinf_cli.screens.recipe import keys_screen

    if as_json:
        print(json.dumps([dataclasses.asdict(key) for _, keys in sections().values() for key in keys], indent=2))
    elif as_markdown:
        print(markdown(), end="")
    else:
        Screen().print(keys_screen(sections()))


@recipes.command("schema")
def recipe_schema() -> None:
    """The JSON Schema of a recipe, for editors: they complete keys and mark what is wrong.

    Its name goes into a recipe's first line: # yaml-language-server: $schema=recipe.schema.json
    """
    from zinf_cli.recipe.keys import json_schema

    print(json.dumps(json_schema(), indent=2))
