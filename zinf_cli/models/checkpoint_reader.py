"""Reads a checkpoint, one field of a parameter at a time, and checks what it reads.

It cuts and joins slices by parameter name. So neither the ranks that wrote them nor the slices of the engine that asks
matter.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import nn

from zinf_cli.checkpoint.manifest import BUFFERS, Manifest, Region, StoredFlat, StoredParam, rank_file
from zinf_cli.checkpoint.reading import patiently, read_checked
from zinf_cli.checkpoint.verify import damage_of, read_file, size_problem
from zinf_cli.engine.compute.stored_places import take_out
from zinf_cli.engine.eight_bits import CODES, Blocks, decoded, encode
from zinf_cli.engine.precision import STORED
from zinf_cli.engine.split_masters import join
from zinf_cli.engine.units.origins import shapes_of
from zinf_cli.errors import CheckpointError, DamagedError, ZinfError
from zinf_cli.model_state import (
    CHUNK_NUMEL,
    FACTORS,
    FP32_BYTES,
    FROZEN,
    PARAM,
    PIECE,
    REMAINDER,
    SCALE_BLOCK,
    SCALED,
    VALUES,
    bytes_of,
)
from zinf_cli.tiers.arena import Arena, Buffer
from zinf_cli.tiers.nvme import as_memory

_KEPT = 4
"""How many pieces stay in memory: the next parameters to be read lie in the same pieces."""
_WILL_NEED = 4
"""How many pieces the kernel is told to read ahead."""


@dataclass(frozen=True)
class _Place:
    """The place where a parameter, or a part of it, is stored."""

    key: tuple[str, int]
    """The unit and the flat that it is in."""
    flat: StoredFlat
    param: StoredParam

    @property
    def last(self) -> int:
        """The element of the parameter behind the last one that is stored here."""
        return self.param.first + self.param.numel


class CheckpointReader:
    """A StateSource and a WeightSource over a checkpoint's folder.

    DamagedError is raised at once if a file is missing or has another size, and later if a piece is damaged.
    UnreadableError is raised if the drive does not give the bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        for name in self.manifest.files:
            if (problem := size_problem(folder, self.manifest, name)) is not None:
                raise DamagedError(problem, where=str(folder / name))
        self._places: dict[str, list[_Place]] = {}
        for unit in self.manifest.units:
            for number, flat in enumerate(unit.flats):
                for param in flat.params:
                    self._places.setdefault(param.name, []).append(_Place((unit.name, number), flat, param))
        for places in self._places.values():
            places.sort(key=lambda place: place.param.first)
        self._regions = {region.key: region for region in self.manifest.layout.regions}
        self._files: dict[str, int] = {}
        self._arena = Arena(_KEPT * PIECE, torch.device("cpu"))
        self._pieces: OrderedDict[tuple[str, int], Buffer] = OrderedDict()

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        while self._pieces:
            self._pieces.popitem()[1].free()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter in the checkpoint, by name."""
        return {name: places[0].param.shape for name, places in self._places.items()}

    def updates(self, name: str, first: int) -> int:
        """See StateSource."""
        return next(place.param.updates for place in self._places[name] if first < place.last)

    def read(self, name: str, field: str, first: int, last: int) -> torch.Tensor:
        """See StateSource. A parameter may have been trained and be frozen now, or the other way round.

        CheckpointError if another optimizer has trained it: its count of updates would not fit to fields of zeros.
        """
        if field == FACTORS.stored:
            return self._read_place(self._places[name][0], field, first, last)
        parts = [
            self._read_place(place, field, max(first, place.param.first), min(last, place.last))
            for place in self._parts(name, first, last)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _parts(self, name: str, first: int, last: int) -> Iterator[_Place]:
        """The places of elements [first, last) of a parameter, in their order."""
        return (place for place in self._places[name] if first < place.last and place.param.first < last)

    def _read_place(self, place: _Place, field: str, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a parameter's field, which all lie at `place`."""
        flat = place.flat
        if flat.carrier is not None and field in (*VALUES, flat.carrier):
            names = (PARAM.stored, REMAINDER.stored, flat.carrier)
            param, remainder, carried = (self._stored(place, name, first, last) for name in names)
            carried = carried.float()
            master = join(param, remainder, carried)
            return carried if field == flat.carrier else master
        if field not in flat.fields:
            if field in VALUES:
                field = next(iter(flat.fields))
            elif not flat.trainable:
                return torch.zeros(last - first)  # as before the first update
            else:
                trained_by = self.manifest.recipe["optimizer"]["name"]
                raise CheckpointError(
                    f"of another optimizer, {trained_by}: "
                    f"it has no {field} of {place.param.name}, but {', '.join(flat.fields)}",
                    where=str(self.folder),
                    hint="give it as model.name_or_path to begin with its weights",
                )
        return self._stored(place, field, first, last)

    def _stored(self, place: _Place, field: str, first: int, last: int) -> torch.Tensor:
        """The same, of a field as it is stored."""
        param, region = place.param, self._regions[(*place.key, field)]
        if region.dtype == SCALED:
            skipped, blocks = self._stored_blocks(place, region, first, last)
            return decoded(blocks)[skipped:][: last - first]
        values = torch.empty(last - first, dtype=STORED[region.dtype])
        begin, done = param.offset + first - param.first, 0
        if field == FACTORS.stored:
            begin = place.flat.factors[0][place.flat.params.index(param)][0] + first
        while done < values.numel():
            rank, inside = divmod(begin + done, region.numel)
            count = min(region.numel - inside, values.numel() - done)
            self._read(rank_file(rank), region, inside * values.element_size(), values[done : done + count])
            done += count
        return values

    def blocks(self, name: str, field: str, first: int, last: int) -> Blocks:
        """See StateSource."""
        found = Blocks.empty(last - first)
        begin = 0
        for place in self._parts(name, first, last):
            start, end = max(first, place.param.first), min(last, place.last)
            region = self._regions.get((*place.key, field))
            if region is None or region.dtype != SCALED:
                break
            skipped, blocks = self._stored_blocks(place, region, start, end)
            ends = (end - start) % SCALE_BLOCK == 0 or end == last == place.last
            if skipped or not ends:
                break
            number = len(blocks.scales)
            codes = blocks.codes.bitwise_and_(CODES) if field == place.flat.carrier else blocks.codes
            found.codes[begin * SCALE_BLOCK : (begin + number) * SCALE_BLOCK] = codes
            found.scales[begin : begin + number] = blocks.scales
            begin += number
        else:
            return found
        encode(self.read(name, field, first, last).float(), found)
        return found

    def _stored_blocks(self, place: _Place, region: Region, first: int, last: int) -> tuple[int, Blocks]:
        """The blocks that hold elements [first, last) of a parameter at `place`, and how many elements come before."""
        begin = place.param.offset + first - place.param.first
        skipped = begin % SCALE_BLOCK
        begin, end = begin - skipped, begin + last - first
        blocks = Blocks.empty(end - begin)
        done = 0
        while done < blocks.codes.numel():
            rank, inside = divmod(begin + done, region.numel)
            chunk, within = divmod(inside, CHUNK_NUMEL)
            numel = min(CHUNK_NUMEL, region.numel - chunk * CHUNK_NUMEL)
            count, start = min(numel - within, blocks.codes.numel() - done), bytes_of(SCALED, chunk * CHUNK_NUMEL)
            scales = blocks.scales[done // SCALE_BLOCK : (done + count) // SCALE_BLOCK]
            self._read(rank_file(rank), region, start + within, blocks.codes[done : done + count])
            self._read(rank_file(rank), region, start + numel + within // SCALE_BLOCK * FP32_BYTES, scales)
            done += count
        return skipped, blocks

    def param(self, name: str) -> torch.Tensor:
        """A whole parameter in its shape, in fp32 if it was trained."""
        shape = self._places[name][0].param.shape
        return self.read(name, FROZEN.stored, 0, math.prod(shape)).view(shape)

    def _read(self, file: str, region: Region, start: int, into: torch.Tensor) -> None:
        """Fill `into` from byte `start` of a region of a rank's file on."""
        data, done = into.view(torch.uint8), 0
        while done < data.numel():
            number, inside = divmod(start + done, region.piece)
            piece = self._piece(file, self.manifest.layout.first_piece[region.key] + number)
            count = min(piece.numel() - inside, data.numel() - done)
            data[done : done + count] = piece[inside : inside + count]
            done += count

    def _piece(self, file: str, number: int) -> torch.Tensor:
        """A piece of a rank's file: read and checked, or still in memory."""
        if (file, number) in self._pieces:
            self._pieces.move_to_end((file, number))
            return self._pieces[file, number].data
        offset, length = self.manifest.layout.pieces[number]
        while (piece := self._arena.allocate(length)) is None:
            self._pieces.popitem(last=False)[1].free()
        try:
            self._fill(piece.data, file, number, offset)
        except ZinfError:
            piece.free()
            raise
        self._pieces[file, number] = piece
        return piece.data

    def _fill(self, piece: torch.Tensor, file: str, number: int, offset: int) -> None:
        """Read a piece and compare its checksum."""
        path, descriptor, length = self.folder / file, self._open(file), piece.numel()
        with suppress(OSError):  # a hint
            os.posix_fadvise(descriptor, offset + length, _WILL_NEED * PIECE, os.POSIX_FADV_WILLNEED)
        if not read_checked(descriptor, as_memory(piece), offset, self.manifest.files[file].xxh3[number], path):
            raise DamagedError(damage_of(number, offset, length), where=str(path))

    def _open(self, file: str) -> int:
        if file not in self._files:
            path = self.folder / file
            self._files[file] = patiently(lambda: os.open(path, os.O_RDONLY), path)
        return self._files[file]


class StoredWeights:
    """A WeightSource over the checkpoint of a run, instead of a Hugging Face checkpoint."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._reader = CheckpointReader(folder)
        if self._reader.manifest.base is not None:
            raise CheckpointError(
                "holds an adapter, and not the model that it is for",
                where=str(folder),
                hint=f"make a model of both: zinf export --merge {folder} DIRECTORY",
            )
        check_params(self._reader, model)

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """See WeightSource."""
        values = {name: self._reader.param(name) for name in names}
        self._reader.close()  # frees its pieces; files open again when needed
        return values

    def read_part(self, name: str, first: int, last: int) -> torch.Tensor:
        """See RangedWeights."""
        values = self._reader.read(name, FROZEN.stored, first, last)
        self._reader.close()
        return values


def check_params(reader: CheckpointReader, model: nn.Module) -> None:
    """CheckpointError if a checkpoint's parameters differ from those of `model` in name or shape.

    Of a model with an adapter, that are the adapter's.
    """
    stored, wanted = reader.shapes, shapes_of(model, trained=reader.manifest.base is not None)
    different = [name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)]
    if different:
        name = min(different)
        raise CheckpointError(
            f"of another model: {len(different)} parameters differ, such as {name}: "
            f"{stored.get(name, 'missing')} here, {wanted.get(name, 'missing')} in the recipe's model",
            where=str(reader.folder),
            hint="is model.config the one of this checkpoint?",
        )


def load_buffers_of(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Fill the module's buffers from a checkpoint. Returns what else its forward had changed (stored_places.py)."""
    manifest = Manifest.load(folder)
    if BUFFERS not in manifest.files:
        return {}
    buffers, others = take_out(load(read_file(folder, manifest, BUFFERS)))
    device = next((buffer.device for buffer in model.buffers()), torch.device("cpu"))
    for name, value in buffers.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        present = module._buffers.get(attribute)
        if present is not None and present.shape == value.shape:
            present.copy_(value)
        elif attribute in module._buffers:  # a forward has made it, or made it larger
            module._buffers[attribute] = value.to(device)
        else:
            module.register_buffer(attribute, value.to(device))
    return others
