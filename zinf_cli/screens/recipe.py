"""`zinf recipe keys`, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from zinf_cli.recipe.keys import RecipeKey


def keys_screen(sections: Mapping[str, tuple[str, Sequence[RecipeKey]]]) -> RenderableType:
    """A line of each key with what it takes and its default; its meaning stands below."""
    lines: list[RenderableType] = []
    for name, (what, keys) in sections.items():
        if name:
            lines += [Text.assemble((name, "bold"), "  ", (what, "dim"))]
        for key in keys:
            default = "has to be given" if key.default is None else f"default {key.default}"
            lines.append(Padding(Text.assemble((key.name, "cyan"), f"  {key.takes}  ", (default, "dim")), (0, 0, 0, 2)))
            lines.append(Padding(Text(key.meaning), (0, 0, 0, 6)))
        lines.append(Text())
    return Group(*lines[:-1])
