"""A run whose losses or gradients are not finite."""

from __future__ import annotations

from forked_ranks import ForkedRanks
from workshop import Workshop


def test_a_run_that_has_blown_up_keeps_its_good_checkpoints(workshop: Workshop, forked: ForkedRanks) -> None:
    """Steps that are not finite write none, let none go, and end the run when there are many in a row."""
    workshop.content["train"]["global_batch_size"] = 4
    workshop.content["checkpoint"] = {"interval": 1, "keep_latest_k": 2}
    workshop.fork(forked, "run", "train.max_steps=3")
    ended = workshop.launch("train.max_steps=40", "optimizer.lr=1e30", "train.non_finite=skip", "--slots", "2")
    assert ended.code == 1
    assert [line["step"] for line in ended.metrics][-1] == 13
    assert "step 14: loss " in ended.message
    assert "after 9 steps that were skipped too" in ended.message
    good = ended.run_dir / "checkpoints" / "step-00000003"
    assert f"the last good checkpoint: checkpoint.resume={good}; log: " in ended.message
    assert ended.err.count("note: skipped step") == 9
    assert "note: no checkpoint step-00000005: its step changes nothing" in ended.err
    there = sorted(path.name for path in good.parent.iterdir() if path.name.startswith("step-"))
    assert there == ["step-00000002", "step-00000003", "step-00000004"]
    again = workshop.fork(
        forked, "again", "train.max_steps=5", "optimizer.lr=1e-3", "train.non_finite=skip", f"checkpoint.resume={good}"
    )
    assert again.losses[-1] is not None
    assert workshop.left_behind() == []
