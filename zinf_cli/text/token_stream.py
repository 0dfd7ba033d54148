"""Tokens side by side in files. They are checked as a whole whenever they are opened, and memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import xxhash

from zinf_cli.text.cache import identity

MASKED = -100
"""A label that losses ignore."""
_TOKENS, _MASK, _ENDS, _LABELS, _META = "tokens.bin", "mask.bin", "ends.bin", "labels.bin", "meta.json"
_PICTURES = "pictures.jsonl"
_PIECE_BYTES = 1 << 22


class TokenBlock(NamedTuple):
    """Tokens that lie side by side in a text."""

    tokens: np.ndarray[Any, Any]
    """Integers [n]."""
    loss_mask: np.ndarray[Any, Any] | None = None
    """Of chats and pairs, bool [n]: where there is a loss."""
    ends: bool | None = None
    """Whether a document ends behind the block. None: where documents end is not known."""
    seen: float = 1.0
    """The share of its file that was read when the block was."""
    label: float | None = None
    """Of a document that has one: what it is, or its number among the labels."""
    pictures: tuple[Seen, ...] | None = None
    """Of a document that may have some."""


class NotAsWrittenError(Exception):
    """A folder does not hold what `write_tokens` has written, or that is out of date."""


class Seen(NamedTuple):
    """A picture as it was when its text became tokens."""

    path: str
    identity: tuple[int, ...]

    @property
    def changed(self) -> bool:
        """Whether another file is there now, or none."""
        try:
            return identity(Path(self.path)) != self.identity
        except OSError:
            return True


@dataclass(frozen=True)
class TokenStream:
    """Documents side by side, with an end-of-text token after each. They are mapped, so opening takes no memory."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    """int32 [num_tokens]."""
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]] | None
    """bool [num_tokens]: True where there is a loss. None: everywhere."""
    max_token: int
    fingerprint: str
    """A hash of every token, its mask, and all labels. The same text has the same one, wherever its files lie."""
    ends: np.ndarray[Any, np.dtype[np.int64]] | None = None
    """int64 [num_documents]: the places behind the documents, rising. None: not known."""
    labels: np.ndarray[Any, np.dtype[np.float64]] | None = None
    """float64 [num_documents]: the label of each. None: they have none."""
    pictures: tuple[tuple[Seen, ...], ...] | None = None
    """The pictures of each document. None: they have none."""

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

    def part(self, start: int, stop: int) -> TokenStream:
        """The tokens from `start` to before `stop`. Documents that lie across an end are cut there."""
        mask = None if self.loss_mask is None else self.loss_mask[start:stop]
        ends, labels, pictures = self.ends, self.labels, self.pictures
        if ends is not None:
            first, last = (int(number) for number in np.searchsorted(ends, (start, stop), "right"))
            labels = None if labels is None else labels[first:last]
            pictures = None if pictures is None else pictures[first:last]
            ends = ends[(ends > start) & (ends < stop)] - start
            ends = np.append(ends, stop - start) if stop > start else ends
        return replace(
            self,
            tokens=self.tokens[start:stop],
            loss_mask=mask,
            ends=ends,
            labels=labels,
            pictures=pictures,
            fingerprint=digest(f"{self.fingerprint} {start} {stop}"),
        )


def split_held_out(stream: TokenStream, fraction: float) -> tuple[TokenStream, TokenStream]:
    """(training, held out): the last `fraction` of the tokens is held out."""
    boundary = len(stream) - int(len(stream) * fraction)
    return stream.part(0, boundary), stream.part(boundary, len(stream))


def write_tokens(folder: Path, blocks: Iterable[TokenBlock]) -> int:
    """Write the blocks into an empty folder, which the caller has to sync. Returns the number of tokens."""
    max_token, num_tokens, last_end = -1, 0, 0
    names = (_TOKENS, _MASK, _ENDS, _LABELS, _PICTURES)
    with ExitStack() as stack:
        tokens, mask, ends, labels, pictures = growing = [
            stack.enter_context(_Growing(folder / name)) for name in names
        ]
        for block in blocks:
            num_tokens += len(block.tokens)
            if len(block.tokens):
                max_token = max(max_token, int(block.tokens.max()))
            tokens.append(block.tokens.astype(np.int32).tobytes())
            if block.loss_mask is not None:
                mask.append(block.loss_mask.tobytes())
            if block.label is not None:
                labels.append(np.float64(block.label).tobytes())
            if block.pictures is not None:
                pictures.append(json.dumps(block.pictures).encode() + b"\n")
            if block.ends and num_tokens > last_end:
                ends.append(np.int64(num_tokens).tobytes())
                last_end = num_tokens
    files = {name: file.seal() for name, file in zip(names, growing, strict=True) if file.size}
    meta = {"max_token": max_token, "files": files}
    with _Growing(folder / _META) as file:
        file.append(json.dumps({"meta": meta, "xxh3": digest(json.dumps(meta))}).encode())
    return num_tokens


def read_tokens(folder: Path) -> TokenStream:
    """Open what `write_tokens` has written. Every byte is read and checked; NotAsWrittenError if it differs."""
    try:
        document = json.loads((folder / _META).read_bytes())
        meta = document["meta"]
        if document["xxh3"] != digest(json.dumps(meta)):
            raise NotAsWrittenError(f"{_META} does not match its checksum")
        files = meta["files"]
        tokens = _mapped(folder / _TOKENS, np.int32, files[_TOKENS])
        mask = _mapped(folder / _MASK, np.bool_, files[_MASK]) if _MASK in files else None
        ends = _mapped(folder / _ENDS, np.int64, files[_ENDS]) if _ENDS in files else None
        labels = _mapped(folder / _LABELS, np.float64, files[_LABELS]) if _LABELS in files else None
        pictures = _pictures(_mapped(folder / _PICTURES, np.uint8, files[_PICTURES])) if _PICTURES in files else None
        telling = [name for name in (_TOKENS, _MASK, _LABELS) if name in files]
        fingerprint = digest(json.dumps([files[name]["xxh3"] for name in telling]))
        return TokenStream(tokens, mask, meta["max_token"], fingerprint, ends, labels, pictures)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotAsWrittenError(f"it can't be read: {error}") from error


def _pictures(lines: np.ndarray[Any, Any]) -> tuple[tuple[Seen, ...], ...]:
    """The pictures of each document. NotAsWrittenError if a file is another one by now."""
    found = tuple(
        tuple(Seen(path, tuple(identity)) for path, identity in json.loads(line))
        for line in lines.tobytes().splitlines()
    )
    if changed := next((picture.path for row in found for picture in row if picture.changed), None):
        raise NotAsWrittenError(f"{changed} has changed")
    return found


def _mapped(path: Path, dtype: Any, sealed: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The file as an array. It is first read through a buffer, to check it, which leaves no page mapped."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != sealed["bytes"]:
            raise NotAsWrittenError(f"{path.name} has {size} bytes, not {sealed['bytes']}")
        if _checksum_of(file) != sealed["xxh3"]:
            raise NotAsWrittenError(f"{path.name} does not match its checksum")
        return np.memmap(file, dtype=dtype, mode="r")


def _checksum_of(file: IO[bytes]) -> str:
    checksum = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        checksum.update(buffer[:count])
    return checksum.hexdigest()


class _Growing:
    """A file that only its owner can read, with the checksum of what is appended to it."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._checksum = xxhash.xxh3_128()
        self.size = 0

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._checksum.update(data)
        self.size += len(data)

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def seal(self) -> dict[str, Any]:
        return {"bytes": self.size, "xxh3": self._checksum.hexdigest()}


def digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
