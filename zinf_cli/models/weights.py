"""Reads a model's weights, a group of parameters at a time.

Note "two names for one tensor". A checkpoint's keys differ from the model's parameter names: transformers renames,
stacks, splits and transposes tensors as it loads them. A saved Mixtral has `block_sparse_moe.experts.0.w1.weight` where
the module has `mlp.experts.gate_up_proj`. So `_plan` puts every key through transformers' own renaming, in the order of
its `convert_and_load_state_dict_in_model`, and notes which conversion takes the key. Run on meta tensors, conversions
give names and shapes, so a checkpoint is judged by its headers alone. Run on the tensors of one group, they give its
values, and take memory for that group.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from zinf_cli.checkpoint.folder import is_checkpoint
from zinf_cli.errors import CheckpointError
from zinf_cli.models.checkpoint_reader import StoredWeights, load_buffers_of
from zinf_cli.models.model import ModelSource, skeleton
from zinf_cli.models.random_weights import RandomWeights
from zinf_cli.models.safetensors_files import SafetensorsFiles

_LISTED = 10  # tensors of each kind that a message names


class WeightSource(Protocol):
    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The parameters `names` (as in `model.named_parameters()`) on the CPU, in their shape and any dtype.

        Reading takes memory for `names`, so ask for a block at a time. Tensors may be views of mapped files, so copy
        values that have to stay.
        """


class RangedWeights(WeightSource, Protocol):
    def read_part(self, name: str, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a parameter, as a 1-D tensor."""


def open_weights(
    model: nn.Module, source: ModelSource, notice: Callable[[str], None] = lambda _: None
) -> RangedWeights:
    """The weights of a model from `build_model(source)`, which keeps its parameters on the meta device.

    A checkpoint is judged here, by its headers: one CheckpointError names all that is missing or has a wrong shape.
    Tensors without a place in the model are left out, as in transformers, and `notice` is told their names.
    """
    if source.init == "random" or source.name_or_path is None:
        return RandomWeights(model, source.seed)
    if is_checkpoint(source.name_or_path):
        return StoredWeights(source.name_or_path, model)
    files = SafetensorsFiles(source.name_or_path)
    return PretrainedWeights(model, files, source.seed, notice, new_head=source.head != "own")


def load_buffers(model: nn.Module, source: ModelSource) -> None:
    """Fill the persistent buffers from the checkpoint. With random weights they stay as `__init__` made them."""
    stored = model.state_dict().keys() & dict(model.named_buffers()).keys()
    if source.init == "random" or source.name_or_path is None or not stored:
        return
    if is_checkpoint(source.name_or_path):
        load_buffers_of(source.name_or_path, model)
        return
    files = SafetensorsFiles(source.name_or_path)
    with files.reader() as fetch:
        for conversion in _plan(model, files.keys()).conversions:
            if conversion.target in stored:
                for name, value in conversion.run(model, fetch).items():
                    model.get_buffer(name).copy_(value)


class PretrainedWeights:
    """A WeightSource over a checkpoint directory. CheckpointError at once if model and checkpoint do not fit.

    Parameters that the model class allows to be absent are drawn from `seed`; with `new_head`, those of a head as well.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: SafetensorsFiles,
        seed: int,
        notice: Callable[[str], None],
        *,
        new_head: bool = False,
    ) -> None:
        self._model = skeleton(model)
        self._files = files
        plan = _plan(self._model, files.keys())
        self._origins, self.new = _judge(self._model, plan, files, notice, new_head=new_head)
        """Names of the parameters of a new head."""
        self._seed = seed

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """See WeightSource. CheckpointError if tied names are stored with different values."""
        values: dict[str, torch.Tensor] = {}
        converted: dict[int, dict[str, torch.Tensor]] = {}
        with self._files.reader() as fetch:
            for name in names:
                copies = {}
                for stored_name, conversion in self._origins[name].items():
                    if id(conversion) not in converted:  # one may yield several of the parameters
                        converted[id(conversion)] = conversion.run(self._model, fetch)
                    copies[stored_name] = converted[id(conversion)][stored_name]
                values.update(self._agreed(name, copies))
        return values

    def read_part(self, name: str, first: int, last: int) -> torch.Tensor:
        """See RangedWeights. A view of a mapped file, unless a conversion makes the parameter.

        A checkpoint may have experts one by one that the model has in one parameter. Then only those are read that lie
        in the range.
        """
        shape = self._model.get_parameter(name).shape
        each = shape[1:].numel()
        ((stored_name, conversion), *more) = self._origins[name].items()
        some = conversion.of_experts(first // each, last // each, shape[0])
        if some is not None and not more and not first % each and not last % each:
            with self._files.reader() as fetch:
                values = some.run(self._model, fetch)[stored_name].reshape(-1)
            if len(values) == last - first:
                return values
        return self.read([name])[name].reshape(-1)[first:last]

    def _agreed(self, name: str, copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not copies:
            return RandomWeights(self._model, self._seed).read([name])
        first, *others = copies.items()
        for other, value in others:
            if not torch.equal(first[1], value):
                raise CheckpointError(
                    f"the configuration ties {first[0]} and {other}, but their values differ",
                    where=str(self._files.directory),
                    hint="set tie_word_embeddings to false in config.json",
                )
        return {name: first[1]}


@dataclass(frozen=True)
class _Conversion:
    """Tensors of a checkpoint that together become one or more of the model's tensors."""

    transform: WeightConverter | WeightRenaming
    target: str
    """The first of the names that the conversion yields."""
    keys: list[tuple[str, str]] = field(default_factory=list)
    """(the transform's source pattern, the checkpoint's key), in the order in which the tensors are stacked."""

    def first_keys(self) -> str:
        more = ", ..." if len(self.keys) > 3 else ""
        return ", ".join(key for _, key in self.keys[:3]) + more

    def of_experts(self, first: int, last: int, count: int) -> _Conversion | None:
        """The conversion for experts [first, last) of `count`. None if the checkpoint has no tensor for each expert."""
        patterns = dict.fromkeys(pattern for pattern, _ in self.keys)
        stacks = [[key for key in self.keys if key[0] == pattern] for pattern in patterns]
        if not stacks or any(len(stack) != count for stack in stacks):
            return None
        return replace(self, keys=[key for stack in stacks for key in stack[first:last]])

    def run(self, model: PreTrainedModel, fetch: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors, by their names in the model. `fetch` is called as late as the conversion permits."""
        transform = copy.deepcopy(self.transform)  # running one consumes it
        for pattern, key in self.keys:
            transform.add_tensor(self.target, key, pattern, partial(fetch, key))
        yielded = transform.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in yielded.items()}


_Origins = dict[str, _Conversion]
"""For a parameter, the conversion that yields it, by the name under which it is stored. Tied names may have several."""


@dataclass(frozen=True)
class _Plan:
    conversions: list[_Conversion]
    homeless: dict[str, str]
    """Tensors without a place in the model: the checkpoint's key, by the name that the model would use."""


def _plan(model: PreTrainedModel, keys: Sequence[str]) -> _Plan:
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    conversions: dict[str, _Conversion] = {}
    homeless: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # renamed without need
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            homeless[name] = key
            continue
        transform = WeightRenaming(key, name) if pattern is None else converter_of[pattern]
        conversion = conversions.setdefault(name, _Conversion(transform, name))
        conversion.keys.append((key if pattern is None else pattern, key))
    return _Plan(list(conversions.values()), homeless)


def _judge(
    model: PreTrainedModel, plan: _Plan, files: SafetensorsFiles, notice: Callable[[str], None], *, new_head: bool
) -> tuple[dict[str, _Origins], list[str]]:
    """(the conversions that yield each parameter, the names of those of a new head), found from headers alone.

    A parameter that its class allows to be absent has none, nor has one of a new head. CheckpointError if tensors are
    missing, have a wrong shape, or show that config.json is not theirs. `notice` is told of tensors that are left out.
    """
    state = model.state_dict()
    homeless, misshaped = dict(plan.homeless), []
    yields: _Origins = {}
    for conversion in plan.conversions:
        try:
            shapes = {name: value.shape for name, value in conversion.run(model, files.on_meta).items()}
        except Exception as error:  # each operation has its own way to refuse tensors that do not go together
            shapes = {}
            yields[conversion.target] = conversion
            misshaped.append(f"{conversion.target} can't be made of {conversion.first_keys()}: {error}")
        for name, shape in shapes.items():
            if name not in state:
                homeless[name] = conversion.first_keys()
                continue
            yields[name] = conversion
            if shape != state[name].shape:
                misshaped.append(f"{name} should be {tuple(state[name].shape)} but is {tuple(shape)}")

    origins: dict[str, _Origins] = {}
    for names in tied_names(model):
        origins[names[0]] = {name: yields[name] for name in names if name in yields}
    absent = {name for name, found in origins.items() if not found}
    absent |= state.keys() & dict(model.named_buffers()).keys() - yields.keys()

    verdict = LoadStateDictInfo(absent, set(homeless), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(verdict)  # drops what the model class says to ignore
    missing = sorted(verdict.missing_keys, key=dot_natural_key)
    drawn = _of_a_head(model, missing, yields) if new_head else []
    if drawn:
        notice(f"new, and drawn from the seed: {_some(drawn)}")
        missing = [name for name in missing if name not in drawn]
    homeless = {name: homeless[name] for name in sorted(verdict.unexpected_keys, key=dot_natural_key)}
    extra, telling = list(homeless.values()), _telling(homeless, origins)
    if missing or misshaped or telling:
        kinds = (("missing", missing), ("extra", extra), ("misshaped", misshaped))
        problems = [f"  {len(found)} {kind}: {_some(found)}" for kind, found in kinds if found]
        raise CheckpointError(
            "\n".join([f"the tensors do not fit {type(model).__name__}:", *problems, *telling]),
            where=str(files.directory),
            hint="is config.json the one of these weights, with their class under architectures?",
        )
    if extra:
        count = f" ({len(extra)} in all)" if len(extra) > _LISTED else ""
        notice(f"{files.directory}: left out, as {type(model).__name__} has no place for it: {_some(extra)}{count}")
    return origins, drawn


def _of_a_head(model: PreTrainedModel, missing: Sequence[str], known: Collection[str]) -> list[str]:
    """The `missing` tensors of modules that are a head, or a pooler, and of which no tensor is `known`."""
    modules = {name.rpartition(".")[0] for name in known}
    below = "" if model.base_model is model else f"{model.base_model_prefix}."
    return [
        name
        for name in missing
        if (not name.startswith(below) or ".pooler." in f".{name}") and name.rpartition(".")[0] not in modules
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _telling(extra: Collection[str], known: Collection[str]) -> list[str]:
    """Lines of an error: which tensors without a place show that config.json is not theirs.

    Most show nothing (a value head, old masks). More elements of a list of modules show that there should be more
    layers. Scales beside known weights show that the weights are quantized.
    """
    ours, theirs = _elements(known), _elements(extra)
    alike = {(path, frozenset(inside)) for (path, _), inside in ours.items()}
    more = [f"{path}.{number}" for (path, number), inside in theirs.items() if (path, frozenset(inside)) in alike]
    scales = [name for name in extra if any(name[: mark.start()] in known for mark in re.finditer("_", name))]
    return [
        *([f"  more of a list than the configuration says: {_some(more)}"] if more else []),
        *([f"  scales of a quantized checkpoint: {_some(scales)}"] if scales else []),
    ]


def _elements(names: Collection[str]) -> dict[tuple[str, str], set[str]]:
    """The names inside each element of a module list, by (name of the list, number of the element)."""
    inside: dict[tuple[str, str], set[str]] = {}
    for name in names:
        for place in re.finditer(r"\.(\d+)\.", name):
            inside.setdefault((name[: place.start()], place[1]), set()).add(name[place.end() :])
    return inside


def tied_names(model: nn.Module) -> list[list[str]]:
    """All names of each parameter. The first is the one in `model.named_parameters()`."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    return list(names_of.values())
