"""Exports a checkpoint as an ordinary Hugging Face checkpoint: config, tokenizer, sharded safetensors with an index.
An adapter alone is exported as peft saves it (adapter_export.py).

Weights are exported one unit at a time. They are read and cast; transformers' own conversions give them the names and
shapes in which they are published (weights.py goes the other way); then they are written to their place in a shard. So
memory is that of the largest unit. The same conversions first run on the meta device, to find all names and shapes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from zinf_cli.checkpoint.folder import find_checkpoint
from zinf_cli.checkpoint.manifest import MANIFEST
from zinf_cli.checkpoint.verify import read_file
from zinf_cli.durable import PARTIAL, publish
from zinf_cli.engine.precision import DTYPES
from zinf_cli.errors import TierError, UsageError
from zinf_cli.models.adapter_export import Merged, head_of, write_adapter
from zinf_cli.models.checkpoint_reader import CheckpointReader, check_params, load_buffers_of
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.model_files import CONFIG
from zinf_cli.models.weights import tied_names
from zinf_cli.tiers.nvme import as_memory
from zinf_cli.told import Tell, nobody

MAX_SHARD = 5 * 10**9
"""Most bytes of a shard, unless a single tensor has more."""
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Exported:
    """What an export has written. `num_bytes` are those of the weights."""

    checkpoint: Path
    folder: Path
    step: int
    dtype: str
    num_bytes: int
    num_shards: int


def export(
    path: Path,
    out: Path,
    dtype: str | None = None,
    max_shard: int = MAX_SHARD,
    tell: Tell = nobody,
    *,
    merge: bool = False,
) -> Exported:
    """Write the newest checkpoint of a run, or the checkpoint at `path`, to the new folder `out`.

    Parameters are written as `dtype`, whatever the run computed in: a checkpoint has trained parameters in fp32, which
    is the default. Those that the model's class keeps in fp32 stay fp32. An adapter is written as peft has it; with
    `merge`, a model that it is merged into, by default in that model's own dtype. `tell` gets the share of the units
    that are written. UsageError if `out` is in use. DamagedError if the checkpoint is damaged; then there is no `out`.
    """
    folder = find_checkpoint(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("the folder of an export has to be new or empty", where=str(out))
    reader = CheckpointReader(folder)
    adapted = reader.manifest.base is not None
    if merge and not adapted:
        raise UsageError("there is no adapter to merge: the model itself was trained", where=str(folder))
    partial = out.with_name(f"{out.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
        try:
            written_as = DTYPES[dtype or "fp32"]
            if adapted and not merge:
                num_bytes, num_shards = write_adapter(reader, partial, written_as), 1
            else:
                merged = Merged(reader, DTYPES[dtype] if dtype else None) if merge else None
                written_as = written_as if merged is None else merged.dtype
                weights = _Weights(_Trained(reader, written_as) if merged is None else merged)
                _write_model_files(reader, partial, written_as)
                num_bytes, num_shards = _write_shards(weights, partial, max_shard, tell)
            publish(partial, out)
        finally:
            reader.close()
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise TierError(f"can't write the export: {error.strerror}", where=str(out)) from error
    named = next(name for name, known in DTYPES.items() if known == written_as)
    return Exported(folder, out, reader.manifest.step, named, num_bytes, num_shards)


class _Source(Protocol):
    """Weights that are exported, by their names in a model whose parameters are on the meta device."""

    model: PreTrainedModel

    def groups(self) -> list[list[str]]:
        """The names of each unit's parameters."""

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The parameters of one unit, each in its dtype."""


class _Trained:
    """The weights of a checkpoint that holds a model."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype) -> None:
        self._reader = reader
        model: Any = build_model(ModelSource(reader.folder, None, "pretrained", 0, head_of(reader)), dtype)
        self.model: PreTrainedModel = model
        self._dtypes = {name: param.dtype for name, param in model.named_parameters()}
        check_params(reader, model)
        load_buffers_of(reader.folder, model)

    def groups(self) -> list[list[str]]:
        """See _Source."""
        seen: dict[str, None] = {}
        groups = []
        for unit in self._reader.manifest.units:  # several may hold tiles of one parameter
            groups.append([param.name for flat in unit.flats for param in flat.params if param.name not in seen])
            seen.update(dict.fromkeys(groups[-1]))
        return groups

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """See _Source."""
        return {name: self._reader.param(name).to(self._dtypes[name]) for name in names}


class _Weights:
    """Weights with names and shapes as they are published, one unit at a time."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self.num_units = len(source.groups())
        self._model: Any = source.model
        model: nn.Module = source.model
        tied_to = cast("dict[str, str]", self._model.all_tied_weights_keys)
        self._stored_as = {
            names[0]: next((name for name in names if name not in tied_to), names[0]) for names in tied_names(model)
        }

    def on_meta(self) -> Iterator[_Tensors]:
        """All tensors on the meta device: their names, shapes and dtypes."""
        params = dict(self._model.named_parameters())
        return self._groups(lambda names: {name: torch.empty_like(params[name], device="meta") for name in names})

    def read(self) -> Iterator[_Tensors]:
        """All tensors. Those of a unit are freed before the next unit is read."""
        return self._groups(self._source.read)

    def _groups(self, values_of: Callable[[Sequence[str]], _Tensors]) -> Iterator[_Tensors]:
        """The published tensors of each unit, then those of the buffers. `values_of` gives parameters by name."""
        for names in self._source.groups():
            yield self._published({self._stored_as[name]: value for name, value in values_of(names).items()})
        persistent = self._model.state_dict().keys()
        yield self._published({name: value for name, value in self._model.named_buffers() if name in persistent})

    def _published(self, tensors: _Tensors) -> _Tensors:
        ignored = self._model._keys_to_ignore_on_save or ()
        kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
        published: _Tensors = revert_weight_conversion(self._model, kept)
        return published


@dataclass(frozen=True)
class _Shard:
    """A safetensors file of known tensors. They may be written in any order."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    """On the meta device."""

    def offsets(self) -> dict[str, tuple[int, int]]:
        """(first, last) byte of each tensor after the header. Wide types come first, so that each tensor is aligned."""
        offsets, start = {}, 0
        for name, tensor in sorted(self.tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            offsets[name] = (start, start + tensor.nbytes)
            start += tensor.nbytes
        return offsets

    def begin(self) -> int:
        """Write the header. Returns its length."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, offsets in self.offsets().items():
            tensor = self.tensors[name]
            entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        header = text.ljust(-(-len(text) // 8) * 8)
        self.path.write_bytes(len(header).to_bytes(8, "little") + header)
        return 8 + len(header)


def _write_shards(weights: _Weights, out: Path, max_shard: int, tell: Tell) -> tuple[int, int]:
    """Write the shards, with an index if there are several. Returns (bytes, number of shards)."""
    tensors = {name: tensor for group in weights.on_meta() for name, tensor in group.items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard)
    places: dict[str, tuple[Path, int]] = {}
    for file_name, names in split.filename_to_tensors.items():
        shard = _Shard(out / file_name, {name: tensors[name] for name in names})
        start = shard.begin()
        places |= {name: (shard.path, start + first) for name, (first, _) in shard.offsets().items()}
    for number, group in enumerate(weights.read()):
        tell(number / weights.num_units)
        for name, tensor in group.items():
            path, offset = places[name]
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(as_memory(tensor.contiguous().reshape(-1).view(torch.uint8)))
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if split.is_sharded:
        weight_map = {name: path.name for name, (path, _) in sorted(places.items())}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return num_bytes, len(split.filename_to_tensors)


def _write_model_files(reader: CheckpointReader, out: Path, dtype: torch.dtype) -> None:
    """Write the configuration, with the dtype of the weights, and all other files of the model's folder."""
    manifest = reader.manifest
    for name in manifest.files:
        if name != MANIFEST and not name.endswith(".safetensors"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(read_file(reader.folder, manifest, name))
    config = json.loads((out / CONFIG).read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
