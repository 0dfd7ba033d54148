"""The dry forward, of models that ask for data: it is complete, and what can't be tried is guessed generously."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from plain import CPU, batches, engine_losses, everything_on, open_engine, plain_losses, relative_difference
from tiny_models import CONFIGS, random_source
from zinf_cli.engine.compute.survey import Survey, survey
from zinf_cli.engine.compute.trial import Trial
from zinf_cli.engine.compute.unsurveyed import guessed
from zinf_cli.errors import ModelError
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.weights import open_weights
from zinf_cli.train.setup import model_loss
from zoo.shrink import configs

ASKING = {
    "dbrx": "the positions of the experts that were chosen",
    "doge": "attention with a mask that is learned",
    "flaubert": "the largest length, as a number",
    "jetmoe": "how many rows each expert gets, as a list",
    "led": "whether some token sees all others, and where they are",
    "longcat_flash": "the positions of the experts that were chosen",
    "switch_transformers": "an expert by its number in a name",
    "t5gemma2": "a mask that vmap makes of a function",
    "umt5": "attention with a bias of positions that is learned",
    "xmod": "the rows of a language",
}


def surveyed(source: ModelSource) -> Survey:
    model = build_model(source)
    ids = torch.zeros((2, 12), dtype=torch.long, device="meta")
    return survey(model, partial(model_loss, model, ids, ids), 1)


def tried(source: ModelSource) -> Survey:
    """Surveyed with real weights on a micro-batch."""
    model = build_model(source)
    (ids,) = batches(0, 1)
    return survey(model, partial(model_loss, model, ids, ids), 1, Trial(open_weights(model, source).read, CPU))


@pytest.mark.sampled
@pytest.mark.parametrize("model_type", ASKING)
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_what_models_ask_of_data_is_answered(model_type: str) -> None:
    seen = surveyed(ModelSource(None, next(iter(configs(model_type))), "random", 0))
    assert not seen.failure
    for number in seen.order:
        assert seen.units[number].resident or seen.uses[number].output_bytes


def test_t5_without_dropout_is_surveyed_whole() -> None:
    dry, wet = (surveyed(random_source("t5", dropout_rate=rate)) for rate in (0.0, 0.1))
    assert not dry.failure
    assert dry.order == wet.order
    assert [use.input_bytes for use in dry.uses.values()] == [use.input_bytes for use in wet.uses.values()]


@pytest.mark.sampled
@pytest.mark.parametrize("name", CONFIGS)
def test_a_guess_is_generous(name: str) -> None:
    """Where a model can't be tried, the plan gives it at least what it would have been found to take."""
    seen = surveyed(random_source(name))
    guess = guessed(build_model(random_source(name)), seen, 2, 12)
    for number, use in seen.uses.items():
        most = guess.uses[number]
        assert most.input_bytes >= use.input_bytes // seen.order.count(number)
        assert most.call_bytes >= use.call_bytes
        assert most.output_bytes * seen.order.count(number) >= use.output_bytes
        assert most.saved_bytes * seen.order.count(number) >= use.saved_bytes
    assert guess.glue_bytes >= seen.glue_bytes
    assert guess.loss_bytes >= seen.loss_bytes


@pytest.mark.sampled
@pytest.mark.parametrize("name", CONFIGS)
def test_real_data_shows_what_no_data_did(name: str) -> None:
    seen, dry = tried(random_source(name)), surveyed(random_source(name))
    assert (seen.units, seen.order, seen.written) == (dry.units, dry.order, dry.written)
    for number, use in seen.uses.items():
        assert (use.input_bytes, use.call_bytes) == (dry.uses[number].input_bytes, dry.uses[number].call_bytes)
        assert use.output_bytes == dry.uses[number].output_bytes
        assert use.saved_bytes == pytest.approx(dry.uses[number].saved_bytes, rel=0.5)


def test_a_model_whose_shapes_follow_from_data_is_tried_on_some(tmp_path: Path) -> None:
    """BLT cuts a text where a network of its own is surprised."""
    source = ModelSource(None, next(iter(configs("blt"))), "random", 0)
    assert surveyed(source).failure
    seen = tried(source)
    assert not seen.failure
    parts = ("patcher", "local_encoder", "global_transformer", "local_decoder")
    assert {seen.units[number].name for number in seen.order} >= {f"model.{part}.layers.0" for part in parts}
    for keep in (False, True):
        engine = open_engine(source, everything_on("nvme", tmp_path), keep=keep)
        assert relative_difference(engine_losses(engine, 3), plain_losses(source, 3)) < 1e-6


def test_a_trial_holds_one_unit_at_a_time() -> None:
    source = random_source("llama")
    model = build_model(source)
    (ids,) = batches(0, 1)
    weights = open_weights(model, source)

    def read(names: Sequence[str]) -> dict[str, torch.Tensor]:
        held = {name for name, param in model.named_parameters() if param.untyped_storage().nbytes() > 4}
        assert held <= {"model.norm.weight"}
        return weights.read(names)

    assert not survey(model, partial(model_loss, model, ids, ids), 1, Trial(read, CPU)).failure


def test_what_comes_after_a_question_is_seen_in_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is clamped behind it: its bounds are kept, as in plain PyTorch."""
    forward = LlamaMLP.forward

    def asking(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        assert float(x.detach().sum()) < 1e9
        self.up_proj.weight.data.clamp_(-1e-2, 1e-2)
        output: torch.Tensor = forward(self, x)
        return output

    monkeypatch.setattr(LlamaMLP, "forward", asking)
    source = random_source("llama")
    dry, seen = surveyed(source), tried(source)
    assert dry.failure
    bounds = {p.name: p.bounds for unit in seen.units for p in unit.params() if p.bounds is not None}
    assert bounds == dict.fromkeys((f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)), (-1e-2, 1e-2))
    assert engine_losses(open_engine(source, everything_on("nvme", tmp_path)), 3) == plain_losses(source, 3)
    assert guessed(build_model(source), dry, 2, 12).written >= bounds.keys()


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 8, "factor": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_the_dry_forward_leaves_nothing_in_the_model(rope: str, tmp_path: Path) -> None:
    source = random_source("llama", rope_parameters=ROPES[rope], max_position_embeddings=8)
    model = build_model(source)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ids = torch.zeros((2, 12), dtype=torch.long, device="meta")
    params = dict(model.named_parameters())
    trial = Trial(open_weights(model, source).read, CPU)
    for asked, given in ((ids, None), (torch.zeros((2, 12), dtype=torch.long), trial)):
        numbers = torch.get_rng_state()
        survey(model, partial(model_loss, model, asked, asked), 1, given)
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
        assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
        assert all(params[name] is param and param.is_meta for name, param in model.named_parameters())
        assert torch.get_rng_state().equal(numbers)
    losses = engine_losses(open_engine(source, everything_on("nvme", tmp_path)), 3)
    assert losses == plain_losses(source, 3)


@pytest.mark.parametrize("write", ["part", "no_grad", "data ="])
def test_writes_to_weights_are_seen(write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaMLP.forward

    def writing(self: LlamaMLP, x: torch.Tensor) -> Any:
        weight = self.up_proj.weight
        if write == "part":
            weight.data[:4].clamp_(-1e-3, 1e-3)
        elif write == "no_grad":
            with torch.no_grad():
                weight[0] = 0.0
        else:
            weight.data = weight.data * 0.5
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", writing)
    assert {name.rpartition("layers.")[2] for name in surveyed(random_source("llama")).written} >= {
        "0.mlp.up_proj.weight", "1.mlp.up_proj.weight"
    }  # fmt: skip
    engine = open_engine(random_source("llama"), everything_on("nvme", tmp_path))
    with pytest.raises(ModelError, match="changes its weight"):
        engine_losses(engine, 1, close=False)
    assert any("forward" in vars(module) for module in engine.model.modules())
    engine.close()
    assert not any("forward" in vars(module) for module in engine.model.modules())


class Stashing(nn.Module):
    def __init__(self, *, returned: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.returned = returned
        self.extra: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.extra = self.inner(x).square().mean()
        return x + self.inner(x), self.extra if self.returned else x.mean()


class Stashes(nn.Module):
    def __init__(self, *, returned: bool, read: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stashing(returned=returned) for _ in range(2))
        self.read = read

    def forward(self) -> torch.Tensor:
        x, loss = torch.zeros((2, 8), device="meta"), torch.zeros((), device="meta")
        layer: Any
        for layer in self.layers:
            x, extra = layer(x)
            loss = loss + (layer.extra if self.read else extra)
        return x.mean() + loss


def test_what_a_layer_leaves_in_itself_for_others_is_refused() -> None:
    """Its gradient would be lost, and another micro-batch may put its own there meanwhile."""
    model = Stashes(returned=False, read=True).to("meta")
    with pytest.raises(ModelError, match=r"layers\.1 leaves the result of mean .* in add"):
        survey(model, model, 1)
    with pytest.raises(ModelError, match=r"layers\.1"):  # what it returns as well is another tensor where it is read
        survey(both := Stashes(returned=True, read=True).to("meta"), both, 1)
    for fine in (Stashes(returned=False, read=False).to("meta"), Stashes(returned=True, read=False).to("meta")):
        assert not survey(fine, fine, 1).failure
