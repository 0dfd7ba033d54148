"""Text to tokens to global batches."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from own_processes import in_processes
from tiny_models import WORD_TEMPLATE, WORDS
from zinf_cli.batches.batches import BatchOrder, deal
from zinf_cli.batches.collator import Collator, Sample
from zinf_cli.errors import DatasetError
from zinf_cli.models.objective import Objective
from zinf_cli.text.data import TextSource, open_token_stream
from zinf_cli.text.token_stream import split_held_out
from zinf_cli.text.tokens import TOKENIZER_FILES


def words(stream: Any) -> str:
    return " ".join(WORDS[token] for token in stream.tokens)


def test_txt_jsonl_and_parquet_give_the_same_tokens(tokenizer: Path, tmp_path: Path) -> None:
    texts = ["one two three", "hello", "yes no"]
    for number, text in enumerate(texts):
        (tmp_path / f"txt{number}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts) + "\n\n")
    pa.parquet.write_table(pa.table({"body": texts}), tmp_path / "a.parquet")
    sources = [
        TextSource(tuple(sorted(tmp_path.glob("*.txt"))), tokenizer=tokenizer),
        TextSource((tmp_path / "a.jsonl",), text_field="body", tokenizer=tokenizer),
        TextSource((tmp_path / "a.parquet",), text_field="body", tokenizer=tokenizer),
    ]
    for source in sources:
        stream = open_token_stream(source, tmp_path / "cache")
        assert words(stream) == "one two three <end> hello <end> yes no <end>"
        assert stream.max_token == WORDS.index("no")


def test_npy_files_are_tokens_already(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2, 3], dtype=np.uint16))
    np.save(tmp_path / "b.npy", np.array([70000], dtype=np.int64))
    stream = open_token_stream(TextSource((tmp_path,)), tmp_path / "cache")
    assert stream.tokens.tolist() == [1, 2, 3, 70000]


def test_in_chats_only_what_the_assistant_says_counts(tokenizer: Path, tmp_path: Path) -> None:
    dialog = [("user", "one"), ("assistant", "two"), ("user", "hello"), ("assistant", "yes no")]
    messages = [{"role": role, "content": content} for role, content in dialog]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    source = TextSource((tmp_path / "chat.jsonl",), messages_field="messages", tokenizer=tokenizer)
    stream = open_token_stream(source, tmp_path / "cache")
    assert words(stream) == "<user> one <end> <bot> two <end> <user> hello <end> <bot> yes no <end>"
    assert stream.loss_mask is not None
    said = [WORDS[token] for token, counts in zip(stream.tokens, stream.loss_mask, strict=True) if counts]
    assert said == ["two", "<end>", "yes", "no", "<end>"]
    _, labels = stream.window(0, len(stream))
    assert (labels != -100).tolist() == stream.loss_mask.tolist()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "{", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}', "a.jsonl:2: no field 'text', there is: txt"),
        ("a.jsonl", '{"text": 3}', "a.jsonl:1: expected text, got int"),
        ("a.jsonl", "", "the file is empty"),
        ("a.txt", "", "the file is empty"),
        ("a.txt", b"one\ntwo \xff", "a.txt:2: not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xe9"}', "a.jsonl:2: not UTF-8"),
        ("a.txt", "one two".encode("utf-16"), "a.txt:1: this is UTF-16 text"),
        ("a.jsonl", '{"text": "one"}'.encode("utf-32"), "a.jsonl:1: this is UTF-32 text"),
        ("a.txt", "one two".encode("utf-16-le"), "a.txt:1: a byte of zero"),
        ("a.txt", b"one\ntwo" + bytes(100), "a.txt:2: a byte of zero"),
        ("a.jsonl", '{"text": "one"}\n{"text": "\\ud83d"}', r"a.jsonl:2: \ud83d is half of a character"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "a.jsonl:1: not usable JSON"),
        ("a.jsonl", "[" * 200_000, "a.jsonl:1: not usable JSON"),
        ("a.jsonl", "\n \n", "the file is empty"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n', mtime=0)[:-9], "a.jsonl.gz:2: the .gz file is cut short"),
        ("a.txt.gz", b"one", "a.txt.gz:1: not a whole .gz file"),
        ("a.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\0one two", "a.txt.gz:1: not a whole .gz file"),
        ("a.parquet", b"PAR1" + bytes(90) + b"PAR1", "not a parquet file"),
        ("a.npy", "", "not a .npy file"),
        ("a.npy", b"PK\3\4", "a zip archive"),
        ("a.npy", b"\x93NUMPY\1\0\x10\0{'descr': [[[[[[", "not a .npy file"),
        ("a.npy.gz", "one", "can't read .npy.gz"),
        ("a.json", "one", "can't read .json"),
        ("a.parquet", "one", "not a parquet file"),
        ("a.npy", "one", "not a .npy file"),
        ("a.csv", "one", "can't read .csv"),
    ],
)
def test_bad_files_are_named(tokenizer: Path, tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError) as caught:
        open_token_stream(TextSource((path,), tokenizer=tokenizer), tmp_path / "cache")
    assert said in caught.value.line()
    assert str(path) in caught.value.line()
    assert "\n" not in caught.value.line()
    assert not list((tmp_path / "cache").glob("*/*")), "a cache entry of half a text"


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), dtype=np.int64), np.zeros(3), np.array([-1]), np.array([2**63], dtype=np.uint64), np.array(3)],
)
def test_arrays_that_are_no_tokens(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DatasetError, match=r"a\.npy"):
        open_token_stream(TextSource((tmp_path,)), tmp_path / "cache")


def length_of(source: TextSource, cache: Path) -> int:
    return len(open_token_stream(source, cache))


def test_ranks_that_start_at_once_share_one_cache(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three hello\n" * 20_000)
    source = TextSource((tmp_path / "a.txt",), tokenizer=tokenizer)
    assert in_processes(length_of, [(source, tmp_path / "cache")] * 3) == [80_001] * 3
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_a_changed_text_is_tokenised_again(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    source = TextSource((path,), tokenizer=tokenizer)
    path.write_text("one two")
    assert len(open_token_stream(source, tmp_path / "cache")) == 3
    path.write_text("one two three")
    assert len(open_token_stream(source, tmp_path / "cache")) == 4


@pytest.mark.parametrize("library", ["tokenizers", "transformers", "jinja2"])
def test_another_version_of_a_library_cuts_its_own_tokens(
    library: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one two")
    source, cache = TextSource((tmp_path / "a.txt",), tokenizer=tokenizer), tmp_path / "cache"
    version = metadata.version
    open_token_stream(source, cache)
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == library else version(name))
    open_token_stream(source, cache)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "meta.json"])
@pytest.mark.parametrize("damage", [_cut, _flip, _empty, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_damaged_cache_is_built_again_and_said(tokenizer: Path, tmp_path: Path, damage: Any, name: str) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    source = TextSource((tmp_path / "chat.jsonl",), messages_field="messages", tokenizer=tokenizer)
    cache, notes = tmp_path / "cache", list[str]()
    whole = open_token_stream(source, cache, notes.append)
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o600}
    assert (entry.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o700, 0o700)
    expected, fingerprint = (whole.tokens.tolist(), np.asarray(whole.loss_mask).tolist()), whole.fingerprint
    damage(entry / name)
    again = open_token_stream(source, cache, notes.append)
    assert (again.tokens.tolist(), np.asarray(again.loss_mask).tolist()) == expected
    assert again.fingerprint == fingerprint
    assert len(notes) == 1
    assert "tokenised again" in notes[0]
    open_token_stream(source, cache, notes.append)
    assert len(notes) == 1


def test_an_entry_that_is_no_folder_is_built_again(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    open_token_stream(TextSource((tmp_path / "a.npy",)), tmp_path / "cache")
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    shutil.rmtree(entry)
    entry.write_bytes(b"")
    assert len(open_token_stream(TextSource((tmp_path / "a.npy",)), tmp_path / "cache")) == 100


def test_every_token_of_a_long_text_is_in_its_fingerprint(tmp_path: Path) -> None:
    """5 million of them: none is left out, wherever it stands, and whatever the file's dates say."""
    tokens = np.arange(5_000_000, dtype=np.uint16)
    path = tmp_path / "a.npy"
    seen = set()
    for change in (None, 4096, 4_999_999 - 4096, 4_999_999):
        changed = tokens.copy()
        if change is not None:
            changed[change] += 1
        np.save(path, changed)
        os.utime(path, (1, 1))
        stream = open_token_stream(TextSource((path,)), tmp_path / "cache")
        assert int(stream.tokens[change or 0]) == int(changed[change or 0])
        seen.add(stream.fingerprint)
    assert len(seen) == 4
    held = split_held_out(stream, 0.5)
    assert len({stream.fingerprint, *(part.fingerprint for part in held)}) == 3


def test_the_end_of_a_text_can_be_held_out(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    training, held_out = split_held_out(open_token_stream(TextSource((tmp_path,)), tmp_path / "cache"), 0.25)
    assert training.tokens.tolist() == list(range(75))
    assert held_out.tokens.tolist() == list(range(75, 100))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5))
def test_a_global_batch_is_the_same_for_any_number_of_ranks(sequences: int, world_size: int, size: int) -> None:
    windows = tuple(range(100, 100 + sequences))
    if sequences < world_size:
        return
    shares = [deal(windows, rank, world_size, size) for rank in range(world_size)]
    assert tuple(window for share in shares for batch in share for window in batch) == windows
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) <= size for share in shares for batch in share)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_sees_every_window_once(num_windows: int, sequences: int, seed: int) -> None:
    if sequences > num_windows:
        return
    order = BatchOrder(num_windows, sequences, seed, shuffle=True)
    epochs = 3
    steps = order.steps_for(epochs)
    seen = [window for step in range(steps) for window in order.windows(step)]
    assert Counter(seen[: epochs * num_windows]) == dict.fromkeys(range(num_windows), epochs)
    assert order.windows(0) == BatchOrder(num_windows, sequences, seed, shuffle=True).windows(0)
    in_order = BatchOrder(num_windows, sequences, seed, shuffle=False)
    straight = [window for step in range(steps) for window in in_order.windows(step)]
    assert straight == [place % num_windows for place in range(steps * sequences)]


def test_too_little_text_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="the text has 3 windows, fewer than the 4 of one batch"):
        BatchOrder(3, 4, 0, shuffle=True)


def test_an_empty_share_has_no_target(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    stream = open_token_stream(TextSource((tmp_path,)), tmp_path / "cache")
    collator = Collator(Objective.NEXT_TOKEN, 8)
    batch = collator.collate(stream, (), 0)
    assert batch.num_targets == 0
    assert torch.equal(batch.labels, batch.input_ids), "a mean over nothing is NaN"
    full = collator.collate(stream, (Sample(2, 0), Sample(0, 1)), 0)
    assert full.input_ids.tolist() == [list(range(16, 24)), list(range(8))]
    assert full.num_targets == 14


def _custom(folder: Path, tokenizer: Path) -> Path:
    """A tokenizer whose class is code of its own, which would leave a file behind if it were run."""
    shutil.copytree(tokenizer, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: ...\n")
    return folder


def test_code_that_comes_with_a_tokenizer_is_never_run(tokenizer: Path, tmp_path: Path) -> None:
    folder = _custom(tmp_path / "custom", tokenizer)
    (tmp_path / "a.txt").write_text("one")
    source = TextSource((tmp_path / "a.txt",), tokenizer=folder)
    with pytest.raises(DatasetError, match="auto_map"):
        open_token_stream(source, tmp_path / "cache")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # which transformers has itself
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert words(open_token_stream(source, tmp_path / "cache")) == "one <end>"
    assert not (folder / "ran").exists()


def test_a_tokenizer_of_another_version_is_named(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "new")
    content = json.loads((tmp_path / "new" / "tokenizer.json").read_text())
    content["model"]["type"] = "NewKind"
    (tmp_path / "new" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DatasetError, match=r"no usable tokenizer.* or install the version that wrote it"):
        open_token_stream(TextSource((tmp_path / "a.txt",), tokenizer=tmp_path / "new"), tmp_path / "cache")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (name, LFS, "a pointer of Git LFS, not the file itself (git")
        for name in ("a.txt", "a.jsonl", "a.npy", "a.gz.txt")
    ]
    + [(name, b"\n<!DOCTYPE html><html>404", "a page of HTML") for name in ("a.npy", "a.parquet")]
    + [("a.txt", b"/annex/objects/SHA256E-s3--ab.txt\n", "a pointer of git-annex")],
)
def test_what_stands_for_a_file_is_no_text(
    tokenizer: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        open_token_stream(TextSource((tmp_path / "texts",), tokenizer=tokenizer), tmp_path / "cache")
    assert f"{name}: {said}" in caught.value.line()


def test_what_stands_for_a_tokenizer_is_named(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_bytes(LFS)
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DatasetError, match=r"tokenizer\.json: a pointer of Git LFS"):
        open_token_stream(TextSource((tmp_path / "a.txt",), tokenizer=tmp_path / "copy"), tmp_path / "cache")


def test_a_prompt_that_is_no_beginning_of_a_turn_is_told(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "think")
    template = WORD_TEMPLATE.replace(
        "{% if add_generation_prompt %}<bot> ", "{% if add_generation_prompt %}<bot> <think> "
    )
    (tmp_path / "think" / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    source = TextSource((tmp_path / "a.jsonl",), messages_field="messages", tokenizer=tmp_path / "think")
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: the chat template's prompt for a turn ends with '<think> '"):
        open_token_stream(source, tmp_path / "cache")


def test_a_python_tokenizer_in_chats_is_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.chat_template = WORD_TEMPLATE
    slow.save_pretrained(tmp_path / "byt5")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "one"}]}))
    source = TextSource((tmp_path / "a.jsonl",), messages_field="messages", tokenizer=tmp_path / "byt5")
    with pytest.raises(DatasetError, match="ByT5Tokenizer is written in Python"):
        open_token_stream(source, tmp_path / "cache")


def test_every_file_that_tokenizers_read_decides_the_tokens() -> None:
    """Otherwise tokens of an earlier one would come from the cache."""
    import transformers

    wanted = set()
    for source in Path(transformers.__file__).parent.glob("models/*/tokenization*.py"):
        for table in re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", source.read_text(), re.DOTALL | re.MULTILINE):
            wanted |= set(re.findall(r':\s*"([^"]+)"', table))
    assert {"source.spm", "vocab.json"} <= wanted <= set(TOKENIZER_FILES)
