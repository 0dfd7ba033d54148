"""Kept graphs: a unit's forward runs once, and its graph holds neither weights nor activations until backward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from zinf_cli.engine.compute.activations import Activations
from zinf_cli.engine.compute.keep import GlueKeeper, Keeper
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.trace import Trace


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[NvmeTier]:
    nvme = NvmeTier([tmp_path], Trace())
    nvme.reserve(1 << 20)
    yield nvme
    nvme.close()


@pytest.fixture
def activations(tier: NvmeTier) -> Activations:
    return Activations(tier, Arena(1 << 19, torch.device("cpu")), lambda transfer: transfer.wait())


def compute(weight: nn.Parameter, x: torch.Tensor) -> torch.Tensor:
    """Autograd saves the weight, x and two results for it; one of these twice, as a view as well."""
    hidden = (x @ weight).tanh()
    return (hidden * hidden.t() + hidden.exp()).sum()


def gradients(weight: nn.Parameter, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert weight.grad is not None
    assert x.grad is not None
    return weight.grad, x.grad


def test_backward_has_the_same_bits_although_the_weight_has_moved(activations: Activations) -> None:
    values, data = torch.randn(64, 64), torch.randn(64, 64)
    plain, x = nn.Parameter(values.clone()), data.clone().requires_grad_()
    torch.autograd.backward(compute(plain, x))
    expected = gradients(plain, x)

    weight, x = nn.Parameter(values.clone()), data.clone().requires_grad_()
    keeper = Keeper(activations, [weight], [], "a layer")
    with keeper.packing():
        loss = compute(weight, x)
    parcels = keeper.send()
    weight.data.fill_(torch.nan)  # as a slot is used by the next unit
    weight.data = values.clone()  # bound again, elsewhere
    torch.autograd.backward(loss)
    for found, right in zip(gradients(weight, x), expected, strict=True):
        assert torch.equal(found, right)
    for saved in parcels:
        saved.free()


def test_a_storage_goes_once_and_the_weight_not_at_all(activations: Activations, tier: NvmeTier) -> None:
    weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64).requires_grad_()
    keeper = Keeper(activations, [weight], [x], "a layer")  # x stays where it is
    with keeper.packing():
        loss = compute(weight, x)
    parcels = keeper.send()
    assert tier.write_bytes == 2 * 64 * 64 * 4  # tanh and exp
    assert len(parcels) == 1
    del loss
    parcels[0].free()
    assert tier.used == 0


def test_memory_of_what_is_saved_more_than_once_is_free_after_the_forward(
    activations: Activations, tier: NvmeTier
) -> None:
    weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64).requires_grad_()
    keeper = Keeper(activations, [weight], [x], "a layer")
    with keeper.packing():
        hidden = (x @ weight).tanh()
        loss = (hidden * hidden.t()).sum()  # which saves it, and a view of it, again
        memory = StorageWeakRef(hidden.untyped_storage())
        del hidden
        assert not memory.expired()
    parcels = keeper.send()
    assert memory.expired()
    assert tier.write_bytes == 64 * 64 * 4
    del loss
    parcels[0].free()


def test_what_is_saved_again_later_does_not_go_again(activations: Activations, tier: NvmeTier) -> None:
    x = torch.randn(64, 64).requires_grad_()
    keeper = GlueKeeper(activations, [x])
    with keeper.packing():
        hidden, other = x.tanh(), x.exp()
        none, first = keeper.take_again(), keeper.send()
        loss = (hidden.square().square() + other).sum()
        again, second = keeper.take_again(), keeper.send()
    assert none == []
    assert tier.write_bytes == 3 * 64 * 64 * 4  # tanh and exp; then the first square
    again[0].hold()
    second[0].hold()
    torch.autograd.backward(loss)
    assert tier.read_bytes == 3 * 64 * 64 * 4  # each of them by itself, and once
    for saved in (*again, *second):
        saved.free()
    assert first[0].prefetch()  # it was seen before its turn, so it is not brought again
    assert tier.read_bytes == 3 * 64 * 64 * 4
    plain = x.detach().clone().requires_grad_()
    torch.autograd.backward((plain.tanh().square().square() + plain.exp()).sum())
    assert x.grad is not None
    assert plain.grad is not None
    assert torch.equal(x.grad, plain.grad)
    first[0].free()


def test_without_a_tier_below_the_tensors_themselves_wait(tier: NvmeTier) -> None:
    here = Activations(tier, None, lambda transfer: transfer.wait())
    weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64).requires_grad_()
    keeper = Keeper(here, [weight], [], "a layer")
    with keeper.packing():
        loss = compute(weight, x)
    assert (tier.write_bytes, keeper.send()) == (0, [])
    torch.autograd.backward(loss)
    assert x.grad is not None
