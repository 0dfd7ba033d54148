"""`zinf launch` as a user runs it: what it leaves in the run's folder, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file, save_file

from forked_ranks import ForkedRanks
from programs import command
from tiny_models import random_source
from workshop import NVME, ZINF, Ended, Workshop, wait_for_steps
from zinf_cli.errors import ZinfError
from zinf_cli.models.model import build_model
from zinf_cli.plan.refusal import does_not_fit
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.figures import find_figures


def test_a_run_and_what_it_leaves(workshop: Workshop) -> None:
    ended = workshop.launch("--json", "logging.tensorboard=true", "profiler.enabled=true", "train.eval_interval=2")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == ended.summary
    files = {path.name for path in ended.run_dir.iterdir()}
    assert {"recipe.yaml", "plan.json", "metrics.jsonl", "summary.json", "trace.json", "logs", "tensorboard"} == files

    steps = [line for line in ended.metrics if "loss" in line]
    assert [line["step"] for line in ended.metrics] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in ended.metrics if "eval_loss" in line] == [0, 2, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {
        "step", "loss", "lr", "grad_norm", "tokens", "step_s", "tokens_per_s", "tflops_per_rank", "wait_s",
        "device_bytes", "cpu_bytes", "nvme_bytes", "nvme_read_bytes", "nvme_write_bytes",
    } <= steps[0].keys()  # fmt: skip
    assert all(line["tokens"] == 6 * 16 for line in steps)
    assert ended.summary["status"] == "done"
    assert ended.summary["measured"]["nvme_bytes"] <= ended.summary["predicted"]["nvme_bytes"]

    trace = json.loads((ended.run_dir / "trace.json").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in trace if event["name"] == "thread_name"}
    busy = {lanes[event["tid"]] for event in trace if event["ph"] == "X"}
    assert {"compute", "update", "nvme read", "nvme write"} <= busy

    done = subprocess.run([*ZINF, "trace", str(ended.run_dir), "--json"], capture_output=True, text=True, check=True)
    (rank,) = json.loads(done.stdout)["ranks"]
    assert 0 < rank["lanes"]["compute"]["busy"] < 1
    assert rank["lanes"]["nvme read"]["bytes"] > 0
    assert len(rank["longest_waits"]) <= 5
    shown = subprocess.run([*ZINF, "trace", str(ended.run_dir)], capture_output=True, text=True, check=True)
    assert "longest waits" in shown.stdout

    resolved = yaml.safe_load((ended.run_dir / "recipe.yaml").read_text())
    assert resolved["optimizer"]["betas"] == [0.9, 0.999]
    assert list((ended.run_dir / "tensorboard").glob("events.*"))
    assert workshop.left_behind() == []


def test_losses_are_the_same_for_every_placement_and_number_of_ranks(workshop: Workshop, forked: ForkedRanks) -> None:
    one = workshop.fork(forked, "one")
    workshop.content["offload"] = {}
    memory = workshop.fork(forked, "memory")
    two_drives = [workshop.nvme / "a", workshop.nvme / "b"]
    workshop.content["offload"] = {**NVME, "nvme_path": list(map(str, two_drives))}
    two = workshop.fork(forked, "two", ranks=2)
    for drive in two_drives:
        drive.rmdir()  # which a launcher does
    three = workshop.launch("--slots", "3", "train.micro_batches_per_sweep=1")
    assert three.code == 0, three.err
    assert memory.losses == one.losses
    for run in (two, three):
        assert run.losses == pytest.approx(one.losses, rel=1e-5)
    assert workshop.left_behind() == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_precision_learns_as_fp32_does(workshop: Workshop, precision: str, forked: ForkedRanks) -> None:
    ended = workshop.fork(forked, "run", f"train.precision={precision}")
    assert ended.losses[-1] < ended.losses[0] - 0.5
    assert max(line["nvme_bytes"] for line in ended.metrics if "loss" in line) > 2 * 21_700 * (2 + 4 + 12) / 2


def test_a_dry_run_shows_the_plan_and_touches_nothing(workshop: Workshop) -> None:
    ended = workshop.launch("--dry-run", "--json", "--slots", "2")
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert plan["world_size"] == 2
    assert plan["placement"] == NVME
    assert "train.precision=auto" in ended.err
    assert not ended.run_dir.exists()
    assert not workshop.nvme.exists()


def test_all_errors_of_a_recipe_come_at_once(workshop: Workshop) -> None:
    workshop.content["train"]["micro_batchsize"] = 2
    workshop.content["optimizer"]["lr"] = "fast"
    workshop.content["offload"]["cpu_memory"] = "48 apples"
    del workshop.content["dataset"]["path"]
    ended = workshop.launch("learning_rate=1", "train.max_steps")
    assert ended.code == 2
    message = ended.message
    lines = {line.split(": ")[0]: n for n, line in enumerate(workshop.recipe.read_text().splitlines(), 1)}
    assert (
        f"tiny.yaml:{lines['  micro_batchsize']}: train.micro_batchsize: unknown key, did you mean micro_batch_size?"
        in (message)
    )
    assert f"tiny.yaml:{lines['  lr']}: optimizer.lr: expected a number, got 'fast'" in message
    assert f"tiny.yaml:{lines['  cpu_memory']}: offload.cpu_memory: expected a size such as 48GiB" in message
    assert "dataset.path is missing" in message
    assert "command line: learning_rate=1: learning_rate: unknown key, did you mean optimizer.lr?" in message
    assert "command line: train.max_steps: expected KEY=VALUE" in message
    assert ended.out == ""


def test_a_recipe_that_is_not_there(workshop: Workshop) -> None:
    done = subprocess.run([*ZINF, "launch", str(workshop.recipe)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "No such file" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["dataset.path=nowhere.txt"], 2, "no such file or folder: "),
        (["--slots", "9"], 2, "can't be dealt to 9 ranks"),
        (["offload.nvme_path=/proc/zinf"], 3, "/proc/zinf: can't create"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    workshop: Workshop, arguments: list[str], code: int, said: str
) -> None:
    ended = workshop.launch(*arguments)
    assert ended.code == code, ended.err
    assert said in ended.message
    assert "Traceback" not in ended.err
    assert not (ended.run_dir / "metrics.jsonl").exists()
    assert workshop.left_behind() == []


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("train.global_batch_size=1998", 2, "fewer than the 1998 of one batch"),
        ("model.config.vocab_size=64", 2, "is outside the model's embedding of 64 rows"),
        ("model.config.num_attention_heads=5", 2, "hidden size"),
        ("offload.cpu_memory=100MiB", 4, "cpu needs"),
        ("offload.nvme_space=64KiB", 4, "nvme needs"),
    ],
)
def test_what_else_is_found_before_anything_is_loaded(workshop: Workshop, change: str, code: int, said: str) -> None:
    """A launch tells all of it as it tells the errors above."""
    workshop.write()
    recipe = load_recipe(workshop.recipe, [change])
    with pytest.raises(ZinfError) as caught:
        raise does_not_fit(best_plan(recipe, find_figures(recipe, 1)))
    assert caught.value.exit_code == code
    assert said in caught.value.line()


def test_a_checkpoint_with_tensors_that_do_not_fit(workshop: Workshop) -> None:
    directory = workshop.folder / "model"
    blank: Any = build_model(random_source("llama"))
    type(blank)._from_config(blank.config).save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    del stored["model.norm.weight"]
    stored["model.layers.0.input_layernorm.weight"] = stored["lm_head.weight"].clone()
    stored["adapter"] = stored["lm_head.weight"].clone()
    save_file(stored, directory / "model.safetensors")
    workshop.content["model"] = {"name_or_path": str(directory)}
    workshop.write()
    with pytest.raises(ZinfError) as caught:
        find_figures(load_recipe(workshop.recipe), 1)
    assert caught.value.exit_code == 2
    for part in ("1 missing: model.norm.weight", "1 extra: adapter", "1 misshaped: model.layers.0.input_layernorm"):
        assert part in caught.value.line()


def test_a_loss_that_is_nan_stops_the_run_with_its_step_and_text(workshop: Workshop, forked: ForkedRanks) -> None:
    ended = workshop.launch("optimizer.lr=1e30", "train.max_steps=9")
    assert ended.code == 1
    step = len(ended.losses) + 1
    assert 1 < step < 9
    assert f"step {step}: loss " in ended.message
    assert "gradient norm nan" in ended.message
    assert "(windows " in ended.message
    assert "train.non_finite=skip" in ended.message
    assert workshop.left_behind() == []
    skipped = workshop.fork(forked, "skipping", "optimizer.lr=1e30", "train.max_steps=9", "train.non_finite=skip")
    assert f"note: skipped step {step}: loss " in skipped.err


def test_a_rank_that_is_killed_is_named(workshop: Workshop) -> None:
    process = workshop.start("train.max_steps=100000", "--slots", "2")
    wait_for_steps(workshop.folder / "run", 3)
    below = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    (victim,) = [
        found for found in psutil.process_iter(["name"]) if found.pid in below and found.info["name"] == "zinf rank 1"
    ]
    victim.kill()
    ended = workshop.end(process)
    assert ended.code == 1
    assert "rank 1: killed by SIGKILL" in ended.message
    assert "rank-00001.log" in ended.message
    assert ended.summary["status"] == "failed"
    assert workshop.left_behind() == []


def test_ctrl_c_twice(workshop: Workshop) -> None:
    process = workshop.start("train.max_steps=100000", "--slots", "2")
    wait_for_steps(workshop.folder / "run", 3)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
    assert_interrupted(workshop, workshop.end(process))


def assert_interrupted(workshop: Workshop, ended: Ended) -> None:
    assert ended.code == 130, ended.err
    assert ended.summary["status"] == "interrupted"
    assert ended.summary["steps"] == len(ended.losses)
    assert workshop.left_behind() == []


def test_a_run_in_memory_as_a_file_system_does_not_share_its_folder_and_ends_by_ctrl_c(workshop: Workshop) -> None:
    memory = Path("/dev/shm/zinf-test")
    process = workshop.start("train.max_steps=100000", "--slots", "2", f"offload.nvme_path={memory}")
    wait_for_steps(workshop.folder / "run", 3)
    second = workshop.launch()
    assert second.code == 3
    assert "another run is using this folder" in second.message
    os.killpg(process.pid, signal.SIGINT)
    ended = workshop.end(process)
    assert "stopping after this step" in ended.err
    assert_interrupted(workshop, ended)
    assert f"note: {memory}: this is memory (tmpfs), not a drive" in " ".join(ended.err.split())
    assert not memory.exists()


def test_a_run_is_not_its_screens(workshop: Workshop) -> None:
    command = workshop.command("--json", "train.max_steps=2", "checkpoint.interval=1", "profiler.enabled=true")
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(command, env=workshop.environment(), stdout=full, stderr=full, check=False)
    assert done.returncode == 0
    assert Ended(0, "", "", workshop.folder / "run").summary["status"] == "done"
    assert (workshop.folder / "run" / "checkpoints" / "step-00000002" / "manifest.json").exists()


def test_help_imports_no_torch() -> None:
    words = command("imported", "zinf_cli.cli:main", "--help")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "launch" in done.stdout
    assert not {"torch", "transformers", "pydantic"} & set(done.stderr.splitlines()[-1].split())


def test_a_run_without_a_trace_is_told(tmp_path: Path) -> None:
    done = subprocess.run([*ZINF, "trace", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run with profiler.enabled=true" in " ".join(done.stderr.split())
