"""The plan's bytes are the engine's bytes, and its least buffers are enough."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

from forked_ranks import ForkedRanks
from in_process import Closed, run
from tiny_models import CONFIGS, random_source
from tiny_recipes import recipe_of
from zinf_cli.engine.engine import Engine
from zinf_cli.errors import CapacityError
from zinf_cli.machine.hardware import Room, room_here
from zinf_cli.machine.profiles import MEMORY_SHARE
from zinf_cli.models.model import build_model
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import KEPT_MORE
from zinf_cli.plan.plan import CheckpointStep, Plan
from zinf_cli.plan.refusal import does_not_fit
from zinf_cli.plan.search import best_plan, frugal_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.screens.plan import plan_screen
from zinf_cli.train.figures import find_figures
from zinf_cli.train.surveyed import GUESSED, TRIAL_FLOPS, TRIED

pytestmark = pytest.mark.usefixtures("own_folders", "stated_speed")


@pytest.mark.sampled
@pytest.mark.parametrize("per_sweep", [1, 3])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bert"])
def test_the_least_buffers_are_enough(name: str, per_sweep: int, tmp_path: Path, closed: list[Closed]) -> None:
    recipe = recipe_of(tmp_path, name, micro_batches_per_sweep=per_sweep)
    plan = best_plan(recipe, find_figures(recipe, 1))
    ample = run(recipe, plan)
    least = replace(plan, working=plan.working.shrunk(1 << 60))
    assert least.working.total < plan.working.total
    tight = run(recipe, least)
    assert [line["loss"] for line in tight] == [line["loss"] for line in ample]
    assert max(line["nvme_bytes"] for line in ample) == plan.nvme_bytes
    assert [tier.allocated for tier in closed] == [plan.nvme_bytes] * 2


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_a_step_that_begins_again_has_room(tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward changes the model. Then each sweep has one micro-batch, whose gradient is added to what is there."""
    plain = LlamaMLP.forward

    def counting(self: Any, x: torch.Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counting)
    losses = []
    for per_sweep in ("auto", 1):
        recipe = recipe_of(tmp_path, "llama", tier, micro_batches_per_sweep=per_sweep)
        plan = best_plan(recipe, find_figures(recipe, 1))
        assert plan.per_sweep == (1 if per_sweep == 1 else 3)
        losses.append([line["loss"] for line in run(recipe, replace(plan, working=plan.working.shrunk(1 << 60)))])
    assert losses[0] == losses[1]


def test_drives_that_are_memory_count_as_memory(tmp_path: Path) -> None:
    assert room_here([Path("/dev/shm"), tmp_path]).drives_in_memory == 0.5
    recipe = recipe_of(tmp_path, "llama")
    figures = find_figures(recipe, 1)
    for share in (0.0, 0.5, 1.0):
        plan = best_plan(recipe, figures, room=Room(1 << 34, 1 << 34, drives_in_memory=share))
        assert plan.nvme_bytes > 0
        assert [line.num_bytes for line in plan.lines if line.what == "tmpfs"] == [int(plan.nvme_bytes * share)] * (
            share > 0
        )
        cpu = next(limit for limit in plan.limits if limit.tier == "cpu")
        assert cpu.needed > plan.cpu_bytes_per_rank >= plan.nvme_bytes * share
        plan_screen(plan, "tiny", [])


def test_what_lies_on_a_device_takes_from_the_memory_that_it_shares(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", "device")
    figures = find_figures(recipe, 1)
    machine = replace(figures.machine, accelerators=1, device_bytes=1 << 34)
    plans = [
        best_plan(recipe, replace(figures, machine=replace(machine, one_pool=shared)), room=Room(1 << 34, 1 << 34))
        for shared in (False, True)
    ]
    apart, pool = ({limit.tier: limit.needed for limit in plan.limits} for plan in plans)
    assert pool["device"] == apart["device"] > 0
    assert pool["cpu"] == apart["cpu"] + apart["device"]
    screen = StringIO()
    Console(width=200, file=screen).print(plan_screen(plans[1], "tiny", []))
    assert "cpu with device" in screen.getvalue()


def test_what_an_accelerator_has_left_is_one_ranks(tmp_path: Path) -> None:
    """It was divided by the ranks of the host, as what they share is."""
    figures = find_figures(recipe := recipe_of(tmp_path, "llama", "device"), 2)
    machine = replace(figures.machine, accelerators=2, device_bytes=1 << 34)
    plan = best_plan(recipe, replace(figures, machine=machine), room=Room(1 << 34, 1 << 34))
    left = {limit.tier: limit.allowed - limit.needed for limit in plan.limits}
    assert (plan.room("device"), plan.room("cpu")) == (left["device"], left["cpu"] // 2)
    console = Console(width=200, file=(screen := StringIO()))
    console.print(plan_screen(plan, "tiny", []))
    assert "device, each of 2" in screen.getvalue()


def test_buffers_shrink_to_what_each_accelerator_has(tmp_path: Path) -> None:
    """They shrank by what all ranks of the host share: with two by half of what was needed."""
    figures = find_figures(recipe := recipe_of(tmp_path, "llama", "cpu"), 2)
    ample, room = replace(figures.machine, accelerators=2, device_bytes=1 << 34), Room(1 << 34, 1 << 34)
    whole = frugal_plan(recipe, replace(figures, machine=ample), room=room)
    spare = whole.working.total - whole.working.shrunk(whole.working.total).total
    (needed,) = (limit.needed for limit in whole.limits if limit.tier == "device")
    scarce = replace(ample, device_bytes=int((needed - spare * 9 // 10) / MEMORY_SHARE))
    assert spare
    assert frugal_plan(recipe, replace(figures, machine=scarce), room=room).fits


def test_a_model_that_no_accelerator_holds_is_planned(tmp_path: Path) -> None:
    """A placement whose updates stream nothing has no chunk buffers to shrink."""
    recipe = recipe_of(tmp_path, "llama", "auto")
    config = {"model_type": "llama", **CONFIGS["llama"], "hidden_size": 2048, "intermediate_size": 8192}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    figures = find_figures(recipe, 1)
    states = 16 * figures.model.num_params
    machine = replace(figures.machine, accelerators=1, device_bytes=states * 3 // 4)
    plan = best_plan(recipe, replace(figures, machine=machine), room=Room(1 << 34, 1 << 34))
    assert plan.fits
    assert {"device", "cpu"} <= set(plan.placement.values())


def test_the_least_buffers_are_enough_for_eager_updates(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", max_grad_norm=None)
    plan = best_plan(recipe, find_figures(recipe, 1))
    assert plan.update == "eager"
    ample = run(recipe, plan)
    tight = run(recipe, replace(plan, working=plan.working.shrunk(1 << 60)))
    assert [line["loss"] for line in tight] == [line["loss"] for line in ample]


@pytest.mark.sampled
@pytest.mark.parametrize("name", CONFIGS)
def test_kept_activations_are_as_planned(name: str, tmp_path: Path, closed: list[Closed]) -> None:
    recipe = recipe_of(tmp_path, name).model_copy(update={"activation_checkpointing": "none"})
    plan = best_plan(recipe, find_figures(recipe, 1))
    tight = replace(plan, working=plan.working.shrunk(1 << 60))
    lines = run(recipe, tight)
    states = {line.what: line.num_bytes for line in plan.lines}
    recomputing = best_plan(recipe.model_copy(update={"activation_checkpointing": "unit"}), plan.figures)
    assert states["activations"] > next(line.num_bytes for line in recomputing.lines if line.what == "activations")
    assert max(line["nvme_bytes"] for line in lines) == plan.nvme_bytes
    assert [tier.allocated for tier in closed] == [plan.nvme_bytes]


@pytest.mark.parametrize(("name", "ranks", "kept"), [("llama", 3, False), ("t5", 2, True), ("deepseek_v3", 2, True)])
def test_every_rank_allocates_what_is_planned(
    name: str, ranks: int, kept: bool, forked: ForkedRanks, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, name, precision="bf16", global_batch_size=4 * ranks)
    recipe = recipe.model_copy(update={"activation_checkpointing": "none" if kept else "unit"})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    codes = forked.run(tmp_path / "r.yaml", ranks)
    assert codes == [0] * ranks, (recipe.output_dir / "logs" / "forked.log").read_text()
    lines = (recipe.output_dir / "metrics.jsonl").read_text().splitlines()
    planned = Plan.load(recipe.output_dir / "plan.json").nvme_bytes
    assert max(json.loads(line)["nvme_bytes"] for line in lines) == planned


def test_auto_keeps_the_activations_that_memory_holds(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", tier="cpu")
    figures = find_figures(recipe, 1)
    assert recipe.activation_checkpointing == "auto"
    assert best_plan(recipe, figures).kept_units == tuple(sorted(figures.model.order[:-1]))
    unit = recipe.model_copy(update={"activation_checkpointing": "unit"})
    needed = best_plan(unit, figures).limits[0].needed
    assert best_plan(unit, figures).kept_units == ()
    one_more = int(figures.model.units[1].saved_bytes * KEPT_MORE) * 3
    offload = recipe.offload.model_copy(update={"cpu_memory": needed + one_more})
    plan = best_plan(recipe.model_copy(update={"offload": offload}), figures)
    assert len({1, 2} & set(plan.kept_units)) == 1  # of the two layers; the embedding saves next to nothing
    assert plan.limits[0].needed <= needed + one_more


EXACT = {"llama": ("fp32", "bf16", "fp16"), "deepseek_v3": ("bf16",), "glm4_moe": ("bf16",), "t5": ("fp16",)}
"""All but llama keep parameters in fp32 then."""


@pytest.mark.parametrize(("name", "precision"), [(name, precision) for name in EXACT for precision in EXACT[name]])
def test_states_are_exact(name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, name, precision=precision)
    plan = best_plan(recipe, find_figures(recipe, 1))
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


def test_what_is_left_out_of_a_checkpoint_stands_in_the_plan(tmp_path: Path) -> None:
    blank: Any = build_model(random_source("llama"))
    type(blank)._from_config(blank.config).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"v_head.weight": torch.zeros(3)}, file)
    recipe = recipe_of(tmp_path, "llama")
    model = recipe.model.model_copy(update={"config": None, "name_or_path": tmp_path / "model", "init": "pretrained"})
    recipe = recipe.model_copy(update={"model": model})
    figures = find_figures(recipe, 1)
    assert Figures.from_json(json.loads(json.dumps(asdict(figures)))) == figures
    shown = StringIO()
    Console(width=500, file=shown).print(plan_screen(best_plan(recipe, figures), "tiny", []))
    assert "left out, as LlamaForCausalLM has no place for it: v_head.weight" in shown.getvalue()


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    plan = best_plan(recipe, find_figures(recipe, 2))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_first_lines_say_whether_it_fits_where_it_lies_and_how_long_it_takes(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    plan = best_plan(recipe, find_figures(recipe, 1))
    lines = first_lines(replace(plan, step_s=100.0, bottleneck="nvme"))
    assert re.fullmatch(r"fits +CPU memory \S+ .iB of \S+ .iB, NVMe \S+ .iB of \S+ .iB", lines[0])
    assert re.fullmatch(r"lies +parameters, gradients, optimizer states, activations on NVMe", lines[1])
    assert re.fullmatch(r"takes +5 min 00 s for 3 steps, 1 min 40 s a step, bound by nvme", lines[2])
    assert lines[3] == ""
    saved = CheckpointStep(2, "checkpoints", 1 << 30, 1 << 30, drive_shared=True, step_s=130.0)
    assert "6 min 00 s for 3 steps, 1 min 40 s a step" in first_lines(replace(plan, step_s=100.0, checkpoint=saved))[2]
    elsewhere = {**plan.placement, "activations": "cpu"}
    full = tuple(replace(limit, allowed=limit.needed - 1) for limit in plan.limits)
    lines = first_lines(replace(plan, placement=elsewhere, limits=full, resume="step-1"))
    assert lines[0].startswith("too large")
    assert lines[1].endswith("parameters, gradients, optimizer states on NVMe; activations in CPU memory")
    assert "for 3 steps" not in lines[2]


@pytest.mark.parametrize(("calm_step_s", "told"), [(9.9, True), (10.0, False)])
def test_what_takes_no_longer_where_it_is_clipped_is_told_once(calm_step_s: float, told: bool, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    plan = best_plan(recipe, find_figures(recipe, 1))
    shown = StringIO()
    plan = replace(plan, update="speculative", step_s=10.0, calm_step_s=calm_step_s)
    Console(width=500, file=shown).print(plan_screen(plan, "tiny"))
    assert ("where nothing is clipped" in shown.getvalue()) == told


def first_lines(plan: Plan) -> list[str]:
    shown = StringIO()
    Console(width=500, file=shown).print(plan_screen(plan, "tiny", []))
    return [line.strip("│ ") for line in shown.getvalue().splitlines()[1:5]]


def test_auto_leaves_memory_only_as_far_as_it_must(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", tier="auto")
    figures = find_figures(recipe, 1)
    assert set(best_plan(recipe, figures).placement.values()) == {"cpu"}
    less = recipe.offload.model_copy(update={"cpu_memory": 1 << 20})
    with pytest.raises(CapacityError, match=r"cpu needs .*, offload\.cpu_memory allows"):
        raise does_not_fit(best_plan(recipe.model_copy(update={"offload": less}), figures))


@pytest.mark.parametrize(
    ("tier", "offload", "said", "steps"),
    [
        ("auto", {"cpu_memory": 1 << 20}, "; the launcher ", "raise offload.cpu_memory, shorten "),  # all is on NVMe
        ("cpu", {"cpu_memory": 1 << 20}, "; the launcher ", "raise offload.cpu_memory, move states to nvme "),
        ("nvme", {"nvme_space": 1 << 12}, "nvme needs ", "raise offload.nvme_space"),
        ("nvme", {"nvme_space": 1 << 12, "cpu_memory": 1 << 20}, "nvme needs ", "raise offload.cpu_memory, raise "),
    ],
)
def test_what_does_not_fit_names_what_can_be_done(
    tier: str, offload: dict[str, int], said: str, steps: str, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, "llama", tier=tier)
    tight = recipe.model_copy(update={"offload": recipe.offload.model_copy(update=offload)})
    refused = does_not_fit(best_plan(tight, find_figures(recipe, 1)))
    assert said in refused.message
    assert refused.hint is not None
    assert refused.hint.startswith(steps)


def test_where_memory_for_all_micro_batches_is_not_there_groups_of_them_make_sweeps(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", global_batch_size=24)
    figures = find_figures(recipe, 1)
    figures = replace(figures, model=replace(figures.model, live_bytes=50 << 20))
    together = best_plan(recipe, figures)
    assert (together.per_sweep, together.sweep_cost) == (12, None)

    def with_memory(recipe: Recipe, num_bytes: int) -> Recipe:
        return recipe.model_copy(update={"offload": recipe.offload.model_copy(update={"cpu_memory": num_bytes})})

    fours = recipe_of(tmp_path, "llama", global_batch_size=24, micro_batches_per_sweep=4)
    tight = with_memory(recipe, best_plan(with_memory(fours, 1), figures).limits[0].needed + (20 << 20))
    plan = best_plan(tight, figures)
    assert plan.per_sweep == 4
    cost = plan.sweep_cost
    assert cost is not None
    assert [limit.tier for limit in cost.lacking] == ["cpu"]
    assert cost.traffic == plan.nvme_traffic_clipped - together.nvme_traffic_clipped > 0
    assert cost.step_s > 0
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert Plan.load(tmp_path / "plan.json") == plan
    shown = StringIO()
    Console(width=500, file=shown).print(plan_screen(plan, "tiny", []))
    said = r"12 micro-batches in one, cpu would need .* of .*; more than one moves .* more a step, and takes .* longer"
    assert re.search(said, shown.getvalue())
    told = best_plan(fours, figures).sweep_cost
    assert told is not None
    assert not told.lacking


@pytest.mark.parametrize("said", [TRIED, GUESSED])
def test_a_model_that_needs_data_is_planned_and_says_so(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that no shape can answer ends the dry forward; the run trains as it would have."""
    recipe = recipe_of(tmp_path, "llama")
    known = find_figures(recipe, 1)
    whole = run(recipe, best_plan(recipe, known))
    forward = LlamaMLP.forward

    def asking(self: LlamaMLP, x: torch.Tensor) -> Any:
        assert float(x.detach().sum()) == float(x.detach().sum())
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", asking)
    if said == GUESSED:
        monkeypatch.setitem(TRIAL_FLOPS, "cpu", 0)
    unknown = find_figures(recipe, 1)
    (line,) = set(unknown.model.notes) - set(known.model.notes)
    assert line.startswith(said)
    assert Figures.from_json(json.loads(json.dumps(asdict(unknown)))) == unknown
    assert unknown.model.surveyed == (said == TRIED)
    for seen, dry in zip(unknown.model.units, known.model.units, strict=True):
        assert seen.saved_bytes >= 1.5 * dry.saved_bytes
    plan = best_plan(recipe, unknown)
    assert [line["loss"] for line in run(recipe, plan)] == [line["loss"] for line in whole]
