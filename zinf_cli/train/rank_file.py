"""One rank's file of a checkpoint; its layout is in checkpoint/manifest.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from pathlib import Path

import torch

from zinf_cli.amounts import format_bytes
from zinf_cli.checkpoint.manifest import Layout, rank_file
from zinf_cli.checksum import checksum
from zinf_cli.errors import CapacityError, PreflightError, TierError
from zinf_cli.machine.drive_files import FULL, set_direct, what_is_left, why_buffered
from zinf_cli.tiers.checksums import Checksums
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.tiers.tier import Extent
from zinf_cli.trace import Trace

_KEPT = "earlier checkpoints are as they were"
_NO_ROOM = f"free space, or set checkpoint.keep_latest_k; {_KEPT}"


def cant_write(error: OSError, where: Path) -> CapacityError | TierError:
    """The error to raise if a drive does not take a file of a checkpoint."""
    if error.errno in FULL:
        return CapacityError(f"no room for a checkpoint: {error.strerror}", where=str(where), hint=_NO_ROOM)
    return TierError(f"can't write a checkpoint: {error.strerror}", where=str(where), hint=_KEPT)


def open_rank_file(
    folder: Path,
    layout: Layout,
    trace: Trace,
    rank: int,
    background: Executor,
    *,
    verify: bool = True,
    notice: Callable[[str], None] | None = None,
) -> RankFile:
    """Make this rank's file, with its space taken. If that fails, no file is left. With `verify`, what the engine reads
    from it is compared with what was written."""
    if not folder.is_dir():
        raise PreflightError(
            f"rank {rank} does not see the checkpoint's folder that rank 0 has made",
            where=str(folder),
            hint="output_dir has to lie on a file system that all hosts share",
        )
    path = folder / rank_file(rank)
    try:
        return RankFile(path, layout, trace, rank, background, verify=verify, notice=notice)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


class RankFile:
    """A StateSink: one rank's file of a checkpoint. The threads that write also take the checksums."""

    def __init__(
        self,
        path: Path,
        layout: Layout,
        trace: Trace,
        rank: int,
        background: Executor,
        *,
        verify: bool,
        notice: Callable[[str], None] | None,
    ) -> None:
        self.path = path
        self.checksums = torch.zeros(len(layout.pieces), dtype=torch.int64)
        """The xxh3 of every piece, as signed 64-bit numbers."""
        self.closed = False
        self._pieces = {start: (number, length) for number, (start, length) in enumerate(layout.pieces)}
        self._descriptor = _create(path, layout, rank)
        self.why_buffered = None if set_direct(self._descriptor) else why_buffered(self._descriptor)
        """A line for the user, if the file is not written past the page cache."""
        self._tier = NvmeTier(
            [path], trace, rank=rank, file=self._descriptor, written=self._note, verify=verify, notice=notice
        )
        self._background = background
        self._on_drive: Future[None] | None = None
        self._note(0, len(layout.header), checksum(memoryview(layout.header)))
        self._regions = {
            region.key: Extent(
                self._tier,
                region.num_bytes,
                f"checkpoint {region.name}",
                start=len(layout.header) + region.start,
                checksums=Checksums(region.piece),
            )
            for region in layout.regions
        }

    def region(self, unit: str, flat: int, field: str) -> Extent:
        return self._regions[unit, flat, field]

    def replaces(self, extent: Extent) -> bool:
        return isinstance(extent.tier, NvmeTier) and extent.tier.devices == self._tier.devices

    def holds(self, extent: Extent) -> bool:
        return extent.tier is self._tier

    def complete(self) -> None:
        self._on_drive = self._background.submit(self._sync)

    @property
    def completed(self) -> bool:
        """Whether all state has been handed to it. This is the same on every rank."""
        return self._on_drive is not None

    @property
    def on_drive(self) -> Future[None]:
        """A future that is done when all of the file is on the drive."""
        assert self._on_drive is not None
        return self._on_drive

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes (read, written) so far."""
        return self._tier.read_bytes, self._tier.write_bytes

    def close(self) -> None:
        """Wait for a sync that is under way, and close. A file that was not completed is given up."""
        if not self.closed:
            self.closed = True
            if self._on_drive is not None:
                wait([self._on_drive])
            self._tier.close()

    def _sync(self) -> None:
        for region in self._regions.values():
            for write in region.writes:
                write.wait()
        os.fsync(self._descriptor)

    def _note(self, position: int, num_bytes: int, unsigned: int) -> None:
        piece, length = self._pieces[position]
        assert num_bytes == length, f"{num_bytes} bytes at {position}, where {length} have one checksum"
        self.checksums[piece] = unsigned - (1 << 64) if unsigned >> 63 else unsigned


def _create(path: Path, layout: Layout, rank: int) -> int:
    """Make the file with its header, in its full length: so a full drive is found here, and not half way."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError as error:
        raise cant_write(error, path) from error
    try:
        os.posix_fallocate(descriptor, 0, layout.num_bytes)
        os.pwrite(descriptor, layout.header, 0)
    except OSError as error:
        left = what_is_left(descriptor, error)
        os.close(descriptor)
        raise CapacityError(
            f"no room for a checkpoint: rank {rank} needs {format_bytes(layout.num_bytes)}, {left}",
            where=str(path.parent),
            hint=_NO_ROOM,
        ) from error
    return descriptor
