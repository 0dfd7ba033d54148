"""Moments in eight bits: a byte for each value, and a scale (fp32) for each block of SCALE_BLOCK values.

A scale is the largest magnitude of its block. A byte is a sign (bit 7) and a code c from 0 to 127: the value is
±scale · (c / 127)⁴. So codes lie close together near zero: elements whose gradients are far apart share a block, and
updates divide by the root of the mean of squares. The 8-bit Adam of arXiv 2110.02861 has steps of other sizes for that.
A value that is not zero has a code that is not.

An update rounds to the nearer of two codes, most often the one that was there: with a decay of 0.999 it changes a mean
of squares by less than half a step. What falls and rises is the scale, with the largest value of the block.

The codes and the scale of a block follow from its values alone. A block begins at a multiple of SCALE_BLOCK from its
parameter's first element, and slices and chunks are cut between blocks. So ranks and places change no bit. The sign of
a mean of squares is that of a split master (split_masters.py).

On a tier, CHUNK_NUMEL elements of a slice lie side by side: their codes, then their scales, then zeros up to a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from zinf_cli.model_state import CHUNK_NUMEL, SCALE_BLOCK, SCALED, bytes_of

CODES = 127
"""The largest code."""
_SIGN = 128
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Blocks(NamedTuple):
    """Whole blocks side by side."""

    codes: torch.Tensor
    """uint8, 1-D."""
    scales: torch.Tensor
    """fp32, 1-D, one for each SCALE_BLOCK of the codes."""

    @classmethod
    def empty(cls, numel: int) -> Blocks:
        """Room for `numel` elements, on the CPU."""
        count = -(-numel // SCALE_BLOCK)
        return cls(torch.empty(count * SCALE_BLOCK, dtype=torch.uint8), torch.empty(count))


def set_signs(codes: torch.Tensor, of: torch.Tensor) -> None:
    """Give `codes` the signs of `of` (fp32, 1-D), which may be shorter by less than a block."""
    codes.bitwise_and_(CODES)
    codes[: of.numel()].bitwise_or_(of.signbit().to(torch.uint8) << 7)


def blocks_in(data: torch.Tensor, numel: int, begin: int, end: int) -> Iterator[tuple[int, Blocks]]:
    """The blocks of elements [begin, end) as `data` (uint8) has them, which holds `numel` elements from a cut on.

    Before each, its first element. `begin` is a multiple of SCALE_BLOCK; what is left of the last block comes along.
    """
    while begin < end:
        first = begin // CHUNK_NUMEL * CHUNK_NUMEL
        inside = min(CHUNK_NUMEL, numel - first)
        start = bytes_of(SCALED, first)
        codes = data[start : start + inside]
        scales = data[start + inside : start + inside + inside // SCALE_BLOCK * 4].view(torch.float32)
        last = min(end - first, inside)
        blocks = slice((begin - first) // SCALE_BLOCK, -(-last // SCALE_BLOCK))
        yield begin, Blocks(codes[blocks.start * SCALE_BLOCK : blocks.stop * SCALE_BLOCK], scales[blocks])
        begin = first + last


def decoded(blocks: Blocks) -> torch.Tensor:
    """The values (fp32, 1-D)."""
    bits = blocks.codes.to(torch.int32)
    values = (bits & CODES).float().view(-1, SCALE_BLOCK)
    values.mul_(values).mul_(values)
    values.mul_((blocks.scales / CODES**4).unsqueeze(1))
    flat = values.view(-1)
    flat.view(torch.int32).bitwise_or_(bits.bitwise_and_(_SIGN) << 24)
    return flat


def encode(values: torch.Tensor, into: Blocks) -> None:
    """Fill `into` with `values` (fp32, 1-D), the last block with zeros."""
    lacking = into.codes.numel() - values.numel()
    if lacking:
        values = pad(values, (0, lacking))
    found = values.abs()
    used = found.view(torch.int32).clamp(max=1)
    roots = found.view(-1, SCALE_BLOCK)
    into.scales.copy_(roots.amax(1).clamp_(_LEAST, _MOST))
    roots.div_(into.scales.unsqueeze(1)).clamp_(max=1).sqrt_().sqrt_().mul_(CODES)
    codes = torch.maximum(roots.add_(0.5).to(torch.int32).view(-1), used)
    codes.bitwise_or_((values.view(torch.int32) >> 24).bitwise_and_(_SIGN))
    into.codes.copy_(codes)
