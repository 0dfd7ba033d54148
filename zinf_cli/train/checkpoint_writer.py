"""Writing a checkpoint: every rank its slices, rank 0 the rest; see checkpoint/manifest.py for what comes of it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from zinf_cli.amounts import format_bytes
from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import (
    BUFFERS,
    PIECE,
    Layout,
    Manifest,
    StoredFile,
    StoredFlat,
    StoredParam,
    StoredUnit,
    cut,
    rank_file,
)
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.store import Unit
from zinf_cli.errors import CapacityError, PreflightError, TierError
from zinf_cli.tiers.arena import Arena, Buffer
from zinf_cli.tiers.nvme import NvmeTier, as_memory, set_direct
from zinf_cli.tiers.tier import Extent, Transfer
from zinf_cli.trace import Trace

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_STAGED = 4
"""Pieces between the engine and the drive."""
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Position:
    """Where a run stands after `step` updates; the fields are the manifest's."""

    step: int
    precision: str
    sequences: int
    text: str
    loss_scale: tuple[float, int] | None
    recipe: Mapping[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of one run; `write` is called on every rank between two steps.

    `model_files` yields (name, content) of what else makes the folder a model: its configuration and tokenizer.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        ranks: Ranks,
        model_files: Callable[[], Iterator[tuple[str, bytes]]],
        keep_latest_k: int | None,
    ) -> None:
        self._run_dir = run_dir
        self._engine = engine
        self._ranks = ranks
        self._model_files = model_files
        self._keep = keep_latest_k

    def write(self, position: Position) -> None:
        """Do what updates are pending, write the state, make it a checkpoint, remove the oldest ones."""
        folder = folders.step_folder(self._run_dir, position.step)
        layout = Layout(tuple(map(stored_unit, self._engine.units)), self._ranks.world_size)
        if self._ranks.rank == 0:
            with _disk_errors(folder):
                folders.begin(folder)
        self._ranks.all(0)  # nobody writes into a folder that is about to be emptied
        with open_rank_file(folder, layout, self._engine.trace, self._ranks.rank) as file:
            self._engine.save(file)
            file.finish()
        checksums = torch.zeros(self._ranks.world_size, len(layout.pieces), dtype=torch.int64)
        checksums[self._ranks.rank] = file.checksums
        self._ranks.sum(checksums)  # known to rank 0, when every rank's file is on its drive
        if self._ranks.rank == 0:
            with _disk_errors(folder):
                self._complete(folder, layout, position, checksums)

    def _complete(self, folder: Path, layout: Layout, position: Position, checksums: torch.Tensor) -> None:
        """Everything beside the files of the ranks; then the checkpoint exists."""
        files = {
            rank_file(rank): StoredFile(layout.num_bytes, tuple(f"{value & _64_BITS:016x}" for value in row))
            for rank, row in enumerate(checksums.tolist())
        }
        files |= dict(self._write_small_files(folder))
        manifest = Manifest(**vars(position), world_size=self._ranks.world_size, units=layout.units, files=files)
        folders.commit(folder, manifest.dump())
        if self._keep is not None:
            folders.keep_latest(self._run_dir, self._keep)

    def _write_small_files(self, folder: Path) -> Iterator[tuple[str, StoredFile]]:
        for name, content in [*self._model_files(), *_buffers(self._engine.model)]:
            folders.write_durably(folder / name, content)
            pieces = (content[start : start + length] for start, length in cut(len(content)))
            yield name, StoredFile(len(content), tuple(map(xxh3_64_hexdigest, pieces)))


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "earlier checkpoints are as they were"
        raise TierError(f"can't write a checkpoint: {error.strerror}", where=str(folder), hint=hint) from error


class RankFile:
    """One rank's file of a checkpoint, a StateSink: regions written in any order, checksums taken on the way."""

    def __init__(self, path: Path, layout: Layout, trace: Trace, rank: int) -> None:
        self.layout = layout
        self.checksums = torch.zeros(len(layout.pieces), dtype=torch.int64)
        """xxh3 of every piece, as signed 64-bit numbers."""
        self._descriptor = _create(path, layout, rank)
        self._tier = NvmeTier([path], trace, rank=rank, file=self._descriptor)
        self._hashing = ThreadPoolExecutor(1, "zinf-xxh3")
        self._staging = Arena(_STAGED * PIECE, torch.device("cpu"))
        self._leaving: deque[tuple[Transfer, Future[None], Buffer]] = deque()
        self._note(0, memoryview(layout.header))
        self._extents = {
            (region.unit, region.field): Extent(
                self._tier, region.num_bytes, f"checkpoint {region.name}", start=len(layout.header) + region.start
            )
            for region in layout.regions
        }

    def write(self, unit: str, field: str, start: int, data: torch.Tensor) -> None:
        """See StateSink."""
        while (buffer := self._staging.allocate(data.numel())) is None:
            self._leave()
        buffer.data.copy_(data)
        piece = self.layout.first_piece[unit, field] + start // PIECE
        hashed = self._hashing.submit(self._note, piece, as_memory(buffer.data))
        self._leaving.append((self._extents[unit, field].write(start, buffer.data), hashed, buffer))

    def finish(self) -> None:
        """Return when all of it is on the drive."""
        while self._leaving:
            self._leave()
        os.fsync(self._descriptor)

    def close(self) -> None:
        self._hashing.shutdown()
        self._tier.close()

    def _leave(self) -> None:
        written, hashed, buffer = self._leaving.popleft()
        hashed.result()
        written.wait()
        buffer.free()

    def _note(self, piece: int, content: memoryview) -> None:
        unsigned = xxh3_64_intdigest(content)
        self.checksums[piece] = unsigned - (1 << 64) if unsigned >> 63 else unsigned


@contextmanager
def open_rank_file(folder: Path, layout: Layout, trace: Trace, rank: int) -> Iterator[RankFile]:
    """This rank's file, its space taken; it does not outlive an error."""
    if not folder.is_dir():
        raise PreflightError(
            f"rank {rank} does not see the checkpoint's folder that rank 0 has made",
            where=str(folder),
            hint="output_dir has to lie on a file system that all hosts share",
        )
    path = folder / rank_file(rank)
    file = None
    try:
        file = RankFile(path, layout, trace, rank)
        yield file
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        if file is not None:
            file.close()


def _create(path: Path, layout: Layout, rank: int) -> int:
    """The file with its header, as long as it will be: a full drive is found here, and not half way."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, layout.num_bytes)
        os.pwrite(descriptor, layout.header, 0)
    except OSError as error:
        os.close(descriptor)
        status = os.statvfs(path.parent)
        left = format_bytes(status.f_bavail * status.f_frsize)
        raise CapacityError(
            f"no room for a checkpoint: rank {rank} needs {format_bytes(layout.num_bytes)}, {left} are left "
            f"({error.strerror})",
            where=str(path.parent),
            hint="free space, or set checkpoint.keep_latest_k; earlier checkpoints are as they were",
        ) from error
    set_direct(descriptor, path)
    return descriptor


def stored_unit(unit: Unit) -> StoredUnit:
    """A unit of the engine as the manifest has it."""
    flats = []
    for flat in unit.layout.flats:
        updates = unit.steps if flat.trainable else [0] * len(flat.params)
        params = tuple(
            StoredParam(place.name, tuple(place.shape), place.offset, count)
            for place, count in zip(flat.params, updates, strict=True)
        )
        dtype = torch.float32 if flat.trainable else unit.dtype
        flats.append(StoredFlat(_DTYPE_NAMES[dtype], flat.trainable, flat.numel, params))
    return StoredUnit(unit.name, tuple(flats))


def _buffers(model: nn.Module) -> Sequence[tuple[str, bytes]]:
    """The module's buffers, persistent or not, as one safetensors file."""
    buffers = {name: buffer.detach().cpu().contiguous().clone() for name, buffer in model.named_buffers()}
    return [(BUFFERS, save(buffers))] if buffers else []
