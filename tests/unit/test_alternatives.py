"""`zinf estimate RECIPE --explain`: what each choice would buy is what a plan of that choice says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tiny_recipes import recipe_of
from zinf_cli.commands.estimate import Flags
from zinf_cli.commands.estimate_recipe import estimate_recipe
from zinf_cli.recipe.recipe_file import dump_recipe

pytestmark = pytest.mark.usefixtures("own_folders", "looked_at_here")
MIB = 2**20


def answer(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str, explain: bool = False) -> dict[str, Any]:
    estimate_recipe(path, overrides, Flags(explain=explain, as_json=True), Console(stderr=True))
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.fixture
def path(tmp_path: Path) -> Path:
    recipe = recipe_of(tmp_path, "llama", tier="nvme", precision="fp32")
    written = tmp_path / "r.yaml"
    written.write_text(dump_recipe(recipe))
    return written


def test_each_choice_is_planned_as_if_it_were_made(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(path, capsys, explain=True)
    others = {other["change"]: other for other in found["alternatives"]}
    assert "alternatives" not in answer(path, capsys)
    keys = [change for change in others if "=" in change and "cpu_memory" not in change]
    assert {key.partition("=")[0] for key in keys} == {
        "optimizer.state_dtype", "train.max_grad_norm", "train.precision", "train.global_batch_size",
    }  # fmt: skip
    for key in keys:
        chosen = answer(path, capsys, *([key, "train.gradient_accumulation_steps=null"] if "batch" in key else [key]))
        assert others[key]["step_s"] == pytest.approx(chosen["step_s"]), key
        assert others[key]["fits"] is True
    moved = {name: other["nvme_traffic_bytes"] for name, other in others.items()}
    assert moved["optimizer.state_dtype=int8"] < moved["optimizer.state_dtype=bf16"] < found["nvme_traffic_bytes"]
    assert others["drives twice as fast"]["step_s"] < found["step_s"]
    assert others["drives twice as fast"]["nvme_traffic_bytes"] == found["nvme_traffic_bytes"]
    assert [name for name, other in others.items() if not other["other_results"]] == [
        "drives twice as fast", *(name for name in others if "cpu_memory" in name),
    ]  # fmt: skip


def test_more_memory_is_counted_from_what_the_plan_may_use(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = ["model.config.hidden_size=512", "model.config.intermediate_size=2048", "model.config.num_hidden_layers=8"]
    free = [f"offload.{state}=auto" for state in ("params", "grads", "optimizer")]
    least = answer(path, capsys, *large)["tiers"]["cpu"]["need_bytes"] + MIB
    found = answer(path, capsys, *large, *free, f"offload.cpu_memory={least}", explain=True)
    steps = [other for other in found["alternatives"] if "cpu_memory" in other["change"]]
    assert len(steps) == 4
    moved = [found["nvme_traffic_bytes"], *(other["nvme_traffic_bytes"] for other in steps)]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < moved[0]


def test_the_screen_has_a_line_for_each(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate_recipe(path, (), Flags(explain=True), Console(width=140))
    shown = capsys.readouterr().out
    table = shown[shown.index("what each choice would buy") :]
    for change in ("as planned", "optimizer.state_dtype=int8 *", "train.max_grad_norm=null *", "drives twice as fast"):
        assert table.count(change) == 1
