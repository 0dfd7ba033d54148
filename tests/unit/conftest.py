"""What unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a word of WORDS a token, saved as checkpoints have it."""
    from tiny_models import WORD_TEMPLATE, WORDS, save_word_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(folder, WORDS, eos_token="<end>", template=WORD_TEMPLATE)
    return folder
