"""Activations: what backward needs leaves for its tier, and comes back with the same bits, when there is room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zinf_cli.engine.compute.activations import SMALL, Activations
from zinf_cli.errors import CapacityError, ModelError
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.memory import MemoryTier
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.trace import Trace

KIB = 1024


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[NvmeTier]:
    nvme = NvmeTier([tmp_path], Trace())
    nvme.reserve(1024 * KIB)
    yield nvme
    nvme.close()


@pytest.fixture
def staging() -> Arena:
    return Arena(32 * KIB, torch.device("cpu"))


@pytest.fixture
def activations(tier: NvmeTier, staging: Arena) -> Activations:
    return Activations(tier, staging, lambda transfer: transfer.wait())


def test_more_than_fits_into_memory_is_saved_and_comes_back(
    activations: Activations, tier: NvmeTier, staging: Arena
) -> None:
    tensors = [torch.randn(4, 1024) for _ in range(8)]  # 16 KiB each
    saved = [activations.save(tensor, "a layer") for tensor in tensors]
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()  # nothing of it is needed any more
    for one, value in reversed(list(zip(saved, expected, strict=True))):
        assert torch.equal(one.get(), value)
        one.evict()
        assert torch.equal(one.get(), value)  # it is still at home
        one.free()
    assert staging.peak <= 32 * KIB
    assert (staging.used, tier.used) == (0, 0)


def test_what_goes_together_is_one_transfer_with_a_page_for_each(activations: Activations, tier: NvmeTier) -> None:
    parts = activations.save_together([torch.arange(7, dtype=torch.int16), torch.eye(3, dtype=torch.bfloat16)], "a")
    assert tier.write_bytes == 2 * 4 * KIB
    assert torch.equal(parts[1].get(), torch.eye(3, dtype=torch.bfloat16))
    assert torch.equal(parts[0].get(), torch.arange(7, dtype=torch.int16))
    assert tier.read_bytes == 2 * 4 * KIB
    parts[0].free()


def test_it_is_brought_ahead_only_where_there_is_room(activations: Activations) -> None:
    first, second = (activations.save(torch.randn(6 * KIB), "a") for _ in range(2))  # 24 KiB each
    first.get()
    assert not second.prefetch()
    first.evict()
    assert second.prefetch()
    for one in (first, second):
        one.free()


def test_a_small_tensor_is_kept_and_must_stay_as_it_is(activations: Activations, tier: NvmeTier) -> None:
    tensor = torch.ones(SMALL // 4 - 1)
    saved = activations.save(tensor, "a")
    assert tier.write_bytes == 0
    assert saved.get().data_ptr() == tensor.data_ptr()
    tensor.add_(1)
    with pytest.raises(ModelError, match="changed in place"):
        saved.get()


def test_what_can_never_fit_is_an_error(activations: Activations) -> None:
    with pytest.raises(CapacityError, match=r"activation of 64\.0 KiB does not fit"):
        activations.save(torch.randn(16 * KIB), "a")


def test_what_a_transfer_brings_is_no_change_of_what_is_in_use(staging: Arena) -> None:
    """A copy that fills another buffer runs between a forward and its backward, on an accelerator in any thread."""
    memory = MemoryTier("cpu", torch.device("cpu"), torch.device("cpu:0"), Trace())
    activations = Activations(memory, staging, lambda transfer: transfer.wait())
    used, coming = (activations.save(torch.full((1024,), value), "a") for value in (2.0, 3.0))
    x = used.get().requires_grad_()
    y = (x * x).sum()
    assert coming.prefetch()
    assert torch.equal(coming.get(), torch.full((1024,), 3.0))
    (gradient,) = torch.autograd.grad(y, x)
    assert torch.equal(gradient, torch.full((1024,), 4.0))


def test_nor_is_a_change_of_a_tensor_one_of_those_that_came_with_it(activations: Activations) -> None:
    first, second = activations.save_together([torch.ones(1024), torch.ones(1024)], "a")
    x = first.get().requires_grad_()
    y = (x * x).sum()
    second.get().add_(1)
    (gradient,) = torch.autograd.grad(y, x)
    assert torch.equal(gradient, torch.full((1024,), 2.0))
