"""SIGKILL at seeded moments, inside the writes of checkpoints and elsewhere; `make test-crash` has the long chains."""

from __future__ import annotations

from pathlib import Path

import pytest

from crash_chain import assert_survives
from forked_ranks import ForkedRanks


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    ranks: int, forked: ForkedRanks, tmp_path: Path
) -> None:
    assert_survives(forked, tmp_path, ranks, kills=6, seed=ranks)
