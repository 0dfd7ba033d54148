"""The plan's bytes are the engine's bytes, and its least buffers are enough."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

from forked_ranks import ForkedRanks
from in_process import run
from tiny_models import CONFIGS, random_source
from tiny_recipes import CLASSES, recipe_of
from zinf_cli.amounts import format_bytes
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.engine.engine import Engine
from zinf_cli.errors import CapacityError
from zinf_cli.machine.hardware import Room, room_here
from zinf_cli.plan import memory, search
from zinf_cli.plan.checkpoints import checkpoint_bytes
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import KEPT_MORE
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.predict import profile_here
from zinf_cli.plan.search import make_plan
from zinf_cli.recipe.recipe import Checkpoint
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.screens.plan import plan_screen
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.train import describe as describing
from zinf_cli.train.describe import describe
from zinf_cli.train.model import build_model
from zinf_cli.train.surveyed import GUESSED, TRIAL_FLOPS, TRIED
from zoo.shrink import configs

FLOPS = 1e13
"""What every machine computes a second here, so that a plan follows no measurement; drives hold up each step."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(autouse=True)
def stated_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describing, "_flops", lambda *_: FLOPS)


class Closed(NamedTuple):
    """What a tier on drives had come to when it was closed, in bytes: the length of its files, what went into them."""

    allocated: int
    written: int


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Closed]:
    """All that are closed, in this process."""
    tiers: list[Closed] = []
    close = NvmeTier.close

    def note_and_close(tier: NvmeTier) -> None:
        tiers.append(Closed(sum(os.fstat(file).st_size for file in tier._files), tier.write_bytes))
        close(tier)

    monkeypatch.setattr(NvmeTier, "close", note_and_close)
    return tiers


@pytest.mark.parametrize("per_sweep", [1, 3])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bert"])
def test_the_least_buffers_are_enough(name: str, per_sweep: int, tmp_path: Path, closed: list[Closed]) -> None:
    recipe = recipe_of(tmp_path, name, micro_batches_per_sweep=per_sweep)
    plan = make_plan(recipe, describe(recipe, 1))
    ample = run(recipe, plan)
    least = replace(plan, working=plan.working.shrunk(1 << 60))
    assert least.working.total < plan.working.total
    tight = run(recipe, least)
    assert [line["loss"] for line in tight] == [line["loss"] for line in ample]
    assert max(line["nvme_bytes"] for line in ample) == plan.nvme_bytes
    assert [tier.allocated for tier in closed] == [plan.nvme_bytes] * 2


def test_drives_that_are_memory_count_as_memory(tmp_path: Path) -> None:
    assert room_here([Path("/dev/shm"), tmp_path]).drives_in_memory == 0.5
    recipe = recipe_of(tmp_path, "llama")
    figures = describe(recipe, 1)
    for share in (0.0, 0.5, 1.0):
        plan = make_plan(recipe, figures, room=Room(1 << 34, 1 << 34, drives_in_memory=share))
        assert plan.nvme_bytes > 0
        assert [line.num_bytes for line in plan.lines if line.what == "tmpfs"] == [int(plan.nvme_bytes * share)] * (
            share > 0
        )
        cpu = next(limit for limit in plan.limits if limit.tier == "cpu")
        assert cpu.needed > plan.cpu_bytes_per_rank >= plan.nvme_bytes * share
        plan_screen(plan, "tiny", [])


def test_the_least_buffers_are_enough_for_eager_updates(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", max_grad_norm=None)
    plan = make_plan(recipe, describe(recipe, 1))
    assert plan.update == "eager"
    ample = run(recipe, plan)
    tight = run(recipe, replace(plan, working=plan.working.shrunk(1 << 60)))
    assert [line["loss"] for line in tight] == [line["loss"] for line in ample]


@pytest.mark.parametrize("name", CONFIGS)
def test_kept_activations_are_as_planned(name: str, tmp_path: Path, closed: list[Closed]) -> None:
    recipe = recipe_of(tmp_path, name).model_copy(update={"activation_checkpointing": "none"})
    plan = make_plan(recipe, describe(recipe, 1))
    tight = replace(plan, working=plan.working.shrunk(1 << 60))
    lines = run(recipe, tight)
    states = {line.what: line.num_bytes for line in plan.lines}
    recomputing = make_plan(recipe.model_copy(update={"activation_checkpointing": "unit"}), plan.figures)
    assert states["activations"] > next(line.num_bytes for line in recomputing.lines if line.what == "activations")
    assert max(line["nvme_bytes"] for line in lines) == plan.nvme_bytes
    assert [tier.allocated for tier in closed] == [plan.nvme_bytes]


@pytest.mark.parametrize(("name", "ranks", "kept"), [("llama", 3, False), ("t5", 2, True), ("deepseek_v3", 2, True)])
def test_every_rank_allocates_what_is_planned(name: str, ranks: int, kept: bool, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, name, precision="bf16", gradient_accumulation_steps=2 * ranks)
    recipe = recipe.model_copy(update={"activation_checkpointing": "none" if kept else "unit"})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    with ForkedRanks() as forked:
        codes = forked.run(tmp_path / "r.yaml", ranks)
    assert codes == [0] * ranks, (recipe.output_dir / "logs" / "forked.log").read_text()
    lines = (recipe.output_dir / "metrics.jsonl").read_text().splitlines()
    planned = Plan.load(recipe.output_dir / "plan.json").nvme_bytes
    assert max(json.loads(line)["nvme_bytes"] for line in lines) == planned


def test_auto_keeps_the_activations_that_memory_holds(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", tier="cpu")
    figures = describe(recipe, 1)
    assert recipe.activation_checkpointing == "auto"
    assert make_plan(recipe, figures).kept_units == tuple(sorted(figures.model.order[:-1]))
    unit = recipe.model_copy(update={"activation_checkpointing": "unit"})
    needed = make_plan(unit, figures).limits[0].needed
    assert make_plan(unit, figures).kept_units == ()
    one_more = int(figures.model.units[1].saved_bytes * KEPT_MORE) * 3
    offload = recipe.offload.model_copy(update={"cpu_memory": needed + one_more})
    plan = make_plan(recipe.model_copy(update={"offload": offload}), figures)
    assert len({1, 2} & set(plan.kept_units)) == 1  # of the two layers; the embedding saves next to nothing
    assert plan.limits[0].needed <= needed + one_more


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("per_sweep", [1, 3])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "mixtral", "bert", "deepseek_v3"])
def test_traffic_is_as_planned(name: str, per_sweep: int, clip: float | None, tmp_path: Path) -> None:
    """A step reads ahead for the next one, so only the sum over a run is exact; its last update is a flush."""
    train: dict[str, Any] = {"micro_batches_per_sweep": per_sweep, "max_grad_norm": clip, "max_steps": 12}
    recipe = recipe_of(tmp_path, name, **train, precision="bf16" if name == "deepseek_v3" else "fp32")
    plan = make_plan(recipe, describe(recipe, 1))
    lines = run(recipe, plan)
    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in lines)
    assert moved / len(lines) == pytest.approx(plan.nvme_traffic, rel=0.08)


EXACT = {"llama": ("fp32", "bf16", "fp16"), "deepseek_v3": ("bf16",), "glm4_moe": ("bf16",), "t5": ("fp16",)}
"""All but llama keep parameters in fp32 then."""


@pytest.mark.parametrize(("name", "precision"), [(name, precision) for name in EXACT for precision in EXACT[name]])
def test_states_are_exact(name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, name, precision=precision)
    plan = make_plan(recipe, describe(recipe, 1))
    used: dict[str, int] = {}
    close = Engine.close

    def note_and_close(engine: Engine) -> None:
        used["states"] = engine.tiers.params.used
        close(engine)

    monkeypatch.setattr(Engine, "close", note_and_close)
    run(recipe, plan)
    states = {line.what: line.num_bytes for line in plan.lines}
    assert used["states"] == sum(states.get(name, 0) for name in ("params", "grads", "optimizer", "second"))
    assert ("second" in states) == (precision != "fp16")


@pytest.mark.parametrize(("precision", "clip"), [("fp32", 1.0), ("bf16", None)])
def test_memory_that_is_left_holds_units(
    precision: str, clip: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, "llama", precision=precision, max_grad_norm=clip, max_steps=12)
    config = {"model_type": "llama", **CONFIGS["llama"], "num_hidden_layers": 5}
    monkeypatch.setattr(memory, "CHUNK_NUMEL", 2048)  # else buffers take more than the states
    monkeypatch.setattr(search, "UNSURE", 0.0)  # which is more than they take, of what Python does
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    figures = describe(recipe, 1)
    streamed = make_plan(recipe, figures)
    losses = [line["loss"] for line in run(recipe, streamed)]
    states = sum(line.num_bytes for line in streamed.lines if line.what in ("params", "grads", "optimizer"))
    budget = streamed.limits[0].needed + states // 3
    auto = {"params": "auto", "grads": "auto", "optimizer": "auto", "cpu_memory": budget}
    recipe = recipe.model_copy(update={"offload": recipe.offload.model_copy(update=auto)})
    plan = make_plan(recipe, figures)
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


def test_what_is_left_out_of_a_checkpoint_stands_in_the_plan(tmp_path: Path) -> None:
    blank: Any = build_model(random_source("llama"))
    type(blank)._from_config(blank.config).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"v_head.weight": torch.zeros(3)}, file)
    recipe = recipe_of(tmp_path, "llama")
    model = recipe.model.model_copy(update={"config": None, "name_or_path": tmp_path / "model", "init": "pretrained"})
    recipe = recipe.model_copy(update={"model": model})
    figures = describe(recipe, 1)
    assert Figures.from_json(json.loads(json.dumps(asdict(figures)))) == figures
    shown = StringIO()
    Console(width=500, file=shown).print(plan_screen(make_plan(recipe, figures), "tiny", []))
    assert "left out, as LlamaForCausalLM has no place for it: v_head.weight" in shown.getvalue()


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    plan = make_plan(recipe, describe(recipe, 2))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert Plan.load(tmp_path / "plan.json") == plan


def test_auto_leaves_memory_only_as_far_as_it_must(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", tier="auto")
    figures = describe(recipe, 1)
    assert set(make_plan(recipe, figures).placement.values()) == {"cpu"}
    needs = make_plan(recipe, figures).limits[0].needed
    budget = recipe.offload.model_copy(update={"cpu_memory": needs - 1})
    with pytest.raises(CapacityError, match=r"cpu needs .*, offload\.cpu_memory allows"):
        make_plan(recipe.model_copy(update={"offload": budget.model_copy(update={"cpu_memory": 1 << 20})}), figures)


@pytest.mark.parametrize(("kept", "count"), [(None, 50), (2, 3), (80, 50)])
def test_checkpoints_take_the_space_the_plan_says(kept: int | None, count: int, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", max_steps=99).model_copy(
        update={"checkpoint": Checkpoint(interval=2, keep_latest_k=kept)}
    )
    figures = describe(recipe, 2)
    (limit,) = (limit for limit in make_plan(recipe, figures).limits if limit.tier == "checkpoints")
    assert limit.needed == count * checkpoint_bytes(figures)
    many = recipe.model_copy(update={"checkpoint": Checkpoint(interval=1)})
    endless = replace(figures, data=replace(figures.data, max_steps=10**9))
    with pytest.raises(CapacityError, match=r"checkpoints need .*TiB, this machine allows .*keep_latest_k"):
        make_plan(many, endless)


def test_a_checkpoint_is_as_large_as_the_plan_says(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama").model_copy(update={"checkpoint": Checkpoint(interval=3)})
    figures = describe(recipe, 1)
    run(recipe, make_plan(recipe, figures))
    manifest = Manifest.load(recipe.output_dir / "checkpoints" / "latest")
    assert manifest.layout.num_bytes - len(manifest.layout.header) == checkpoint_bytes(figures)


@pytest.fixture
def other_drive() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"zinf-test-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("tiers", "precision", "share"),
    [
        ({}, "fp32", 0),  # updates write into the checkpoint
        ({"params": "cpu"}, "bf16", 0),  # which holds the masters, a part of the optimizer's states
        ({"params": "cpu"}, "fp32", 1 / 3),
        (dict.fromkeys(CLASSES, "cpu"), "fp32", 1),
    ],
)
def test_a_checkpoint_moves_what_the_plan_says(
    tiers: dict[str, str], precision: str, share: float, tmp_path: Path, closed: list[Closed]
) -> None:
    assert_checkpoint_moves(tmp_path, closed, tiers, precision, share)


def test_a_checkpoint_on_another_drive_is_a_second_copy(
    tmp_path: Path, other_drive: Path, closed: list[Closed]
) -> None:
    plan = assert_checkpoint_moves(tmp_path, closed, {"nvme_path": str(other_drive)}, "fp32", 1)
    assert plan.checkpoint is not None
    assert not plan.checkpoint.drive_shared


def assert_checkpoint_moves(
    folder: Path, closed: list[Closed], tiers: dict[str, str], precision: str, share: float
) -> Plan:
    """A step with a checkpoint writes `share` of it beside what a step writes."""
    recipe = recipe_of(folder, "llama", precision=precision, max_steps=4)
    offload = recipe.offload.model_validate({**recipe.offload.model_dump(exclude_none=True), **tiers})
    recipe = recipe.model_copy(update={"offload": offload})
    figures = describe(recipe, 1)
    plain = make_plan(recipe, figures)
    assert plain.checkpoint is None
    losses = [line["loss"] for line in run(recipe, plain)]
    written = sum(tier.written for tier in closed)
    closed.clear()
    recipe = recipe.model_copy(update={"checkpoint": Checkpoint(interval=2)})
    plan = make_plan(recipe, figures)
    assert plan.checkpoint is not None
    assert plan.checkpoint.num_bytes == checkpoint_bytes(figures)
    assert plan.checkpoint.traffic == round(share * plan.checkpoint.num_bytes)
    assert Plan.load(written_to(folder / "plan.json", plan)) == plan
    screen = StringIO()
    Console(width=500, file=screen).print(plan_screen(plan, "tiny", []))
    assert f"every 2 steps {format_bytes(plan.checkpoint.num_bytes)} to {recipe.output_dir}" in screen.getvalue()
    assert [line["loss"] for line in run(recipe, plan)] == losses
    assert sum(tier.written for tier in closed) - written == 2 * plan.checkpoint.traffic
    return plan


def written_to(path: Path, plan: Plan) -> Path:
    path.write_text(json.dumps(plan.to_json()))
    return path


def test_a_slow_drive_of_checkpoints_holds_up_their_steps(tmp_path: Path) -> None:
    """Beside the tier's traffic where it is the same drive, and beside nothing else where it is another."""
    recipe = recipe_of(tmp_path, "llama", tier="cpu").model_copy(update={"checkpoint": Checkpoint(interval=2)})
    figures = describe(recipe, 1)
    profile = profile_here(figures, [tmp_path], None)
    slow = replace(profile, drives=replace(profile.drives, read=1e6, write=1e6, both=1e6))
    for name, tier in (("cpu", recipe), ("nvme", recipe_of(tmp_path, "llama"))):
        plan = make_plan(tier.model_copy(update={"checkpoint": recipe.checkpoint}), figures, slow)
        assert plan.checkpoint is not None
        if name == "cpu":
            assert plan.checkpoint.step_s == pytest.approx(plan.checkpoint.num_bytes / 1e6)
            assert plan.checkpoint.step_s > plan.step_s
        else:
            assert plan.checkpoint.step_s == plan.step_s


@pytest.mark.parametrize("said", [TRIED, GUESSED])
def test_a_model_that_needs_data_is_planned_and_says_so(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that no shape can answer ends the dry forward; the run trains as it would have."""
    recipe = recipe_of(tmp_path, "llama")
    known = describe(recipe, 1)
    whole = run(recipe, make_plan(recipe, known))
    forward = LlamaMLP.forward

    def asking(self: LlamaMLP, x: torch.Tensor) -> Any:
        assert float(x.detach().sum()) == float(x.detach().sum())
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", asking)
    if said == GUESSED:
        monkeypatch.setitem(TRIAL_FLOPS, "cpu", 0)
    unknown = describe(recipe, 1)
    (line,) = set(unknown.model.notes) - set(known.model.notes)
    assert line.startswith(said)
    assert Figures.from_json(json.loads(json.dumps(asdict(unknown)))) == unknown
    assert unknown.model.surveyed == (said == TRIED)
    for seen, dry in zip(unknown.model.units, known.model.units, strict=True):
        assert seen.saved_bytes >= 1.5 * dry.saved_bytes
    plan = make_plan(recipe, unknown)
    assert [line["loss"] for line in run(recipe, plan)] == [line["loss"] for line in whole]


@pytest.mark.filterwarnings("ignore")
def test_parts_that_text_never_calls_stay_on_their_tier(tmp_path: Path) -> None:
    """A vision tower is neither held in memory nor read again and again; its parameters are what they were."""
    recipe = recipe_of(tmp_path, "llama", max_steps=8)
    config = next(iter(configs("llava")))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    figures = describe(recipe, 1)
    called = {unit.name: unit.calls for unit in figures.model.units}
    assert called["model.vision_tower.encoder.layers.0"] == 0
    assert called["model.language_model.layers.0"] == 1
    plan = make_plan(recipe, figures)
    assert plan.working.resident_bytes < sum(unit.param_bytes for unit in figures.model.units if not unit.calls)
    lines = run(recipe, plan)
    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in lines)
    assert moved / len(lines) == pytest.approx(plan.nvme_traffic, rel=0.08)
    assert max(line["nvme_bytes"] for line in lines) <= plan.nvme_bytes
