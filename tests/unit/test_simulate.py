"""The simulation does what lanes do, and the schedule moves the bytes that the plan says."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.plan.schedule import ADAMW_BYTES, Op, Step, UnitLoad, sweep_steps
from zinf_cli.plan.simulate import play, write_timeline

RATES = {
    "matmul": 1.0, "adamw": 1.0, "network": 1.0, "inside": 1.0, "copy in": 1.0, "copy out": 1.0,
    "nvme read": 1.0, "nvme write": 1.0, "both": 2.0,
    "drive share": 1.0, "compute share": 1.0,
}  # fmt: skip


def op(lane: str, amount: float, *after: int) -> Op:
    return Op(lane, "matmul" if lane == "compute" else lane, lane, amount, after)


def seconds(*ops: Op, rates: Mapping[str, float] = RATES) -> float:
    return play([op("compute", 0), *ops], [0, len(ops)], rates).step_s


def test_lanes_work_side_by_side_and_each_does_one_thing_at_a_time() -> None:
    assert seconds(op("compute", 3), op("nvme read", 2), op("compute", 1, 2)) == pytest.approx(4)
    assert seconds(op("nvme read", 2), op("compute", 3, 1)) == pytest.approx(5)
    assert seconds(op("compute", 1), op("compute", 2), op("compute", 3)) == pytest.approx(6)


def test_a_drive_that_is_no_faster_both_ways_shares_itself() -> None:
    both = (op("nvme read", 2), op("nvme write", 3), op("compute", 0, 1, 2))
    assert seconds(*both) == pytest.approx(3)
    assert seconds(*both, rates={**RATES, "both": 1.0}) == pytest.approx(5)


def test_a_drive_and_the_cores_that_serve_it_slow_each_other_down() -> None:
    rates = {**RATES, "drive share": 0.5, "compute share": 0.8}
    work = (op("nvme read", 4), op("compute", 4), op("compute", 0, 1, 2))
    assert seconds(*work, rates=rates) == pytest.approx(5 + 1.5)  # while it computes for 5 s, 2.5 are read
    assert seconds(op("nvme read", 4), op("compute", 4, 1), rates=rates) == pytest.approx(4 + 4)


def test_the_lane_takes_what_comes_first_in_the_schedule() -> None:
    ops = [op("compute", 0), op("nvme read", 1), op("compute", 2), op("compute", 5, 1), op("compute", 1)]
    played = play(ops, [0, 4], RATES)
    assert played.spans[3] == (2, 7)
    assert played.spans[4] == (7, 8)


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["deferred", "speculative", "in vain", "eager"]),
    st.booleans(),
    st.lists(st.sampled_from(["device", "cpu", "nvme"]), min_size=4, max_size=4),
)
def test_any_step_can_be_played_and_moves_the_planned_bytes(
    units: int, micro_batches: int, per_sweep: int, world: int, update: str, accelerator: bool, tiers: list[str]
) -> None:
    placement = dict(zip(("params", "grads", "optimizer", "activations"), tiers, strict=True))
    load = [UnitLoad(f"unit {number}", 120, 120, 7, 5) for number in range(units)]
    step = Step(load, micro_batches, per_sweep, world, placement, accelerator, update=update, chunk_params=50)
    ops, ends = sweep_steps(step, 3)
    assert len(ends) == 3
    played = play(ops, ends, RATES)
    assert all(
        start >= max((played.spans[b][1] for b in ops[n].after), default=0) for n, (start, _) in enumerate(played.spans)
    )
    sweeps = -(-micro_batches // per_sweep)
    own = 120 / world
    away = {state for state, tier in placement.items() if tier == "nvme"}
    visits = sweeps * (2 * units - 1)
    updates = 2 if update == "in vain" else 1
    planned = {
        "params": (own * 2 * visits, own * 2 * units * updates),
        "grads": (
            own * 4 * units * (sweeps - (update in ("speculative", "eager"))),
            own * 4 * units * (sweeps - (update == "eager")),
        ),
        "optimizer": (own * 10 * units * updates,) * 2,
        "activations": (5 * micro_batches * (units - 1),) * 2,
    }
    for lane, direction in (("nvme read", 0), ("nvme write", 1)):
        moved = sum(o.amount for o in ops if o.lane == lane)
        assert moved == pytest.approx(3 * sum(planned[state][direction] for state in away))


def test_compute_takes_a_forward_and_three_more() -> None:
    """Forward, recomputed forward and backward; the last unit is not recomputed."""
    load = [UnitLoad(f"unit {number}", 0, 0, 10, 0) for number in range(5)]
    placement = dict.fromkeys(("params", "grads", "optimizer", "activations"), "device")
    step = Step(load, 2, 2, 1, placement, accelerator=True)
    assert play(*sweep_steps(step), RATES).step_s == pytest.approx(2 * 10 * (4 * 4 + 3))
    assert play(*sweep_steps(replace(step, per_sweep=1)), RATES).step_s == pytest.approx(2 * 10 * (4 * 4 + 3))


def test_what_is_computed_beside_units_takes_its_time() -> None:
    """MLPs in chunks of tokens are computed once more in backward; code between units, in forward and in backward."""
    load = [UnitLoad(f"unit {number}", 0, 0, 10, 0, again=0.5, glue_bytes=ADAMW_BYTES) for number in range(5)]
    step = Step(load, 2, 2, 1, dict.fromkeys(("params", "grads", "optimizer", "activations"), "device"), True)
    units, glue = 2 * 10 * (4 * 4.5 + 3.5) / RATES["matmul"], 2 * 5 * 2 / RATES["adamw"]
    assert play(*sweep_steps(step), RATES).step_s == pytest.approx(units + 3 * glue)
    assert play(*sweep_steps(replace(step, accelerator=False)), RATES).step_s == pytest.approx(units + 15 * glue)


def test_the_timeline_is_one_that_perfetto_opens(tmp_path: Path) -> None:
    load = [UnitLoad(f"unit {number}", 100, 100, 10, 4) for number in range(3)]
    placement = dict.fromkeys(("params", "grads", "optimizer", "activations"), "nvme")
    write_timeline(play(*sweep_steps(Step(load, 2, 2, 2, placement, accelerator=True)), RATES), tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"unit 0 forward", "gather unit 2", "unit 1 update"} <= {span["name"] for span in spans}
    for tid in {span["tid"] for span in spans}:
        lane = sorted((span["ts"], span["dur"]) for span in spans if span["tid"] == tid)
        assert all(a + b <= c + 1e-3 for (a, b), (c, _) in itertools.pairwise(lane))


def test_the_step_that_counts_is_like_all_that_follow() -> None:
    """Where updates are made in backward, the second still gains from the first, before which nothing was pending."""
    load = [UnitLoad(f"unit {number}", 120, 120, 40, 5) for number in range(4)]
    placement = {"params": "nvme", "grads": "nvme", "optimizer": "nvme", "activations": "cpu"}
    step = Step(load, 1, 1, 1, placement, False, update="eager", depth=3, chunk_params=100)
    rates = {**RATES, "both": 1.0}
    assert play(*sweep_steps(step), rates).step_s == pytest.approx(play(*sweep_steps(step, 7), rates).step_s)
