"""What names and headers tell of a checkpoint's model, without torch: `zinf init` needs no more of most."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from zinf_cli.errors import CheckpointError
from zinf_cli.file_names import is_plain
from zinf_cli.stand_ins import stand_in

CLASSIFIER = "ForSequenceClassification"
"""The end of the names of models that tell the label of a text."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TABLE = re.compile(r"(^|\.)(\w*pos\w*|wpe|embed_positions|pos_encoding)$")
_NOT_OF_TEXT = re.compile(
    r"vision|visual|image|patch|pixel|audio|video|speech|qformer|2d|entity|(^|[._])rel(ative)?[._]"
)


def is_of_text(path: str) -> bool:
    """Whether a module is none that sees or hears, by its path."""
    return not _NOT_OF_TEXT.search(path)


def is_table(path: str) -> bool:
    """Whether positions of text are looked up in a module, by its path, if it is an embedding."""
    return is_of_text(path) and bool(_TABLE.search(path))


def shapes_in(path: Path) -> dict[str, list[int]]:
    """The shapes of all tensors in a safetensors file."""
    with errors_of(path), safe_open(path, framework="np") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)


def tensor_files(directory: Path) -> list[Path]:
    """The files that hold the tensors. CheckpointError if there is none, or one is missing."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    index = directory / _INDEX
    if not index.is_file():
        raise CheckpointError(f"no {_SINGLE} and no {_INDEX} here", where=str(directory), hint=_hint(directory))
    try:
        names = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a safetensors index: {error}", where=str(index)) from error
    for name in names:
        if not is_plain(name):
            raise CheckpointError(f"{name!r} is not the name of a file in this folder", where=str(index))
    files = [directory / name for name in names]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(files)} shards are missing: {', '.join(absent[:10])}",
            where=str(index),
            hint="copy the whole checkpoint directory",
        )
    return files


def _hint(directory: Path) -> str | None:
    if not any(directory.glob("pytorch_model*.bin")):
        return None
    return "only safetensors are read: convert the .bin files with from_pretrained and save_pretrained"


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """A context in which errors of a safetensors file are CheckpointErrors that name it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if found := stand_in(path):
            raise CheckpointError(found[0], where=str(path), hint=found[1]) from error
        message = f"not a whole safetensors file: {error}"
        raise CheckpointError(message, where=str(path), hint="copy the file again") from error
