"""The safetensors files of a Hugging Face checkpoint directory: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from zinf_cli.errors import CheckpointError
from zinf_cli.file_names import is_plain
from zinf_cli.stand_ins import stand_in

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFiles:
    """Reads shapes from all headers at once, and tensors on demand. Errors are CheckpointErrors that name a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in tensor_files(directory):
            with _errors_of(path), safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    self._file_of[key] = path
                    self._shapes[key] = file.get_slice(key).get_shape()

    def keys(self) -> list[str]:
        return list(self._shapes)

    def on_meta(self, key: str) -> torch.Tensor:
        """A tensor of the stored shape on the meta device. It is float32, whatever dtype is stored."""
        return torch.empty(self._shapes[key], dtype=torch.float32, device="meta")

    def not_finite(self) -> str | None:
        """The first tensor with a NaN or an infinity. All tensors are read, one at a time."""
        with self.reader() as fetch:
            return next((key for key in self.keys() if not bool(fetch(key).isfinite().all())), None)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """A context with a function that gives the CPU tensor of a key, in the stored dtype.

        The tensors are private views of mapped files. Their pages count as this process's memory until the files are
        closed and the tensors are freed. So no file stays open between two readers.
        """
        with ExitStack() as stack:
            files: dict[Path, Any] = {}

            def fetch(key: str) -> torch.Tensor:
                path = self._file_of[key]
                with _errors_of(path):
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensor: torch.Tensor = files[path].get_tensor(key)
                return tensor

            yield fetch


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
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if found := stand_in(path):
            raise CheckpointError(found[0], where=str(path), hint=found[1]) from error
        message = f"not a whole safetensors file: {error}"
        raise CheckpointError(message, where=str(path), hint="copy the file again") from error
