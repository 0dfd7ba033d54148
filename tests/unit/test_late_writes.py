"""How late a drive writes changes no bit: what a write under way still reads is not changed, and writes keep order."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from late_writes import late_writes
from plain import LR, batches, everything_on, open_engine
from tiny_models import random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.checkpoint.verify import verify
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.nvme import STRIPE, NvmeTier
from zinf_cli.trace import Trace
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position
from zinf_cli.train.setup import model_loss

STEPS = 7
CLIPPED = {3, 6}
"""Steps with a gradient that is clipped, after two that were not: updated speculatively, in vain."""

Found = tuple[list[list[float]], dict[int, Manifest]]


def train(folder: Path, options: EngineOptions, dtype: torch.dtype, how: str, *, save: bool) -> Found:
    """Losses, and the manifests (with checksums) of checkpoints taken in passing after each step."""
    engine = open_engine(random_source("llama"), options, dtype=dtype)
    writer = CheckpointWriter(folder, engine, Ranks(), lambda: iter([]), None)
    losses = []
    for step in range(STEPS):
        weight = (1000.0 if step in CLIPPED else 1.0) / 3
        work = [
            MicroBatch(partial(model_loss, engine.model, ids, ids), weight, n) for n, ids in enumerate(batches(step, 3))
        ]
        sink = writer.begin(step + 1) if save else None
        clip = None if how == "eager" else 50.0
        losses.append(
            engine.train_step(
                work, AdamW(LR), max_grad_norm=clip, eager=how == "eager", more=step + 1 < STEPS, sink=sink
            ).losses
        )
        if save:
            writer.complete(Position(step + 1, "fp32", 3, "text", None, {"seed": 0}))
            writer.advance()
    engine.flush()
    writer.finish()
    writer.close()
    engine.close()
    assert not [piece for path in folders.checkpoints_of(folder) for piece in verify(path) if piece.problem]
    return losses, {path.step: path for path in map(Manifest.load, folders.checkpoints_of(folder))}


@pytest.mark.sampled
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["speculative", "eager"])
def test_a_late_drive_changes_no_bit(how: str, dtype: torch.dtype, save: bool, tmp_path: Path) -> None:
    options = replace(everything_on("nvme", tmp_path / "nvme"), speculate=how == "speculative")
    expected = train(tmp_path / "prompt", options, dtype, how, save=save)
    with late_writes():
        assert train(tmp_path / "late", options, dtype, how, save=save) == expected


@pytest.mark.sampled
@pytest.mark.parametrize("late", ["embed_tokens", "layers.0", "lm_head", "resident", "grads", "exp_avg"])
def test_nor_does_one_that_is_late_with_some(late: str, tmp_path: Path) -> None:
    options = replace(everything_on("nvme", tmp_path), speculate=True)
    expected = train(tmp_path / "prompt", options, torch.float32, "speculative", save=False)
    with late_writes(late):
        assert train(tmp_path / "late", options, torch.float32, "speculative", save=False) == expected


@pytest.mark.parametrize("state", ["params", "optimizer"])
def test_state_in_memory_is_not_updated_ahead(state: str, tmp_path: Path) -> None:
    """It has no shadow that a clip could go back from."""
    in_memory: dict[str, Any] = {state: "cpu"}
    waiting = replace(everything_on("nvme", tmp_path), **in_memory)
    expected = train(tmp_path / "a", waiting, torch.float32, "deferred", save=False)
    ahead = replace(waiting, speculate=True)
    assert train(tmp_path / "b", ahead, torch.float32, "speculative", save=False) == expected


def page_aligned(num_bytes: int, value: int) -> torch.Tensor:
    buffer = Arena(num_bytes, torch.device("cpu")).allocate(num_bytes)
    assert buffer is not None
    return buffer.data.fill_(value)


def test_the_last_write_of_a_range_wins(tmp_path: Path) -> None:
    tier = NvmeTier([tmp_path], Trace())
    extent = tier.allocate(STRIPE, "weights")
    first, second, beside = (page_aligned(8192, value) for value in (1, 2, 3))
    with late_writes():
        writes = [extent.write(0, first), extent.write(4096, second), extent.write(65536, beside)]
    for write in reversed(writes):
        write.wait()
    found = page_aligned(12288, 0)
    extent.read(0, found).wait()
    assert torch.equal(found, torch.cat([first[:4096], second]))
    tier.close()


CACHED = {"cached_units": frozenset(range(0, 100, 2)), "cached_states": frozenset(("params", "optimizer"))}


@pytest.mark.parametrize(
    "in_memory", [{"params": "cpu"}, {"optimizer": "cpu"}, CACHED], ids=["params", "optimizer", "cached"]
)
def test_a_late_checkpoint_has_its_own_step(in_memory: dict[str, Any], tmp_path: Path) -> None:
    """State in memory is copied to the file behind the update: the next one must not reach it before."""
    options = replace(everything_on("nvme", tmp_path / "nvme"), speculate=True, **in_memory)
    expected = train(tmp_path / "prompt", options, torch.float32, "speculative", save=True)
    with late_writes():
        assert train(tmp_path / "late", options, torch.float32, "speculative", save=True) == expected
