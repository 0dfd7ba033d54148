"""A plan alone looks at a part of a long text, says so, and counts about as many steps as there are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tiny_recipes import recipe_of
from zinf_cli.errors import DatasetError
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.text import data, documents
from zinf_cli.text.data import TextSource, open_token_stream, part_of_tokens
from zinf_cli.train import setup
from zinf_cli.train.figures import find_figures

PRIMES = (7919, 7907, 7901, 7883, 7879, 7877, 7873, 7867, 7853)
ROWS = 8000
MOST = 1 << 13


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 1 << 10)
    monkeypatch.setattr(documents, "_SIP", 1 << 8)
    monkeypatch.setattr(data, "_CHARACTERS", 1 << 12)
    monkeypatch.setattr(setup, "_PART_TOKENS", MOST)
    monkeypatch.setattr(setup, "_PART_WINDOWS", 1)


def write_text(folder: Path, kind: str) -> Path:
    """A text of ten words in each of its rows, most of them numbers, which do not pack to nothing."""
    folder.mkdir(exist_ok=True)
    rows = [" ".join(["hello", *(str(number * n % 99_991) for n in PRIMES)]) for number in range(ROWS)]
    path = folder / f"text.{kind}"
    if kind == "npy":
        np.save(path, np.arange(10 * ROWS) % 60)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    else:
        lines = [json.dumps({"text": row}) for row in rows] if kind.startswith("jsonl") else rows
        content = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet", "npy"])
def test_a_part_tells_about_how_long_the_text_is(
    kind: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_BLOCK", 1 << 10)
    source = TextSource((write_text(tmp_path / "text", kind),), tokenizer=tokenizer)
    found = part_of_tokens(source, tmp_path / "cache", MOST)
    assert found is not None
    part, share = found
    assert not (tmp_path / "cache").exists()
    told: list[float] = []
    whole = open_token_stream(source, tmp_path / "cache", tell=told.append)
    assert MOST <= len(part) < len(whole) / 2
    assert len(part) / share == pytest.approx(len(whole), rel=0.25)
    assert told == sorted(told)
    assert told[-1] == 1
    assert part_of_tokens(source, tmp_path / "cache", MOST) is None, "the cache has all of it"


def test_a_short_text_is_looked_at_as_a_whole(tokenizer: Path, tmp_path: Path) -> None:
    source = TextSource((write_text(tmp_path / "text", "txt"),), tokenizer=tokenizer)
    assert part_of_tokens(source, tmp_path / "cache", 1 << 16) is None


def test_what_is_wrong_in_a_part_has_its_place(tokenizer: Path, tmp_path: Path) -> None:
    path = write_text(tmp_path / "text", "jsonl")
    path.write_text("{\n" + path.read_text())
    with pytest.raises(DatasetError) as refused:
        part_of_tokens(TextSource((path,), tokenizer=tokenizer), tmp_path / "cache", MOST)
    assert refused.value.where == f"{path}:1"


def recipe_with(tmp_path: Path, tokenizer: Path, **train: Any) -> Recipe:
    recipe = recipe_of(tmp_path, "llama", **train)
    several = (write_text(tmp_path / "text", "txt"), write_text(tmp_path / "text", "jsonl"))
    changes = {"paths": several, "path": several, "tokenizer": tokenizer, "eval_fraction": 0.1}
    fields = type(recipe.dataset).model_fields
    dataset = recipe.dataset.model_copy(update={name: at for name, at in changes.items() if name in fields})
    return recipe.model_copy(update={"dataset": dataset})


def test_a_plan_of_a_part_says_about_how_many_steps(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = recipe_with(tmp_path, tokenizer, max_steps=None, epochs=1)
    found = find_figures(recipe, 1, in_part=True).data
    assert found.share < 0.5
    assert found.about
    assert any("a launch reads and checks all of it" in line for line in found.texts)
    given = find_figures(recipe_with(tmp_path, tokenizer, max_steps=7), 1, in_part=True).data
    assert (given.max_steps, given.about) == (7, False)
    exact = find_figures(recipe, 1).data
    assert (exact.share, exact.about) == (1.0, False)
    assert found.max_steps == pytest.approx(exact.max_steps, rel=0.25)
    assert find_figures(recipe, 1, in_part=True).data == exact, "the cache has all of it"
