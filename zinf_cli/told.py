"""How far a work is that takes long, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[float], None]
"""Gets the share that is done, from 0 to 1, as often as the work likes."""


def nobody(share: float) -> None:
    """For those who don't want to know."""
