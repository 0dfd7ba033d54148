"""`zinf launch` of a model whose block is larger than the memory it is given: cut into parts, it learns the same."""

from __future__ import annotations

import json

import pytest

from forked_ranks import ForkedRanks
from workshop import Workshop

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
