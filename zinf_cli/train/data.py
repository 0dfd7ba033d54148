"""Text as one stream of tokens on disk, tokenised once for all ranks and runs, cut into windows."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zinf_cli.durable import publish
from zinf_cli.errors import DatasetError
from zinf_cli.train.documents import find_files, read_documents
from zinf_cli.train.tokens import Tokenizer

CACHE_VERSION = 1
LARGEST_TOKEN = 2**31 - 1
MASKED = -100
_BLOCK = 1 << 22
_SAMPLE, _SAMPLES = 4096, 1024
"""Tokens of a sample, and how many of them a fingerprint takes at most."""


@dataclass(frozen=True)
class TextSource:
    """What a recipe says of a text."""

    paths: tuple[Path, ...]
    text_field: str = "text"
    messages_field: str | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class TokenStream:
    """Documents side by side, an end-of-text token after each. Memory-mapped: opening costs no memory."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    """int32 [num_tokens]."""
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]] | None
    """bool [num_tokens]: where there is a loss; None: everywhere."""
    max_token: int

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def num_windows(self, seq_len: int) -> int:
        return len(self) // seq_len

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels) of window `index`, each int64 [seq_len]; labels are -100 where there is no loss."""
        part = slice(index * seq_len, (index + 1) * seq_len)
        input_ids = torch.from_numpy(self.tokens[part].astype(np.int64))
        labels = input_ids.clone()
        if self.loss_mask is not None:
            labels[torch.from_numpy(~self.loss_mask[part])] = MASKED
        return input_ids, labels

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens and their mask: the same for the same text, wherever it lies. Long texts are sampled."""
        digest = hashlib.sha256(str(len(self)).encode())
        for start in np.linspace(0, max(0, len(self) - _SAMPLE), min(_SAMPLES, -(-len(self) // _SAMPLE)), dtype=int):
            digest.update(self.tokens[start : start + _SAMPLE].tobytes())
            if self.loss_mask is not None:
                digest.update(self.loss_mask[start : start + _SAMPLE].tobytes())
        return digest.hexdigest()[:32]

    def part(self, start: int, stop: int) -> TokenStream:
        mask = None if self.loss_mask is None else self.loss_mask[start:stop]
        return TokenStream(self.tokens[start:stop], mask, self.max_token)


def split_held_out(stream: TokenStream, fraction: float) -> tuple[TokenStream, TokenStream]:
    """(training, held out): the last `fraction` of the tokens is held out."""
    boundary = len(stream) - int(len(stream) * fraction)
    return stream.part(0, boundary), stream.part(boundary, len(stream))


def open_token_stream(source: TextSource, cache_dir: Path) -> TokenStream:
    """The tokens of a text, from the cache where it has them; several processes may start at once, one tokenises."""
    files = find_files(source.paths)
    if source.tokenizer is None and files[0].suffix != ".npy":
        raise DatasetError(
            "this text needs a tokenizer, and a model from a config has none", hint="set dataset.tokenizer"
        )
    entry = cache_dir / _fingerprint(source, files)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{entry.name}.lock"):
            if not (entry / "meta.json").exists():
                _build(source, files, entry)
        return _open(entry)
    except OSError as error:
        raise DatasetError(
            f"the token cache failed: {error.strerror or error}", where=str(cache_dir), hint="set XDG_CACHE_HOME"
        ) from error


def _fingerprint(source: TextSource, files: Sequence[Path]) -> str:
    """What decides the tokens: the files as they are now, the fields, the tokenizer's files."""
    parts: list[Any] = [CACHE_VERSION, source.text_field, source.messages_field]
    parts += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if source.tokenizer is not None and files[0].suffix != ".npy":
        parts += Tokenizer.fingerprint(source.tokenizer)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel lets go of it when the process dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(source: TextSource, files: Sequence[Path], entry: Path) -> None:
    """Write the cache entry beside its place and rename it: it exists whole or not at all."""
    building = entry.with_suffix(".building")
    for leftover in (building, entry):
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    try:
        with (building / "tokens.bin").open("wb") as tokens, (building / "mask.bin").open("wb") as mask:
            max_token = -1
            for block, block_mask in _blocks(source, files):
                max_token = max(max_token, int(block.max()))
                tokens.write(block.astype(np.int32).tobytes())
                if block_mask is not None:
                    mask.write(block_mask.tobytes())
        if max_token < 0:
            raise DatasetError("there are no tokens in this text", where=str(files[0]))
        meta = {"max_token": max_token, "has_mask": source.messages_field is not None}
        (building / "meta.json").write_text(json.dumps(meta))
        publish(building, entry)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _blocks(
    source: TextSource, files: Sequence[Path]
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]]:
    """Blocks of tokens, with their loss masks for chats."""
    if files[0].suffix == ".npy":
        for file in files:
            for block in _array_blocks(file):
                yield block, None
        return
    assert source.tokenizer is not None
    tokenizer = Tokenizer(source.tokenizer)
    for file in files:
        for document in read_documents(file, source.messages_field or source.text_field):
            if source.messages_field is None:
                ids = tokenizer.encode_text(document)
                if ids:
                    yield np.array(ids, dtype=np.int32), None
            else:
                ids, mask = tokenizer.encode_chat(document)
                if ids:
                    yield np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_)


def _array_blocks(file: Path) -> Iterator[np.ndarray[Any, Any]]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DatasetError(f"not a .npy file of numbers: {error}", where=str(file)) from error
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DatasetError(
            f"expected one-dimensional integers (tokens), got {array.dtype} of shape {array.shape}", where=str(file)
        )
    for start in range(0, array.shape[0], _BLOCK):
        block = np.asarray(array[start : start + _BLOCK])
        if block.min() < 0 or block.max() > LARGEST_TOKEN:
            raise DatasetError(f"a token is outside of 0 .. {LARGEST_TOKEN}", where=str(file))
        yield block


def _open(entry: Path) -> TokenStream:
    meta = json.loads((entry / "meta.json").read_text())
    tokens = np.memmap(entry / "tokens.bin", dtype=np.int32, mode="r")
    mask = np.memmap(entry / "mask.bin", dtype=np.bool_, mode="r") if meta["has_mask"] else None
    return TokenStream(tokens, mask, meta["max_token"])
