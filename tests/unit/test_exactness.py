"""Plain PyTorch on the same batches is the reference: the engine's losses are its losses, wherever the bytes lie."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from plain import (
    CLIP,
    engine_losses,
    every_other_unit_cached,
    everything_on,
    open_engine,
    plain_losses,
    relative_difference,
)
from tiny_models import CONFIGS, random_source
from zinf_cli.engine.clips import Clips
from zinf_cli.engine.compute.loss_scale import LossScale
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.traffic.adamw import AdamW

CLASSES = ("params", "grads", "optimizer", "activations")
STEPS = 4
LONG = 10
"""Steps of a run in which some are clipped and others are not."""

TO_THE_BIT = {"llama", "qwen3", "qwen3_moe", "mistral", "phi3", "gpt_neox", "deepseek_v3", "mixtral"}
"""The others add up gradients in another order: a parameter used twice, or a bias summed over a larger batch."""

CLIP_THAT_BITES_SOMETIMES = {"llama": 1.12, "llama-tied": 1.12, "t5": 1.9, "qwen3_moe": 1.25}

NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "opt": {"dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
}
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.2},
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "bert": {"hidden_dropout_prob": 0.2},
    "bloom": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "t5": {"dropout_rate": 0.2},
    "qwen3_moe": {"attention_dropout": 0.2, "output_router_logits": True},
}


@cache
def reference(
    name: str, steps: int = STEPS, *, clip: float | None = CLIP, dtype: torch.dtype = torch.float32, **changes: Any
) -> list[list[float]]:
    return plain_losses(random_source(name, **changes), steps, clip=clip, dtype=dtype)


def train(name: str, options: EngineOptions, changes: dict[str, Any] | None = None) -> list[list[float]]:
    return engine_losses(open_engine(random_source(name, **(changes or {})), options), STEPS)


def assert_agree(found: list[list[float]], expected: list[list[float]], name: str) -> None:
    if name in TO_THE_BIT:
        assert found == expected
    assert relative_difference(found, expected) < 1e-5


@pytest.mark.sampled
@pytest.mark.parametrize("name", CONFIGS)
def test_all_on_nvme_learns_as_plain_pytorch_does(name: str, tmp_path: Path) -> None:
    changes = NO_DROPOUT.get(name, {})
    assert_agree(train(name, everything_on("nvme", tmp_path), changes), reference(name, **changes), name)
    assert list(tmp_path.iterdir()) == []


def test_activations_do_go_to_the_tier(tmp_path: Path) -> None:
    options = replace(EngineOptions(nvme_folders=(tmp_path,)), activations="nvme")
    engine = open_engine(random_source("llama"), options)
    engine_losses(engine, 1, close=False)
    moved = 3 * 2 * 4096  # three micro-batches, two layers that take a hidden state of 2 × 12 × 32 floats
    assert engine.tiers.activations.write_bytes == engine.tiers.activations.read_bytes == moved
    engine.close()


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "tier"), [*((name, "nvme") for name in CONFIGS), ("gpt2", "cpu"), ("t5", "cpu")])
def test_kept_activations_give_the_same_losses(name: str, tier: str, tmp_path: Path) -> None:
    changes = DROPOUT.get(name, {})
    engine = open_engine(random_source(name, **changes), everything_on(tier, tmp_path), keep=True)
    assert_agree(engine_losses(engine, STEPS), reference(name, **changes), name)


@pytest.mark.parametrize("keep", [False, True])
def test_a_unit_whose_activations_are_kept_runs_once(keep: bool, tmp_path: Path) -> None:
    engine = open_engine(random_source("llama"), everything_on("nvme", tmp_path), keep=keep)
    calls = itertools.count()  # an iterator: a list that a hook fills would be state of the model

    def count(*_: Any) -> None:
        next(calls)

    engine.model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(count)
    engine_losses(engine, 2, count=3)
    assert next(calls) == 2 * 3 * (1 if keep else 2)


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_the_same_in_the_recompute(name: str, tmp_path: Path) -> None:
    expected = reference(name, **DROPOUT[name])
    assert_agree(train(name, everything_on("nvme", tmp_path), DROPOUT[name]), expected, name)
    assert expected != reference(name, **NO_DROPOUT.get(name, {}))


@pytest.mark.sampled
@pytest.mark.parametrize("tier", ["device", "cpu", "nvme"])
@pytest.mark.parametrize("state", [*CLASSES, "all"])
def test_the_tier_changes_no_bit(state: str, tier: str, tmp_path: Path) -> None:
    base = EngineOptions(nvme_folders=(tmp_path,))
    placed: dict[str, Any] = dict.fromkeys(CLASSES if state == "all" else (state,), tier)
    assert train("llama", replace(base, **placed)) == reference("llama")


@pytest.mark.parametrize("folders", [2, 3])
def test_stripes_over_several_drives_change_no_bit(folders: int, tmp_path: Path) -> None:
    options = replace(
        everything_on("nvme", tmp_path), nvme_folders=tuple(tmp_path / str(number) for number in range(folders))
    )
    assert train("llama", options) == reference("llama")


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "mixtral", "mamba"])
def test_sweeps_of_one_and_of_all_agree(name: str, tmp_path: Path) -> None:
    options = everything_on("nvme", tmp_path)
    together = train(name, options)
    for per_sweep in (1, 2):
        found = train(name, replace(options, micro_batches_per_sweep=per_sweep))
        assert relative_difference(found, together) < 1e-6
        assert_agree(found, reference(name), name)


def test_a_unit_may_run_many_times_in_a_pass(tmp_path: Path) -> None:
    """albert's layers are one layer, called four times."""
    config: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config |= {"embedding_size": 16, "intermediate_size": 48, "architectures": ["AlbertForMaskedLM"]}
    source = random_source("bert", **config, model_type="albert")
    found = engine_losses(open_engine(source, everything_on("nvme", tmp_path)), STEPS)
    assert relative_difference(found, plain_losses(source, STEPS)) < 1e-5


@pytest.mark.parametrize("clip", [CLIP, None])
def test_micro_batches_share_a_sweep_whichever_layers_they_leave_out(clip: float | None, tmp_path: Path) -> None:
    """With LayerDrop every micro-batch leaves out other layers."""
    source = random_source("opt", layerdrop=0.5, num_hidden_layers=4)
    notes: list[str] = []
    engine = open_engine(source, everything_on("nvme", tmp_path), notice=notes.append)
    found = engine_losses(engine, STEPS, clip=clip, eager=clip is None)
    assert relative_difference(found, plain_losses(source, STEPS, clip=clip)) < 1e-5
    assert not notes


@pytest.mark.parametrize("part", ["layers.0.", "embed_tokens", "lm_head", "norm", "q_proj"])
def test_frozen_parameters_have_no_state_and_stay(part: str, tmp_path: Path) -> None:
    source = random_source("llama")
    engine = open_engine(source, everything_on("nvme", tmp_path), freeze=part)
    trainable = sum(flat.numel for unit in engine.units for flat in unit.layout.trainable)
    grads = [flat.grad for unit in engine.units for flat in unit.flats if flat.grad is not None]
    assert sum(grad.num_bytes for grad in grads) == 4 * trainable
    assert sum(flat.numel for unit in engine.units for flat in unit.layout.flats) > trainable
    assert engine_losses(engine, STEPS) == plain_losses(source, STEPS, freeze=part)


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3_moe"])
def test_bf16_has_fp32_masters_and_gradients(name: str, tier: str, tmp_path: Path) -> None:
    engine = open_engine(random_source(name), everything_on(tier, tmp_path), dtype=torch.bfloat16)
    found, expected = engine_losses(engine, STEPS), reference(name, dtype=torch.bfloat16)
    if name == "llama":
        assert found == expected
    assert relative_difference(found, expected) < 2e-3


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "tier", "per_sweep", "eager"),
    [*product(["llama", "llama-tied", "t5", "mixtral"], ["cpu", "nvme"], [None, 1], [False, True])],
)
def test_without_clipping(name: str, tier: str, per_sweep: int | None, eager: bool, tmp_path: Path) -> None:
    options = replace(everything_on(tier, tmp_path), micro_batches_per_sweep=per_sweep)
    found = engine_losses(open_engine(random_source(name), options), STEPS, clip=None, eager=eager, evaluate_every=2)
    assert_agree(found, reference(name, clip=None), name)


def test_an_eager_update_moves_no_gradient(tmp_path: Path) -> None:
    engine = open_engine(random_source("llama"), replace(EngineOptions(nvme_folders=(tmp_path,)), grads="nvme"))
    engine_losses(engine, 2, clip=None, eager=True, close=False)
    assert engine.tiers.grads.read_bytes == engine.tiers.grads.write_bytes == 0
    with pytest.raises(ValueError, match="eager"):
        engine.train_step([], AdamW(1e-3), eager=True)
    engine.close()


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "world"),
    [*product(["llama", "llama-tied", "t5", "qwen3_moe"], ["one sweep", "sweeps of one", "bf16", "in memory"])],
)
def test_speculative_updates(name: str, world: str, tmp_path: Path) -> None:
    """The clip is set so that it bites in some of the steps; then what was updated ahead must not count."""
    source = random_source(name)
    dtype = torch.bfloat16 if world == "bf16" else torch.float32
    options = replace(everything_on("nvme", tmp_path), speculate=True)
    if world == "sweeps of one":
        options = replace(options, micro_batches_per_sweep=1)
    if world == "in memory":
        options = replace(options, grads="cpu")
    norms, updated = [], []
    engine = open_engine(source, options, dtype=dtype)
    step = engine.train_step

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        norms.append(result.grad_norm)
        updated.append(result.updated)
        return result

    engine.train_step = noted  # type: ignore[method-assign]
    clip = CLIP_THAT_BITES_SOMETIMES[name]
    found = engine_losses(engine, LONG, clip=clip, evaluate_every=4)
    waiting = open_engine(source, replace(options, speculate=False), dtype=dtype)
    assert found == engine_losses(waiting, LONG, clip=clip, evaluate_every=4)
    bites = [norm > clip for norm in norms]
    clips, tried = Clips(), []
    for bite in bites:
        tried.append(not clips.expected)
        clips.count(clipped=bite)
    assert updated == [tries and not bite for tries, bite in zip(tried, bites, strict=True)]
    assert any(tries and bite for tries, bite in zip(tried, bites, strict=True)), norms
    assert any(updated), norms
    if dtype == torch.float32:
        assert_agree(found, reference(name, LONG, clip=clip), name)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("how", "name"),
    [
        *product(
            ["deferred", "eager", "speculative", "sweeps of one", "bf16", "moments only", "parameters only"],
            ["llama", "llama-tied", "t5", "qwen3_moe"],
        )
    ],
)
def test_cached_units_change_no_bit(name: str, how: str, tmp_path: Path) -> None:
    source = random_source(name)
    streamed = replace(
        everything_on("nvme", tmp_path),
        speculate=how == "speculative",
        micro_batches_per_sweep=1 if how == "sweeps of one" else None,
    )
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    some = {"moments only": ["optimizer"], "parameters only": ["params"]}
    cached = every_other_unit_cached(streamed, *some.get(how, []))
    clip = None if how == "eager" else CLIP_THAT_BITES_SOMETIMES[name]
    steps = LONG if how == "speculative" else STEPS
    losses, moved = [], []
    for options in (streamed, cached):
        engine = open_engine(source, options, dtype=dtype)
        losses.append(engine_losses(engine, steps, clip=clip, eager=how == "eager", evaluate_every=2, close=False))
        moved.append(engine.opened["nvme"].read_bytes + engine.opened["nvme"].write_bytes)
        engine.close()
    assert losses[0] == losses[1]
    assert moved[1] < 0.9 * moved[0]
    assert list(tmp_path.iterdir()) == []


def test_eager_bf16(tmp_path: Path) -> None:
    engine = open_engine(random_source("llama"), everything_on("nvme", tmp_path), dtype=torch.bfloat16)
    found = engine_losses(engine, STEPS, clip=None, eager=True)
    assert found == reference("llama", clip=None, dtype=torch.bfloat16)


def test_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    engine = open_engine(random_source("llama", attention_dropout=0.2), everything_on("nvme", tmp_path))
    found = engine_losses(engine, STEPS, evaluate_every=2)
    assert found == reference("llama", attention_dropout=0.2)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    engine = open_engine(random_source("llama"), everything_on("nvme", tmp_path))
    ids = torch.arange(24).reshape(2, 12) + 3
    before = engine.evaluate([MicroBatch(engine_loss(engine, ids))])
    bad = engine.train_step([MicroBatch(lambda: engine_loss(engine, ids)() * float("nan"))], AdamW(1e-3))
    assert not bad.finite
    assert engine.evaluate([MicroBatch(engine_loss(engine, ids))]) == before
    good = engine.train_step([MicroBatch(engine_loss(engine, ids))], AdamW(1e-3), more=False)
    assert good.finite
    assert engine.evaluate([MicroBatch(engine_loss(engine, ids))]) < before
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["deferred", "speculative"])
def test_nor_does_an_infinite_loss_with_a_finite_gradient(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = replace(everything_on("nvme", tmp_path), speculate=how == "speculative")
    engine = open_engine(random_source("llama"), options, dtype=dtype)
    found = engine_losses(engine, 6, clip=50.0, infinite=(3, 1))
    assert found == plain_losses(random_source("llama"), 6, clip=50.0, dtype=dtype, infinite=(3, 1))


def test_a_scale_that_a_loss_in_fp16_can_not_hold_changes_nothing(tmp_path: Path) -> None:
    """As with GradScaler, whose first scale is 65536: the step is left out, and the next scale is half of it."""
    engine = open_engine(random_source("llama"), everything_on("nvme", tmp_path), dtype=torch.float16)
    ids = torch.arange(24).reshape(2, 12) + 3
    work = [MicroBatch(lambda: engine_loss(engine, ids)().half())]
    before, scale, found = engine.evaluate(work), LossScale(), []
    for _ in range(2):
        found.append((scale.scale, engine.train_step(work, AdamW(1e-3), loss_scale=scale.scale, more=False).finite))
        scale.note(finite=found[-1][1])
    assert found == [(65536.0, False), (32768.0, True)]
    assert engine.evaluate(work) < before
    engine.close()


def test_a_scale_that_has_fallen_to_one_grows_again() -> None:
    """As GradScaler's. An infinite step at a scale of one is not for the scale."""
    ours, theirs, finite_steps = LossScale(growth_interval=3), torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    for finite in [False] * 16 + [True] * 7:
        assert ours.takes(finite=finite, loss=1.0)
        torch._amp_update_scale_(theirs, finite_steps, torch.tensor(float(not finite)), 2.0, 0.5, 3)
        assert (ours.scale, ours.finite_steps) == (theirs.item(), finite_steps.item())
    assert ours.scale == 4
    one = LossScale(scale=1.0, finite_steps=5)
    assert not one.takes(finite=False, loss=1.0)
    assert not LossScale().takes(finite=False, loss=math.inf)
    assert one == LossScale(scale=1.0, finite_steps=5)


def test_a_loss_is_judged_with_its_gradient_unless_it_has_no_weight(tmp_path: Path) -> None:
    engine = open_engine(random_source("llama"), everything_on("nvme", tmp_path), dtype=torch.float16)
    ids = torch.arange(24).reshape(2, 12) + 3

    def finite(weight: float) -> bool:
        work = [
            MicroBatch(engine_loss(engine, ids), 1.0),
            MicroBatch(lambda: engine_loss(engine, ids)() + float("inf"), weight),
        ]
        result = engine.train_step(work, AdamW(1e-3), loss_scale=8.0, more=False)
        assert math.isfinite(result.grad_norm)
        return result.finite

    before = engine.evaluate([MicroBatch(engine_loss(engine, ids))])
    assert not finite(1.0)
    assert engine.evaluate([MicroBatch(engine_loss(engine, ids))]) == before
    assert finite(0.0)
    assert engine.evaluate([MicroBatch(engine_loss(engine, ids))]) < before
    engine.close()


def engine_loss(engine: Any, ids: torch.Tensor) -> Any:
    return lambda: engine.model(input_ids=ids, labels=ids, use_cache=False).loss


def test_parameters_read_back_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    source = random_source("llama")
    engine = open_engine(source, everything_on("nvme", tmp_path))
    engine_losses(engine, 3, close=False)
    model: dict[str, torch.Tensor] = {}
    plain_losses(source, 3, parameters=model)
    read = {name: value for number in range(len(engine.units)) for name, value in engine.read_params(number).items()}
    engine.close()
    assert read.keys() == model.keys()
    assert all(torch.equal(read[name], value) for name, value in model.items())
