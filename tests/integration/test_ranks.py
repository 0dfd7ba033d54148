"""Several ranks over gloo: bit-identical for every placement, and the losses of one rank within rounding."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from late_writes import late_writes
from own_processes import as_ranks
from plain import engine_losses, every_other_unit_cached, open_engine, plain_losses, relative_difference
from tiny_models import random_source
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.units import chunked_loss

STEPS, COUNT = 3, 6
FAILING = 5
"""Steps of a run of which one fails that was updated speculatively."""
CLASSES = ("params", "grads", "optimizer", "activations")


Case = tuple[str, dict[str, Any], dict[str, Any]]
"""An architecture, changes to its configuration, and where its state lies.

The last are fields of EngineOptions, and `cached`, `late`, `dtype`, `most`, `chunk` (logits), `steps` and `settings`
of engine_losses().
"""


def of_rank(ranks: Ranks, cases: list[Case], folder: Path) -> list[list[list[float]]]:
    """For each case, the losses of this rank's micro-batches of every step."""
    return [losses_of(ranks, name, changes, folder, **placement) for name, changes, placement in cases]


def losses_of(
    ranks: Ranks,
    name: str,
    changes: dict[str, Any],
    folder: Path,
    *,
    cached: bool = False,
    late: bool = False,
    dtype: torch.dtype = torch.float32,
    most: int | None = None,
    chunk: int | None = None,
    steps: int = STEPS,
    settings: dict[str, Any] | None = None,
    **placement: Any,
) -> list[list[float]]:
    if chunk is not None:
        chunked_loss.CHUNK = chunk
    options = EngineOptions(**placement, nvme_folders=(folder / f"rank-{ranks.rank}",))
    if cached:
        options = every_other_unit_cached(options)
    source = random_source(name, **changes)
    engine = open_engine(source, options, ranks, dtype=dtype, most=most, in_chunks=chunk is not None)
    with late_writes() if late else nullcontext():
        return engine_losses(engine, steps, count=COUNT, rank=ranks.rank, world_size=ranks.world_size, **settings or {})


def run_ranks(world_size: int, cases: list[Case], folder: Path) -> list[list[list[float]]]:
    """For each case, the losses of all micro-batches of every step, ranks side by side."""
    by_rank = as_ranks(world_size, of_rank, cases, folder)
    return [
        [[loss for losses in step for loss in losses] for step in zip(*case, strict=True)]
        for case in zip(*by_rank, strict=True)
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_whatever_the_placement(world_size: int, tmp_path: Path) -> None:
    placements: list[dict[str, Any]] = [dict.fromkeys(CLASSES, tier) for tier in ("cpu", "device", "nvme")]
    if world_size == 2:
        placements += [{state: "nvme"} for state in CLASSES]
    placements += [{**placements[2], "cached": True}]
    architectures: list[tuple[str, dict[str, Any]]] = [
        ("llama-tied", {"attention_dropout": 0.2}),
        ("mixtral", {}),
        ("t5", {}),
        ("opt", {"layerdrop": 0.5, "num_hidden_layers": 4}),  # every micro-batch leaves out other layers
    ]
    cases: list[Case] = [("llama", {}, placement) for placement in placements]
    cases += [(name, changes, placements[2]) for name, changes in architectures]
    cases += [("llama", {}, {**placements[2], "micro_batches_per_sweep": 1})]
    cases += [(name, {}, {**placements[2], "most": 1000}) for name in ("llama-tied", "mixtral")]  # in parts
    in_chunks = {**placements[2], "chunk": 7 * 96}  # the loss
    cases += [("phi", {}, in_chunks), ("gemma2", {}, in_chunks), ("gemma2", {}, {**in_chunks, "most": 1000})]
    architectures += [(name, {}) for name in ("llama", "llama-tied", "mixtral", "phi", "gemma2", "gemma2")]
    eager = {"settings": {"clip": None, "eager": True}}
    cases += [("llama", {}, {**placement, **eager}) for placement in placements[:3:2]]
    clips = (0.78, 0.81)  # at the first one, the speculation of step 4 fails
    speculating = {**placements[2], "speculate": True, "steps": FAILING}
    cases += [("llama", {}, {**speculating, "settings": {"clip": clip}}) for clip in clips]
    cases += [("llama", {}, {**speculating, "late": True, "settings": {"clip": clips[0]}})]
    cases += [("llama", {}, {**placements[2], "settings": {"infinite": (1, COUNT - 1)}})]  # of the last rank alone
    mixed: dict[str, Any] = {"dtype": torch.bfloat16}  # and fp32 routers
    cases += [("deepseek_v3", {}, {**placement, **mixed}) for placement in placements[:3:2]]
    *found, in_memory, on_nvme, failing, holding, late, infinite, in_bf16, bf16_on_nvme = run_ranks(
        world_size, cases, tmp_path
    )
    assert in_bf16 == bf16_on_nvme
    expected = plain_losses(random_source("deepseek_v3"), STEPS, count=COUNT, dtype=torch.bfloat16)
    assert relative_difference(in_bf16, expected) < 2e-3
    assert late == failing
    expected = plain_losses(random_source("llama"), STEPS, count=COUNT, infinite=(1, COUNT - 1))
    assert infinite[1][-1] == expected[1][-1] == math.inf
    infinite[1][-1] = expected[1][-1] = 1.0
    assert relative_difference(infinite, expected) < 1e-6
    for losses, clip in zip((failing, holding), clips, strict=True):
        expected = plain_losses(random_source("llama"), FAILING, count=COUNT, clip=clip)
        assert relative_difference(losses, expected) < 1e-6
    assert in_memory == on_nvme
    without_clip = plain_losses(random_source("llama"), STEPS, count=COUNT, clip=None)
    assert relative_difference(in_memory, without_clip) < 1e-6
    llama, others = found[: len(placements)], found[len(placements) :]
    assert all(losses == llama[0] for losses in llama)
    assert relative_difference(llama[0], plain_losses(random_source("llama"), STEPS, count=COUNT)) < 1e-6
    for losses, (name, changes) in zip(others, architectures, strict=True):
        source = random_source(name, **changes)
        assert relative_difference(losses, plain_losses(source, STEPS, count=COUNT)) < 1e-6
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[]] * world_size


def test_ranks_agree_on_experts_that_their_tokens_are_routed_to(tmp_path: Path) -> None:
    many = {"num_experts": 16}
    cases: list[Case] = [
        ("qwen3_moe", many, {**dict.fromkeys(CLASSES, tier), "most": 2000}) for tier in ("cpu", "device", "nvme")
    ]
    first, *others = run_ranks(2, cases, tmp_path)
    assert others == [first, first]
    expected = plain_losses(random_source("qwen3_moe", **many), STEPS, count=COUNT)
    assert relative_difference(first, expected) < 1e-6
