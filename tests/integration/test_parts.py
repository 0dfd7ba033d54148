"""Runs of models in parts: a block that is larger than the memory it is given; other ranks and another cut."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from forked_ranks import ForkedRanks
from plain import LR, batches, plain_losses
from tiny_models import random_source
from workshop import Workshop
from zinf_cli.train.export import export

MIB = 2**20
WIDE = {"hidden_size": 512, "intermediate_size": 4096}
"""A block of 7.3M parameters: 28 MiB, and as much of gradient. Whole, slots for two take 112 MiB."""


def test_a_block_that_does_not_fit_is_computed_in_parts(workshop: Workshop, forked: ForkedRanks) -> None:
    model = workshop.content["model"]["config"]
    model.update(WIDE)
    workshop.content["optimizer"]["lr"] = 1e-4  # a larger one makes more of rounding
    whole = workshop.fork(forked, "whole")
    plan = json.loads((whole.run_dir / "plan.json").read_text())
    assert plan["figures"]["model"]["most"] is None
    needed = next(limit["needed"] for limit in plan["limits"] if limit["tier"] == "cpu")

    tight = f"offload.cpu_memory={needed - 150 * MIB}"
    ended = workshop.launch(tight, f"output_dir={workshop.folder / 'parts'}", "checkpoint.interval=2")
    assert ended.code == 0, ended.err
    assert "computed in parts of up to" in ended.err
    run = workshop.folder / "parts"
    plan = json.loads((run / "plan.json").read_text())
    assert max(unit["trainable_numel"] for unit in plan["figures"]["model"]["units"]) < 7.3e6 / 2
    found = [
        line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert found == pytest.approx(whole.losses, rel=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["measured"]["nvme_bytes"] <= summary["predicted"]["nvme_bytes"]

    again = workshop.launch(f"output_dir={run}", "train.max_steps=6")  # memory for whole blocks is there now
    assert again.code == 0, again.err
    assert "resume" in again.err
    assert "computed in parts of up to" in again.err
    assert workshop.left_behind() == []


def test_a_cut_mixture_that_changes_ranks_and_cut_ends_with_the_weights_of_plain_pytorch(
    workshop: Workshop, forked: ForkedRanks
) -> None:
    """Checkpoints are taken in passing; each rank writes its own file. The export is compared."""
    steps, each = 5, 3
    mixture = {"num_experts": 8, "num_experts_per_tok": 2}
    windows = [batches(step, each) for step in range(steps)]
    np.save(workshop.folder / "tokens.npy", torch.cat([ids.flatten() for step in windows for ids in step]).numpy())
    workshop.content["model"]["config"] = random_source("qwen3_moe", **mixture).config
    workshop.content["dataset"] = {"path": str(workshop.folder / "tokens.npy"), "shuffle": False}
    workshop.content["train"] |= {"seq_len": 12, "global_batch_size": 6}
    workshop.content["optimizer"] = {"lr": LR, "weight_decay": 0.01}
    workshop.content["checkpoint"] = {"interval": 1, "keep_latest_k": 1}
    for end, ranks, most in ((2, 2, 1000), (4, 3, 2000), (steps, 1, None)):
        ended = workshop.fork(forked, "run", f"train.max_steps={end}", ranks=ranks, most=most)
        assert json.loads((ended.run_dir / "plan.json").read_text())["figures"]["model"]["most"] == most
    expected: dict[str, torch.Tensor] = {}
    losses = plain_losses(random_source("qwen3_moe", **mixture), steps, count=each, parameters=expected)
    assert ended.losses == pytest.approx([sum(step) / each for step in losses], rel=1e-6)
    export(ended.run_dir, workshop.folder / "out")
    found = dict(AutoModelForCausalLM.from_pretrained(workshop.folder / "out").named_parameters())
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name] - values).norm() < 1e-5 * values.norm(), name
