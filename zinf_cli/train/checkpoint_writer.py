"""Writes checkpoints: every rank writes its slices, rank 0 all else. checkpoint/manifest.py says what they hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from xxhash import xxh3_64_hexdigest

from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import (
    BUFFERS,
    MANIFEST,
    Layout,
    Manifest,
    StoredFile,
    StoredFlat,
    StoredParam,
    StoredUnit,
    cut,
    rank_file,
)
from zinf_cli.checkpoint.own_files import remove
from zinf_cli.durable import write_durably
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.precision import STORED_NAMES
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.units.store import Unit
from zinf_cli.engine.units.units import ParamLayout
from zinf_cli.errors import CapacityError, CheckpointError, RankError, TierError, UnreadableError, ZinfError
from zinf_cli.train.rank_file import RankFile, cant_write, open_rank_file

_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Position:
    """Where a run stands after `step` updates. The fields are those of the manifest."""

    step: int
    precision: str
    sequences: int
    text: str
    loss_scale: tuple[float, int] | None
    recipe: Mapping[str, Any]
    held_out: Mapping[str, Any] | None = None
    base: str | None = None


class CheckpointWriter:
    """Writes the checkpoints of one run, on every rank in the same order. `notice` gets a line for the user.

    `begin` opens this rank's file, which the engine fills in training (engine/traffic/destination.py). `complete` adds
    the rest when the step is done. `advance` looks if every rank's file is on its drive. If so, a thread of rank 0
    makes it a checkpoint and removes the oldest ones. `model_files` yields (name, content) of the other files of a
    model: its configuration and tokenizer.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        ranks: Ranks,
        model_files: Callable[[], Iterator[tuple[str, bytes]]],
        keep_latest_k: int | None,
        notice: Callable[[str], None] = print,
        *,
        keep_best: bool = False,
    ) -> None:
        self._run_dir = run_dir
        self._engine = engine
        self._ranks = ranks
        self._model_files = model_files
        self._keep = keep_latest_k
        self._keep_best = keep_best
        self._notice = notice
        self._background = ThreadPoolExecutor(1, "zinf-checkpoint")
        self._coming: deque[_Coming] = deque()
        """Checkpoints that are not whole yet, the oldest first."""
        self._commit: Future[None] | None = None
        self._begun = False
        """Whether there was room for the newest checkpoint."""
        self._said_buffered = False
        self._trusted = True
        """Whether the last step was finite. If not, older checkpoints stay."""
        self._files: list[RankFile] = []
        self._moved = (0, 0)

    def begin(self, step: int, *, required: bool = True) -> RankFile | None:
        """Make room for the state after `step` updates, after earlier checkpoints are whole, if they can be.

        If there is no room, raise an error if it is `required`. Otherwise give a notice and return None: the run goes
        on with the checkpoints that it has.
        """
        while self._coming and self._coming[0].file.completed:
            self._finish_oldest()
        folder = folders.step_folder(self._run_dir, step)
        file, problem = self._open(folder)
        failed = [rank for rank, flag in enumerate(self._ranks.all(int(file is None))) if flag]
        self._begun = not failed
        if file is not None and not failed:
            self._files.append(file)
            self._coming.append(_Coming(folder, file, required))
            return file
        if file is not None:
            file.close()
        self._remove(folder)
        problem = problem or RankError(f"rank {failed[0]} can't write a checkpoint", where=str(folder))
        if required:
            raise problem
        self._say_missing(folder, problem)
        return None

    def _open(self, folder: Path) -> tuple[RankFile | None, ZinfError | None]:
        """This rank's file in an empty folder, or the reason why there is none."""
        problem: ZinfError | None = None
        if self._ranks.rank == 0:
            try:
                with _disk_errors(folder):
                    folders.begin(folder)
            except (CapacityError, CheckpointError, TierError) as error:
                problem = error
        if any(self._ranks.all(int(problem is not None))):  # no rank may write into a folder that rank 0 is emptying
            return None, problem
        try:
            engine = self._engine
            file = open_rank_file(
                folder,
                self._layout(),
                engine.trace,
                self._ranks.rank,
                self._background,
                verify=engine.verifies,
                notice=self._notice,
            )
            if file.why_buffered is not None and not self._said_buffered:
                self._said_buffered = True
                self._notice(f"{folder.parent}: {file.why_buffered}")
            return file, None
        except (CapacityError, TierError) as error:
            return None, error

    def complete(self, position: Position) -> bool:
        """Add the rest to the state after `position.step` updates, made or pending. False if `begin` found no room."""
        if not self._begun:
            return False
        coming = self._coming[-1]
        coming.position = position
        coming.layout = self._layout()
        if self._ranks.rank == 0:
            coming.small_files = chain(self._model_files(), _beside_parameters(self._engine))
        return True

    def judge(self, *, finite: bool) -> None:
        """Note whether loss and gradient of the last step were finite.

        While they are not, older checkpoints stay, since the newest one may hold a blown-up state.
        """
        self._trusted = finite

    @property
    def has_room(self) -> bool:
        """Whether there was room for the newest checkpoint."""
        return self._begun

    def drop_newest(self) -> None:
        """Give up the checkpoint that `begin` made room for. The engine may still keep state in its file."""
        if self._begun:
            self._begun = False
            folder = self._coming.pop().folder
            self._remove(folder)
            self._notice(f"no checkpoint {folder.name}: its step changes nothing")

    def write(self, position: Position, *, required: bool = True) -> bool:
        """Write a whole checkpoint of the present state, with pending updates made. False if there was no room.

        `required` is that of `begin`. While steps are not finite, no checkpoint is required.
        """
        file = self.begin(position.step, required=required and self._trusted)
        if file is not None:
            self._engine.save(file)
            self.complete(position)
            self._wait_for_all()
        return file is not None

    def advance(self) -> None:
        """Make the oldest file a checkpoint, if it is on every rank's drive. Called between two steps."""
        if not self._coming or not self._coming[0].file.completed:
            return
        if all(self._ranks.all(int(self._coming[0].file.on_drive.done()))):
            self._seal_oldest()

    def finish(self) -> None:
        """Return when every checkpoint is whole. All files have been completed before.

        The run ends here, so its last checkpoint has to be whole. That also holds if it was begun as one of many: a run
        may be told to stop in a step whose checkpoint is due.
        """
        if self._coming:
            self._coming[-1].required = self._trusted
        self._wait_for_all()

    def close(self) -> None:
        """End the threads, and remove the files of checkpoints that were given up."""
        self._background.shutdown()
        for file in self._files:
            file.close()
        for coming in self._coming:
            self._remove(coming.folder)

    def traffic(self) -> tuple[int, int]:
        """Bytes (read, written) of all checkpoints so far."""
        for file in [file for file in self._files if file.closed]:
            self._files.remove(file)
            self._moved = _sum(self._moved, file.traffic)
        moved = self._moved
        for file in self._files:
            moved = _sum(moved, file.traffic)
        return moved

    def _layout(self) -> Layout:
        units = map(stored_unit, self._engine.units)
        return Layout(tuple(unit for unit in units if unit.flats), self._ranks.world_size)

    def _wait_for_all(self) -> None:
        while self._coming:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        self._seal_oldest()
        if self._commit is not None:
            self._commit.result()

    def _seal_oldest(self) -> None:
        """Bring the checksums of all ranks to rank 0, which writes the manifest."""
        coming = self._coming[0]
        with _disk_errors(coming.file.path):
            coming.file.on_drive.result()
        assert coming.layout is not None
        assert coming.position is not None
        checksums = torch.zeros(self._ranks.world_size, len(coming.layout.pieces), dtype=torch.int64)
        checksums[self._ranks.rank] = coming.file.checksums
        self._ranks.sum(checksums)  # also waits until every rank's file is on its drive
        if self._ranks.rank == 0:
            if self._commit is not None:
                self._commit.result()
            self._commit = self._background.submit(self._make_whole, coming, checksums, self._trusted)
        self._coming.popleft()

    def _make_whole(self, coming: _Coming, checksums: torch.Tensor, trusted: bool) -> None:
        """Write all other files, the manifest last. Then the checkpoint exists."""
        assert coming.layout is not None
        assert coming.position is not None
        files = {
            rank_file(rank): StoredFile(coming.layout.num_bytes, tuple(f"{value & _64_BITS:016x}" for value in row))
            for rank, row in enumerate(checksums.tolist())
        }
        try:
            with _disk_errors(coming.folder):
                for name, content in coming.small_files:
                    folders.announce(coming.folder, [*files, name])
                    (coming.folder / name).parent.mkdir(exist_ok=True)
                    write_durably(coming.folder / name, content)
                    pieces = (content[start : start + length] for start, length in cut(len(content)))
                    files[name] = StoredFile(len(content), tuple(map(xxh3_64_hexdigest, pieces)))
                manifest = Manifest(
                    **vars(coming.position), world_size=self._ranks.world_size, units=coming.layout.units, files=files
                )
                folders.commit(coming.folder, manifest.dump())
        except (CapacityError, TierError) as error:
            with suppress(OSError):
                (coming.folder / MANIFEST).unlink(missing_ok=True)
            if self._ranks.world_size == 1:  # units of other ranks may lie in their files, which would vanish on NFS
                self._remove(coming.folder)
            if coming.required:
                raise
            self._say_missing(coming.folder, error)
            return
        self._make_newest(coming.folder, (coming.position.held_out or {}).get("kept_step"), trusted)

    def _make_newest(self, folder: Path, best: int | None, trusted: bool) -> None:
        """Point the links to a whole checkpoint, and remove older ones if it is `trusted`. Notices tell of failures.

        `best` is the step with the lowest held-out loss of all that have a checkpoint.
        """
        kept = folders.step_folder(self._run_dir, best) if self._keep_best and best is not None else None
        try:
            folders.point_to(folder, folders.LATEST)
            if kept == folder:
                folders.point_to(folder, folders.BEST)
        except OSError as error:
            self._notice(f"the link to the newest checkpoint, {folder.name}, can't be set: {error}")
        try:
            if trusted and self._keep is not None and (left := folders.keep_latest(folder, self._keep, kept)):
                self._notice(folders.kept_back(left))
        except (OSError, UnreadableError) as error:
            self._notice(f"checkpoints before {folder.name} can't be removed: {error}")

    def _remove(self, folder: Path) -> None:
        """Remove the files of a checkpoint that was given up."""
        with suppress(OSError, UnreadableError):
            if self._ranks.rank != 0:
                (folder / rank_file(self._ranks.rank)).unlink(missing_ok=True)
            else:
                remove(folder)

    def _say_missing(self, folder: Path, error: ZinfError) -> None:
        self._notice(f"no checkpoint {folder.name}, the run goes on without: {error.line()}")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cant_write(error, folder) from error


@dataclass
class _Coming:
    """A checkpoint that is not whole yet."""

    folder: Path
    file: RankFile
    required: bool
    position: Position | None = None
    layout: Layout | None = None
    """With the number of updates of each parameter after the step."""
    small_files: Iterable[tuple[str, bytes]] = ()
    """(name, content) of the files beside those of the ranks, on rank 0."""


def stored_unit(unit: Unit) -> StoredUnit:
    """A unit of the engine, in the words of the manifest: the flats that a checkpoint holds."""
    flats = []
    for flat in filter(attrgetter("stored"), unit.flats):
        layout = flat.layout
        params = tuple(_stored_param(place, count) for place, count in zip(layout.params, flat.steps, strict=True))
        fields = {field.stored: field.dtype or STORED_NAMES[flat.dtype] for field in flat.stored}
        carrier = None if flat.carrier is None else flat.carrier.stored
        flats.append(StoredFlat(next(iter(fields.values())), layout.trainable, layout.numel, params, fields, carrier))
    return StoredUnit(unit.name, tuple(flats))


def _stored_param(place: ParamLayout, updates: int) -> StoredParam:
    if place.part is None:
        return StoredParam(place.name, tuple(place.shape), place.offset, updates)
    return StoredParam(place.origin, tuple(place.part.shape), place.offset, updates, place.first, place.numel)


def _beside_parameters(engine: Engine) -> Sequence[tuple[str, bytes]]:
    """The model's buffers, persistent or not, and what else its forward has changed, as one safetensors file."""
    tensors = {name: buffer.detach().cpu().contiguous().clone() for name, buffer in engine.model.named_buffers()}
    tensors |= engine.moved_places()
    return [(BUFFERS, save(tensors))] if tensors else []


def _sum(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    return left[0] + right[0], left[1] + right[1]
