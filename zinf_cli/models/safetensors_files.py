"""The safetensors files of a Hugging Face checkpoint directory: one file, or shards with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from zinf_cli.models.headers import errors_of, shapes_in, tensor_files


class SafetensorsFiles:
    """Reads shapes from all headers at once, and tensors on demand. Errors are CheckpointErrors that name a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in tensor_files(directory):
            shapes = shapes_in(path)
            self._shapes |= shapes
            self._file_of |= dict.fromkeys(shapes, path)

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
                with errors_of(path):
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensor: torch.Tensor = files[path].get_tensor(key)
                return tensor

            yield fetch
