"""What of a run is held against its plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_recipes import recipe_of
from zinf_cli.errors import UsageError
from zinf_cli.launch.failure import first_failure
from zinf_cli.launch.runner import Outcome
from zinf_cli.launch.summary import _steady, summarise
from zinf_cli.plan.search import best_plan
from zinf_cli.plan.wear import step_bytes
from zinf_cli.run_folder.metrics import Watch
from zinf_cli.run_folder.names import START
from zinf_cli.trace import summarise_trace
from zinf_cli.train.figures import find_figures


@pytest.mark.parametrize(
    ("updated", "steady"),
    [
        ([0, 0, 0], [1, 2]),
        ([0, 0, 2, 2, 2, 0], [1, 3, 4]),  # the third updates twice, the last not at all
        ([0], [0]),
        ([0, 2], [0, 1]),
        ([], []),
    ],
)
def test_steps_that_follow_one_of_their_kind_are_compared(updated: list[int], steady: list[int]) -> None:
    steps = [{"step": number, "updated_in_backward": count} for number, count in enumerate(updated)]
    assert [step["step"] for step in _steady(steps)] == steady


@pytest.mark.usefixtures("own_folders", "stated_speed")
def test_what_is_held_against_a_plan_are_the_steps_that_had_it(tmp_path: Path) -> None:
    """A run may have gone on from its checkpoint in other places, on other ranks."""
    recipe = recipe_of(tmp_path, "llama")
    plan = best_plan(recipe, find_figures(recipe, 1))
    numbers = ("tokens", "tokens_per_s", "tflops_per_rank", "wait_s", "device_bytes", "nvme_bytes", "nvme_read_bytes")
    lines = [
        {"step": step, "loss": 4.0 / step, "updated_in_backward": 0, **dict.fromkeys(numbers, 1), **measured}
        for step, measured in enumerate(
            [{"step_s": 9.0, "cpu_bytes": 900, "nvme_write_bytes": 90}] * 4
            + [{"step_s": 2.0, "cpu_bytes": 200, "nvme_write_bytes": 20}] * 2,
            1,
        )
    ]
    found = summarise(
        plan, Watch(tmp_path, lambda line: None, lines, first_step=4), Outcome(1, None, interrupted=False)
    )
    assert (found["steps"], found["tokens"], found["first_loss"], found["resumed_from_step"]) == (6, 6, 4.0, 4)
    measured = found["measured"]
    assert (measured["step_s"], measured["cpu_bytes"], measured["drives_written"]) == (2.0, 200, 40)
    assert found["predicted"]["drives_written"] == 2 * step_bytes(plan)


@pytest.mark.parametrize("content", ["", "\0" * 8, '{"st'])
def test_files_that_are_not_whole_are_not_there(tmp_path: Path, content: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / START).write_text(content)
    (tmp_path / "logs" / "error-00000.json").write_text(content)
    watch = Watch(tmp_path, lambda line: None)
    watch.poll()
    assert watch.first_step is None
    (tmp_path / START).write_text('{"step": 3}')
    watch.poll()
    assert watch.first_step == 3
    assert first_failure(tmp_path, []) is None


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b'{"traceEvents": [1]}', b'{"traceEvents": [{"ph": "X"}]}', b"\xff"]
)
def test_what_is_no_trace_is_called_that(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(UsageError, match="not a trace"):
        summarise_trace(tmp_path / "trace.json")
