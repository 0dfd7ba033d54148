"""Finds the files that a recipe's paths name, and reports those in their folders that are left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import DatasetError
from zinf_cli.stand_ins import LARGEST_POINTER, pointer
from zinf_cli.text.token_arrays import open_tokens

SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")
RECORDS = (".jsonl", ".parquet")
PACKED = (".txt", ".jsonl")
"""Suffixes of files that may also be packed as .gz."""
_SHOWN = 4
_BYTES_PER_TOKEN = 4
"""Of text in most languages and tokenizers, about."""
_PACKED_TIMES = 3
"""Text by its gzip, about."""


@dataclass
class Texts:
    """The files of one path: the file itself, or those in the folder."""

    path: Path
    files: list[Path] = field(default_factory=list)
    num_bytes: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """The names of files that are left out, by reason."""

    def line(self) -> str:
        """What the path contributes, in words."""
        count = f"{len(self.files)} {'file' if len(self.files) == 1 else 'files'}, " if self.path.is_dir() else ""
        said = f"{self.path}: {count}{format_bytes(self.num_bytes)}"
        without = [f"{len(names)} {reason} ({_some(names)})" for reason, names in self.left_out.items()]
        return f"{said}; left out: {', '.join(without)}" if without else said

    def take(self, file: Path) -> None:
        size = file.stat().st_size
        if size <= LARGEST_POINTER and (found := pointer(file)):
            raise DatasetError(found[0], where=str(file), hint=found[1])
        self.files.append(file)
        self.num_bytes += size

    def leave(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)


def kind_of(file: Path) -> str:
    """The suffix that says how to read a file, without .gz. Empty if the file is not read."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        return suffixes[0] if suffixes[0] in PACKED else ""
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def is_packed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def about_tokens(file: Path) -> int:
    """How many tokens a file has: of .npy exactly, else about, by its bytes."""
    if kind_of(file) == ".npy":
        return int(open_tokens(file).size)
    return -(-file.stat().st_size * (_PACKED_TIMES if is_packed(file) else 1) // _BYTES_PER_TOKEN)


def about_tokens_of(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode(errors="replace")) // _BYTES_PER_TOKEN)


def find_texts(paths: Sequence[Path]) -> list[Texts]:
    """The data files of each path, in sorted order. Folders are searched recursively.

    Links are followed, and a folder is read once. Names that begin with a dot, and __pycache__, are skipped.
    DatasetError if a path has no file, a file can't be read, or tokens are mixed with text.
    """
    found = []
    for path in paths:
        try:
            found.append(_folder(path) if path.is_dir() else _file(path))
        except OSError as error:
            where = str(error.filename or path)
            raise DatasetError(f"can't read: {error.strerror or error}", where=where) from error
    if len({kind_of(file) == ".npy" for texts in found for file in texts.files}) > 1:
        raise DatasetError(".npy files hold tokens and can't be mixed with text", where=str(paths[0]))
    return found


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files of `find_texts`, in one list."""
    return [file for texts in find_texts(paths) for file in texts.files]


def _file(path: Path) -> Texts:
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file or folder"
        raise DatasetError(what, where=str(path))
    if not kind_of(path):
        suffix = "".join(path.suffixes[-2:]) if is_packed(path) else path.suffix
        raise DatasetError(f"can't read {suffix or 'a file without suffix'}", where=str(path), hint=_accepted())
    texts = Texts(path)
    texts.take(path)
    return texts


def _folder(path: Path) -> Texts:
    texts = Texts(path)
    for file in sorted(_below(path, texts, set())):
        if kind_of(file) and file.stat().st_size == 0:
            texts.leave("empty", file.name)
        elif kind_of(file):
            texts.take(file)
        else:
            texts.leave("not text", file.name)
    if not texts.files:
        raise DatasetError(
            f"no {', '.join(SUFFIXES)} file in this folder"
            + ("" if not texts.left_out else f"; {texts.line().partition('; ')[2]}"),
            where=str(path),
            hint=_accepted(),
        )
    return texts


def _below(folder: Path, texts: Texts, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Every regular file below a folder. `seen` are the folders visited so far, so that a circle of links ends."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        texts.leave("read already", folder.name)
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    linked = []
    for path in (folder / name for name in names):
        if path.name.startswith(".") or path.name in ("__pycache__", "lost+found"):
            texts.leave("hidden", path.name)
        elif path.is_dir():
            if path.is_symlink():
                linked.append(path)  # after the folders themselves
            else:
                yield from _below(path, texts, seen)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            raise DatasetError("a link that leads nowhere", where=str(path), hint="mount its drive, or remove the link")
        else:
            texts.leave("no regular file", path.name)
    for path in linked:
        yield from _below(path, texts, seen)


def _some(names: Sequence[str]) -> str:
    counted = Counter(names)
    shown = [f"{name} ({count} times)" if count > 1 else name for name, count in counted.most_common(_SHOWN)]
    return ", ".join(shown) + (", ..." if len(counted) > _SHOWN else "")


def _accepted() -> str:
    return f"give {', '.join(SUFFIXES)}, or {', '.join(f'{suffix}.gz' for suffix in PACKED)}"
