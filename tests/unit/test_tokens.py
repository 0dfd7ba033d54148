"""Texts through a tokenizer, several at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tiny_models import WORDS
from zinf_cli.errors import DatasetError
from zinf_cli.text.data import TextSource, open_token_stream


def test_documents_are_tokenised_at_once_as_one_by_one(tokenizer: Path, tmp_path: Path) -> None:
    """More of them than are taken at once; where one is wrong, its own line is named."""
    texts = [" ".join(WORDS[3 + (number * step) % 6] for step in range(1 + number % 5)) for number in range(600)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = TextSource((path,), tokenizer=tokenizer)
    stream = open_token_stream(source, tmp_path / "cache")
    assert " ".join(WORDS[token] for token in stream.tokens) == " ".join(f"{text} <end>" for text in texts)
    assert stream.ends is not None
    assert stream.ends.tolist() == np.cumsum([len(text.split()) + 1 for text in texts]).tolist()
    path.write_text("".join(json.dumps({"text": 3 if number == 400 else "one"}) + "\n" for number in range(600)))
    with pytest.raises(DatasetError, match=r"a\.jsonl:401: expected text, got int"):
        open_token_stream(source, tmp_path / "cache")
