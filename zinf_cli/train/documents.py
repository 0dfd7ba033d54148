"""Documents from files: .txt, .jsonl, .parquet, with the place of each for errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinf_cli.errors import DatasetError

SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")
RECORDS = (".jsonl", ".parquet")
PIECE = 1 << 20
"""Characters of a .txt file that are tokenised together."""


@dataclass(frozen=True)
class Document:
    """A text, or a piece of one (`ends` says whether it is the last), or chat messages."""

    where: str
    content: Any
    """str, or a list of {role, content}."""
    ends: bool = True
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the record."""


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The data files under `paths`, folders searched recursively, in sorted order; DatasetError where there is none."""
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
            if not found:
                raise DatasetError(f"no {', '.join(SUFFIXES)} file in this folder", where=str(path))
            files += found
        elif not path.is_file():
            raise DatasetError("no such file or folder", where=str(path))
        elif path.suffix not in SUFFIXES:
            raise DatasetError(
                f"can't read {path.suffix or 'a file without suffix'}", where=str(path), hint=_accepted()
            )
        else:
            files.append(path)
    if len({file.suffix == ".npy" for file in files}) > 1:
        raise DatasetError(".npy files hold tokens and can't be mixed with text", where=str(paths[0]))
    return files


def _accepted() -> str:
    return f"give {', '.join(SUFFIXES)}"


def read_documents(path: Path, field: str, beside: Sequence[str] = ()) -> Iterator[Document]:
    """The documents of one text file; `field` names what a record holds, `beside` what else of it is wanted."""
    try:
        if path.suffix == ".txt":
            yield from _text_pieces(path)
        elif path.suffix == ".jsonl":
            yield from _json_lines(path, field, beside)
        else:
            yield from _parquet_rows(path, field, beside)
    except UnicodeDecodeError as error:
        raise DatasetError(f"not UTF-8 text (byte {error.start} of a piece)", where=str(path)) from error
    except OSError as error:
        raise DatasetError(f"can't read: {error.strerror or error}", where=str(path)) from error


def _text_pieces(path: Path) -> Iterator[Document]:
    """A .txt file is one document, cut at line ends so that memory stays bounded."""
    with path.open(encoding="utf-8") as file:
        piece = file.readlines(PIECE)
        if not piece:
            raise DatasetError("the file is empty", where=str(path))
        while piece:
            following = file.readlines(PIECE)
            yield Document(str(path), "".join(piece), ends=not following)
            piece = following


def _json_lines(path: Path, field: str, beside: Sequence[str]) -> Iterator[Document]:
    empty = True
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"not valid JSON: {error.msg}", where=where) from error
            if not isinstance(record, dict) or field not in record:
                known = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
                raise DatasetError(f"no field {field!r}, there is: {known}", where=where, hint=_field_hint())
            yield Document(where, record[field], beside={name: record.get(name) for name in beside})
    if empty:
        raise DatasetError("the file is empty", where=str(path))


def _parquet_rows(path: Path, field: str, beside: Sequence[str]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DatasetError(f"not a parquet file: {error}", where=str(path)) from error
    with table:
        names = table.schema_arrow.names
        if field not in names:
            raise DatasetError(f"no field {field!r}, there is: {', '.join(names)}", where=str(path), hint=_field_hint())
        if table.metadata.num_rows == 0:
            raise DatasetError("the file has no rows", where=str(path))
        row = 0
        columns = [field, *(name for name in beside if name in names)]
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                yield Document(f"{path}:row {row}", record[field], beside={name: record.get(name) for name in beside})
                row += 1


def _field_hint() -> str:
    return "set dataset.text_field; dataset.messages_field for chats; dataset.source_field for an encoder-decoder"
