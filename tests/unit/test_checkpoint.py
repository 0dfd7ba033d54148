"""Checkpoints: what is saved is what goes on, wherever it lay and lies; what is damaged is found and named."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoints import params_of, resumed, save
from plain import LR, batches, engine_losses, every_other_unit_cached, everything_on, open_engine
from small_drives import fill
from tiny_models import CONFIGS, random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import MANIFEST, Manifest
from zinf_cli.checkpoint.verify import verify
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.errors import CapacityError, CheckpointError, DamagedError
from zinf_cli.model_state import PAGE
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position
from zinf_cli.train.setup import model_loss

STEPS = 4


def assert_goes_on(name: str, tmp_path: Path, before: EngineOptions, after: EngineOptions, **how: Any) -> None:
    """Half of the steps, a checkpoint, the other half in another engine: the bits of all steps in one."""
    opened: dict[str, Any] = {"freeze": how.pop("freeze", ""), "dtype": how.pop("dtype", torch.float32)}
    whole = open_engine(random_source(name), before, **opened)
    losses = engine_losses(whole, STEPS, close=False, **how)
    first = open_engine(random_source(name), before, **opened)
    engine_losses(first, STEPS // 2, close=False, **how)
    folder = save(first, tmp_path / "run", STEPS // 2)
    first.close()
    second = resumed(folder, name, after, **opened)
    assert engine_losses(second, STEPS, first=STEPS // 2, close=False, **how) == losses[STEPS // 2 :]
    expected = params_of(whole)
    for parameter, value in params_of(second).items():
        assert torch.equal(value, expected[parameter]), parameter
    whole.close()
    second.close()


@pytest.mark.sampled
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    assert_goes_on(name, tmp_path, everything_on("nvme", tmp_path / "a"), everything_on("cpu", tmp_path / "b"))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("before", "after"), [("cpu", "nvme"), ("nvme", "nvme"), ("device", "cpu")])
def test_every_placement_and_precision(before: str, after: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = [everything_on(tier, tmp_path / tier) for tier in (before, after)]
    assert_goes_on("llama-tied", tmp_path, *options, freeze="layers.0.mlp", dtype=dtype)


def test_updates_done_in_the_backward_pass(tmp_path: Path) -> None:
    nvme = everything_on("nvme", tmp_path / "a")
    assert_goes_on("llama", tmp_path, nvme, nvme, clip=None, eager=True)


PASSING = {2, 3, 5, 7}
"""Steps whose checkpoint is taken in passing: some in a row, some with others between them."""
MIXED: dict[str, Any] = {"params": "cpu", "grads": "nvme", "optimizer": "nvme", "activations": "cpu"}


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "how", ["deferred", "eager", "speculative", "in memory", "mixed", "another drive", "dropped", "cached"]
)
def test_taken_in_passing_it_is_what_a_pause_would_have_written(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """And the run goes on as if there had been none."""
    options = everything_on("cpu" if how == "in memory" else "nvme", tmp_path / "nvme")
    options = replace(options, speculate=how in ("speculative", "cached"))
    if how == "cached":
        options = every_other_unit_cached(options)
    if how == "mixed":
        options = replace(options, **MIXED)
    elif how == "another drive":
        options = replace(options, nvme_folders=(tmp_path / "nvme", Path("/dev/shm")))
    source = (
        random_source("opt", layerdrop=0.5, num_hidden_layers=4, ffn_dim=16)
        if how == "dropped"
        else random_source("llama")
    )
    freeze = "layers.0.mlp" if how in ("deferred", "mixed") else ""
    clip = {"eager": None, "speculative": 1.12, "cached": 1.12}.get(how, 1.0)
    losses, states = [], []
    for in_passing in (False, True):
        run_dir = tmp_path / str(in_passing)
        engine = open_engine(source, options, freeze=freeze, dtype=dtype)
        writer = CheckpointWriter(run_dir, engine, Ranks(), lambda: iter([]), None)
        found = []
        for step in range(max(PASSING)):
            work = [
                MicroBatch(partial(model_loss, engine.model, ids, ids), 1 / 3, 1000 * step + number)
                for number, ids in enumerate(batches(step, 3))
            ]
            sink = writer.begin(step + 1) if in_passing and step + 1 in PASSING else None
            result = engine.train_step(work, AdamW(LR), max_grad_norm=clip, eager=how == "eager", sink=sink)
            position = Position(step + 1, "fp32", 3, "text", None, {"seed": 0})
            if sink is not None:
                writer.complete(position)
            elif step + 1 in PASSING:
                writer.write(position)
            writer.advance()
            found.append((result.losses, result.grad_norm, result.updated))
        engine.flush()
        writer.finish()
        losses.append(found)
        writer.close()
        engine.close()
        states.append([Manifest.load(folder) for folder in folders.checkpoints_of(run_dir)])
        assert not [bad for folder in folders.checkpoints_of(run_dir) for bad in verify(folder) if bad.problem]
    assert losses[0] == losses[1]
    assert {manifest.step for manifest in states[0]} == PASSING
    assert states[0] == states[1]
    if how in ("speculative", "cached"):
        assert {updated for _, _, updated in losses[0]} == {True, False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a trained llama with a frozen part."""
    engine = open_engine(random_source("llama"), EngineOptions(), freeze="layers.0.mlp")
    engine_losses(engine, 2, close=False)
    folder = save(engine, tmp_path_factory.mktemp("run"), 2)
    engine.close()
    return folder


def test_a_ranks_file_is_an_ordinary_safetensors_file_on_whole_pages(checkpoint: Path) -> None:
    path = checkpoint / "rank-00000.safetensors"
    stored = load_file(path)
    layout = Manifest.load(checkpoint).layout
    assert len(layout.header) % PAGE == 0
    assert all(region.start % PAGE == region.num_bytes % PAGE == 0 for region in layout.regions)
    assert path.stat().st_size == layout.num_bytes
    assert stored.keys() == {region.name for region in layout.regions}
    reader = CheckpointReader(checkpoint)
    for unit in reader.manifest.units:
        for flat in unit.flats:
            for param in flat.params:
                for field in flat.fields:
                    value = stored[f"{unit.name}/{field}"][param.offset : param.offset + param.numel]
                    assert torch.equal(reader.read(param.name, field, 0, param.numel), value)
                assert param.updates == (2 if flat.trainable else 0)
    assert not stored["model.layers.0/exp_avg"].equal(torch.zeros_like(stored["model.layers.0/exp_avg"]))
    reader.close()


def test_the_manifest_comes_back_as_it_was_written(checkpoint: Path) -> None:
    manifest = Manifest.load(checkpoint)
    assert manifest.dump() == (checkpoint / MANIFEST).read_bytes()
    assert (manifest.step, manifest.sequences, manifest.world_size) == (2, 6, 1)
    assert all(verdict.problem is None for verdict in verify(checkpoint))
    assert (checkpoint.parent / "latest").resolve() == checkpoint
    assert folders.find_checkpoint(checkpoint.parent.parent) == checkpoint


@contextmanager
def flipped(path: Path, offset: int) -> Iterator[None]:
    """One bit of a file is another while the context lasts."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
        file.flush()
        yield
        file.seek(offset)
        file.write(bytes([byte]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_anywhere_is_found_and_named(checkpoint: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in checkpoint.iterdir())))
    offset = data.draw(st.integers(0, path.stat().st_size - 1))
    with flipped(path, offset):
        damaged = {verdict.name: verdict.problem for verdict in verify(checkpoint) if verdict.problem}
        assert damaged.keys() == {path.name}
        if path.name.startswith("rank-"):
            first, last = (int(word) for word in damaged[path.name].split("bytes ")[1].split(" (")[0].split(" to "))
            assert first <= offset <= last
    assert not [verdict for verdict in verify(checkpoint) if verdict.problem]


def test_what_is_damaged_is_not_loaded(checkpoint: Path) -> None:
    path = checkpoint / "rank-00000.safetensors"
    engine = open_engine(random_source("llama"), EngineOptions(), freeze="layers.0.mlp")
    with flipped(path, path.stat().st_size // 2), pytest.raises(DamagedError, match="damaged in bytes"):
        engine.load_state(CheckpointReader(checkpoint))
    engine.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors: .* long, was written"):
        CheckpointReader(checkpoint)
    path.unlink()
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors: missing"):
        CheckpointReader(checkpoint)
    path.write_bytes(whole)


def test_only_whole_ones_count_and_the_oldest_go(tmp_path: Path) -> None:
    engine = open_engine(random_source("llama"), EngineOptions())
    for step in (1, 2, 3):
        save(engine, tmp_path, step, keep=2)
    assert [folders.step_of(folder) for folder in folders.checkpoints_of(tmp_path)] == [3, 2]
    (folders.step_folder(tmp_path, 3) / MANIFEST).unlink()
    assert folders.find_checkpoint(tmp_path) == folders.step_folder(tmp_path, 2)
    assert folders.remains_of(tmp_path) == [folders.step_folder(tmp_path, 3)]
    save(engine, tmp_path, 3, keep=2)
    assert folders.find_checkpoint(tmp_path) == folders.step_folder(tmp_path, 3)
    engine.close()
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        folders.find_checkpoint(tmp_path / "checkpoints" / "latest" / "..")
    with pytest.raises(CheckpointError, match="no such folder"):
        folders.find_checkpoint(tmp_path / "nowhere")


def test_a_drive_that_is_full_leaves_what_was_there(tmp_path: Path) -> None:
    """Nothing is left of the one there was no room for; a run goes on without it, and says so."""
    engine = open_engine(random_source("llama"), EngineOptions())
    before = save(engine, tmp_path, 1)
    said: list[str] = []
    writer = CheckpointWriter(tmp_path, engine, Ranks(), lambda: iter([]), 1, said.append)
    position = Position(3, "fp32", 9, "text", None, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        with pytest.raises(CapacityError, match="no room for a checkpoint: rank 0 needs"):
            save(engine, tmp_path, 2)
        assert writer.begin(3, required=False) is None
        assert not writer.complete(position)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said[0].startswith("no checkpoint step-00000003, the run goes on without: ")
    assert "no room for a checkpoint: rank 0 needs" in said[0]
    assert {path.name for path in before.parent.iterdir()} == {before.name, "latest"}
    assert not [verdict for verdict in verify(before) if verdict.problem]
    writer.write(replace(position, step=4))  # there is room again
    assert [folders.step_of(folder) for folder in folders.checkpoints_of(tmp_path)] == [4]
    writer.close()
    engine.close()


@pytest.mark.parametrize("ends", [True, False])
def test_a_checkpoint_that_finds_no_room_in_the_end_ends_a_run_if_it_is_its_last(ends: bool, small_drive: Path) -> None:
    """A run that is told to stop in a step whose checkpoint is due learns it when that one is under way."""
    engine = open_engine(random_source("llama"), EngineOptions())
    said: list[str] = []
    files = [("licence", bytes(1 << 20))]
    writer = CheckpointWriter(small_drive, engine, Ranks(), lambda: iter(files), 1, said.append)
    file = writer.begin(3, required=False)
    assert file is not None
    engine.save(file)
    writer.complete(Position(3, "fp32", 9, "text", None, {}))
    fill(small_drive)
    if ends:
        with pytest.raises(CapacityError, match="step-00000003: no room for a checkpoint: No space left on device"):
            writer.finish()
    else:
        writer.begin(6, required=False)
        assert said[0].startswith("no checkpoint step-00000003, the run goes on without: ")
    writer.close()
    engine.close()
    assert not folders.checkpoints_of(small_drive)


def zinf(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zinf_cli.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_doctor_names_what_is_damaged(checkpoint: Path) -> None:
    whole = zinf("doctor", checkpoint.parent.parent, "--json")
    assert whole.returncode == 0, whole.stderr
    report = json.loads(whole.stdout)
    assert report["checkpoint"] == str(checkpoint)
    assert {file["name"] for file in report["files"]} == {path.name for path in checkpoint.iterdir()}
    with flipped(checkpoint / "config.json", 3):
        damaged = zinf("doctor", checkpoint)
    assert damaged.returncode == 2
    assert f"error: {checkpoint}: config.json is damaged in bytes 0 to " in damaged.stderr
    assert "rank-00000.safetensors" in damaged.stdout
    assert zinf("doctor", checkpoint / "rank-00000.safetensors").returncode == 2


def test_clean_takes_what_is_nothing_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    dead, alive = tmp_path / "runs" / "dead", tmp_path / "runs" / "alive"
    for run_dir in (dead, alive):
        shutil.copytree(checkpoint.parent.parent, run_dir, symlinks=True)
        for name in ("recipe.yaml", "plan.json", "metrics.jsonl.123.partial"):
            (run_dir / name).touch()
        half = folders.step_folder(run_dir, 9)
        half.mkdir()
        (half / "rank-00000.safetensors").write_bytes(bytes(8192))
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    untouched = sorted(alive.rglob("*"))
    first, second = zinf("clean", tmp_path / "runs"), zinf("clean", tmp_path / "runs")
    os.close(lock)
    assert first.returncode == 0, first.stderr
    assert f"{folders.step_folder(dead, 9)}: a checkpoint that was not finished, 8.00 KiB" in first.stdout
    assert "2 removed, 8.00 KiB" in first.stdout
    assert second.stdout == "nothing left behind\n"
    assert sorted(alive.rglob("*")) == untouched
    assert {path.name for path in dead.iterdir()} == {"recipe.yaml", "plan.json", "checkpoints"}
    assert [folders.step_of(folder) for folder in folders.checkpoints_of(dead)] == [2]
    assert zinf("clean", tmp_path / "nowhere").returncode == 2
