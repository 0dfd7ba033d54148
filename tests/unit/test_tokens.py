"""Texts through a tokenizer, several at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Raw
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny_models import WORDS
from zinf_cli.batches.rows import shortened
from zinf_cli.errors import DatasetError
from zinf_cli.text import documents
from zinf_cli.text.data import TextSource, open_token_stream
from zinf_cli.text.documents import Document
from zinf_cli.text.tokens import Tokenizer


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


@pytest.mark.parametrize(
    ("prompt", "answer", "tokens", "said"),
    [
        ("Q:", "yes", ["▁Q", ":", "yes", "</s>"], 2),  # tokenised alone, the answer would be ▁yes
        ("Q:", " yes", ["▁Q", ":", "▁yes", "</s>"], 2),
        ("Q: ", "yes", ["▁Q", ":", "▁yes", "</s>"], 2),  # the prompt alone ends with ▁
    ],
)
def test_an_answer_has_the_tokens_it_has_behind_its_prompt(
    prompt: str, answer: str, tokens: list[str], said: int, tmp_path: Path
) -> None:
    words = ["<unk>", "</s>", "▁", "Q", "▁Q", ":", "yes", "▁yes", "no", "▁no", *"yesno"]
    raw = Raw(models.Unigram([(word, -1.0) for word in dict.fromkeys(words)], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    row = Document("here", answer, beside={"prompt": prompt, "rejected": " no"})
    (ids, mask), _ = Tokenizer(tmp_path).encode_answers(row, ("chosen", "rejected", "prompt"))
    assert fast.convert_ids_to_tokens(ids) == tokens
    assert mask == [False] * said + [True] * (len(tokens) - said)
    merged = Document("here", "yes", beside={"prompt": "", "rejected": "no"})
    with pytest.raises(DatasetError, match="here: a prompt or an answer has no tokens"):
        next(Tokenizer(tmp_path).encode_answers(merged, ("chosen", "rejected", "prompt")))


def _framed(template: str, folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of words in `folder`, with special tokens around a text ($A) as in `template`."""
    words = ["<unk>", "<s>", "</s>", "en", "one", "two", "three", "four"]
    raw = Raw(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, number) for number, word in enumerate(words[:4])]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "en <s> $A"])
def test_a_document_begins_as_its_tokenizer_begins_it(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text is what the tokenizer makes of it, with one end; so is a prompt, and a text that is read in pieces."""
    monkeypatch.setattr(documents, "PIECE", 6)
    fast, cache = _framed(template, tmp_path), tmp_path / "cache"
    head, whole = fast(" ")["input_ids"][: template.split().index("$A")], fast("one two three four")["input_ids"]
    whole = [*(token for token in whole if token != fast.eos_token_id), fast.eos_token_id]
    begun = "".join(f"{token} " for token in fast.convert_ids_to_tokens(head))  # such as a rendered dialog
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{b}one two three four"}) + "\n" for b in ("", begun))
    )
    (tmp_path / "b.txt").write_text("one two\nthree\nfour")
    rows, text = (
        open_token_stream(TextSource((tmp_path / name,), tokenizer=tmp_path), cache) for name in ("a.jsonl", "b.txt")
    )
    assert rows.tokens.tolist() == 2 * whole
    assert text.tokens.tolist() == whole
    assert Tokenizer(tmp_path).encode_prompt("one two three four", chat=False) == whole[:-1]
    row = Document("here", " two", beside={"prompt": "one", "rejected": " three"})
    chosen, rejected = Tokenizer(tmp_path).encode_answers(row, ("chosen", "rejected", "prompt"))
    assert fast.convert_ids_to_tokens(chosen[0]) == [*begun.split(), "one", "two", "</s>"]
    assert chosen[1] == rejected[1] == [False] * (len(head) + 1) + [True, True]


@pytest.mark.parametrize(
    ("template", "tail", "kept"),
    [
        ("$A", 0, "one two three"),
        ("<s> $A", 0, "<s> one two"),
        ("$A </s>", 1, "one two </s>"),
        ("<s> $A </s> en", 2, "<s> </s> en"),
    ],
)
def test_a_text_that_is_cut_keeps_what_its_tokenizer_puts_behind_it(
    template: str, tail: int, kept: str, tmp_path: Path
) -> None:
    """As with a tokenizer's own truncation. A text may end with a special token of its own."""
    fast = _framed(template, tmp_path)
    assert Tokenizer(tmp_path).tail() == Tokenizer(tmp_path).tail("text_target") == tail
    text = "one two three four </s>"
    ids = shortened(np.array(fast(text)["input_ids"]), 3, tail).tolist()
    assert ids == fast(text, truncation=True, max_length=3)["input_ids"]
    assert fast.convert_ids_to_tokens(ids) == kept.split()
