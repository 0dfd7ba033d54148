"""A hash of the weights that an adapter is trained on, for little reading.

It is of each weight file's name, size and header, and of the first page of every tensor. Training changes a tensor
nearly everywhere, so another model has another hash. A change behind the first page of a tensor alone is not seen.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from xxhash import xxh3_128

from zinf_cli.checkpoint.folder import is_checkpoint
from zinf_cli.checkpoint.manifest import Manifest, rank_file
from zinf_cli.errors import CheckpointError
from zinf_cli.model_state import PAGE
from zinf_cli.models.headers import tensor_files


def base_digest(folder: Path) -> str:
    """32 hexadecimal digits, for a Hugging Face checkpoint directory or a checkpoint of a run.

    CheckpointError if the files can't be read.
    """
    found = xxh3_128()
    for path in _files(folder):
        try:
            _add(found, path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"not a whole safetensors file: {error}", where=str(path)) from error
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    if is_checkpoint(folder):
        return [folder / rank_file(rank) for rank in range(Manifest.load(folder).world_size)]
    return tensor_files(folder)


def _add(found: xxh3_128, path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        found.update(f"{path.name} {os.fstat(file.fileno()).st_size} ".encode())
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        found.update(header)
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found.update(os.pread(file.fileno(), min(PAGE, last - first), 8 + size + first))
