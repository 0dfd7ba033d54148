"""What of a run is held against its plan."""

from __future__ import annotations

import pytest

from zinf_cli.launch.summary import _steady


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
