"""The special tokens that a tokenizer puts around a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def around(encode: Callable[[bool], Sequence[int]]) -> tuple[list[int], int]:
    """(the tokens before a text, how many there are behind it). `encode` gives those of a short text, with or without
    special tokens."""
    whole, bare = list(encode(True)), list(encode(False))
    for end in range(len(whole), len(bare) - 1, -1):
        if bare and whole[end - len(bare) : end] == bare:
            return whole[: end - len(bare)], len(whole) - end
    return [], 0


def begun(ids: Sequence[int], head: Sequence[int]) -> list[int]:
    """The tokens of a text behind `head`, unless it has none, or begins so already: a rendered dialog may."""
    return list(ids) if not ids or list(ids[: len(head)]) == list(head) else [*head, *ids]
