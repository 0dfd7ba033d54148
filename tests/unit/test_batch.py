"""The three sizes of a batch: what follows from what, and what disagrees. What is dealt in turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.batches.batches import in_turn
from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import UsageError
from zinf_cli.recipe.batch import sequences_per_step

SIZES = st.integers(1, 50)


@given(SIZES, SIZES, SIZES)
def test_accumulation_is_that_of_each_rank(micro: int, accumulated: int, ranks: int) -> None:
    whole = sequences_per_step(micro, accumulated, None, ranks)
    assert whole == micro * accumulated * ranks == sequences_per_step(micro, accumulated, whole, ranks)
    assert sequences_per_step(micro, None, None, ranks) == micro * ranks


@given(SIZES, SIZES, SIZES)
def test_a_global_batch_is_what_it_says_for_any_ranks(micro: int, whole: int, ranks: int) -> None:
    if whole >= ranks:
        assert sequences_per_step(micro, None, whole, ranks) == whole
    else:
        with pytest.raises(UsageError, match=f"{whole} sequences per step can't be dealt to {ranks} ranks"):
            sequences_per_step(micro, None, whole, ranks)


def test_what_disagrees_is_told_with_its_arithmetic() -> None:
    with pytest.raises(UsageError) as caught:
        sequences_per_step(2, 4, 64, 4)
    assert caught.value.line().startswith(
        "global_batch_size 64 is not micro_batch_size 2 × gradient_accumulation_steps 4 × 4 ranks = 32"
    )


@given(st.integers(1, 30), st.integers(1, 8))
def test_dealt_in_turn_ranks_have_as_many(count: int, world_size: int) -> None:
    dealt = [in_turn(range(count), Ranks(rank, world_size)) for rank in range(world_size)]
    assert sorted(item for mine, _ in dealt for item in mine) == list(range(count))
    assert len({len(padded) for _, padded in dealt}) == 1
    assert all(padded == mine + [0] * (len(padded) - len(mine)) for mine, padded in dealt)
