"""What `zinf export` writes of a checkpoint with an adapter: the adapter as peft has it, or merged into its model.

A merge reads, merges and gives away one unit at a time. Of a unit, peft's own layers are filled in fp32, and merged by
their own code. So what is rounded to the model's dtype is the sum. An adapter has learned to add to the weights that it
was trained on: if these lay in fewer bits (`model.base_dtype`), it is merged into what they were unpacked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from zinf_cli.engine.packed import rounded
from zinf_cli.engine.units.origins import packings_of
from zinf_cli.engine.units.units import discover
from zinf_cli.errors import CheckpointError
from zinf_cli.models.adapters import NAME, adapt, base_name
from zinf_cli.models.base_digest import base_digest
from zinf_cli.models.base_packing import pack_base
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.models.model import Head, ModelSource, build_model, head_for, load_class
from zinf_cli.models.weights import RangedWeights, load_buffers, open_weights, tied_names
from zinf_cli.recipe.adapter import Adapter

WEIGHTS = "adapter_model.safetensors"


def base_dtype_of(reader: CheckpointReader) -> str:
    """How the model lay that the adapter was trained on, a value of `model.base_dtype`."""
    return str(reader.manifest.recipe["model"].get("base_dtype", "auto"))


def adapter_of(reader: CheckpointReader) -> tuple[Adapter, Path]:
    """The adapter's settings, and the folder of the model that it is for."""
    recipe = reader.manifest.recipe
    return Adapter.model_validate(recipe["adapter"]), Path(recipe["model"]["name_or_path"].replace("$$", "$"))


def _source_of(reader: CheckpointReader) -> ModelSource:
    """The model that an adapter is for: of a classifier, with its labels."""
    recipe = reader.manifest.recipe
    labels = tuple(recipe["dataset"].get("labels", ()))
    return ModelSource(adapter_of(reader)[1], None, "pretrained", recipe["seed"], head_of(reader), labels)


def head_of(reader: CheckpointReader) -> Head:
    """What the model of a checkpoint has on top."""
    return head_for(reader.manifest.recipe["train"].get("objective", "auto"))


def write_adapter(reader: CheckpointReader, out: Path, dtype: torch.dtype) -> int:
    """Write adapter_config.json and adapter_model.safetensors. Returns the bytes of the weights, all in memory."""
    from peft import get_peft_model_state_dict

    settings, folder = adapter_of(reader)
    model: Any = build_model(ModelSource(reader.folder, None, "pretrained", 0, head_of(reader)), torch.float32)
    adapted: Any = adapt(model, settings, folder)
    named = {f"base_model.model.{name}": reader.param(name).to(dtype) for name in reader.shapes}
    weights = get_peft_model_state_dict(adapted, named, NAME, save_embedding_layers=False)
    save_file({name: value.contiguous() for name, value in weights.items()}, out / WEIGHTS, {"format": "pt"})
    config = adapted.peft_config[NAME]
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(out)
    return sum(value.nbytes for value in weights.values())


class Merged:
    """The weights of a model with the adapter of a checkpoint merged into it, by their names in the model.

    CheckpointError if the model is not the one that the adapter was trained on.
    """

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype | None) -> None:
        """`dtype` of the parameters; without it, that of the model."""
        self._reader = reader
        from peft.tuners.tuners_utils import BaseTunerLayer

        settings, folder = adapter_of(reader)
        if base_digest(folder) != reader.manifest.base:
            raise CheckpointError(
                f"the weights in {folder} are not those that the adapter was trained on", where=str(reader.folder)
            )
        source = _source_of(reader)
        self.dtype = dtype or load_class(source)[1].dtype or torch.float32
        model: Any = build_model(source, self.dtype)
        self.model: PreTrainedModel = model
        load_buffers(self.model, source)
        self._base: RangedWeights = open_weights(self.model, source)
        pack_base(self.model, base_dtype_of(reader))
        self._packings = packings_of(self.model)
        twin: Any = build_model(source, torch.float32)
        adapt(twin, settings, folder)
        self._layers: list[Any] = [module for module in twin.modules() if isinstance(module, BaseTunerLayer)]
        names = {id(param): name for name, param in twin.named_parameters()}
        self._names = {
            id(layer): {path: names[id(param)] for path, param in layer.named_parameters()} for layer in self._layers
        }
        known = {name: names[0] for names in tied_names(self.model) for name in names}
        self._saved = {known[base_name(name) or ""]: name for name in reader.shapes if ".modules_to_save." in name}

    def groups(self) -> list[list[str]]:
        """The names of each unit's parameters."""
        return [[place.name for place in unit.params()] for unit in discover(self.model, 1)]

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The parameters of one unit, each in its dtype."""
        values = {name: value.to(torch.float32, copy=True) for name, value in self._base.read(names).items()}
        for name in values.keys() & self._packings.keys():
            values[name] = rounded(values[name], self._packings[name])
        for layer in self._layers:
            if any(base_name(name) in values for name in self._names[id(layer)].values()):
                self._merge(layer, values)
        values |= {name: self._reader.param(self._saved[name]) for name in names if name in self._saved}
        dtypes = {name: param.dtype for name, param in self.model.named_parameters()}
        return {name: values[name].to(dtypes[name]) for name in names}

    def _merge(self, layer: Any, values: dict[str, torch.Tensor]) -> None:
        """Merge a layer of peft's into `values`."""
        before = {path: layer.get_parameter(path) for path in self._names[id(layer)]}
        for path, name in self._names[id(layer)].items():
            base = base_name(name)
            value = self._reader.param(name) if base is None else values[base]
            _put(layer, path, nn.Parameter(value, requires_grad=False))
        layer.merge()
        for path, name in self._names[id(layer)].items():
            if (base := base_name(name)) is not None:
                values[base] = layer.get_parameter(path).detach()
            _put(layer, path, before[path])


def _put(module: nn.Module, path: str, param: nn.Parameter) -> None:
    owner, _, attribute = path.rpartition(".")
    module.get_submodule(owner)._parameters[attribute] = param
