"""Whatever the bytes of a data file are, there are documents and tokens, or one error with its place."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zinf_cli.errors import DatasetError
from zinf_cli.text.data import TextSource, open_token_stream

KINDS = ("txt", "jsonl", "parquet", "npy", "txt.gz", "jsonl.gz")
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | VALUES, "content": VALUES})


def tried(source: TextSource, cache: Path) -> None:
    try:
        assert len(open_token_stream(source, cache)) > 0
    except DatasetError as error:
        line = error.line()
        assert line.startswith(str(source.paths[0].parent))
        assert "\n" not in line
        line.encode()


def whole(kind: str) -> bytes:
    """A file as it should be, to be damaged."""
    file = io.BytesIO()
    if kind == "parquet":
        pa.parquet.write_table(pa.table({"text": ["one two", None, "three"], "n": [1, 2, 3]}), file)
    elif kind == "npy":
        np.save(file, np.arange(20))
    else:
        text = b"\xef\xbb\xbfone two\r\nthree \xc3\xa4" if kind.startswith("txt") else b'{"text": "one"}\n' * 3
        file.write(gzip.compress(text, mtime=0) if kind.endswith("gz") else text)
    return file.getvalue()


@settings(max_examples=150)
@given(st.sampled_from(KINDS), st.data())
def test_damaged_files(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any) -> None:
    content = bytearray(whole(kind))
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / f"a.{kind}"
    path.write_bytes(bytes(content))
    tried(TextSource((path,), tokenizer=tokenizer), folder / "cache")


@settings(max_examples=100)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"m": st.lists(TURN, max_size=3) | VALUES, "tools": VALUES}), max_size=3
    )
)
def test_records_of_any_kind(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, records: list[Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "records"
    folder.mkdir(exist_ok=True)
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tried(TextSource((path,), messages_field="m", tokenizer=tokenizer), folder / "cache")
    tried(TextSource((path,), text_field="m", tokenizer=tokenizer), folder / "cache")
    tried(TextSource((path,), tokenizer=tokenizer, pair_fields=("m", "tools")), folder / "cache")


@pytest.mark.parametrize("depth", [200, 900, 5000])
def test_lists_in_lists(tokenizer: Path, tmp_path: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    turns = f'[{{"role": "user", "content": {nested}}}, {{"role": "assistant", "content": "one"}}]'
    (tmp_path / "a.jsonl").write_text(f'{{"m": {turns}}}\n')
    tried(TextSource((tmp_path / "a.jsonl",), messages_field="m", tokenizer=tokenizer), tmp_path / "cache")
