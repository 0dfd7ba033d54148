"""A master that is split and joined is what it was, to the bit; its parameter is what a cast makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from happens_before import Checker
from zinf_cli.engine.split_masters import join, split
from zinf_cli.tiers import streams

SIGN = -(2**31)


def masters() -> Iterator[tuple[str, torch.Tensor]]:
    """fp32 with every upper half, and a kind of lower half."""
    uppers = torch.arange(2**16, dtype=torch.int64) << 16
    for lower in (0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF):
        yield f"{lower:#x}", (uppers | lower).to(torch.int32).view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for seed in range(8):
        lowers = torch.randint(2**16, (2**16,), generator=generator)
        yield f"random {seed}", (uppers | lowers).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("carried", [0.0, 1e-45, 1e-8, torch.inf])
def test_every_master_comes_back(carried: float, accelerator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if accelerator:
        monkeypatch.setitem(streams.implementations, "cpu", Checker())
    for lower, master in masters():
        before = master.clone()
        param, remainder = master.new_empty(2**16, dtype=torch.bfloat16), master.new_empty(2**16, dtype=torch.int16)
        carrier = torch.full_like(master, carried)
        split(master, param, remainder, carrier)
        assert torch.equal(bits(master), bits(before)), lower
        number = ~before.isnan()
        assert torch.equal(param[number].view(torch.int16), before[number].bfloat16().view(torch.int16)), lower
        assert param[~number].isnan().all(), lower
        back = join(param, remainder, carrier)
        assert torch.equal(bits(back[number]), bits(before[number])), lower
        assert back[~number].isnan().all(), lower
        assert torch.equal(bits(carrier), bits(torch.full_like(carrier, carried))), lower


def test_ties_of_both_sides_share_a_parameter_and_a_remainder() -> None:
    """1 + 3·2⁻⁸ is rounded up and 1 + 5·2⁻⁸ down, both to 1 + 4·2⁻⁸. Only the carrier's sign differs."""
    ties = torch.tensor([1 + 3 * 2**-8, 1 + 5 * 2**-8])
    param, remainder, carrier = torch.empty(2, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int16), torch.ones(2)
    split(ties, param, remainder, carrier)
    assert param[0] == param[1]
    assert remainder[0] == remainder[1]
    assert carrier.tolist() == [-1, 1]


def test_an_accelerator_stores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a run goes on elsewhere."""
    for lower, master in masters():
        found = []
        for accelerator in (False, True):
            with monkeypatch.context() as patch:
                if accelerator:
                    patch.setitem(streams.implementations, "cpu", Checker())
                number = master[~master.isnan()]
                param, remainder = torch.empty_like(number, dtype=torch.bfloat16), torch.empty_like(number).short()
                split(number, param, remainder, carrier := torch.ones_like(number))
            found.append((param.view(torch.int16), remainder, carrier))
        assert all(map(torch.equal, *found)), lower


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)
