"""An adapter on a frozen model: the losses of plain peft, wherever the bytes lie."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forked_ranks import ForkedRanks
from in_process import run as run_here
from plain_peft import STEPS, adapted_workshop, plain
from tiny_models import batch
from workshop import NVME, Ended
from zinf_cli.errors import CheckpointError, ModelError, RecipeError, UsageError, ZinfError
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures
from zinf_cli.train.setup import open_model

MIXED = {"offload.params": "nvme", "offload.grads": "cpu", "offload.optimizer": "cpu", "offload.activations": "cpu"}
"""The model on a drive, all else in memory: what a plan chooses."""


def changes(placement: dict[str, str]) -> list[str]:
    return [f"{key}={tier}" for key, tier in placement.items()]


def on(tier: str) -> list[str]:
    return changes({f"offload.{state}": tier for state in NVME})


def test_the_losses_are_those_of_peft_on_every_tier(forked: ForkedRanks, tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path)
    run = workshop.fork(forked, "run")
    expected, _ = plain(workshop.recipe)
    assert run.losses == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.1
    norms = [line["grad_norm"] for line in run.metrics[1:]]
    for number, placement in enumerate([on("cpu"), on("device"), changes(MIXED)]):
        placed = workshop.fork(forked, f"placed-{number}", "train.max_steps=4", *placement)
        assert placed.losses == run.losses[:4]
        assert [line["grad_norm"] for line in placed.metrics[1:]] == norms[:4]
    sweeps = workshop.fork(forked, "sweeps", "train.micro_batches_per_sweep=1", "train.max_steps=4", *changes(MIXED))
    assert sweeps.losses == pytest.approx(expected[:4], rel=1e-5)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("llama-tied", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
        ("mixtral", {"target_modules": ["k_proj"], "target_parameters": EXPERTS}),
    ],
)
def test_other_modules_are_adapted_as_by_peft(
    name: str, adapter: dict[str, Any], forked: ForkedRanks, tmp_path: Path
) -> None:
    workshop = adapted_workshop(tmp_path, name, adapter)
    run = workshop.fork(forked, "run", "checkpoint.interval=10")
    expected, model = plain(workshop.recipe, **adapter)
    assert run.losses == pytest.approx(expected, rel=1e-5)
    assert_exported(run, model, tmp_path)


def assert_exported(run: Ended, trained: Any, folder: Path) -> None:
    """The run's exports compute what `trained` does, as peft loads one of them, and transformers the other."""
    export(run.run_dir, folder / "adapter")
    export(run.run_dir, folder / "merged", merge=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see plain_peft.py
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    with torch.no_grad():
        logits = trained.eval()(**batch()).logits
        assert torch.allclose(loaded.eval()(**batch()).logits, logits, atol=1e-5)
        assert torch.allclose(merged.eval()(**batch()).logits, logits, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()(**batch()).logits
        assert not torch.allclose(base, logits, atol=1e-2)


def test_ranks_and_a_resume_change_nothing(forked: ForkedRanks, tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path, adapter={"dropout": 0.2})
    workshop.content["train"]["micro_batch_size"] = 1  # which has random numbers of its own, whatever the ranks
    run = workshop.fork(forked, "run")
    ranks = workshop.fork(forked, "ranks", *changes(MIXED), "checkpoint.interval=5", "train.max_steps=5", ranks=2)
    assert ranks.losses == pytest.approx(run.losses[:5], rel=1e-6)
    checkpoint = ranks.run_dir / "checkpoints" / "step-00000005"
    assert not [key for key in load_file(checkpoint / "rank-00001.safetensors") if "frozen" in key]
    assert sum(file.stat().st_size for file in checkpoint.glob("rank-*")) < 400_000
    goes_on = workshop.fork(forked, "ranks", *on("cpu"), "checkpoint.interval=5", "train.max_steps=10")
    assert goes_on.losses == pytest.approx(run.losses, rel=1e-6)


def test_in_16_bits_the_adapter_stays_in_32(forked: ForkedRanks, tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path)
    run = workshop.fork(forked, "run", "train.precision=bf16", "checkpoint.interval=10")
    expected, _ = plain(workshop.recipe, torch.bfloat16)
    assert run.losses == pytest.approx(expected, rel=2e-3)
    assert workshop.fork(forked, "mixed", "train.precision=bf16", *changes(MIXED)).losses == run.losses
    export(run.run_dir, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.sampled
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_step_reads_the_model_twice_and_writes_none_of_it(name: str, precision: str, tmp_path: Path) -> None:
    """What is not trained before the first adapter has no backward, and the last unit one visit for both."""
    workshop = adapted_workshop(tmp_path, name)
    del workshop.content["dataset"]["eval_fraction"]
    workshop.write()
    at = [f"train.precision={precision}", f"output_dir={tmp_path / 'run'}"]
    recipe = load_recipe(workshop.recipe, [*changes(MIXED), *at])
    figures = find_figures(recipe, 1)
    plan = best_plan(recipe, figures)
    lines = [line for line in run_here(recipe, plan) if "loss" in line]
    assert {line["nvme_write_bytes"] for line in lines} == {0}
    assert sum(line["nvme_read_bytes"] for line in lines) == STEPS * plan.nvme_traffic
    units = figures.model.units
    once = [unit for unit in units if unit.resident or unit.name in ("model.embed_tokens", "lm_head")]
    if name == "llama-tied":  # one unit is both
        once = [unit for unit in units if unit.resident]
    assert plan.nvme_traffic == sum((1 if unit in once else 2) * unit.frozen_bytes for unit in units)
    assert plan.nvme_written == 0


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"target_modules": ["lm_head"]}, "adapter.target_modules: lm_head shares its weight with another module"),
        ({"target_modules": ["q_proj", "v_porj"]}, "no 'v_porj', did you mean v_proj"),
        ({"modules_to_save": ["lm_haed"]}, "adapter.modules_to_save: LlamaForCausalLM has no 'lm_haed', did you mean"),
        ({"target_parameters": ["mlp.experts.gate"]}, "adapter.target_parameters: .* no 'mlp.experts.gate'"),
        ({"target_modules": ["mlp"]}, "peft can't adapt LlamaForCausalLM: Target module LlamaMLP"),
    ],
)
def test_what_is_not_there_is_named(adapter: dict[str, Any], words: str, tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path, "llama-tied", adapter)
    with pytest.raises(ZinfError, match=words):
        open_model(load_recipe(workshop.recipe), "fp32")


def test_an_adapter_needs_a_type_and_a_trained_model(tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path)
    with pytest.raises(RecipeError, match="adapter: type is missing: type: lora"):
        load_recipe(workshop.recipe, ["adapter.type=null", "adapter.r=4"])
    with pytest.raises(RecipeError, match="an adapter is for a model that has learned"):
        load_recipe(workshop.recipe, ["model.init=random"])
    assert load_recipe(workshop.recipe, ["adapter.type=null", "adapter.r=8"]).adapter.type is None


def test_without_peft_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(adapted_workshop(tmp_path).recipe)
    monkeypatch.setattr("zinf_cli.models.adapters.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed.*pip install 'zinf\[adapters\]'"):
        open_model(recipe, "fp32")


def test_another_model_or_adapter_is_not_gone_on_with(forked: ForkedRanks, tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path)
    workshop.fork(forked, "run", "train.max_steps=2", "checkpoint.interval=2")
    checkpoint, at = tmp_path / "run" / "checkpoints" / "step-00000002", [f"output_dir={tmp_path / 'run'}"]

    def refused(*overrides: str) -> str:
        recipe = load_recipe(workshop.recipe, [*at, *overrides])
        with pytest.raises(ZinfError) as caught:
            find_figures(recipe, 1)
        return caught.value.line()

    assert "adapter.r was 8, is 4" in refused("adapter.r=4")
    assert "adapter.type was lora, is None" in refused("adapter.type=null", "adapter.r=8")
    assert f"zinf export --merge {checkpoint}" in refused(f"model.name_or_path={checkpoint}", "adapter.type=null")
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    find_figures(load_recipe(workshop.recipe, [f"model.name_or_path={tmp_path / 'moved'}", *at]), 1)
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, path, {"format": "pt"})
    assert f"the weights in {tmp_path / 'base'} are not those that the adapter was trained on" in refused()
    with pytest.raises(CheckpointError, match="are not those that the adapter was trained on"):
        export(tmp_path / "run", tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


def test_only_an_adapter_can_be_merged(forked: ForkedRanks, tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path)
    del workshop.content["adapter"]
    workshop.fork(forked, "run", "train.max_steps=1", "checkpoint.interval=1")
    with pytest.raises(UsageError, match="there is no adapter to merge"):
        export(tmp_path / "run", tmp_path / "merged", merge=True)


@pytest.mark.sampled
@pytest.mark.parametrize("target", ["auto", "all-linear"])
def test_blocks_in_parts_have_adapters(target: str, tmp_path: Path) -> None:
    workshop = adapted_workshop(tmp_path, adapter={"target_modules": target})
    losses = []
    for most in (None, 700):
        at = [*changes(MIXED), f"output_dir={tmp_path / f'run-{most}'}", "train.max_steps=4"]
        recipe = load_recipe(workshop.recipe, at)
        figures = find_figures(recipe, 1, most=most)
        lines = run_here(recipe, best_plan(recipe, figures))
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
