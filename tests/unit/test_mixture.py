"""Several texts in one run: each has its share in every step, and all of its windows come."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_classes import SIZE
from zinf_cli.batches.collator import Sample
from zinf_cli.batches.mixture import MixedOrder, MixedStream
from zinf_cli.batches.packing import PackedStream
from zinf_cli.errors import DatasetError, RecipeError
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe, load_recipe
from zinf_cli.train.setup import Text, open_text

LLAMA = {"model_type": "llama", **SIZE}
SHARES = st.lists(st.floats(0.05, 1), min_size=2, max_size=4)


@given(SHARES, st.integers(0, 2**31), st.integers(1, 300), st.booleans())
def test_each_text_has_its_share_and_all_its_windows(
    weights: list[float], seed: int, place: int, shuffle: bool
) -> None:
    counts = [7 + 5 * number for number in range(len(weights))]
    order = MixedOrder(counts, weights, 4, seed, shuffle)
    steps = (place + 3) // 4
    seen = [window for step in range(steps) for window in order.windows(step)]
    firsts = np.cumsum([0, *counts])
    by_source = Counter(int(np.searchsorted(firsts, window, "right")) - 1 for window in seen)
    for number, weight in enumerate(weights):
        assert abs(by_source[number] - len(seen) * weight / sum(weights)) < 3, "the shares of every beginning of a run"
        of_source = [window - firsts[number] for window in seen if firsts[number] <= window < firsts[number + 1]]
        passes, rest = divmod(len(of_source), counts[number])
        times = Counter(of_source)
        assert {times[window] for window in range(counts[number])} <= {passes, passes + bool(rest)}
    told = np.sum([order.sources(step) for step in range(steps)], axis=0)
    assert told.tolist() == [by_source[number] for number in range(len(weights))]


def test_a_place_says_which_window_comes() -> None:
    """Whatever was asked before, and whatever the size of the batches was: as a resume finds it."""
    one_by_one = MixedOrder([10, 20], [0.3, 0.7], 1, 5, shuffle=True)
    forward = [one_by_one.windows(step)[0] for step in range(90)]
    assert [one_by_one.windows(step)[0] for step in reversed(range(90))] == forward[::-1]
    resumed = MixedOrder([10, 20], [0.3, 0.7], 6, 5, shuffle=True)
    resumed.start_at(4, 30)
    assert [window for step in range(4, 14) for window in resumed.windows(step)] == forward[30:90]
    assert MixedOrder([10, 20], [0.3, 0.7], 1, 6, shuffle=True).windows(0) != one_by_one.windows(0)


@pytest.fixture(autouse=True)
def cache(own_folders: None) -> None:
    """The user's own cache is left alone."""


def written(folder: Path, texts: dict[str, list[str]]) -> None:
    for name, rows in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def opened(folder: Path, tokenizer: Path, weights: dict[str, Any], **dataset: Any) -> Text:
    paths = [{"path": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in weights.items()]
    given = {"path": paths, "tokenizer": str(tokenizer), **dataset}
    train = {"seq_len": 8, "global_batch_size": 4}
    recipe = Recipe.model_validate({"model": {"config": LLAMA}, "dataset": given, "train": train})
    return open_text(recipe, build_model(ModelSource(None, LLAMA, "random", 0)), 1)


def test_batches_hold_documents_of_each_text(tokenizer: Path, tmp_path: Path) -> None:
    written(tmp_path, {"a": ["one two one"] * 40, "b": ["hello hello yes"] * 10})
    text = opened(tmp_path, tokenizer, {"a": 0.25, "b": 0.75}, eval_fraction=0.2)
    assert isinstance(text.train, MixedStream)
    assert all(isinstance(part, PackedStream) for part in text.train.parts)
    assert text.is_packed
    seen: Counter[int] = Counter()
    for step in range(8):
        samples = [Sample(window, place) for place, window in enumerate(text.order.windows(step))]
        batch = text.collator.collate(text.train, samples, 0)
        assert batch.position_ids is not None
        assert batch.num_tokens == 4 * 8
        seen.update(batch.input_ids[:, 0].tolist())
    one, hello = (seen[number] for number in (3, 6))
    assert (one, hello) == pytest.approx((8, 24), abs=2)
    assert text.held_out[""].num_windows(8) == 4 + 1
    again = opened(tmp_path, tokenizer, {"a": 0.75, "b": 0.25}, eval_fraction=0.2)
    assert again.train.fingerprint != text.train.fingerprint, "another mixture is another run"


def test_a_text_without_a_window_is_named(tokenizer: Path, tmp_path: Path) -> None:
    written(tmp_path, {"a": ["one two one"] * 40, "b": ["yes"]})
    with pytest.raises(DatasetError, match=r"b\.jsonl: a text with a weight has no whole window of 8 tokens"):
        opened(tmp_path, tokenizer, {"a": 0.5, "b": 0.5}, packing="stream")


RECIPE = "model: {config: {model_type: llama}}\ndataset:\n  path:\n"


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["{path: A, weight: 0.5}", "{path: B, weight: 0.4}"], "weights are shares: 0.5 + 0.4 is 0.9, not 1"),
        (["{path: A, weight: 0.5}", "B"], "give every text a weight, or none: "),
        (["{path: A, weight: 0}", "{path: B, weight: 1}"], "has to be a number above 0, got 0"),
        (["{path: A, weight: often}", "{path: B, weight: 1}"], "has to be a number above 0, got 'often'"),
        (["{path: A, wait: 1}"], "a text with a weight is {path: PATH, weight: NUMBER}, got {'path': "),
        (["{path: nowhere, weight: 1}"], "no such file or folder: "),
    ],
)
def test_weights_that_make_no_sense_are_named(items: list[str], said: str, tmp_path: Path) -> None:
    for name in ("A", "B"):
        (tmp_path / name).write_text("text")
    lines = "".join(f"    - {item.replace('A', f'{tmp_path}/A').replace('B', f'{tmp_path}/B')}\n" for item in items)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE + lines)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert said in str(caught.value)
    assert "r.yaml:3: dataset.path: " in str(caught.value)


def test_a_recipe_with_weights_is_written_as_it_was_read(tmp_path: Path) -> None:
    (tmp_path / "A").write_text("text")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE + f"    - {{path: {tmp_path}/A, weight: 1}}\n")
    once = load_recipe(recipe)
    recipe.write_text(dump_recipe(once))
    assert load_recipe(recipe) == once
    assert (once.dataset.paths, once.dataset.weights) == ((tmp_path / "A",), (1.0,))


def test_a_share_that_is_nearly_nothing_takes_nothing() -> None:
    assert MixedOrder([10, 10], [1.0, 1e-17], 4, seed=0, shuffle=True).sources(0) == [4, 0]
