"""The unit tape: units run without autograd, then again in backward, and the gradients are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from zinf_cli.engine.compute.activations import Activations
from zinf_cli.engine.compute.micro_batch import UnitCall
from zinf_cli.engine.compute.moving_state import MovingState
from zinf_cli.engine.compute.tape import Tape
from zinf_cli.errors import ModelError
from zinf_cli.tiers.memory import MemoryTier
from zinf_cli.trace import Trace

CPU = torch.device("cpu")


class TwoLayers(nn.Module):
    """With dropout in the layers, and glue between them; the output of the first one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.runs = 0

    def layer(self, linear: nn.Linear) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return F.dropout(linear(x).tanh() * scale, 0.5)

        return run

    def forward(self, unit: Callable[..., torch.Tensor]) -> torch.Tensor:
        x = torch.linspace(-1, 1, 32).view(4, 8)
        hidden = unit(0, self.layer(self.first), x, torch.tensor(2.0))
        glue = hidden.relu()
        return (unit(1, self.layer(self.second), glue, glue.mean()) + hidden).square().sum()

    def grads(self) -> list[torch.Tensor]:
        return [param.grad for param in self.parameters() if param.grad is not None]


def plain() -> list[torch.Tensor]:
    model = TwoLayers()
    torch.manual_seed(1)
    torch.autograd.backward(model(lambda number, run, *inputs: run(*inputs)))
    return model.grads()


def tape() -> Tape:
    tier = MemoryTier("device", CPU, CPU, Trace())
    return Tape(
        CPU, Activations(tier, None, lambda transfer: transfer.wait()), MovingState(nn.Module()), trainable={0, 1}
    )


def call(number: int, run: Callable[..., Any], *inputs: torch.Tensor) -> UnitCall:
    return UnitCall(number, run, inputs, {}, torch.is_grad_enabled(), (False, torch.float32))


def test_gradients_are_those_of_plain_pytorch() -> None:
    """With the same random numbers in the recompute, and one sum where an output is used twice."""
    model, units = TwoLayers(), tape()
    torch.manual_seed(1)
    loss = model(lambda number, run, *inputs: units.forward(call(number, run, *inputs), f"unit {number}"))
    assert model.runs == 2
    assert [record.graph for record in units.records] == [None, None]  # nothing holds what a unit has computed
    torch.autograd.backward(loss)
    while units.records:
        units.backward(units.records[-1])
    assert model.runs == 4
    for found, expected in zip(model.grads(), plain(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # sums may be in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (1, 24), (2, 3, 24), (2, 5, 3, 24), (24,)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_the_graph_of_a_product_that_is_not_computed_again_gives_the_same_bits(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...], layout: str
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded":
        x = x[:1].expand(shape)
    weights = torch.randn((*shape[:-1], 40), dtype=dtype)

    def grads(compute: Callable[[torch.Tensor], torch.Tensor], backward: Callable[[], None]) -> list[torch.Tensor]:
        linear.zero_grad()
        entered = x.detach().requires_grad_()
        torch.autograd.backward((compute(entered.view_as(entered)) * weights).sum())
        backward()
        return [tensor.grad for tensor in (entered, *linear.parameters()) if tensor.grad is not None]

    expected = grads(linear, lambda: None)
    units = tape()

    def on_tape(given: torch.Tensor) -> Any:
        return units.forward(UnitCall(0, linear, (given,), {}, True, (False, dtype), product=True), "a unit")

    with FlopCounterMode(display=False) as counter:
        found = grads(on_tape, lambda: units.backward(units.records[-1]))
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected) == 2 + bias
    assert counter.get_total_flops() in (0, 3 * 2 * x.numel() * 40)  # mv is not counted


def test_a_hot_forward_needs_no_recompute() -> None:
    """As at the turn of a sweep, where backward comes while the unit is still bound."""
    model, units = TwoLayers(), tape()
    torch.manual_seed(1)
    loss = model(lambda number, run, *inputs: units.forward(call(number, run, *inputs), "a unit", hot=number == 1))
    torch.autograd.backward(loss)
    while units.records:
        units.backward(units.records[-1])
    assert model.runs == 3
    for found, expected in zip(model.grads(), plain(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # sums may be in another order


def test_without_gradients_nothing_is_recorded() -> None:
    model, units = TwoLayers(), tape()
    with torch.no_grad():
        model(lambda number, run, *inputs: units.forward(call(number, run, *inputs), "a unit"))
    assert units.records == []


def test_a_unit_that_changes_its_input_is_refused() -> None:
    units = tape()
    x = torch.ones(2, 2)
    with pytest.raises(ModelError, match=r"unit layers\.3 changes its input in place"):
        units.forward(call(0, lambda given: given.add_(1), x), "layers.3")
