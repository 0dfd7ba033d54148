"""The placement that is chosen is the fastest that fits; a recipe's estimate is the plan of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tiny_models import CONFIGS
from tiny_recipes import recipe_of
from zinf_cli.commands.estimate import Flags
from zinf_cli.commands.estimate_recipe import estimate_recipe
from zinf_cli.errors import CapacityError, RecipeError, UsageError, ZinfError
from zinf_cli.machine.drive_files import GROWTH
from zinf_cli.machine.profile_file import Best, Links, Measured, Nvme, to_profile
from zinf_cli.plan.exact import reasons_of
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import CLASSES, Choice
from zinf_cli.plan.placement import placements, undominated
from zinf_cli.plan.predict import profile_here
from zinf_cli.plan.search import best_plan
from zinf_cli.plan.temporaries import WORKSPACE_BYTES, compute_bytes
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.train.figures import find_figures

pytestmark = pytest.mark.usefixtures("own_folders")

MIB = 2**20


def measured(folder: Path, rate: float = 2e9) -> Measured:
    best = Best(bytes_per_s=rate, block_size=4 * MIB, threads=4)
    links = Links(
        accelerators=0, cpu_memory=16 << 30, matmul={"fp32": {16: 2e10}}, block={"fp32": {16: 1.6e10}}, adamw=4e8
    )
    nvme = Nvme(folders=(folder,), space=1 << 40, read=best, write=best, both=rate)
    return Measured(nvme=nvme, links=links)


def figures_of(recipe: Recipe) -> Figures:
    return find_figures(recipe, 1)


def test_all_placements_are_tried_and_the_frugal_one_comes_last() -> None:
    ways = list(placements({"params": "auto", "grads": "cpu", "optimizer": "auto"}, "device"))
    assert len(ways) == 9
    assert ways[0] == {"params": "device", "grads": "cpu", "optimizer": "device"}
    assert ways[-1] == {"params": "nvme", "grads": "cpu", "optimizer": "nvme"}


def test_on_an_accelerator_only_placements_that_nothing_beats_are_timed() -> None:
    ways = [{"params": "cpu", "grads": "nvme"}, {"params": "nvme", "grads": "cpu"}, {"params": "nvme", "grads": "nvme"}]
    assert undominated([(way, number) for number, way in enumerate(ways)]) == [0, 1]


def test_what_has_to_leave_memory_is_what_costs_least(tmp_path: Path) -> None:
    """Parameters are read twice in each of eight sweeps, moments are streamed once."""
    recipe = recipe_of(tmp_path, "llama", tier="auto", global_batch_size=16, micro_batches_per_sweep=1)
    large = {**CONFIGS["llama"], "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24}
    model = recipe.model.model_copy(update={"config": {"model_type": "llama", **large}})
    recipe = recipe.model_copy(update={"activation_checkpointing": "unit", "model": model})
    figures = figures_of(recipe)
    profile = profile_here(figures, [tmp_path], measured(tmp_path, rate=1e7))
    ample = tight = best_plan(recipe, figures, profile)
    assert set(ample.placement.values()) == {"cpu"}
    budget = ample.limits[0].needed
    while "nvme" not in tight.placement.values():
        budget -= 16 * MIB
        offload = recipe.offload.model_copy(update={"cpu_memory": budget})
        tight = best_plan(recipe.model_copy(update={"offload": offload}), figures, profile)
    assert tight.placement["params"] == "cpu"
    assert tight.step_s > ample.step_s
    reasons = reasons_of(tight, recipe)
    assert all("left for it" in reasons[state] for state, tier in tight.placement.items() if tier == "nvme")


def test_each_thread_that_multiplies_has_a_workspace_on_the_accelerator(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    choices = [Choice(dict.fromkeys(CLASSES, "cpu"), count, "device") for count in (1, 4)]
    few, more = (compute_bytes(figures_of(recipe), choice) for choice in choices)
    on_cpu = [compute_bytes(figures_of(recipe), replace(choice, compute_tier="cpu")) for choice in choices]
    assert few - on_cpu[0] == 3 * WORKSPACE_BYTES
    assert more - on_cpu[1] == 6 * WORKSPACE_BYTES


def test_a_faster_drive_is_a_shorter_step(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    figures = figures_of(recipe)
    slow, fast = (
        best_plan(recipe, figures, profile_here(figures, [tmp_path], measured(tmp_path, rate))) for rate in (1e7, 1e9)
    )
    assert slow.bottleneck == "nvme"
    assert slow.step_s > 5 * fast.step_s


def test_a_measured_machine_is_the_same_to_a_launch_and_to_an_estimate(tmp_path: Path) -> None:
    found = measured(tmp_path)
    here = profile_here(figures_of(recipe_of(tmp_path, "llama")), [tmp_path], found)
    there = replace(to_profile(found), device_memory=here.device_memory, cpu_memory=here.cpu_memory)
    assert there == here
    assert here.drives.may_use == 1 << 40  # of which a file system's share was taken off already


def test_a_drive_that_was_not_measured_is_assumed(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    figures = figures_of(recipe)
    assert profile_here(figures, [tmp_path], measured(tmp_path)).drives.measured
    assert not profile_here(figures, [tmp_path], measured(Path("/proc"))).drives.measured
    assert not profile_here(figures, [tmp_path], None).drives.measured


def answer(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **flags: Any) -> dict[str, Any]:
    estimate_recipe(path, overrides, Flags(**flags, as_json=True), Console(stderr=True))
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_recipe_is_estimated_as_it_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    recipe = recipe_of(tmp_path, "llama-tied")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    found = answer(tmp_path / "r.yaml", capsys)
    request.getfixturevalue("looked_at_here")
    plan = best_plan(recipe, figures_of(recipe))
    assert found["params"] == plan.figures.model.num_params
    assert found["placement"] == plan.placement
    assert found["tiers"]["nvme"]["need_bytes"] == plan.nvme_bytes + GROWTH
    assert found["model_states_bytes"] == sum(line.num_bytes for line in plan.lines[:3])
    assert found["nvme_traffic_bytes"] == plan.nvme_traffic
    assert (
        answer(tmp_path / "r.yaml", capsys, "train.seq_len=32")["activation_bytes"]["checkpoints"]
        > (found["activation_bytes"]["checkpoints"])
    )


@pytest.mark.usefixtures("looked_at_here")
def test_a_config_is_enough_and_the_machine_may_be_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "gpt2", "n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "n_positions": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = answer(tmp_path, capsys, hardware="dgx2", seq_len=128, global_batch=32)
    assert found["architecture"] == "GPT2LMHeadModel"
    assert found["hardware"] == "dgx2"
    assert found["gpus_per_node"] == 16
    assert found["micro_batches"] == 2
    assert found["precision"] == "bf16"
    assert set(found["placement"].values()) == {"device"}
    device = found["tiers"]["device"]  # of a host, as of an estimate without a model
    assert 16 * (28 << 30) < device["may_use_bytes"] <= 16 * (32 << 30)
    assert sum(device["terms"].values()) == device["need_bytes"]


@pytest.mark.usefixtures("looked_at_here")
def test_a_flag_counts_as_given_also_if_it_says_the_default_of_an_estimate_without_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, "llama", micro_batch_size=2)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    asked, one = (
        answer(tmp_path / "r.yaml", capsys, global_batch=4, **flags) for flags in ({}, {"micro_batch_size": 1})
    )
    assert (asked["micro_batches"], one["micro_batches"]) == (2, 4)


@pytest.mark.usefixtures("looked_at_here")
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"model_type": "nonsense"}', ZinfError, "nonsense"),
        ('{"hidden_size": 3}', RecipeError, "no model_type"),
        ("{", RecipeError, "not valid JSON"),
    ],
)
def test_a_config_that_is_none_is_refused(
    text: str, error: type[Exception], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message) as caught:
        answer(tmp_path / "config.json", capsys)
    assert getattr(caught.value, "exit_code", None) == 2


@pytest.mark.usefixtures("looked_at_here")
def test_what_does_not_fit_elsewhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, "llama", tier="cpu")
    budget = recipe.offload.model_copy(update={"cpu_memory": MIB})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe.model_copy(update={"offload": budget})))
    with pytest.raises(CapacityError, match="cpu needs"):
        answer(tmp_path / "r.yaml", capsys, hardware="rtx4090-workstation")
    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.usefixtures("looked_at_here")
def test_several_hosts_share_the_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "gpt2", "n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 1000, "n_positions": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    one, four = (answer(tmp_path, capsys, hardware="dgx2", seq_len=128, nodes=nodes) for nodes in (1, 4))
    assert (one["nodes"], four["nodes"]) == (1, 4)
    assert one["gpus_per_node"] == four["gpus_per_node"] == 16
    assert one["micro_batches"] == four["micro_batches"] == 1
    assert one["model_states_bytes"] == pytest.approx(four["model_states_bytes"], rel=0.05)
    for found in (one, four):
        terms = found["tiers"]["device"]["terms"]
        states = sum(terms[state] for state in ("params", "grads", "optimizer")) * found["nodes"]
        assert states == pytest.approx(found["model_states_bytes"], rel=0.05)
    with pytest.raises(UsageError, match="ranks of a host"):
        answer(tmp_path, capsys, nodes=2)


@pytest.mark.parametrize("flag", [{"max_model": True}, {"strategy": "zero-3"}])
def test_flags_of_a_closed_form_do_not_go_with_a_recipe(
    flag: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="go with --params"):
        answer(tmp_path / "r.yaml", capsys, **flag)
