"""Packs documents into windows, each document a sequence of its own with positions from 0.

A document that fits into a window is never cut. Windows are filled by best fit decreasing (Ding et al., "Fewer
Truncations Improve Language Modeling", 2024): the longest documents first, each into the window that it fills best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zinf_cli.text.token_stream import MASKED, TokenStream, digest

PAD = 0
"""The token behind the last document of a window that is not full. Any will do: no other token sees it."""
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Left:
    """What of a text packing has cut or left out."""

    untrained: int = 0
    """Documents without any token to learn in a window's length: chats without an answer, texts of one token."""
    longer: int = 0
    """Documents that are longer than a window."""
    behind: int = 0
    """Tokens of chats that lie behind a window's length, and are left out."""


@dataclass(frozen=True)
class PackedStream:
    """The documents of a text in windows of `seq_len` tokens."""

    stream: TokenStream
    seq_len: int
    starts: Ints
    """int64 [num_pieces]: where each piece of a window begins in the stream, window by window."""
    lengths: Ints
    """int64 [num_pieces]: the tokens of each."""
    bounds: Ints
    """int64 [num_windows + 1]: window w has the pieces bounds[w] up to before bounds[w + 1]."""
    num_documents: int
    """Those that are trained on."""
    left: Left

    def __len__(self) -> int:
        return int(self.lengths.sum())

    @property
    def max_token(self) -> int:
        return self.stream.max_token

    @property
    def fingerprint(self) -> str:
        """That of the tokens, and of their being packed."""
        return digest(f"{self.stream.fingerprint} documents apart")

    def num_windows(self, seq_len: int) -> int:
        assert seq_len == self.seq_len
        return len(self.bounds) - 1

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, labels, position_ids) of window `index`, each int64 [seq_len].

        Labels are -100 at the first token of a document, which nothing predicts, and where there is no loss. Padding is
        like another document, without a loss.
        """
        assert seq_len == self.seq_len
        input_ids = torch.full((seq_len,), PAD)
        labels = torch.full((seq_len,), MASKED)
        positions = torch.zeros(seq_len, dtype=torch.int64)
        place = 0
        for piece in range(int(self.bounds[index]), int(self.bounds[index + 1])):
            start, length = int(self.starts[piece]), int(self.lengths[piece])
            taken, into = slice(start, start + length), slice(place, place + length)
            input_ids[into] = torch.from_numpy(self.stream.tokens[taken].astype(np.int64))
            labels[into] = input_ids[into]
            if self.stream.loss_mask is not None:
                labels[into][torch.from_numpy(~self.stream.loss_mask[taken])] = MASKED
            labels[place] = MASKED
            positions[into] = torch.arange(length)
            place += length
        positions[place:] = torch.arange(seq_len - place)
        return input_ids, labels, positions

    def lines(self) -> Iterator[str]:
        """How the text is packed, and what of it is left out, in words."""
        chats, windows = self.stream.loss_mask is not None, len(self.bounds) - 1
        kind = "chats" if chats else "documents"
        real = f"{len(self) / max(1, windows * self.seq_len):.1%} of their tokens are real"
        yield f"packed: {self.num_documents} {kind} in {windows} windows of {self.seq_len}; {real}"
        if self.left.longer:
            behind = f"{self.left.behind} tokens behind that are left out"
            what = behind if chats else "these are trained in pieces"
            yield f"longer than train.seq_len={self.seq_len}: {self.left.longer} {kind}; {what}"
        if self.left.untrained:
            why = "nobody who is learned from says anything" if chats else "it is a single token"
            yield f"left out: {self.left.untrained} {kind}, where {why}"

    def num_real(self, index: int) -> int:
        """The tokens of window `index` that are no padding."""
        return int(self.lengths[self.bounds[index] : self.bounds[index + 1]].sum())


def pack(stream: TokenStream, seq_len: int) -> PackedStream:
    """The documents of `stream`, which knows where they end, in windows of `seq_len` tokens.

    A text that is longer than a window is cut into windows, and what is left of it is packed. A chat has its first
    `seq_len` tokens. Documents without a target are left out.
    """
    assert stream.ends is not None
    begins = np.concatenate((np.zeros(1, dtype=np.int64), stream.ends))[:-1]
    lengths = stream.ends - begins
    longer = int((lengths > seq_len).sum())
    behind = 0
    if stream.loss_mask is not None:
        behind = int(np.maximum(lengths - seq_len, 0).sum())
        lengths = np.minimum(lengths, seq_len)
    learned = _learned(stream, begins, lengths)
    left = Left(len(learned) - int(learned.sum()), longer, behind)
    num_documents = int(learned.sum())
    begins, lengths = _pieces(begins[learned], lengths[learned], seq_len)
    windows = best_fit(lengths, seq_len)
    # Windows come in the order of their first pieces, so that they follow the text as far as they can.
    first = np.full(windows.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, windows, begins)
    place = np.empty_like(first)
    place[np.argsort(first)] = np.arange(len(first))
    windows = place[windows]
    order = np.lexsort((begins, windows))
    bounds = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(windows, minlength=len(first)))))
    return PackedStream(stream, seq_len, begins[order], lengths[order], bounds, num_documents, left)


def split_packed(stream: TokenStream, fraction: float) -> tuple[TokenStream, TokenStream]:
    """(training, held out): the last `fraction` of the tokens is held out, of chats the last whole ones."""
    boundary = len(stream) - int(len(stream) * fraction)
    if stream.loss_mask is not None and stream.ends is not None and len(stream.ends) > 1:
        ends = stream.ends[:-1]
        boundary = int(ends[min(int(np.searchsorted(ends, boundary)), len(ends) - 1)])
    return stream.part(0, boundary), stream.part(boundary, len(stream))


def best_fit(lengths: Ints, room: int) -> Ints:
    """The number of the bin that each item goes into, by best fit decreasing; bins have `room`, and no item has more.

    Items of one length are placed together, so the time follows the number of lengths.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    bins_with: list[list[Ints]] = [[] for _ in range(room + 1)]  # by the room that is left in them
    is_open = np.zeros(room + 1, dtype=np.bool_)
    count = 0
    for items in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        length = int(lengths[items[0]]) if len(items) else room
        while len(items):
            left = length + int(is_open[length:].argmax())  # the least room that is enough
            if is_open[left]:
                found = np.concatenate(bins_with[left])
                bins_with[left], is_open[left] = [], False
            else:
                left = room
                found = np.arange(count, count - (-len(items) // (room // length)))
                count += len(found)
            per_bin = left // length
            used = found[: -(-len(items) // per_bin)]
            placed = items[: len(used) * per_bin]
            bins[placed] = used[np.arange(len(placed)) // per_bin]
            full, more = divmod(len(placed), per_bin)
            kept = (
                (found[len(used) :], left),
                (used[:full], left - per_bin * length),
                (used[full:], left - more * length),
            )
            for group, with_room in kept:
                if len(group):
                    bins_with[with_room].append(group)
                    is_open[with_room] = True
            items = items[len(placed) :]
    return bins


def _learned(stream: TokenStream, begins: Ints, lengths: Ints) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each document has a target: a token behind its first one that has a loss."""
    learned = lengths > 1
    if stream.loss_mask is not None and learned.any():
        spans = np.stack((begins[learned] + 1, (begins + lengths)[learned]), axis=1).ravel()
        if spans[-1] == len(stream):
            spans = spans[:-1]
        learned[learned] = np.logical_or.reduceat(stream.loss_mask, spans)[::2]
    return learned


def _pieces(begins: Ints, lengths: Ints, seq_len: int) -> tuple[Ints, Ints]:
    """(begins, lengths) of pieces of at most `seq_len` tokens. A rest of one token has no target, and is left out."""
    counts = -(-lengths // seq_len)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = number * seq_len
    parts = np.minimum(np.repeat(lengths, counts) - offsets, seq_len)
    kept = parts > 1
    return (np.repeat(begins, counts) + offsets)[kept], parts[kept]
