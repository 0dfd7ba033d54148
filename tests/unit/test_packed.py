"""Frozen parameters in fewer bits: the published formats, and an unpacking that may write over what it reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zinf_cli.engine.packed import NF4, pack, rounded, unpack
from zinf_cli.model_state import BLOCK_NUMEL, CHUNK_NUMEL, PACKINGS, SLICE_MULTIPLE, packed_bytes


def values_of(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 0.02


def as_published(values: torch.Tensor, packing: str) -> torch.Tensor:
    """By a search among all values that a block can have."""
    if packing == "bf16":
        return values.bfloat16().float()
    blocks = values.view(-1, 256 if packing == "int8" else 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.arange(-127, 128).float() if packing == "int8" else torch.tensor(NF4)
    step = largest / 127 if packing == "int8" else largest
    nearest = (blocks / step).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * step).view(-1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_value_is_the_nearest_that_its_block_can_have(packing: str) -> None:
    values = values_of(16 * SLICE_MULTIPLE)
    assert torch.equal(rounded(values, packing), as_published(values, packing))
    matrix = values[: 37 * 24].view(37, 24)  # the last block is not full
    assert torch.equal(rounded(matrix, packing).view(-1)[:768], rounded(values[:768], packing))
    again = rounded(values, packing)
    assert torch.allclose(rounded(again, packing), again, rtol=1e-6)


@pytest.mark.parametrize("packing", PACKINGS)
def test_bytes_hold_what_they_should(packing: str) -> None:
    expected = {"bf16": 2.0, "int8": 1 + 4 / 256, "nf4": 0.5 + 4 / 64}
    assert packed_bytes(packing, CHUNK_NUMEL) / CHUNK_NUMEL == expected[packing]


def test_a_byte_of_nf4_has_the_first_value_in_its_upper_half() -> None:
    values = torch.zeros(SLICE_MULTIPLE)
    values[:2] = torch.tensor([1.0, -1.0])
    assert pack(values, "nf4")[-SLICE_MULTIPLE // 2 :].tolist()[:2] == [15 << 4 | 0, 7 << 4 | 7]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_block_of_zeros_stays_zeros(packing: str) -> None:
    assert not rounded(torch.zeros(SLICE_MULTIPLE), packing).any()


@given(
    st.sampled_from(sorted(PACKINGS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 5),
    st.sampled_from([256, BLOCK_NUMEL]),
)
@example("nf4", torch.bfloat16, (CHUNK_NUMEL + BLOCK_NUMEL) // SLICE_MULTIPLE + 1, BLOCK_NUMEL)
@settings(max_examples=30)
def test_what_comes_into_the_end_of_a_slot_is_unpacked_from_its_front(
    packing: str, dtype: torch.dtype, pages: int, block: int
) -> None:
    numel = pages * SLICE_MULTIPLE
    data = pack(values_of(numel, pages), packing)
    expected = torch.empty(numel, dtype=dtype)
    unpack(data, packing, expected, block)
    slot = torch.zeros(numel * dtype.itemsize, dtype=torch.uint8)
    end = slot[slot.numel() - data.numel() :]
    end.copy_(data)
    unpack(end, packing, slot.view(dtype), block)
    assert torch.equal(slot.view(dtype), expected)
