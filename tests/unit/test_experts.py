"""Experts as parts: a layer's experts, packed in a few parameters, are units of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from checkpoints import resumed, save
from own_processes import in_processes
from peaks import peak_of_layer
from plain import (
    batches,
    engine_losses,
    every_other_unit_cached,
    everything_on,
    open_engine,
    plain_losses,
    relative_difference,
)
from tiny_models import random_source, skip_unless_known
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.pipeline import Pipeline
from zinf_cli.engine.traffic.visit import Visit
from zinf_cli.engine.units.origins import parts_of
from zinf_cli.engine.units.tiles import cut, cut_together
from zinf_cli.engine.units.units import discover
from zinf_cli.errors import ModelError
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.weights import open_weights
from zinf_cli.trace import LANES
from zinf_cli.train.setup import model_loss
from zoo.shrink import class_names, configs

STEPS = 3
ONE, TWO = 2000, 3500
"""Elements of a part: a tiny model's experts are units by themselves, or in pairs where they are small."""
MODELS = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "olmoe"]


def source(name: str, **changes: Any) -> ModelSource:
    if name != "olmoe":
        return random_source(name, **changes)
    mixture = {"model_type": name, "num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 2}
    return random_source("mistral", **{**mixture, **changes})


@cache
def whole(name: str) -> list[list[float]]:
    return plain_losses(source(name), STEPS)


@pytest.mark.parametrize(("name", "most"), [*((name, ONE) for name in MODELS), ("qwen3_moe", TWO), ("gpt_oss", TWO)])
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_experts_learn_as_plain_pytorch_does(name: str, most: int, tmp_path: Path) -> None:
    engine = open_engine(source(name), everything_on("nvme", tmp_path), most=most)
    assert sum("experts" in unit.name for unit in engine.units) >= (4 if most == ONE else 2)
    assert relative_difference(engine_losses(engine, STEPS), whole(name)) < 1e-6


def test_all_placements_have_the_same_bits(tmp_path: Path) -> None:
    nvme = everything_on("nvme", tmp_path)
    expected = engine_losses(open_engine(source("qwen3_moe"), nvme, most=ONE), STEPS)
    for options in (EngineOptions(), replace(nvme, speculate=True), every_other_unit_cached(nvme)):
        assert engine_losses(open_engine(source("qwen3_moe"), options, most=ONE), STEPS) == expected, options


@pytest.mark.parametrize(("before", "after"), [(None, ONE), (ONE, None), (ONE, TWO)])
def test_a_checkpoint_goes_on_with_another_cut(before: int | None, after: int | None, tmp_path: Path) -> None:
    first = open_engine(source("mixtral"), EngineOptions(), most=before)
    engine_losses(first, 2, close=False)
    folder = save(first, tmp_path / "run", 2)
    first.close()
    second = resumed(folder, "mixtral", EngineOptions(), most=after)
    losses = engine_losses(second, STEPS, first=2, close=False)
    again = save(second, tmp_path / "run", STEPS)
    second.close()
    assert relative_difference(losses, whole("mixtral")[2:]) < 1e-6
    one, two = CheckpointReader(folder), CheckpointReader(again)
    assert one.shapes == two.shapes
    one.close()
    two.close()


@pytest.mark.parametrize("eager", [False, True])
def test_an_expert_that_no_token_reaches_decays_as_its_layer_does(eager: bool, tmp_path: Path) -> None:
    many = source("qwen3_moe", num_experts=12, num_experts_per_tok=1)
    expected: dict[str, torch.Tensor] = {}
    losses = plain_losses(many, STEPS, clip=None if eager else 1.0, parameters=expected)
    engine = open_engine(many, everything_on("nvme", tmp_path), most=ONE)
    found = engine_losses(engine, STEPS, clip=None if eager else 1.0, eager=eager, close=False)
    assert relative_difference(found, losses) < 1e-6
    seen = 0
    for number, unit in enumerate(engine.units):
        values = engine.read_params(number)
        for place in unit.layout.params():
            if place.part is not None:
                original = expected[place.origin].reshape(-1)[place.first : place.first + place.numel]
                torch.testing.assert_close(values[place.name].reshape(-1), original, rtol=1e-4, atol=1e-6)
                seen += 1
    assert seen >= 2 * 2 * 12
    engine.close()


TWELVE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 12},
    "mixtral": {"num_local_experts": 12},
    "deepseek_v3": {"n_routed_experts": 12, "topk_group": 2},
    "gpt_oss": {"num_local_experts": 12},
    "olmoe": {"num_experts": 12},
}
"""What makes them 12 experts a layer."""


@pytest.mark.sampled
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_experts_learn_with_the_bits_of_plain_pytorch(name: str, tmp_path: Path) -> None:
    """Losses and weights, where nothing is clipped.

    The experts of plain PyTorch are transformers' eager ones, as those of a cut model are: one after another adds what
    it gives. Its default, grouped_mm, adds up in another order.
    """
    many = source(name, **TWELVE[name], num_experts_per_tok=4)
    expected: dict[str, torch.Tensor] = {}
    losses = plain_losses(many, STEPS, clip=None, parameters=expected, experts="eager")
    engine = open_engine(many, everything_on("nvme", tmp_path), most=3072)
    assert engine_losses(engine, STEPS, clip=None, close=False) == losses
    cut_experts = 0
    for number, unit in enumerate(engine.units):
        values = engine.read_params(number)
        for place in unit.layout.params():
            original = expected[place.origin].reshape(-1)[place.first : place.first + place.numel]
            assert torch.equal(values[place.name].reshape(-1), original), place.name
            cut_experts += unit.layout.on_demand
    assert cut_experts >= 12
    engine.close()


@pytest.mark.sampled
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_a_norm_that_clips_is_the_same_whole_and_cut(name: str) -> None:
    """To the bit, as losses are: an expert's norm is taken by itself, whatever is cut and whichever it is in its tile.

    The norm of plain PyTorch adds up all experts of a layer in one chain.
    """
    width = "intermediate_size" if name in ("mixtral", "gpt_oss", "olmoe") else "moe_intermediate_size"
    many = source(name, **TWELVE[name], num_experts_per_tok=4, **{width: 160})
    each = 3 * 32 * 160

    def learned(most: int | None) -> tuple[list[float], list[list[float]]]:
        engine = open_engine(many, EngineOptions(), most=most, experts="eager")
        found = [
            engine.train_step(
                [MicroBatch(partial(model_loss, engine.model, ids, ids), 1 / 2) for ids in batches(step, 2)],
                AdamW(1e-3),
                max_grad_norm=0.05,
            )
            for step in range(STEPS)
        ]
        engine.close()
        return [step.grad_norm for step in found], [step.losses for step in found]

    norms, losses = learned(None)
    assert min(norms) > 0.05
    for most in (each, 2 * each):
        assert learned(most) == (norms, losses)
    assert relative_difference(losses, plain_losses(many, STEPS, count=2, clip=0.05)) < 1e-6


@pytest.mark.parametrize("name", ["deepseek_v4", "jamba", "longcat_flash"])
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_types_whose_cut_adds_up_in_another_order_differ_in_last_bits(name: str) -> None:
    """Of all types with experts, those that have not the bits of plain PyTorch (docs/architecture.md, "Parts")."""
    skip_unless_known(name)
    many = ModelSource(None, next(configs(name, class_names(name)[0])), "random", 0)
    sizes = []
    for weights in map(cut_together, build_model(many).modules()):
        packed = any(weight.dim() > 2 for weight in weights.values())
        sizes.append(sum(weight.numel() // (len(weight) if packed else 1) for weight in weights.values()))
    engine = open_engine(many, EngineOptions(), most=max(sizes), experts="eager")
    assert any(unit.layout.on_demand for unit in engine.units)
    expected = plain_losses(many, STEPS, experts="eager")
    assert relative_difference(engine_losses(engine, STEPS), expected) < 3e-7


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_backward_passes_each_norm_once(name: str, tmp_path: Path) -> None:
    """However many experts, shared ones and routers take the result of a norm, their gradients are added up first."""
    many = source(name, **TWELVE[name], num_experts_per_tok=4)

    def norms_passed(step: Callable[[], Any]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            step()
        return sum(event.name.startswith("RsqrtBackward") for event in profiled.events())

    engine = open_engine(many, everything_on("nvme", tmp_path), most=3072)
    here = norms_passed(lambda: engine_losses(engine, 1, count=1))
    assert here == norms_passed(lambda: plain_losses(many, 1, count=1))


def test_both_matrices_of_an_expert_are_one_unit_and_the_survey_calls_all_experts() -> None:
    model = build_model(source("qwen3_moe"))
    cut(model, TWO)
    units = {unit.name: [place.shape for place in unit.params()] for unit in discover(model, 1, most=TWO)}
    experts = [shapes for name, shapes in units.items() if "experts" in name]
    assert experts == [[(2, 32, 32), (2, 32, 16)]] * 4
    engine = open_engine(source("qwen3_moe"), EngineOptions(), most=TWO)
    assert all(unit.layout.modules for unit in engine.units if "experts" in unit.name)
    engine.close()


@pytest.mark.parametrize(
    ("name", "changes", "freeze"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, ""),  # the block changes its input in place
        ("mixtral", {}, "experts"),
        ("deepseek_v3", {"attention_dropout": 0.2}, "self_attn"),
        ("qwen3_moe", {"output_router_logits": True}, ""),
    ],
)
def test_noise_and_frozen_weights_are_as_in_plain_pytorch(
    name: str, changes: dict[str, Any], freeze: str, tmp_path: Path
) -> None:
    many = source(name, **TWELVE[name], **changes)
    engine = open_engine(many, everything_on("nvme", tmp_path), most=ONE, freeze=freeze)
    assert relative_difference(engine_losses(engine, STEPS), plain_losses(many, STEPS, freeze=freeze)) < 1e-6


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 8))  # the last expert has none


def cut_with_values(module: nn.Module, most: int) -> None:
    values = {name: param.detach().reshape(-1) for name, param in module.named_parameters()}
    cut(module, most)
    parts = parts_of(module)
    with torch.no_grad():
        for param in module.parameters():
            part = parts[id(param)]
            param.copy_(values[part.name][part.first : part.first + param.numel()].view(param.shape))


@pytest.mark.parametrize("most", [96, 200])
def test_products_with_experts_and_with_rows_are_those_of_the_whole(most: int) -> None:
    torch.manual_seed(0)
    whole, experts = Experts(), Experts()
    experts.load_state_dict(whole.state_dict())
    cut_with_values(experts, most)
    x, batch = torch.randn(5, 6), torch.randn(4, 5, 8)
    uses: list[Callable[[Any], torch.Tensor]] = [
        lambda of: F.linear(x, of.up[2]),
        lambda of: x @ of.down[2],
        lambda of: torch.bmm(batch, of.up),
        lambda of: of.up[3] @ x.T,
    ]
    for compute in uses:
        torch.testing.assert_close(compute(experts), compute(whole))


def test_what_stands_for_experts_gives_the_matrix_of_one_and_refuses_what_takes_all() -> None:
    experts = Experts().to("meta")
    cut(experts, 100)
    x = torch.zeros(3, 6, device="meta")
    up: Any = experts.up
    assert up.shape == (4, 8, 6)
    for one in (up[3], up[-1], up[torch.tensor(2)]):
        assert one.shape == (8, 6)
        assert F.linear(x, one).shape == (3, 8)
        assert (torch.zeros(3, 8, device="meta") @ one).shape == torch.matmul(
            torch.zeros(3, 8, device="meta"), one
        ).shape
    uses: list[Callable[[], Any]] = [
        lambda: up[:2],
        lambda: up[torch.tensor([0, 1])],
        lambda: up @ x.T,
        lambda: x @ up,
        lambda: up[0].T,
    ]
    for use in uses:
        with pytest.raises(ModelError, match=r"up is larger than the memory for it, and can't be cut"):
            use()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_of_a_checkpoint_that_has_experts_one_by_one_some_are_read(name: str, tmp_path: Path) -> None:
    config: Any = build_model(source(name)).config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = ModelSource(tmp_path, None, "pretrained", 0)
    weights = open_weights(build_model(stored), stored)
    param = "model.layers.1.mlp.experts.gate_up_proj"
    whole = weights.read([param])[param]
    each = whole[0].numel()
    assert torch.equal(weights.read_part(param, each, 3 * each), whole[1:3].reshape(-1))
    assert torch.equal(weights.read_part(param, 5, 2 * each), whole.reshape(-1)[5 : 2 * each])


def test_micro_batches_share_a_sweep_whichever_experts_they_call(tmp_path: Path) -> None:
    many = source("qwen3_moe", num_experts=8)
    said: list[str] = []
    expected = plain_losses(many, 4)
    nvme = everything_on("nvme", tmp_path)
    for options in (nvme, replace(nvme, speculate=True, micro_batches_per_sweep=2)):
        keep = options is not nvme
        engine = open_engine(many, options, most=ONE, notice=said.append, keep=keep)
        assert relative_difference(engine_losses(engine, 4), expected) < 1e-6
    assert not said


@pytest.mark.parametrize("per_sweep", [None, 2])
def test_experts_are_fetched_ahead(per_sweep: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every visit is the next announced one, and under way when it comes."""
    acquire = Pipeline.acquire
    ahead: list[bool] = []

    def seen(pipeline: Pipeline, visit: Visit) -> None:
        ahead.append(bool(pipeline._fetches) and pipeline._fetches[0].visit == visit and pipeline._fetches[0].placed)
        acquire(pipeline, visit)

    monkeypatch.setattr(Pipeline, "acquire", seen)
    many = source("qwen3_moe", num_experts=8, num_experts_per_tok=1)
    options = replace(everything_on("nvme", tmp_path), micro_batches_per_sweep=per_sweep)
    engine_losses(open_engine(many, options, most=ONE), 2)
    assert len(ahead) > 50
    assert all(ahead)


def test_experts_are_fetched_where_buffers_hold_only_what_is_announced(tmp_path: Path) -> None:
    many = source("qwen3_moe", num_experts=8)
    engine = open_engine(many, everything_on("nvme", tmp_path), most=ONE)
    least = 3 * max(unit.layout.num_bytes for unit in engine.units)
    engine.close()
    engine = open_engine(many, everything_on("nvme", tmp_path), most=ONE, slot_bytes=least)
    assert relative_difference(engine_losses(engine, STEPS), plain_losses(many, STEPS)) < 1e-6


def experts_read(engine: Engine, path: Path) -> int:
    """Bytes of experts' parameters that the drive has given so far."""
    engine.trace.write(path)
    spans = json.loads(path.read_text())["traceEvents"]
    named = [span for span in spans if "experts" in span["name"] and span["name"].endswith(" params")]
    return sum(span["args"]["bytes"] for span in named if span["tid"] == LANES.index("nvme read"))


def test_only_experts_that_a_token_is_routed_to_are_read(tmp_path: Path) -> None:
    """What is fetched for compute follows the experts in use; the update of the others reads them once, without it."""
    many = source("qwen3_moe", num_experts=64, num_experts_per_tok=4, num_hidden_layers=1, moe_intermediate_size=64)
    engine = open_engine(many, everything_on("nvme", tmp_path), most=7000)
    engine.trace.enabled = True
    ids = torch.full((1, 16), 5)  # equal tokens take the same way
    batch = MicroBatch(lambda: model_loss(engine.model, ids, ids))

    def step() -> None:
        engine.train_step([batch], AdamW(1e-4), more=False)

    read = [0]
    for one in (lambda: engine.evaluate([batch]), step, step):
        one()
        engine._pipeline.settle()
        read.append(experts_read(engine, tmp_path / "trace.json"))
    engine.close()
    used = 4 * 3 * 32 * 64 * 4
    evaluation, first, second = (after - before for before, after in pairwise(read))
    assert used <= evaluation <= 1.1 * used
    assert 2 * used <= first <= 1.1 * 2 * used  # forward and backward
    assert second <= 1.1 * (64 / 4 * used + used)  # the update reads each once: those in use on their way into compute


def test_memory_follows_the_experts_in_use(tmp_path: Path) -> None:
    """64 experts, 4 for each of 16 tokens, take no more memory than a dense layer of 8 experts' size."""
    folders = [tmp_path / "dense", tmp_path / "mixture"]
    for folder in folders:
        folder.mkdir()
    dense, mixture = in_processes(peak_of_layer, list(zip(folders, (0, 64), strict=True)))
    assert mixture.planned < dense.planned
    assert mixture.peak < dense.peak
