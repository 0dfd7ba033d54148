"""Reads documents from files: .txt, .jsonl (both also .gz) and .parquet. A document has its place, for errors.

Whatever the bytes of a file are, the result is documents or a DatasetError.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from zinf_cli.errors import DatasetError
from zinf_cli.stand_ins import stand_in
from zinf_cli.text.text_files import is_packed, kind_of

PIECE = 1 << 20
"""Characters of a .txt file that are tokenised together."""
LONGEST_PIECE = 1 << 24
"""Bytes of a line of a .txt file that are read at once. A longer line is cut."""
LONGEST_RECORD = 1 << 28
"""Most bytes of a line of a .jsonl file."""
_SIP = 1 << 12
"""Bytes of a packed file that are unpacked at once."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_MARK = "\ufeff"
"""A byte order mark, decoded. If files were joined, one may stand in the middle."""


@dataclass(frozen=True)
class Document:
    """A text, or a piece of one, or chat messages. `ends` says if it is the last piece."""

    where: str
    """File, and line or row."""
    content: Any
    """str, or a list of {role, content}."""
    ends: bool = True
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the record, by name."""
    begins: bool = True
    """Whether it is the first piece."""
    seen: float = 1.0
    """The share of the file, by its bytes on the drive or its rows, that was read when this was."""


def read_documents(path: Path, field: str, beside: Sequence[str] = ()) -> Iterator[Document]:
    """The documents of one file. An empty file has none.

    `field` is the field of a record to read; `beside` are other fields that are wanted. DatasetError if the file can't
    be read, or a record has no `field`.
    """
    kind = kind_of(path)
    try:
        if kind == ".txt":
            yield from _text_pieces(path)
        elif kind == ".jsonl":
            yield from _json_lines(path, field, beside)
        else:
            yield from _parquet_rows(path, field, beside)
    except OSError as error:
        raise DatasetError(f"can't read: {_first_line(error.strerror or error)}", where=str(path)) from error


def refuse_halves(text: str, where: str) -> None:
    """DatasetError if a text has half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise DatasetError(
            f"{half} is half of a character (a lone surrogate), as where a text was cut inside of one",
            where=where,
            hint="remove it, or cut the text elsewhere",
        ) from error


def first_record(path: Path) -> dict[str, Any]:
    """The first record of a .jsonl or .parquet file, all its fields. DatasetError if there is none."""
    try:
        if kind_of(path) == ".jsonl":
            where, record, _ = next(_json_values(path), (str(path), None, 1.0))
        else:
            where, record = f"{path}:row 0", next(_parquet_records(path, None), (None, 1.0))[0]
    except OSError as error:
        raise DatasetError(f"can't read: {_first_line(error.strerror or error)}", where=str(path)) from error
    if not isinstance(record, dict):
        raise DatasetError(
            "no record here" if record is None else f"expected a record, got a {type(record).__name__}", where=where
        )
    return record


def _text_pieces(path: Path) -> Iterator[Document]:
    """The document of a .txt file, cut at line ends so that memory stays bounded."""
    piece: list[str] = []
    size, where, begins = 0, str(path), True
    for number, line, seen in _lines(path, LONGEST_PIECE):
        if size > PIECE:
            yield Document(where, "".join(piece), ends=False, begins=begins, seen=seen)
            piece, size, where, begins = [], 0, f"{path}:{number}", False
        piece.append(line)
        size += len(line)
    if size:
        yield Document(where, "".join(piece), begins=begins)


def _json_lines(path: Path, field: str, beside: Sequence[str]) -> Iterator[Document]:
    for where, record, seen in _json_values(path):
        if not isinstance(record, dict) or field not in record:
            raise _no_field(field, record, where)
        yield Document(where, _unmarked(record[field]), beside={name: record.get(name) for name in beside}, seen=seen)


def _json_values(path: Path) -> Iterator[tuple[str, Any, float]]:
    """(place, value, share of the file that was read) of every line that is not empty."""
    for number, line, seen in _lines(path, LONGEST_RECORD, whole=True):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"not valid JSON: {error.msg}", where=where) from error
        except (ValueError, RecursionError) as error:  # a number with too many digits; too many brackets in brackets
            raise DatasetError(f"not usable JSON: {_first_line(error)}", where=where) from error
        yield where, value, seen


def _parquet_rows(path: Path, field: str, beside: Sequence[str]) -> Iterator[Document]:
    for row, (record, seen) in enumerate(_parquet_records(path, (field, *beside), field)):
        rest = {name: record.get(name) for name in beside}
        yield Document(f"{path}:row {row}", _unmarked(record.get(field)), beside=rest, seen=seen)


def _parquet_records(
    path: Path, wanted: Sequence[str] | None, needed: str | None = None
) -> Iterator[tuple[dict[str, Any], float]]:
    """Rows with the `wanted` columns that there are, and the share of rows that was read; None wants all columns.

    DatasetError without the `needed` one.
    """
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if needed is not None and needed not in names:
                raise _no_field(needed, dict.fromkeys(names), str(path))
            columns = names if wanted is None else [name for name in wanted if name in names]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield record, row / table.metadata.num_rows
    except DatasetError:
        raise
    except Exception as error:  # damaged bytes raise errors of many kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if found := stand_in(path):
            raise DatasetError(found[0], where=str(path), hint=found[1]) from error
        where = f"{path}:row {row}" if row else str(path)
        raise DatasetError(f"not a parquet file, or a damaged one: {_first_line(error)}", where=where) from error


def _lines(path: Path, longest: int, *, whole: bool = False) -> Iterator[tuple[int, str, float]]:
    """(number, text, share of the file that was read) of every line. Its end is part of it, always as \\n.

    A line of more than `longest` bytes comes in pieces. If lines have to be `whole`, such a line is a DatasetError.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, begins, size = 1, True, path.stat().st_size or 1
    with path.open("rb") as stored, gzip.open(_in_sips(stored)) if is_packed(path) else nullcontext(stored) as file:
        while True:
            where = f"{path}:{number}"
            with _unpacking(where):
                raw = file.readline(longest)
            if number == 1 and begins:
                _refuse_other_encodings(raw, path)
            if b"\0" in raw:
                raise DatasetError(
                    "a byte of zero, so this is not text", where=where, hint="UTF-8 is read; the file may be damaged"
                )
            ended = not raw or raw.endswith(b"\n")
            if whole and not ended and len(raw) == longest:
                raise DatasetError(f"a line of more than {longest >> 20} MiB", where=where)
            try:
                text = decoder.decode(raw, final=ended)
            except UnicodeDecodeError as error:
                raise DatasetError(f"not UTF-8 text (byte {error.start} of the line)", where=where) from error
            if begins:
                text = text.removeprefix(_MARK)
            if text:
                text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
                yield number, text, min(1.0, stored.tell() / size)
            if not raw:
                return
            number, begins = number + ended, ended


def _in_sips(stored: IO[bytes]) -> Any:
    """A packed file for gzip, which unpacks a little of it at a time, so that its place says how much that was."""
    return SimpleNamespace(read=lambda most: stored.read(min(most, _SIP)))


@contextmanager
def _unpacking(where: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = "the .gz file is cut short" if isinstance(error, EOFError) else f"not a whole .gz file: {error}"
        raise DatasetError(what, where=where, hint="copy it again") from error


def _refuse_other_encodings(begin: bytes, path: Path) -> None:
    for mark, name in _MARKS:
        if begin.startswith(mark):
            hint = f"iconv -f {name} -t UTF-8 {path.name} > NEW"
            raise DatasetError(f"this is {name} text, and UTF-8 is read", where=f"{path}:1", hint=hint)


def _unmarked(content: Any) -> Any:
    return content.removeprefix(_MARK) if isinstance(content, str) else content


def _no_field(field: str, record: Any, where: str) -> DatasetError:
    there = f"a {type(record).__name__}"
    if isinstance(record, dict):
        names = [name[:40] if name.isprintable() else repr(name)[:40] for name in map(str, record)]
        there = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    hint = "set dataset.text_field; dataset.messages_field for chats; dataset.source_field for an encoder-decoder"
    return DatasetError(f"no field {field!r}, there is: {there or 'nothing'}", where=where, hint=hint)


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
