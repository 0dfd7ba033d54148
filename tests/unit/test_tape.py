"""The unit tape: units run without autograd, then again in backward, and the gradients are those of plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from zinf_cli.engine.compute.activations import Activations
from zinf_cli.engine.compute.micro_batch import UnitCall
from zinf_cli.engine.compute.moving_state import MovingState
from zinf_cli.engine.compute.spared import Spared
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


def tape(trainable: Iterable[int] = (0, 1)) -> Tape:
    tier = MemoryTier("device", CPU, CPU, Trace())
    return Tape(
        CPU,
        Activations(tier, None, lambda transfer: transfer.wait()),
        MovingState(nn.Module()),
        Spared(nn.Module(), ()),
        trainable=set(trainable),
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
    backward_on(units, loss)
    assert model.runs == 4
    assert all(map(torch.equal, model.grads(), plain()))


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

    def grads(compute: Callable[[torch.Tensor], torch.Tensor], backward: Callable[..., Any]) -> list[torch.Tensor]:
        linear.zero_grad()
        entered = x.detach().requires_grad_()
        backward((compute(entered.view_as(entered)) * weights).sum())
        return [tensor.grad for tensor in (entered, *linear.parameters()) if tensor.grad is not None]

    expected = grads(linear, torch.autograd.backward)
    units = tape()

    def on_tape(given: torch.Tensor) -> Any:
        return units.forward(UnitCall(0, linear, (given,), {}, True, (False, dtype), product=True), "a unit")

    with FlopCounterMode(display=False) as counter:
        found = grads(on_tape, partial(backward_on, units))
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected) == 2 + bias
    assert counter.get_total_flops() in (0, 3 * 2 * x.numel() * 40)  # mv is not counted


class Tangle(nn.Module):
    """Units and glue at random. Each takes the newest tensor, and glue any older one as well."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.units = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.scale = nn.Parameter(torch.randn(8))
        self.seed = seed

    def forward(self, unit: Callable[..., torch.Tensor]) -> torch.Tensor:
        draw = random.Random(self.seed)
        made = [unit(0, self.units[0], torch.linspace(-1, 1, 32).view(4, 8))]
        glue: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda newest: newest + draw.choice(made),
            lambda newest: draw.choice(made).tanh() * newest,
            lambda newest: torch.cat([half * draw.choice(made)[:, :4].tanh() for half in newest.chunk(2, -1)], -1),
        ]
        for _ in range(24):
            number = draw.randrange(len(self.units))
            go_on: list[Callable[[torch.Tensor], torch.Tensor]] = [*glue, partial(unit, number, self.units[number])]
            made.append(draw.choice(go_on)(made[-1]))
        return (made[-1] * self.scale).square().mean()


@pytest.mark.parametrize("seed", range(20))
def test_gradients_are_added_up_as_in_plain_pytorch(seed: int) -> None:
    """To the bit, whatever the glue is. Each of its nodes runs once: autograd refuses to run one again."""
    expected, found = Tangle(seed), Tangle(seed)
    torch.autograd.backward(expected(lambda number, run, *inputs: run(*inputs)))
    units = tape(range(len(found.units)))
    backward_on(units, found(lambda number, run, *inputs: units.forward(call(number, run, *inputs), "a unit")))
    gradients = [(one.grad, two.grad) for one, two in zip(expected.parameters(), found.parameters(), strict=True)]
    assert all(one is two is None or torch.equal(one, two) for one, two in gradients)  # type: ignore[arg-type]


def backward_on(units: Tape, loss: torch.Tensor) -> None:
    units.loss_backward(loss)
    while units.records:
        units.backward(units.records[-1])


def test_a_hot_forward_needs_no_recompute() -> None:
    """As at the turn of a sweep, where backward comes while the unit is still bound."""
    model, units = TwoLayers(), tape()
    torch.manual_seed(1)
    loss = model(lambda number, run, *inputs: units.forward(call(number, run, *inputs), "a unit", hot=number == 1))
    backward_on(units, loss)
    assert model.runs == 3
    assert all(map(torch.equal, model.grads(), plain()))


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
