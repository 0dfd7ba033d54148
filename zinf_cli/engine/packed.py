"""Frozen parameters in fewer bits: how they lie on tiers and travel, and how they are unpacked in a slot.

The formats, by `model.base_dtype`:

- bf16: values rounded to bf16, to nearest even.
- int8: blocks of 256 values. The scale (fp32) is the largest magnitude of a block, divided by 127; a value is an int8
  times it, rounded to nearest even.
- nf4: blocks of 64 values. The scale (fp32) is the largest magnitude of a block; a value is one of 16 levels times it,
  the nearest. The levels are NF4 of arXiv 2305.14314 (appendix E): quantiles of a normal distribution. A byte has two
  values, the first one in its upper half.

Values are computed in fp32 and rounded to the dtype of compute. So they follow from the weights that were published and
the format alone: a block begins at a multiple of its length from its parameter's first element, and slices, tiles and
chunks are cut between blocks.

On a tier, CHUNK_NUMEL values of a slice lie side by side: their scales, then zeros, and at the end of whole pages their
codes. A slot takes the room of unpacked values. What is packed comes into its end and is unpacked from its front on: a
packed chunk is no longer than an unpacked one, so what is written never comes up with codes that are still to be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch.nn.functional import pad

from zinf_cli.model_state import CHUNK_NUMEL, FP32_BYTES, PACKINGS, SCALE_BLOCK, packed_bytes

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of NF4."""
_LEAST = torch.finfo(torch.float32).tiny


def pack(values: torch.Tensor, packing: str) -> torch.Tensor:
    """`values` (1-D, real, on the CPU, whole blocks from a cut between chunks on) as a tier has them: uint8."""
    data = torch.zeros(packed_bytes(packing, values.numel()), dtype=torch.uint8)
    for first, last, scales, codes in _chunks(data, packing, values.numel()):
        _encode(values[first:last].float(), packing, scales, codes)
    return data


def unpack(data: torch.Tensor, packing: str, into: torch.Tensor, block: int) -> None:
    """Fill `into` (1-D, any real dtype) with the values of `data` (uint8, from `pack`), `block` of them at a time.

    `data` may be the end of the memory of `into`.
    """
    for first, last, scales, codes in _chunks(data, packing, into.numel()):
        steps = scales.clone()
        for begin in range(first, last, block):
            end = min(last, begin + block)
            into[begin:end] = _decode(codes, steps, packing, begin - first, end - first)


def rounded(values: torch.Tensor, packing: str) -> torch.Tensor:
    """`values` (any shape) as they are when they were packed and unpacked: fp32."""
    flat = values.reshape(-1)
    flat = pad(flat, (0, -flat.numel() % SCALE_BLOCK))
    found = torch.empty(flat.numel())
    unpack(pack(flat, packing), packing, found, CHUNK_NUMEL)
    return found[: values.numel()].view(values.shape)


def _chunks(data: torch.Tensor, packing: str, numel: int) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Of each chunk its first and last element, its scales (fp32) and codes (uint8), as views of `data`."""
    bits, block = PACKINGS[packing].bits, PACKINGS[packing].block
    start = 0
    for first in range(0, numel, CHUNK_NUMEL):
        inside = min(CHUNK_NUMEL, numel - first)
        chunk = data[start : start + packed_bytes(packing, inside)]
        start += chunk.numel()
        num_scales = inside // block if block else 0
        scales = chunk[: num_scales * FP32_BYTES].view(torch.float32)
        yield first, first + inside, scales, chunk[chunk.numel() - inside * bits // 8 :]


def _encode(values: torch.Tensor, packing: str, scales: torch.Tensor, codes: torch.Tensor) -> None:
    if packing == "bf16":
        codes.view(torch.bfloat16).copy_(values)
        return
    blocks = values.view(scales.numel(), -1)
    largest = blocks.abs().amax(1)
    if packing == "int8":
        scales.copy_(largest.div_(127).clamp_(min=_LEAST))
        steps = (blocks / scales.unsqueeze(1)).round_().clamp_(-127, 127)
        codes.view(torch.int8).copy_(steps.view(-1))
        return
    scales.copy_(largest.clamp_(min=_LEAST))
    levels = torch.tensor(NF4)
    found = torch.bucketize(blocks / scales.unsqueeze(1), (levels[1:] + levels[:-1]) / 2, out_int32=True)
    pairs = found.view(-1, 2).to(torch.uint8)
    codes.copy_(pairs[:, 0] << 4 | pairs[:, 1])


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two levels of each byte: fp32 [256, 2]."""
    levels = torch.tensor(NF4)
    return torch.cartesian_prod(levels, levels).to(device)


def _decode(codes: torch.Tensor, scales: torch.Tensor, packing: str, begin: int, end: int) -> torch.Tensor:
    """Elements [begin, end) of a chunk, whole blocks of it: bf16 or fp32, in memory of their own."""
    if packing == "bf16":
        return codes.view(torch.bfloat16)[begin:end].clone()
    length = PACKINGS[packing].block
    assert length is not None
    if packing == "int8":
        values = codes.view(torch.int8)[begin:end].float()
    else:
        values = _pairs(codes.device).index_select(0, codes[begin // 2 : end // 2].int())
    return values.view(-1, length).mul_(scales[begin // length : end // length].unsqueeze(1)).view(-1)
