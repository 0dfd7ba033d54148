"""manifest.json: what a checkpoint holds and where, and a checksum of every piece of every file.

    step-00000100/
      rank-00000.safetensors    per flat, rank 0's slice of each field that is state between two steps
                                (of an adapter's flats alone, if one is trained)
      buffers.safetensors       the module's buffers
      config.json, tokenizer... what makes the folder a model for `model.name_or_path`, chat templates in a folder
      manifest.json             written last: without it there is no checkpoint

A rank's file is an ordinary safetensors file. Its header is padded with spaces, so that data starts on a page. Slices
are whole pages long, so each field of each flat of a unit is a *region* of the file that O_DIRECT can write. The place
of a region is known before the first byte is written, regions may be filled in any order, and a region may be an extent
of a tier. The second flat of a kind (parameters that stay fp32 in a 16-bit model) has regions "param.1" and so on.

The fp32 master of a trained bf16 parameter is three fields: "param", "remainder" and the sign of a moment
(engine/split_masters.py). Moments in eight bits are bytes as engine/eight_bits.py lays them out. Version 1 of the
manifest, which has fp32 masters as "param", is read as well.

Checksums are xxh3 (64 bits) of *pieces*: the header, and each region cut from its start into chunks of the update, or
into PIECE bytes where nothing is trained. The manifest begins with the checksum of the rest of itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from zinf_cli.checkpoint.reading import read_whole
from zinf_cli.errors import CheckpointError, DamagedError
from zinf_cli.file_names import is_plain
from zinf_cli.model_state import ADAMW, CHUNK_NUMEL, FACTORS, FROZEN, PIECE, SCALED, bytes_of, factors_of, round_up

VERSION = 3
READABLE = (1, 2, 3)
"""Versions that are read."""
MANIFEST, BUFFERS = "manifest.json", "buffers.safetensors"
REFERENCE = "reference.safetensors"
"""Of a run that learns preferences: what the model thought of them as it began."""
CHAT_TEMPLATES, POOLING = "additional_chat_templates", "1_Pooling"
FOLDERS = (CHAT_TEMPLATES, POOLING)
"""The folders in the folder of a model, as transformers and sentence-transformers write them."""
UNFINISHED = "manifest.json.partial"
"""A file that exists while a checkpoint is written or removed. Its "files" are those that are the run's."""
_HEAD, _DIGITS = b'{"xxh3": "', 16


@dataclass(frozen=True)
class StoredParam:
    """A parameter inside a flat, or a part of one: `numel` elements from element `offset`."""

    name: str
    shape: tuple[int, ...]
    """The shape of the whole parameter."""
    offset: int
    updates: int
    """How often it has been updated."""
    first: int = 0
    """The parameter's element with which this begins: it may be a tile of the parameter (engine/units/tiles.py)."""
    count: int | None = None
    """How many elements of the parameter are here. None: all."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape) if self.count is None else self.count


@dataclass(frozen=True)
class StoredFlat:
    """Parameters side by side, padded to `numel` elements and cut into world_size equal slices."""

    dtype: str
    """The dtype in which the parameters are stored, in the words of safetensors."""
    trainable: bool
    numel: int
    params: tuple[StoredParam, ...]
    fields: Mapping[str, str]
    """The fields that are stored (model_state.py) with their dtypes, the parameters first. A manifest leaves them
    out if they are AdamW's, or if all parameters are frozen."""
    carrier: str | None = None
    """The field whose sign is that of split masters, if masters are split (engine/split_masters.py)."""

    @cached_property
    def factors(self) -> tuple[tuple[tuple[int, int], ...], int]:
        """Of a factored field: first and last value of each parameter's, and the number of all with padding."""
        return factors_of([param.shape for param in self.params])


@dataclass(frozen=True)
class StoredUnit:
    name: str
    flats: tuple[StoredFlat, ...]


@dataclass(frozen=True)
class Region:
    """One field of one flat in the file of every rank: `numel` elements, whole pages long."""

    unit: str
    flat: int
    """The flat's number in the unit."""
    field: str
    name: str
    dtype: str
    numel: int
    start: int
    """First byte after the header."""
    piece: int
    """Bytes of its pieces, but for the last one."""

    @property
    def num_bytes(self) -> int:
        return bytes_of(self.dtype, self.numel)

    @property
    def key(self) -> tuple[str, int, str]:
        return self.unit, self.flat, self.field


@dataclass(frozen=True)
class Layout:
    """The places of the bytes in a rank's file. They are the same for every rank."""

    units: tuple[StoredUnit, ...]
    world_size: int

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        regions: list[Region] = []
        start = 0
        for unit in self.units:
            for number, flat in enumerate(unit.flats):
                alike = sum(other.trainable == flat.trainable for other in unit.flats[:number])
                for part, dtype in flat.fields.items():
                    name = f"{unit.name}/{part}{f'.{alike}' if alike else ''}"
                    numel = flat.factors[1] if part == FACTORS.stored else flat.numel // self.world_size
                    piece = bytes_of(dtype, CHUNK_NUMEL) if flat.trainable else PIECE
                    regions.append(Region(unit.name, number, part, name, dtype, numel, start, piece))
                    start += regions[-1].num_bytes
        return tuple(regions)

    @cached_property
    def header(self) -> bytes:
        """The safetensors header, with its length in front, padded to whole pages."""
        entries: dict[str, Any] = {"__metadata__": {"zinf": f"a slice of every unit, see {MANIFEST}"}}
        for region in self.regions:
            offsets = [region.start, region.start + region.num_bytes]
            dtype, shape = ("U8", region.num_bytes) if region.dtype == SCALED else (region.dtype, region.numel)
            entries[region.name] = {"dtype": dtype, "shape": [shape], "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        size = round_up(8 + len(text)) - 8
        return size.to_bytes(8, "little") + text.ljust(size)

    @property
    def num_bytes(self) -> int:
        """The size of a rank's file."""
        return len(self.header) + sum(region.num_bytes for region in self.regions)

    @cached_property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """(offset in the file, length) of each piece, which has a checksum of its own."""
        pieces = [(0, len(self.header))]
        for region in self.regions:
            start = len(self.header) + region.start
            pieces += [(start + offset, length) for offset, length in cut(region.num_bytes, region.piece)]
        return tuple(pieces)

    @cached_property
    def first_piece(self) -> Mapping[tuple[str, int, str], int]:
        """The number of the first piece of each region, by the region's key."""
        first, number = {}, 1
        for region in self.regions:
            first[region.key] = number
            number += len(cut(region.num_bytes, region.piece))
        return first


def cut(num_bytes: int, piece: int = PIECE) -> list[tuple[int, int]]:
    """(offset, length) of the pieces of a region or a whole file."""
    return [(offset, min(piece, num_bytes - offset)) for offset in range(0, num_bytes, piece)]


@dataclass(frozen=True)
class StoredFile:
    num_bytes: int
    xxh3: tuple[str, ...]
    """The checksums of its pieces, in order, each with 16 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """One checkpoint: the state after `step` updates."""

    step: int
    world_size: int
    precision: str
    sequences: int
    """How many sequences the run has taken so far: its place in the text."""
    text: str
    """The fingerprint of the tokens, without which that place has no meaning."""
    loss_scale: tuple[float, int] | None
    """fp16: the scale, and the finite steps since it last changed."""
    units: tuple[StoredUnit, ...]
    files: Mapping[str, StoredFile]
    recipe: Mapping[str, Any]
    """The run's recipe. Its seed and the step give every random number to come, since generators start anew in every
    micro-batch."""
    held_out: Mapping[str, Any] | None = None
    """What the run's evaluations have come to (train/evaluation.py)."""
    base: str | None = None
    """If an adapter is trained: the hash of the model that it is trained on (models/base_digest.py), which is not here.
    A manifest leaves it out otherwise."""
    version: int = field(default=VERSION, kw_only=True)

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.units, self.world_size)

    def pieces_of(self, name: str) -> Sequence[tuple[int, int]]:
        """(offset, length) of the pieces of a file."""
        ranks = map(rank_file, range(self.world_size))
        return self.layout.pieces if name in ranks else cut(self.files[name].num_bytes)

    def params(self) -> Iterator[tuple[StoredFlat, StoredParam]]:
        for unit in self.units:
            for flat in unit.flats:
                for param in flat.params:
                    yield flat, param

    def dump(self) -> bytes:
        document = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        if self.base is None:
            del document["base"]
        document["units"] = [dataclasses.asdict(unit) for unit in self.units]
        for flat in (flat for unit in document["units"] for flat in unit["flats"]):
            if flat["fields"] == _usual_fields(flat):
                del flat["fields"]
            if flat["carrier"] is None:
                del flat["carrier"]
            for param in flat["params"]:
                if param["count"] is None:
                    del param["first"], param["count"]
        document["files"] = {name: dataclasses.asdict(file) for name, file in self.files.items()}
        rest = b'",\n' + json.dumps(document, indent=1).encode()[1:].lstrip()
        return _HEAD + xxh3_64_hexdigest(rest).encode() + rest

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint. DamagedError if there is none, or if it is not as it was written.

        UnreadableError if the drive does not give it. CheckpointError if another version of zinf wrote it.
        """
        path = folder / MANIFEST
        try:
            content = read_whole(path, _is_as_written)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"not a checkpoint: {error.strerror}", where=str(path)) from error
        if content is None:
            raise DamagedError("damaged: its checksum is another", where=str(path))
        document = json.loads(content)
        del document["xxh3"]
        if document["version"] not in READABLE:
            raise CheckpointError(
                f"version {document['version']} is not known here",
                where=str(path),
                hint="another version of zinf wrote it, and reads it",
            )
        for name in document["files"]:
            inner = next((inner for inner in FOLDERS if name.startswith(f"{inner}/")), None)
            if not is_plain(name if inner is None else name.removeprefix(f"{inner}/")):
                raise DamagedError(f"{name!r} is not the name of a file in this folder", where=str(path))
        document["units"] = tuple(map(_unit, document["units"]))
        document["files"] = {
            name: StoredFile(file["num_bytes"], tuple(file["xxh3"])) for name, file in document["files"].items()
        }
        if document["loss_scale"] is not None:
            document["loss_scale"] = tuple(document["loss_scale"])
        return cls(**document)


def _is_as_written(content: bytes) -> bool:
    start = len(_HEAD) + _DIGITS
    return content[:start] == _HEAD + xxh3_64_hexdigest(content[start:]).encode()


def _unit(document: Mapping[str, Any]) -> StoredUnit:
    flats = []
    for flat in document["flats"]:
        params = tuple(StoredParam(**{**param, "shape": tuple(param["shape"])}) for param in flat["params"])
        flats.append(StoredFlat(**{"fields": _usual_fields(flat), **flat, "params": params}))
    return StoredUnit(document["name"], tuple(flats))


def _usual_fields(flat: Mapping[str, Any]) -> dict[str, str]:
    fields = ADAMW.stored(flat["dtype"]) if flat["trainable"] else (FROZEN,)
    return {field.stored: field.dtype or flat["dtype"] for field in fields}


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
