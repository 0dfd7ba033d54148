"""Turns a text into one stream of tokens. A text is tokenised once for all ranks and runs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from zinf_cli.durable import publish
from zinf_cli.errors import DatasetError
from zinf_cli.text.cache import identity, private_folder
from zinf_cli.text.chats import ANSWERS, PICTURES, TOOLS
from zinf_cli.text.compared import Compared
from zinf_cli.text.documents import PIECE, Document, read_documents
from zinf_cli.text.labels import Labels
from zinf_cli.text.pictures import Processor
from zinf_cli.text.text_files import about_tokens, find_files, kind_of
from zinf_cli.text.token_arrays import open_tokens
from zinf_cli.text.token_stream import NotAsWrittenError, TokenBlock, TokenStream, read_tokens, write_tokens
from zinf_cli.text.tokens import Tokenizer
from zinf_cli.told import Tell, nobody

CACHE_VERSION = 9
LARGEST_TOKEN = 2**31 - 1
_BLOCK = 1 << 22
_MOST, _CHARACTERS = 256, 4 * PIECE
"""Documents, or characters of them, that are tokenised at once."""
_SOME_FILES = 4
"""Of a long text: those of which a part is looked at."""
_MUCH = 8
"""How many times as long as its part a text has to be."""


@dataclass(frozen=True)
class TextSource:
    """A text, as a recipe describes it."""

    paths: tuple[Path, ...]
    text_field: str = "text"
    messages_field: str | None = None
    roles: tuple[str, ...] = (ANSWERS,)
    """Whose turns in chats are learned."""
    tokenizer: Path | None = None
    pair_fields: tuple[str, str] | None = None
    """The fields of a source and its target for an encoder-decoder, instead of text."""
    answer_fields: tuple[str, str, str] | None = None
    """The fields of a chosen answer, a rejected one and their prompt, instead of text."""
    labels: Labels | None = None
    """Of texts that have a label."""
    compared: Compared | None = None
    """Of texts that are compared, instead of text."""
    pictures: str | None = None
    """Of texts with pictures: the field with their paths."""


def open_token_stream(
    source: TextSource, cache_dir: Path, notice: Callable[[str], None] = lambda line: None, tell: Tell = nobody
) -> TokenStream:
    """The tokens of a text, from the cache if it has them whole. `notice` is told if it has them damaged.

    `tell` gets the share of the text that is tokenised. If several processes start at once, one of them tokenises.
    DatasetError if the text or the cache can't be used.
    """
    files = _files(source)
    entry = cache_dir / _fingerprint(source, files)
    try:
        if (kept := _kept(entry)) is not None:
            return kept
        private_folder(cache_dir)
        with _locked(cache_dir / f"{entry.name}.lock"):
            return _kept(entry, notice) or _build(source, files, entry, tell)
    except OSError as error:
        raise DatasetError(
            f"the token cache failed: {error.strerror or error}", where=str(cache_dir), hint="set XDG_CACHE_HOME"
        ) from error


def part_of_tokens(source: TextSource, cache_dir: Path, most: int) -> tuple[TokenStream, float] | None:
    """About `most` tokens of a text that is much longer, from several of its files, and which share of it they are.

    None if the text is short, or the cache has it. DatasetError if what is read can't be used.
    """
    files = _files(source)
    sizes = {file: file.stat().st_size for file in files}
    if sum(map(about_tokens, files)) < _MUCH * most or (cache_dir / _fingerprint(source, files)).exists():
        return None
    chosen = files[:: -(-len(files) // _SOME_FILES)]
    blocks_of, blocks, read = _blocks_of(source, files[0]), [], 0.0
    for file in chosen:
        seen, tokens = 1.0, 0
        for block in blocks_of(file):
            blocks.append(block)
            seen, tokens = block.seen, tokens + len(block.tokens)
            if tokens * len(chosen) >= most:
                break
        read += seen * sizes[file]
    with TemporaryDirectory() as folder:
        if not write_tokens(Path(folder), blocks):
            return None
        return read_tokens(Path(folder)), read / sum(sizes.values())


def _files(source: TextSource) -> list[Path]:
    files = find_files(source.paths)
    if source.tokenizer is None and kind_of(files[0]) != ".npy":
        raise DatasetError(
            "this text needs a tokenizer, and a model from a config has none", hint="set dataset.tokenizer"
        )
    return files


def _fingerprint(source: TextSource, files: Sequence[Path]) -> str:
    """The name of the cache entry. All that decides the tokens is in it: files as they are now, fields, tokenizer."""
    parts: list[Any] = [CACHE_VERSION, source.text_field, source.messages_field, source.pair_fields, source.roles]
    parts += [source.answer_fields] * (source.answer_fields is not None)
    if source.pictures is not None and source.tokenizer is not None:
        parts += [source.pictures, *Processor.fingerprint(source.tokenizer)]
    parts += [source.labels.field, source.labels.names] if source.labels is not None else []
    parts += astuple(source.compared) if source.compared is not None else ()
    parts += [(str(file), *identity(file)) for file in files]
    if source.tokenizer is not None and kind_of(files[0]) != ".npy":
        parts += Tokenizer.fingerprint(source.tokenizer)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock. The kernel releases it if the process dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _kept(entry: Path, notice: Callable[[str], None] = lambda line: None) -> TokenStream | None:
    """The tokens of a cache entry, if it is whole. `notice` is told if it is damaged."""
    if not entry.exists():
        return None
    try:
        return read_tokens(entry)
    except NotAsWrittenError as error:
        notice(f"the token cache {entry} was damaged ({error}): the text is tokenised again")
        return None


def _build(source: TextSource, files: Sequence[Path], entry: Path, tell: Tell) -> TokenStream:
    """Write the cache entry under another name, then rename it: it exists whole or not at all."""
    building = entry.with_suffix(".building")
    for leftover in (building, entry):
        _remove(leftover)
    building.mkdir(mode=0o700)
    try:
        if not write_tokens(building, _blocks(source, files, tell)):
            raise DatasetError("there are no tokens in this text", where=str(files[0]))
        publish(building, entry)
    except BaseException:
        _remove(building)
        raise
    try:
        return read_tokens(entry)
    except NotAsWrittenError as error:
        raise DatasetError(
            f"the token cache does not give back what was just written: {error}",
            where=str(entry),
            hint="set XDG_CACHE_HOME to another drive",
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _blocks(source: TextSource, files: Sequence[Path], tell: Tell) -> Iterator[TokenBlock]:
    """Blocks of tokens, with loss masks for chats. A file in a folder may be empty; a file that was named may not."""
    blocks_of = _blocks_of(source, files[0])
    sizes = [file.stat().st_size for file in files]
    for file, size, before in zip(files, sizes, accumulate(sizes, initial=0), strict=False):
        empty = True
        for block in blocks_of(file):
            empty = empty and not len(block.tokens)
            yield block
            tell((before + size * block.seen) / max(1, sum(sizes)))
        if empty and file in source.paths:
            raise DatasetError("the file is empty", where=str(file))


def _blocks_of(source: TextSource, file: Path) -> Callable[[Path], Iterator[TokenBlock]]:
    """What reads files of the kind of `file`."""
    return _array_blocks if kind_of(file) == ".npy" else _text_blocks(source)


def _text_blocks(source: TextSource) -> Callable[[Path], Iterator[TokenBlock]]:
    """A function that yields a block for each document of a file. DatasetError if no document has a target."""
    assert source.tokenizer is not None
    if source.pictures is not None:
        return _pictured_blocks(source, Processor(source.tokenizer))
    tokenizer = Tokenizer(source.tokenizer)

    def encode(documents: Sequence[Document]) -> list[list[tuple[list[int], list[bool] | None]]]:
        """The sequences of each document."""
        if source.answer_fields is not None:
            return [[*tokenizer.encode_answers(document, source.answer_fields)] for document in documents]
        if source.pair_fields is not None:
            return [[tokenizer.encode_pair(document, source.pair_fields[1])] for document in documents]
        if source.labels is not None:
            return [[(ids, None)] for ids in tokenizer.encode_whole(documents)]
        if source.compared is not None:
            rows = [list(source.compared.texts(document)) for document in documents]
            of_all = iter(tokenizer.encode_whole(list(chain.from_iterable(rows))))
            return [[(next(of_all), None) for _ in row] for row in rows]
        if source.messages_field is not None:
            return [[chat] for chat in tokenizer.encode_chats(documents, source.roles)]
        return [[(ids, None)] for ids in tokenizer.encode_texts(documents)]

    def blocks_of(file: Path) -> Iterator[TokenBlock]:
        count = answered = 0
        for documents in _some_at_once(_documents(file, source)):
            for document, sequences in zip(documents, encode(documents), strict=True):
                for ids, mask in sequences:
                    count, answered = count + 1, answered + (mask is None or any(mask))
                    loss_mask = None if mask is None else np.array(mask, dtype=np.bool_)
                    label = None if source.labels is None else source.labels.of(document)
                    yield TokenBlock(np.array(ids, dtype=np.int32), loss_mask, document.ends, document.seen, label)
        if count and not answered:
            raise _nobody_answers(file, source)

    return blocks_of


def _pictured_blocks(source: TextSource, processor: Processor) -> Callable[[Path], Iterator[TokenBlock]]:
    """The same of texts with pictures."""

    def blocks_of(file: Path) -> Iterator[TokenBlock]:
        count = answered = 0
        for document in _documents(file, source):
            found = processor.encode(document, file, source.roles)
            count, answered = count + 1, answered + any(found.mask)
            ids, mask = np.array(found.ids, dtype=np.int32), np.array(found.mask, dtype=np.bool_)
            yield TokenBlock(ids, mask, document.ends, document.seen, pictures=found.pictures)
        if count and not answered and source.messages_field is not None:
            raise _nobody_answers(file, source)

    return blocks_of


def _some_at_once(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """The documents in groups that are tokenised at once. Content that is no text counts nothing but itself."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.content) if isinstance(document.content, str) else 0
        if len(group) == _MOST or size >= _CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _documents(file: Path, source: TextSource) -> Iterator[Document]:
    if source.answer_fields is not None:
        return read_documents(file, source.answer_fields[0], beside=source.answer_fields[1:])
    if source.pair_fields is not None:
        return read_documents(file, source.pair_fields[0], beside=source.pair_fields[1:])
    if source.labels is not None:
        return read_documents(file, source.text_field, beside=(source.labels.field,))
    if (compared := source.compared) is not None:
        return read_documents(file, compared.query, beside=(compared.positive, compared.negative))
    if source.pictures is not None:
        field = source.messages_field or source.text_field
        found = read_documents(file, field, beside=(TOOLS, source.pictures))
        return (replace(one, beside={**one.beside, PICTURES: one.beside[source.pictures]}) for one in found)
    if source.messages_field is not None:
        return read_documents(file, source.messages_field, beside=(TOOLS,))
    return read_documents(file, source.text_field)


def _nobody_answers(file: Path, source: TextSource) -> DatasetError:
    """The error for a file of chats that have nothing to train on. It names the roles in the file."""
    roles = Counter(str(message["role"]) for document in _documents(file, source) for message in document.content)
    wanted = " or ".join(map(repr, source.roles))
    if not any(roles[role] for role in source.roles):
        found = ", ".join(f"{role} ({count})" for role, count in roles.most_common(8))
        return DatasetError(
            f"no message in {source.messages_field!r} has the role {wanted}, and only what it says is trained on; "
            f"roles there: {found}",
            where=str(file),
            hint=f"rename the role that answers to {ANSWERS}, or set dataset.roles_to_train",
        )
    return DatasetError(
        f"no {wanted} in {source.messages_field!r} says anything, and only what it says is trained on", where=str(file)
    )


def _array_blocks(file: Path) -> Iterator[TokenBlock]:
    array = open_tokens(file)
    for start in range(0, array.shape[0], _BLOCK):
        block = np.asarray(array[start : start + _BLOCK])
        wrong = (block < 0) | (block > LARGEST_TOKEN)
        if wrong.any():
            place = start + int(wrong.argmax())
            raise DatasetError(
                f"token {place} is {block[place - start]}, outside of 0 .. {LARGEST_TOKEN}", where=str(file)
            )
        yield TokenBlock(block, seen=(start + len(block)) / array.shape[0])
