"""What the plan says is moved in a step is what is moved; memory that is left saves some of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from in_process import run
from tiny_models import CONFIGS
from tiny_recipes import CLASSES, recipe_of
from zinf_cli.engine.engine import Engine
from zinf_cli.plan import buffers, memory, mixes, search
from zinf_cli.plan.filling import stayable
from zinf_cli.plan.placement import placements
from zinf_cli.plan.search import best_plan
from zinf_cli.plan.traffic import experts_reached
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.tiers.tier import Extent, Transfer
from zinf_cli.train.figures import find_figures
from zoo.shrink import configs

pytestmark = pytest.mark.usefixtures("own_folders", "stated_speed")


@pytest.mark.sampled
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("per_sweep", [1, 3])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "mixtral", "bert", "deepseek_v3"])
def test_traffic_is_as_planned(name: str, per_sweep: int, clip: float | None, tmp_path: Path) -> None:
    """A step reads ahead for the next one, so only the sum over a run is exact; its last update is a flush."""
    train: dict[str, Any] = {"micro_batches_per_sweep": per_sweep, "max_grad_norm": clip, "max_steps": 12}
    recipe = recipe_of(tmp_path, name, **train, precision="bf16" if name == "deepseek_v3" else "fp32")
    plan = best_plan(recipe, find_figures(recipe, 1))
    lines = run(recipe, plan)
    written = sum(line["nvme_write_bytes"] for line in lines)
    moved = written + sum(line["nvme_read_bytes"] for line in lines)
    assert moved / len(lines) == pytest.approx(plan.nvme_traffic, rel=0.08)
    assert written / len(lines) == pytest.approx(plan.nvme_written, rel=0.08)


@pytest.mark.sampled
@pytest.mark.parametrize("stays", ["nothing", "some", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5", "bert", "bloom", "opt", "phi3"])
def test_each_byte_that_parts_save_is_in_the_plan(
    name: str, stays: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, name, max_steps=2)
    figures = find_figures(recipe, 1, most=1024)
    room = {"nothing": 0, "some": 3 << 17, "all": 1 << 40}[stays]
    plan = best_plan(recipe, figures)
    assert not plan.staying_units, "activations are pinned to the drive"
    plan = replace(plan, staying_units=tuple(sorted(stayable(figures, plan.choice, room))))
    moved = {"read": 0, "write": 0}
    for way in moved:
        move = getattr(NvmeTier, way)

        def count(
            tier: NvmeTier,
            extent: Extent,
            offset: int,
            data: torch.Tensor,
            *after: Any,
            way: str = way,
            move: Any = move,
        ) -> Transfer:
            moved[way] += data.numel() if extent.label.endswith("activations") else 0
            transfer: Transfer = move(tier, extent, offset, data, *after)
            return transfer

        monkeypatch.setattr(NvmeTier, way, count)
    run(recipe, plan)
    planned = list(memory.activations_moved(figures, plan.choice))
    times = 2 * plan.micro_batches
    assert moved["write"] == times * sum(sent for sent, _ in planned)
    brought = times * sum(back for _, back in planned)
    assert bool(plan.staying_units) == (stays != "nothing")
    if stays == "some":  # and so is some of what other units take
        assert moved["read"] <= brought
    elif name == "t5" and stays == "nothing":  # of a parcel, glue needs a tensor before its turn, and later the rest
        assert brought <= moved["read"] <= 1.01 * brought
    else:
        assert moved["read"] == brought


@pytest.mark.parametrize("activations", ["auto", "nvme"])
def test_what_parts_save_stays_in_memory_only_where_the_plan_may_choose(
    activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "placements", lambda asked, tier: placements(dict.fromkeys(asked, "nvme"), tier))
    recipe = recipe_of(tmp_path, "llama", max_steps=2)
    offload = recipe.offload.model_copy(update={"activations": activations})
    figures = find_figures(recipe, 1, most=1024)
    plan = best_plan(recipe.model_copy(update={"offload": offload}), figures)
    assert len(plan.staying_units) == (len(figures.model.units) if activations == "auto" else 0)


def test_of_experts_only_those_are_computed_that_a_token_takes(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "qwen3_moe")

    def flops(num_experts: int, most: int | None = None) -> float:
        config = {**(recipe.model.config or {}), "num_experts": num_experts}
        changed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
        return find_figures(changed, 1, most=most).model.flops_per_token

    routers = 2 * 6 * 32 * 6  # of two layers, hidden 32, for six experts more
    assert flops(8) == pytest.approx(flops(2) + routers)
    assert flops(8, most=4000) == pytest.approx(flops(8))


@pytest.mark.parametrize(("clip", "per_sweep"), [(1e-3, 2), (None, 1)])
def test_traffic_of_experts_is_that_of_the_share_that_tokens_reach(
    clip: float | None, per_sweep: int, tmp_path: Path
) -> None:
    train: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": 2, "seq_len": 8, "max_steps": 12}
    recipe = recipe_of(tmp_path, "qwen3_moe", **train, max_grad_norm=clip, micro_batches_per_sweep=per_sweep)
    many = {**(recipe.model.config or {}), "num_experts": 32, "moe_intermediate_size": 128}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": many})})
    figures = find_figures(recipe, 1, most=13000)  # one expert, and all else of a layer
    experts = [unit for unit in figures.model.units if "experts" in unit.name]
    assert len(experts) == 2 * 32
    assert all(unit.reached == pytest.approx(1 - (30 / 32) ** 8) for unit in experts)
    plan = best_plan(recipe, figures)
    lines = run(recipe, plan)
    expected = experts_reached(figures, plan.choice, sweeps=2 // per_sweep)
    assert expected is not None
    assert expected == pytest.approx(1 - (30 / 32) ** 16)
    share = sum(line["experts_reached"] for line in lines) / len(lines)
    assert 0.7 * expected < share <= expected + 0.05  # routers with random weights prefer some experts

    def planned(reached: float) -> int:
        units = tuple(replace(unit, reached=min(unit.reached, reached)) for unit in figures.model.units)
        return best_plan(recipe, replace(figures, model=replace(figures.model, units=units))).nvme_traffic

    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in lines)
    assert moved / len(lines) == pytest.approx(planned(1 - (1 - share) ** 0.5), rel=0.08)
    assert planned(0.1) < plan.nvme_traffic


@pytest.mark.parametrize(("precision", "clip"), [("fp32", 1.0), ("bf16", None)])
def test_memory_that_is_left_holds_units(
    precision: str, clip: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, "llama", precision=precision, max_grad_norm=clip, max_steps=12)
    config = {"model_type": "llama", **CONFIGS["llama"], "num_hidden_layers": 5}
    monkeypatch.setattr(buffers, "CHUNK_NUMEL", 2048)  # else buffers take more than the states
    monkeypatch.setattr(mixes, "UNSURE", 0.0)  # which is more than they take, of what Python does
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    figures = find_figures(recipe, 1)
    streamed = best_plan(recipe, figures)
    losses = [line["loss"] for line in run(recipe, streamed)]
    states = sum(line.num_bytes for line in streamed.lines if line.what in ("params", "grads", "optimizer"))
    budget = streamed.limits[0].needed + states * 3 // 10
    auto = {"params": "auto", "grads": "auto", "optimizer": "auto", "cpu_memory": budget}
    recipe = recipe.model_copy(update={"offload": recipe.offload.model_copy(update=auto)})
    plan = best_plan(recipe, figures)
    assert plan.cached_units
    assert plan.limits[0].needed <= budget
    held: list[int] = []
    close = Engine.close

    def note_and_close(engine: Engine) -> None:
        held.append(engine.opened["cpu"].used)
        close(engine)

    monkeypatch.setattr(Engine, "close", note_and_close)
    lines = run(recipe, plan)
    assert held == [
        sum(line.num_bytes for line in plan.lines if line.tier == "cpu" and line.what in (*CLASSES, "cached"))
    ]
    assert max(line["nvme_bytes"] for line in lines) <= plan.nvme_bytes < 0.8 * streamed.nvme_bytes
    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in lines)
    assert moved / len(lines) == pytest.approx(plan.nvme_traffic, rel=0.08)
    assert plan.nvme_traffic < 0.8 * streamed.nvme_traffic
    assert [line["loss"] for line in lines] == losses


@pytest.mark.filterwarnings("ignore")
def test_parts_that_text_never_calls_stay_on_their_tier(tmp_path: Path) -> None:
    """A vision tower is neither held in memory nor read again and again; its parameters are what they were."""
    recipe = recipe_of(tmp_path, "llama", max_steps=8)
    config = next(iter(configs("llava")))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    figures = find_figures(recipe, 1)
    called = {unit.name: unit.calls for unit in figures.model.units}
    assert called["model.vision_tower.encoder.layers.0"] == 0
    assert called["model.language_model.layers.0"] == 1
    plan = best_plan(recipe, figures)
    uncalled = [unit.trainable_bytes + unit.frozen_bytes for unit in figures.model.units if not unit.calls]
    assert plan.working.resident_bytes < sum(uncalled)
    lines = run(recipe, plan)
    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in lines)
    assert moved / len(lines) == pytest.approx(plan.nvme_traffic, rel=0.08)
    assert max(line["nvme_bytes"] for line in lines) <= plan.nvme_bytes
