"""When steps are expected to clip, and how many may do so where updates in backward pay."""

import pytest

from zinf_cli.engine.clips import Clips
from zinf_cli.plan.predict import LEAST_CLIPS, MOST_CLIPS, clips_worth

MANY = 100


def after(*clipped: bool, worth: float = 0.5) -> Clips:
    clips = Clips(worth)
    for one in clipped:
        clips.count(clipped=one)
    return clips


@pytest.mark.parametrize("worth", [LEAST_CLIPS, 0.5, MOST_CLIPS])
def test_two_steps_without_a_clip_begin_it_whatever_a_clip_costs(worth: float) -> None:
    assert [after(*[False] * steps, worth=worth).expected for steps in range(4)] == [True, True, False, False]


def test_first_steps_that_clip_are_outweighed_by_as_many_that_do_not() -> None:
    assert [after(True, True, *[False] * steps).expected for steps in range(4)] == [True, True, True, False]


def test_a_rare_clip_changes_nothing() -> None:
    calm = [False] * MANY
    assert not after(*calm, True).expected
    assert not after(*calm, *[True] * 6).expected
    assert after(*calm, *[True] * 7).expected


@pytest.mark.parametrize(
    ("every", "worth", "expected"),
    [(1, 0.5, {True}), (2, 0.5, {True, False}), (3, 0.5, {False}), (3, 0.2, {True}), (10, 0.5, {False}),
     (10, 0.2, {False}), (10, LEAST_CLIPS, {True, False})],
)  # fmt: skip
def test_one_step_in_so_many_clips(every: int, worth: float, expected: set[bool]) -> None:
    """Where as many clip as are worth it, each clip changes the mind. It may: neither way is better."""
    clips, found = Clips(worth), set()
    for step in range(MANY):
        clips.count(clipped=step % every == 0)
        if step > MANY // 2:
            found.add(clips.expected)
    assert found == expected


def test_training_that_calms_down_is_noticed() -> None:
    stormy = [True] * MANY
    assert [after(*stormy, *[False] * steps).expected for steps in (0, 6, 7)] == [True, True, False]


@pytest.mark.parametrize(
    ("expected_s", "unclipped_s", "in_vain_s", "worth"),
    [
        (10.0, 8.0, 12.0, 0.5),
        (9.0, 8.0, 12.0, 0.25),
        (8.0, 8.0, 12.0, LEAST_CLIPS),
        (7.0, 8.0, 12.0, LEAST_CLIPS),
        (10.0, 8.0, 10.0, MOST_CLIPS),
        (10.0, 8.0, 8.0, MOST_CLIPS),
    ],
)
def test_as_many_may_clip_as_take_as_long_either_way(
    expected_s: float, unclipped_s: float, in_vain_s: float, worth: float
) -> None:
    assert clips_worth(expected_s, unclipped_s, in_vain_s) == worth
    if LEAST_CLIPS < worth < MOST_CLIPS:
        assert worth * in_vain_s + (1 - worth) * unclipped_s == expected_s
