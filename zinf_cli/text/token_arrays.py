"""Opens .npy files of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zinf_cli.errors import DatasetError
from zinf_cli.stand_ins import stand_in


def open_tokens(file: Path) -> np.memmap[Any, Any]:
    """The array of a file (1-D, of integers), of which nothing is read yet. DatasetError if it is something else."""
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except OSError:
        raise
    except Exception as error:  # the header is a Python literal, and may be anything
        if found := stand_in(file):
            raise DatasetError(found[0], where=str(file), hint=found[1]) from error
        with file.open("rb") as content:
            zipped = content.read(2) == b"PK"
        what = "a zip archive, as np.savez writes it" if zipped else "not a .npy file of numbers, as np.save writes it"
        hint = "save one array with np.save; raw tokens: np.save(FILE, np.fromfile(RAW, dtype))"
        raise DatasetError(what, where=str(file), hint=hint) from error
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DatasetError(
            f"expected one-dimensional integers (tokens), got {array.dtype} of shape {array.shape}", where=str(file)
        )
    return array
