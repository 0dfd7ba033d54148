"""Weights that a forward changes: bounds are held to as plain PyTorch does, all else is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from plain import engine_losses, everything_on, open_engine, plain_losses, relative_difference
from zinf_cli.engine.compute.survey import survey
from zinf_cli.engine.units.constant_weights import PIECE, constant
from zinf_cli.engine.units.units import discover
from zinf_cli.errors import ModelError
from zinf_cli.models.model import ModelSource
from zoo.shrink import configs

BOUND = 0.03
"""Of weights drawn with a deviation of 0.02: some lie beyond it at first, and steps of 1e-3 carry others there."""


@pytest.mark.parametrize("how", ["deferred", "eager", "speculative", "kept", "in memory"])
@pytest.mark.filterwarnings("ignore")  # of the model, about its configuration
def test_a_clamped_weight_is_as_in_plain_pytorch(how: str, tmp_path: Path) -> None:
    source = ModelSource(None, {**next(iter(configs("gemma3n_text"))), "altup_coef_clip": BOUND}, "random", 0)
    clip = None if how == "eager" else 100.0
    options = everything_on("cpu" if how == "in memory" else "nvme", tmp_path)
    engine = open_engine(source, replace(options, speculate=how == "speculative"), keep=how == "kept")
    found = engine_losses(engine, 4, clip=clip, eager=how == "eager", close=False)
    trained = {name: value for number in range(len(engine.units)) for name, value in engine.read_params(number).items()}
    engine.close()
    model: dict[str, torch.Tensor] = {}
    assert relative_difference(found, plain_losses(source, 4, clip=clip, parameters=model)) < 1e-5
    clamped = [name for name in model if name.endswith("prediction_coefs.weight")]
    assert clamped
    for name in clamped:
        assert (trained[name] - model[name]).abs().max() < 1e-5, name


class Layer(nn.Module):
    def __init__(self, look: Callable[[nn.Parameter], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8, device="meta"))
        self._look = look

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self._look(self.weight)
        return x @ self.weight


class Model(nn.Module):
    def __init__(self, look: Callable[[nn.Parameter], object]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(look)])

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = self.layers[0](torch.empty(4, 8, device="meta")).sum()
        return loss


def _two_clamps(weight: nn.Parameter) -> None:
    weight.clamp_(-1, 1)
    weight.clamp_(-2, 2)


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda weight: weight.mul_(0.9),
    "rows that are looked up": lambda weight: F.embedding(torch.zeros(2, dtype=torch.long), weight, max_norm=1.0),
    "out": lambda weight: torch.mul(weight, 2, out=weight.data),
    "a part": lambda weight: weight[:4].clamp_(-1, 1),
    "to a tensor": lambda weight: weight.clamp_(weight - 1),
    "other bounds": _two_clamps,
}


@pytest.mark.parametrize("kind", WRITES)
def test_any_other_write_is_named(kind: str) -> None:
    model = Model(WRITES[kind])
    seen = survey(model, model, 1)
    assert seen.written == {"layers.0.weight"}
    assert [place.bounds for unit in seen.units for place in unit.params()] == [None]


def test_a_clamp_has_its_bounds() -> None:
    model = Model(lambda weight: weight.data.clamp_min_(-3))
    seen = survey(model, model, 1)
    assert not seen.written
    assert [place.bounds for unit in seen.units for place in unit.params()] == [(-3, None)]


def test_what_only_looks_like_a_write_is_none() -> None:
    def look(weight: nn.Parameter) -> None:
        weight.requires_grad_()
        copy = weight.clone()
        copy.mul_(2)
        copy[0] = weight[0]

    model = Model(look)
    assert not survey(model, model, 1).written


def test_to_compare_a_weight_takes_a_piece_of_it_at_a_time() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(1024, 1024)]))
    (layout,) = (unit for unit in discover(model, 1) if not unit.resident)
    params = list(model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        with constant(layout, params):
            pass
        with pytest.raises(ModelError, match="changes its weight"), constant(layout, params):
            params[0].data[0, 0] += 1e-7
    kineto = seen.profiler
    assert kineto is not None
    taken = [event.nbytes() for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    assert max(taken) == PIECE * 8  # in int64, and no more
