"""The way to the terminal: whatever text from outside is made of, it arrives there as text.

What ranks and hosts say, names of files and errors about them may hold anything: sequences that recolour or rewrite the
screen, that set the clipboard, or that turn the order of letters around. `printable` shows those as escapes. Everything
that is shown goes through it; files keep what was written.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_MAYBE = re.compile(r"[^\t\n\x20-\x7e]")
_JOINERS = "\u200c\u200d"
"""Persian, Hindi and emojis are spelt with them, and they move nothing."""


def printable(text: str) -> str:
    r"""`text` with all that steers a terminal, or is not to be seen, as an escape such as \x1b; tabs and newlines stay.

    That is control characters (C0, DEL, C1), the format characters of Unicode, its own line ends, and bytes of a file
    name that are no UTF-8.
    """
    return _MAYBE.sub(lambda found: _shown(found[0]), text)


@lru_cache(maxsize=4096)
def _shown(character: str) -> str:
    steers = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return character.encode("unicode_escape").decode() if steers else character


def outside(text: object, style: str = "") -> Text:
    """Text from outside, in a style of ours."""
    return Text(printable(str(text)), style)


class Screen(Console):
    """rich's console for text that may come from outside: no word of it is markup, no character steers the terminal."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
