"""Runs that go on: after Ctrl-C, a crash, damage; on other ranks, in other places, by other recipes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from crash_chain import TinyRun
from forked_ranks import ForkedRanks
from tiny_models import CONFIGS
from workshop import Workshop, wait_for_steps
from zinf_cli.checkpoint.folder import checkpoints_of, step_folder
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.cli import app
from zinf_cli.models.checkpoint_reader import CheckpointReader

STEPS = 8


@pytest.fixture(scope="module")
def unbroken(forked: ForkedRanks, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Eight steps in one go on one rank."""
    run = TinyRun.write(tmp_path_factory.mktemp("unbroken"), STEPS)
    assert forked.run(run.recipe, 1) == [0], run.log
    return run


def go_on(forked: ForkedRanks, folder: Path, steps: int, ranks: int = 1, **changes: Any) -> TinyRun:
    run = TinyRun.write(folder, steps, **changes)
    assert forked.run(run.recipe, ranks) == [0] * ranks, run.log
    return run


def refused(forked: ForkedRanks, folder: Path, **changes: Any) -> str:
    """What a run that can't go on says."""
    run = TinyRun.write(folder, STEPS, **changes)
    assert forked.run(run.recipe, 1) == [1]
    return run.log.splitlines()[-1]


def losses(run: TinyRun) -> list[float]:
    return [loss for _, loss, _ in run.trajectory]


def test_any_number_of_ranks_goes_on_with_any_other(forked: ForkedRanks, tmp_path: Path) -> None:
    model = {"config": {"model_type": "llama", **CONFIGS["llama"]}}  # dropout would differ: other micro-batches
    unbroken = go_on(forked, tmp_path / "unbroken", STEPS, model=model)
    for steps, ranks in ((2, 1), (4, 2), (6, 3), (8, 1)):
        run = go_on(forked, tmp_path / "resharded", steps, ranks, model=model)
        assert run.newest.world_size == ranks
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-6)
    assert [step for step, _, _ in run.trajectory] == list(range(1, STEPS + 1))


def test_flats_of_two_dtypes_are_cut_anew_for_other_ranks(forked: ForkedRanks, tmp_path: Path) -> None:
    """deepseek_v3's routers are fp32 in bf16. What moves no weight shows that every weight is where it was."""
    model = {"config": {"model_type": "deepseek_v3", **CONFIGS["deepseek_v3"]}}
    train: dict[str, Any] = {
        "precision": "bf16",
        "seq_len": 16,
        "micro_batch_size": 2,
        "global_batch_size": 4,
    }
    go_on(forked, tmp_path / "first", 2, 2, model=model, train={**train, "max_steps": 2})
    shutil.copytree(tmp_path / "first", tmp_path / "second")  # in which "latest" is a folder
    still = {"model": model, "train": {**train, "max_steps": 3}, "optimizer": {"lr": 1e-30, "weight_decay": 0.0}}
    runs = [go_on(forked, tmp_path / name, 3, ranks, **still) for name, ranks in (("first", 2), ("second", 1))]
    assert [run.newest.world_size for run in runs] == [2, 1]
    there, here = (weights_of(step_folder(run.run_dir, 3)) for run in runs)
    assert all(torch.equal(value, here[name]) for name, value in there.items())
    assert losses(runs[0])[2] == pytest.approx(losses(runs[1])[2], rel=2e-3)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    weights = {name: reader.param(name) for name in reader.shapes}
    reader.close()
    return weights


def test_any_placement_goes_on_with_any_other(forked: ForkedRanks, unbroken: TinyRun, tmp_path: Path) -> None:
    for steps, tier in ((3, "cpu"), (5, "nvme"), (8, "device")):
        placement = dict.fromkeys(("params", "grads", "optimizer", "activations"), tier)
        run = go_on(forked, tmp_path, steps, offload=placement)
    assert run.trajectory == unbroken.trajectory
    assert run.state == unbroken.state


def test_scaled_losses_go_on(forked: ForkedRanks, tmp_path: Path) -> None:
    """fp16: the scale and its count are part of the state; then bf16 and fp32 go on from the masters."""
    whole = go_on(forked, tmp_path / "whole", STEPS, train={"precision": "fp16"})
    for steps in (3, STEPS):
        run = go_on(forked, tmp_path / "halves", steps, train={"precision": "fp16", "max_steps": steps})
    assert run.trajectory == whole.trajectory
    assert run.state == whole.state
    assert run.newest.loss_scale == (2.0**16, STEPS)
    for steps, precision in ((10, "bf16"), (12, "fp32")):
        run = go_on(forked, tmp_path / "halves", steps, train={"precision": precision, "max_steps": steps})
    assert run.newest.loss_scale is None
    assert losses(run)[-1] < losses(whole)[-1]


def test_batches_of_another_size_take_the_text_up_where_it_was(forked: ForkedRanks, tmp_path: Path) -> None:
    train = {"seq_len": 16, "micro_batch_size": 2}
    go_on(forked, tmp_path, 4, train={**train, "global_batch_size": 6, "max_steps": 4})
    run = go_on(forked, tmp_path, 6, train={**train, "global_batch_size": 10, "max_steps": 6})
    assert run.newest.sequences == 4 * 6 + 2 * 10
    assert "note: resumed with another train.global_batch_size, train.max_steps" in run.log
    assert "note: resumed with 10 sequences a step, 6 before" in run.log


def test_what_a_recipe_can_not_go_on_with_is_refused_by_its_key(forked: ForkedRanks, tmp_path: Path) -> None:
    run = go_on(forked, tmp_path, 2)
    before = (run.run_dir / "metrics.jsonl").read_text()
    train = {"micro_batch_size": 2, "global_batch_size": 6}
    assert "train.seq_len was 16, is 8" in refused(forked, tmp_path, train={**train, "seq_len": 8})
    assert "dataset.shuffle was True, is False" in refused(forked, tmp_path, dataset={"shuffle": False})
    assert "dataset.eval_fraction: the text is another one" in refused(forked, tmp_path, dataset={"eval_fraction": 0.1})
    wider = {**run_config(run), "intermediate_size": 64}
    assert "model.config.intermediate_size was 48, is 64" in refused(forked, tmp_path, model={"config": wider})
    other = {**run_config(run), "hidden_act": "gelu"}
    said = refused(forked, tmp_path, model={"config": other})
    assert "model.config.hidden_act was silu, is gelu" in said
    assert "checkpoint.resume=never" in said
    assert (run.run_dir / "metrics.jsonl").read_text() == before


def run_config(run: TinyRun) -> dict[str, Any]:
    config: dict[str, Any] = run.newest.recipe["model"]["config"]
    return config


def test_a_copied_checkpoint_starts_another_run(forked: ForkedRanks, unbroken: TinyRun, tmp_path: Path) -> None:
    """With its whole state by checkpoint.resume, with its weights alone by model.name_or_path."""
    first = go_on(forked, tmp_path / "first", 4)
    copy = tmp_path / "elsewhere"
    shutil.copytree(step_folder(first.run_dir, 4), copy)
    shutil.rmtree(tmp_path / "first")
    second = go_on(forked, tmp_path / "second", STEPS, checkpoint={"resume": str(copy)})
    assert second.trajectory == unbroken.trajectory[4:]
    assert second.state == unbroken.state

    for number, source in enumerate((copy, second.run_dir)):
        model = {"config": None, "name_or_path": str(source)}
        third = go_on(forked, tmp_path / f"third-{number}", 2, model=model, optimizer={"lr": 1e-9})
        assert losses(third)[0] < losses(unbroken)[0] - 0.5
    assert losses(third)[0] == pytest.approx(losses(unbroken)[-1], abs=0.5)


def test_ctrl_c_a_crash_and_a_damaged_checkpoint(workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    """As a user meets them; at the end stand the bits of a run in one go."""
    steps = 40
    run_dir = tmp_path / "run"
    workshop.content["checkpoint"] = {"interval": 3}
    workshop.fork(forked, "whole", f"train.max_steps={steps}")

    process = workshop.start(f"train.max_steps={steps}", "checkpoint.interval=1000")
    wait_for_steps(run_dir, 4)
    os.killpg(process.pid, signal.SIGTERM)
    stopped = workshop.end(process)
    assert stopped.code == 130, stopped.err
    assert Manifest.load(run_dir / "checkpoints" / "latest").step == stopped.summary["steps"]

    process = workshop.start(f"train.max_steps={steps}")
    wait_for_steps(run_dir, stopped.summary["steps"] + 7)  # the first checkpoint is whole when the second one begins
    os.killpg(process.pid, signal.SIGKILL)
    workshop.end(process)
    newest, before, *_ = checkpoints_of(run_dir)
    os.truncate(newest / "rank-00000.safetensors", 100_000)

    ended = workshop.launch(f"train.max_steps={steps}")
    assert ended.code == 0, ended.err
    assert f"note: not resumed from {newest.name}: " in ended.err
    assert "rank-00000.safetensors: 97.7 KiB long, was written " in ended.err
    assert ended.summary["resumed_from_step"] == int(before.name.removeprefix("step-"))
    assert ended.summary["steps"] == steps
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    trajectories = [
        [(line["step"], line["loss"]) for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
         if "loss" in line]
        for folder in (run_dir, tmp_path / "whole")
    ]  # fmt: skip
    assert trajectories[0] == trajectories[1]
    ends = [Manifest.load(folder / "checkpoints" / "latest") for folder in (run_dir, tmp_path / "whole")]
    assert ends[0].files["rank-00000.safetensors"] == ends[1].files["rank-00000.safetensors"]
    assert workshop.left_behind() == []

    again = workshop.launch(f"train.max_steps={steps}")
    assert again.code == 0
    assert "nothing to do: the run has done its 40 steps" in again.err
    anew = workshop.launch("train.max_steps=1", "checkpoint.resume=never", "checkpoint.interval=1")
    assert anew.code == 0, anew.err
    assert len(anew.metrics) == 2
    assert checkpoints_of(run_dir / "earlier" / "1")[0].name == "step-00000040"
    exported = CliRunner().invoke(app, ["export", str(run_dir), str(tmp_path / "out")])
    assert exported.exit_code == 0, exported.stderr
    assert exported.stdout.startswith(f"{tmp_path / 'out'}: step 1, ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
