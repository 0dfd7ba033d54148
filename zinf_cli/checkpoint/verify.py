"""Whether a checkpoint is as it was written: every byte of it is read and every checksum compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from zinf_cli.amounts import format_bytes
from zinf_cli.checkpoint.manifest import MANIFEST, Manifest
from zinf_cli.errors import DamagedError

_THREADS = 4


@dataclass(frozen=True)
class Verdict:
    """One file of a checkpoint."""

    name: str
    num_bytes: int
    problem: str | None
    """None: it is whole."""


def verify(folder: Path) -> list[Verdict]:
    """A verdict on every file, the manifest's first; memory is a few pieces."""
    try:
        manifest = Manifest.load(folder)
    except DamagedError as error:
        path = folder / MANIFEST
        return [Verdict(MANIFEST, path.stat().st_size if path.exists() else 0, error.message)]
    verdicts = [Verdict(MANIFEST, (folder / MANIFEST).stat().st_size, None)]
    for name, file in manifest.files.items():
        problem = size_problem(folder, manifest, name)
        if problem is None:
            problem = next(_damage(folder, manifest, name), None)
        verdicts.append(Verdict(name, file.num_bytes, problem))
    return verdicts


def size_problem(folder: Path, manifest: Manifest, name: str) -> str | None:
    """What a look at its size says of a file; None when it is as long as it was written."""
    written = manifest.files[name].num_bytes
    path = folder / name
    if not path.is_file():
        return "missing"
    if (size := path.stat().st_size) == written:
        return None
    return f"{format_bytes(size)} long, was written {format_bytes(written)}"


def read_file(folder: Path, manifest: Manifest, name: str) -> bytes:
    """A small file of a checkpoint; DamagedError where it is not as it was written."""
    problem = size_problem(folder, manifest, name) or next(_damage(folder, manifest, name), None)
    if problem is not None:
        raise DamagedError(problem, where=str(folder / name))
    return (folder / name).read_bytes()


def damage_of(number: int, offset: int, length: int) -> str:
    return f"damaged in bytes {offset} to {offset + length - 1} (piece {number}: its checksum is another)"


def _damage(folder: Path, manifest: Manifest, name: str) -> Iterator[str]:
    """What is wrong with the pieces of a file."""
    expected, pieces = manifest.files[name].xxh3, manifest.pieces_of(name)
    descriptor = os.open(folder / name, os.O_RDONLY)
    try:

        def digest(piece: tuple[int, int]) -> str:
            content = os.pread(descriptor, piece[1], piece[0])
            os.posix_fadvise(descriptor, piece[0], piece[1], os.POSIX_FADV_DONTNEED)
            return xxh3_64_hexdigest(content)

        with ThreadPoolExecutor(_THREADS) as pool:
            for number, (found, piece) in enumerate(zip(pool.map(digest, pieces), pieces, strict=True)):
                if found != expected[number]:
                    yield damage_of(number, *piece)
    except OSError as error:
        yield f"can't be read: {error.strerror}"
    finally:
        os.close(descriptor)
