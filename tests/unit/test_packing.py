"""Packing: every document whole and once, in few windows; and none sees another."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_classes import OTHERS, SIZE, real
from tiny_models import CONFIGS, random_source
from zinf_cli.batches.apart import why_not_apart
from zinf_cli.batches.collator import Collator, Sample
from zinf_cli.batches.packing import PackedStream, best_fit, pack, split_packed
from zinf_cli.engine.compute.meta_answers import packed_positions
from zinf_cli.engine.compute.survey import survey
from zinf_cli.engine.compute.trial import Trial
from zinf_cli.errors import ZinfError
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.objective import objective_of
from zinf_cli.models.weights import open_weights
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.text.token_stream import MASKED, TokenStream
from zinf_cli.train.setup import Text, model_loss, open_text
from zoo.apart import SAME, difference, with_weights
from zoo.shrink import configs

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def stream_of(lengths: list[int], mask: list[bool] | None = None) -> TokenStream:
    tokens = np.arange(3, 3 + sum(lengths), dtype=np.int32)
    loss_mask = None if mask is None else np.array(mask, dtype=np.bool_)
    return TokenStream(tokens, loss_mask, int(tokens.max()), "text", np.cumsum(lengths))


def one_by_one(lengths: list[int], room: int) -> list[int]:
    """Best fit decreasing as it is defined: what is left in each bin."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, free in enumerate(left) if free >= length]
        if fitting:
            left[min(fitting, key=lambda number: left[number])] -= length
        else:
            left.append(room - length)
    return left


@given(LENGTHS, st.integers(40, 64))
def test_bins_are_filled_as_one_by_one(lengths: list[int], room: int) -> None:
    bins = best_fit(np.array(lengths), room)
    filled: Counter[int] = Counter()
    for number, length in zip(bins.tolist(), lengths, strict=True):
        filled[number] += length
    assert sorted(filled) == list(range(len(filled)))
    assert sorted(room - used for used in filled.values()) == sorted(one_by_one(lengths, room))


@given(LENGTHS, st.integers(2, 50))
def test_every_token_of_a_text_is_in_one_window(lengths: list[int], seq_len: int) -> None:
    """But for what is a single token, and has nothing to learn."""
    stream = stream_of(lengths)
    packed = pack(stream, seq_len)
    seen: Counter[int] = Counter()
    for index in range(packed.num_windows(seq_len)):
        ids, labels, positions = packed.window(index, seq_len)
        real = packed.num_real(index)
        seen.update(ids[:real].tolist())
        follows = positions[1:real] == positions[: real - 1] + 1
        assert torch.equal(ids[1:real][follows], ids[: real - 1][follows] + 1), "a document is consecutive tokens"
        assert torch.equal(labels == MASKED, (positions == 0) | (torch.arange(seq_len) >= real))
        assert torch.equal(positions[real:], torch.arange(seq_len - real))
    assert set(seen.values()) <= {1}
    assert len(packed) == sum(seen.values())
    assert sum(lengths) - len(packed) == sum(length % seq_len == 1 for length in lengths)
    assert packed.left.longer == sum(length > seq_len for length in lengths)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=30), st.integers(2, 40))
def test_chats_are_whole_or_end_with_the_window(chats: list[tuple[int, int]], seq_len: int) -> None:
    """Each chat is a question of `asked` tokens and an answer of `said`, which alone has a loss."""
    lengths = [asked + said for asked, said in chats]
    packed = pack(stream_of(lengths, [n >= asked for asked, said in chats for n in range(asked + said)]), seq_len)
    kept = [
        min(length, seq_len) for length, (asked, _) in zip(lengths, chats, strict=True) if asked < min(length, seq_len)
    ]
    assert sorted(packed.lengths.tolist()) == sorted(kept)
    assert packed.left.untrained == len(chats) - len(kept)
    assert packed.left.behind == sum(max(0, length - seq_len) for length in lengths)
    targets = sum(int((packed.window(n, seq_len)[1] != MASKED).sum()) for n in range(packed.num_windows(seq_len)))
    assert targets == sum(min(asked + said, seq_len) - min(asked, seq_len) for asked, said in chats)


def test_windows_of_chats_are_full() -> None:
    """Lengths as those of instruction data: a median of 250 tokens, one in a hundred above 2000."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, 5000), 2, 2048).astype(int).tolist()
    packed = pack(stream_of(lengths, [True] * sum(lengths)), 2048)
    assert len(packed) / (2048 * packed.num_windows(2048)) > 0.97


def test_windows_come_in_the_order_of_the_text() -> None:
    packed = pack(stream_of([6, 2, 8, 3, 5]), 8)
    first = [int(packed.window(index, 8)[0][0]) for index in range(packed.num_windows(8))]
    assert first == [3, 11, 19]  # 6 and 2, 8, 3 and 5


@given(LENGTHS, st.floats(0.01, 0.9))
def test_no_chat_is_cut_between_training_and_held_out(lengths: list[int], fraction: float) -> None:
    stream = stream_of(lengths, [True] * sum(lengths))
    train, held_out = split_packed(stream, fraction)
    assert np.concatenate((train.tokens, held_out.tokens)).tolist() == stream.tokens.tolist()
    if len(lengths) > 1:
        assert train.ends is not None
        assert held_out.ends is not None
        assert [*np.diff(train.ends, prepend=0), *np.diff(held_out.ends, prepend=0)] == lengths


APART = [name for name in (*CONFIGS, *OTHERS) if why_not_apart(real(name)) is None]


@pytest.mark.parametrize("name", APART)
def test_the_loss_of_a_document_is_what_it_is_alone(name: str) -> None:
    """Through windows, collator and loss, as in training; whatever its neighbours are."""
    torch.manual_seed(0)
    model = real(name)
    lengths = [5, 9, 4, 16, 3, 7, 11]
    tokens = np.random.default_rng(0).integers(3, 90, sum(lengths)).astype(np.int32)
    stream = TokenStream(tokens, None, int(tokens.max()), "", np.cumsum(lengths))
    packed, collator = pack(stream, 16), Collator(objective_of(model), 16)
    windows = packed.num_windows(16)
    batch = collator.collate(packed, [Sample(window, window) for window in range(windows)], 0)
    assert batch.num_targets == sum(lengths) - len(lengths)
    together = loss_of(model, **batch.inputs(torch.device("cpu"))) * batch.num_targets
    alone = 0.0
    for document in np.split(tokens, np.cumsum(lengths)[:-1]):
        ids = torch.from_numpy(document.astype(np.int64))[None]
        alone += loss_of(model, input_ids=ids, labels=ids) * (len(document) - 1)
    assert together == pytest.approx(alone, rel=1e-6)


def loss_of(model: Any, **inputs: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model_loss(model, **inputs))


def test_most_kinds_of_models_are_packed() -> None:
    assert {"llama", "gpt2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "mistral", "phi3", "gpt_neox"} < {*APART}


LEAKING = {
    "mamba": "carries state from token to token",
    "jamba": "carries state from token to token",
    "bloom": "takes no positions",
    "opt": "attends across documents whatever positions it is given",
    "afmoe": "attends across documents whatever positions it is given",
}


@pytest.mark.parametrize("model_type", LEAKING)
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_models_that_would_attend_across_documents_are_refused(model_type: str) -> None:
    """With the same positions their documents are not what they are alone."""
    source = ModelSource(None, next(configs(model_type)), "random", 0)
    assert LEAKING[model_type] in str(why_not_apart(build_model(source)))
    model = with_weights(source)
    if model_type not in ("mamba", "bloom"):  # which would not even take them
        assert difference(model) > 100 * SAME


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_the_plan_counts_the_mask_of_documents(name: str) -> None:
    """The survey on no data finds what a forward on packed data takes."""
    source = random_source(name)
    sizes = []
    for device in ("meta", "cpu"):
        model = build_model(source)
        ids = torch.randint(3, 90, (2, 32)).to(device)
        positions = packed_positions(ids) if device == "meta" else (torch.arange(32) % 11).repeat(2, 1)
        trial = None if device == "meta" else Trial(open_weights(model, source).read, torch.device("cpu"))
        seen = survey(model, partial(model_loss, model, ids, ids, None, positions), 1, trial)
        assert not seen.failure
        sizes.append((seen.live_bytes, [(use.input_bytes, use.saved_bytes) for use in seen.uses.values()]))
    assert sizes[0][0] >= 2 * 32 * 32
    assert sizes[0] == sizes[1]


@pytest.fixture(autouse=True)
def cache(own_folders: None) -> None:
    """The user's own cache is left alone."""


def opened(folder: Path, tokenizer: Path, model: dict[str, Any], texts: list[str], **dataset: Any) -> Text:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {"path": str(folder / "a.jsonl"), "tokenizer": str(tokenizer), **dataset}
    recipe = Recipe.model_validate({"model": {"config": model}, "dataset": given, "train": {"seq_len": 8}})
    return open_text(recipe, build_model(ModelSource(None, model, "random", 0)), 1)


LLAMA = {"model_type": "llama", **SIZE}
BERT = {"model_type": "bert", **SIZE, "architectures": ["BertLMHeadModel"], "is_decoder": True}
TEXTS = ["one two three", "hello", "yes no " * 5, ""]


def test_documents_are_kept_apart_unless_asked(tokenizer: Path, tmp_path: Path) -> None:
    text = opened(tmp_path, tokenizer, LLAMA, TEXTS)
    assert isinstance(text.train, PackedStream)
    assert text.lines == (
        "packed: 3 documents in 3 windows of 8; 70.8% of their tokens are real",
        "longer than train.seq_len=8: 1 documents; these are trained in pieces",
        "left out: 1 documents, where it is a single token",
    )
    stream = opened(tmp_path, tokenizer, LLAMA, TEXTS, packing="stream")
    assert isinstance(stream.train, TokenStream)
    assert stream.lines == ()
    assert stream.train.fingerprint != text.train.fingerprint
    assert isinstance(opened(tmp_path, tokenizer, LLAMA, ["one two " * 9]).train, TokenStream), "a single text"


def test_chats_that_teach_nothing_are_counted_and_skipped(tokenizer: Path, tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "yes " * 9}
    rows = [[asked], [asked, {**said, "content": "no"}], [asked, said], [asked, asked]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    dataset = {"path": str(tmp_path / "chats.jsonl"), "messages_field": "messages"}
    text = opened(tmp_path, tokenizer, LLAMA, TEXTS, **dataset)
    assert text.train.num_windows(8) == 2
    assert text.lines == (
        "packed: 2 chats in 2 windows of 8; 93.8% of their tokens are real",
        "longer than train.seq_len=8: 1 chats; 7 tokens behind that are left out",
        "left out: 2 chats, where nobody who is learned from says anything",
    )


def test_a_model_that_cannot_keep_them_apart_says_so(tokenizer: Path, tmp_path: Path) -> None:
    text = opened(tmp_path, tokenizer, BERT, TEXTS)
    assert isinstance(text.train, TokenStream)
    (line,) = text.lines
    assert line.startswith("windows cross documents: BertLMHeadModel attends across documents")


@pytest.mark.parametrize(
    ("model", "dataset", "said"),
    [
        (BERT, {}, "documents can't be kept apart: BertLMHeadModel attends across documents"),
        (LLAMA, {"path": "a.npy"}, "documents can't be kept apart: .npy files do not say where they end"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    model: dict[str, Any], dataset: dict[str, str], said: str, tokenizer: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", np.arange(90))
    given = {key: str(tmp_path / name) for key, name in dataset.items()}
    with pytest.raises(ZinfError) as caught:
        opened(tmp_path, tokenizer, model, TEXTS, packing="documents", **given)
    assert said in caught.value.line()
    assert "dataset.packing" in caught.value.line()
    assert "stream" in str(caught.value.hint)
    assert caught.value.exit_code == 2
