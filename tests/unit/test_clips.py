"""When steps are expected to clip."""

import pytest

from zinf_cli.engine.clips import Clips

MANY = 100


def after(*clipped: bool) -> Clips:
    clips = Clips()
    for one in clipped:
        clips.count(clipped=one)
    return clips


def test_two_steps_without_a_clip_begin_it() -> None:
    assert [after(*[False] * steps).expected for steps in range(4)] == [True, True, False, False]


def test_a_rare_clip_changes_nothing() -> None:
    calm = [False] * MANY
    assert not after(*calm, True).expected
    assert not after(*calm, True, True).expected
    assert after(*calm, True, True, True).expected


@pytest.mark.parametrize(("every", "expected"), [(1, True), (2, None), (3, False), (10, False)])
def test_one_step_in_so_many_clips(every: int, expected: bool | None) -> None:
    """Where one of two does, each clip changes the mind. It may: neither way is better."""
    clips, found = Clips(), set()
    for step in range(MANY):
        clips.count(clipped=step % every == 0)
        if step > MANY // 2:
            found.add(clips.expected)
    assert found == ({True, False} if expected is None else {expected})


def test_training_that_calms_down_is_noticed() -> None:
    stormy = [True] * MANY
    assert [after(*stormy, *[False] * steps).expected for steps in range(5)] == [True, True, True, False, False]
