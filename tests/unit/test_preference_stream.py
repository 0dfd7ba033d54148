"""Pairs of answers in a token stream: which are kept, and how long they are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.batches.preferences import PreferenceStream
from zinf_cli.text.token_stream import MASKED, TokenStream

SEQUENCE = st.tuples(st.integers(1, 6), st.integers(1, 6))
"""Tokens of a prompt and of an answer."""


@given(st.lists(st.tuples(SEQUENCE, SEQUENCE), max_size=8), st.integers(1, 9), st.sampled_from([(), (3, 2)]))
def test_a_pair_is_kept_if_both_answers_begin_within_a_window(
    pairs: list[tuple[tuple[int, int], tuple[int, int]]], seq_len: int, half: tuple[int, ...]
) -> None:
    """`half`: of a pair whose other answer is cut off, there may be one at the end."""
    sequences = [sequence for pair in pairs for sequence in pair] + ([half] if half else [])
    mask = np.array([learned for asked, said in sequences for learned in [False] * asked + [True] * said], dtype=bool)
    ends = np.cumsum([asked + said for asked, said in sequences], dtype=np.int64)
    tokens = np.arange(len(mask), dtype=np.int32)
    stream = PreferenceStream(TokenStream(tokens, mask, len(mask), "", ends), seq_len)
    kept = [pair for pair in pairs if all(asked < seq_len for asked, _ in pair)]
    assert stream.num_windows(seq_len) == len(kept)
    for index, pair in enumerate(kept):
        assert stream.num_real(index) == sum(min(sum(sequence), seq_len) for sequence in pair)
        _, labels = stream.window(index, seq_len)
        learned = [min(asked + said, seq_len) - asked for asked, said in pair]
        assert (labels != MASKED).sum(1).tolist() == learned
