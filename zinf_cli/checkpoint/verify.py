"""Checks that a checkpoint is as it was written: reads every byte and compares every checksum."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from zinf_cli.amounts import format_bytes
from zinf_cli.checkpoint.manifest import MANIFEST, Manifest
from zinf_cli.checkpoint.reading import patiently, read_checked
from zinf_cli.errors import CheckpointError, DamagedError, UnreadableError
from zinf_cli.told import Tell, nobody

_THREADS = 4


@dataclass(frozen=True)
class Verdict:
    """What a check has found about one file of a checkpoint."""

    name: str
    num_bytes: int
    problem: str | None
    """What is wrong; None if the file is whole."""
    damaged: bool = False
    """Whether the file is not as it was written. If not, a problem says nothing about what is on the drive."""


def verify(folder: Path, tell: Tell = nobody) -> list[Verdict]:
    """A verdict on every file, that on the manifest first. It takes memory of a few pieces.

    `tell` gets the share of the bytes that were looked at.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.load(folder)
    except (CheckpointError, UnreadableError) as error:
        size = path.stat().st_size if path.exists() else 0
        return [Verdict(MANIFEST, size, error.message, isinstance(error, DamagedError))]
    verdicts = [Verdict(MANIFEST, path.stat().st_size, None)]
    sizes = [file.num_bytes for file in manifest.files.values()]
    for before, (name, file) in zip(accumulate(sizes, initial=0), manifest.files.items(), strict=False):

        def seen(num_bytes: int, before: int = before) -> None:
            tell((before + num_bytes) / max(1, sum(sizes)))

        try:
            problem = size_problem(folder, manifest, name) or next(_damage(folder, manifest, name, seen=seen), None)
            verdicts.append(Verdict(name, file.num_bytes, problem, problem is not None))
        except UnreadableError as error:
            verdicts.append(Verdict(name, file.num_bytes, error.message))
    return verdicts


def size_problem(folder: Path, manifest: Manifest, name: str) -> str | None:
    """What is wrong with the size of a file; None if it is as long as it was written."""
    written, path = manifest.files[name].num_bytes, folder / name
    try:
        size = patiently(path.stat, path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    return None if size == written else f"{format_bytes(size)} long, was written {format_bytes(written)}"


def read_file(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The content of a small file of a checkpoint. DamagedError if it is not as it was written."""
    content = bytearray(manifest.files[name].num_bytes)
    problem = size_problem(folder, manifest, name) or next(_damage(folder, manifest, name, memoryview(content)), None)
    if problem is not None:
        raise DamagedError(problem, where=str(folder / name))
    return bytes(content)


def damage_of(number: int, offset: int, length: int) -> str:
    return f"damaged in bytes {offset} to {offset + length - 1} (piece {number}: its checksum is another)"


def _damage(
    folder: Path,
    manifest: Manifest,
    name: str,
    into: memoryview | None = None,
    seen: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[str]:
    """What is wrong with the pieces of a file. They are read `into` that memory for the whole file, if it is given.

    `seen` gets how many bytes were looked at.
    """
    expected, pieces, path = manifest.files[name].xxh3, manifest.pieces_of(name), folder / name
    descriptor = patiently(lambda: os.open(path, os.O_RDONLY), path)
    try:

        def is_whole(number: int) -> bool:
            offset, length = pieces[number]
            memory = memoryview(bytearray(length)) if into is None else into[offset : offset + length]
            return read_checked(descriptor, memory, offset, expected[number], path)

        with ThreadPoolExecutor(_THREADS) as pool:
            for number, whole in enumerate(pool.map(is_whole, range(len(pieces)))):
                seen(sum(pieces[number]))
                if not whole:
                    yield damage_of(number, *pieces[number])
    finally:
        os.close(descriptor)
