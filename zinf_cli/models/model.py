"""Builds a transformers model without its weights: parameters on the meta device, buffers real.

The engine fills the parameters group by group (models/weights.py), so a model never has to fit in memory. Buffers are
small, and many are in no checkpoint (rotary frequencies, position ids). So the model's own `__init__` computes them
here, on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves as leaves
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from zinf_cli.custom_code import custom_code_refused, names_custom_code
from zinf_cli.errors import ModelError
from zinf_cli.models.headers import CLASSIFIER
from zinf_cli.models.objective import check_trainable, is_headless, sees_both_ways
from zinf_cli.models.side_outputs import install_hooks
from zinf_cli.stand_ins import stand_in

# The kinds of model whose own loss zinf trains, in the order they are tried.
_TRAINABLE = (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)


Head = Literal["own", "classifier", "none"]


def head_for(objective: str) -> Head:
    """What a recipe's `train.objective` has on top of a model."""
    heads: dict[str, Head] = {"classification": "classifier", "embedding": "none"}
    return heads.get(objective, "own")


@dataclass(frozen=True)
class ModelSource:
    """The model to train, and where its weights come from: `name_or_path`, or else `config`."""

    name_or_path: Path | None
    """A Hugging Face checkpoint directory."""
    config: dict[str, Any] | None
    """A transformers configuration, `model_type` included."""
    init: Literal["pretrained", "random"]
    seed: int
    """The seed of random weights, and of buffers that a model draws."""
    head: Head = "own"
    """classifier: one of texts, a new one if the checkpoint has none; none: hidden states are what it gives."""
    labels: tuple[str, ...] = ()
    """Those of a classifier; none: as its configuration says."""


def build_model(source: ModelSource, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in train mode: parameters of `dtype` on the meta device, tied ones one object.

    Parameters that the class keeps in fp32 are fp32, as from_pretrained(dtype=...) makes them. So code that needs a
    parameter's dtype has to ask the parameter.

    The class is that of the configuration's `architectures`, or else the causal, sequence-to-sequence or masked
    language model of its type. Buffers are real, on the CPU. KV caches are off, since they would outlive a unit's
    forward. Raises ModelError.
    """
    where = _where(source)
    model_class, config = load_class(source)
    config.use_cache = False
    try:
        # default_generator and not torch.manual_seed: the accelerators' generators are none of our business.
        with torch.random.fork_rng(devices=[]), _parameters_on_meta(), no_init_weights():
            torch.default_generator.manual_seed(source.seed)
            model = model_class._from_config(config, dtype=dtype)
        if dtype != torch.float32:
            _compute_buffers(model, source.seed)
    except Exception as error:  # a model's __init__ is foreign code and may raise anything
        raise ModelError(f"{model_class.__name__} can't be built: {_one_line(error)}", where=where) from error
    model.tie_weights()  # no_init_weights skipped it
    _keep_in_fp32(model, dtype)
    for module in model.modules():  # sub-models may hold copies of the configuration made by their __init__
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    refuse_made_of_weights(model, where)
    install_hooks(model)
    trainable: nn.Module = model.train()
    return trainable


_OF_MODULE = frozenset({"_parameters", "_buffers", "_modules"})


def refuse_made_of_weights(model: nn.Module, where: str | None = None) -> None:
    """ModelError if a module's `__init__` has kept values of a parameter: as a buffer, or as a view.

    Its values are not there yet, and a view would not follow the parameter from slot to slot.
    """
    params = {id(param) for param in model.parameters()}
    for path, module in model.named_modules():
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_MODULE}
        for what, values in (("buffer", module._buffers), ("attribute", attributes)):
            for name, value in values.items():
                tensors = [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
                if any(tensor.is_meta and id(tensor) not in params for tensor in tensors):
                    full = f"{path}.{name}" if path else name
                    raise ModelError(f"{what} {full} is made of a parameter, which is not there yet", where=where)


def _compute_buffers(model: PreTrainedModel, seed: int) -> None:
    """Compute the buffers of a model that was built in 16 bits anew, in fp32, as from_pretrained does.

    Rounded values are right, and what was computed in 16 bits is not: rotary frequencies, say.
    """

    def visit(module: nn.Module, around: PreTrainedModel) -> None:
        if any(buffer is not None and buffer.is_floating_point() for buffer in module._buffers.values()):
            around._init_weights(module)
        for child in module.children():
            visit(child, child if isinstance(child, PreTrainedModel) else around)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        visit(model, model)


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make those parameters and stored buffers fp32 that the class wants in fp32 in a model of `dtype`.

    `_keep_in_fp32_modules_strict` counts in bf16 and fp16, `_keep_in_fp32_modules` in fp16 only. A tied parameter
    counts by the name under which it is stored.
    """
    for name in kept_in_fp32(model, dtype):
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), attribute)
        tensor.data = tensor.data.float()


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """The names of parameters and stored buffers that the class wants in fp32 in a model of `dtype`."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return []
    pattern, _, _ = build_glob_alternation(list(plan))
    names = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    return [name for name in names if pattern.search(name)]


def skeleton(model: nn.Module) -> nn.Module:
    """A deep copy of `model` that holds no weights: all its parameters lie on the meta device.

    Reading weights needs shapes and modules that stay put while the engine swaps the model's own parameters.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def parameters_as_built(model: PreTrainedModel, names: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """The values that the model's `__init__` gives the parameters `names`: float32 on the CPU. It takes O(their bytes).

    When a parameter is registered, its name is unknown, and only its place in the order of registrations is known. So
    the model is built once to find the places, and once more to keep the parameters there. Parameters of the modules
    above are kept, too: a parametrization makes its parameters of one that its module had (weight_norm).
    """

    def build(keep: Collection[int]) -> tuple[PreTrainedModel, list[tuple[nn.Module, nn.Parameter]]]:
        with torch.random.fork_rng(devices=[]), _parameters_on_meta(keep) as registered:
            torch.default_generator.manual_seed(seed)
            return type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32), registered

    twin, registered = build(keep=())
    order = [id(parameter) for _, parameter in registered]  # of a tied parameter the first place counts
    places = {order.index(id(twin.get_parameter(name))) for name in names}
    above = {id(module) for name in names for module in _modules_above(twin, name)}
    twin, _ = build(keep=places | {place for place, (module, _) in enumerate(registered) if id(module) in above})
    return {name: twin.get_parameter(name).detach() for name in names}


def _modules_above(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around the parameter `name`, from the model's root down."""
    module = model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        yield module


def load_class(source: ModelSource) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and its configuration, which is a new object at each call. Raises ModelError.

    The configuration of a classifier has the labels of `source`, if that names some.

    Of a model of several parts (text, vision) whose configuration names no class, that is the language model alone.
    """
    config = _load_config(source)
    choose = {"own": _model_class, "classifier": _classifier, "none": _headless}[source.head]
    model_class = choose(config, _where(source))
    if source.labels:
        config.id2label = dict(enumerate(source.labels))
        config.label2id = {label: number for number, label in enumerate(source.labels)}
    if model_class.__name__.endswith(CLASSIFIER):  # its first forward would find it out, and change the configuration
        of_labels = "regression" if config.num_labels == 1 else "single_label_classification"
        if config.problem_type not in (None, of_labels):
            raise ModelError(
                f"{model_class.__name__} with {config.num_labels} outputs has problem_type {config.problem_type}, and "
                f"what is trained is {of_labels}",
                where=_where(source),
                hint="set problem_type to null in its config.json, if that is what it is to learn",
            )
        config.problem_type = of_labels
    if model_class.config_class is config.sub_configs.get("text_config"):  # as AutoModelForCausalLM does
        config = config.get_text_config()
    return model_class, config


def _where(source: ModelSource) -> str:
    return str(source.name_or_path or f"model.config (model_type {(source.config or {}).get('model_type')})")


def _load_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration as the user gives it."""
    if source.name_or_path is None:
        return _config_from_dict(source.config or {})
    where = str(source.name_or_path)
    if not (source.name_or_path / "config.json").is_file():
        raise ModelError(
            "no config.json here",
            where=where,
            hint="name_or_path is a Hugging Face checkpoint directory on this machine",
        )
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if found := stand_in(source.name_or_path / "config.json"):
            raise ModelError(found[0], where=f"{where}/config.json", hint=found[1]) from error
        if names_custom_code(source.name_or_path, "config.json"):
            raise custom_code_refused(source.name_or_path, "config.json", ModelError) from error
        raise ModelError(f"config.json is not usable: {_one_line(error)}", where=where) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the checkpoint is quantized",
            where=where,
            hint="train from the unquantized checkpoint of this model",
        )
    return config


def _config_from_dict(entries: dict[str, Any]) -> PreTrainedConfig:
    settings = copy.deepcopy(entries)  # configuration classes keep, and change, the dicts they are given
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ModelError("model_type is missing", where="model.config", hint="such as model_type: llama")
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except Exception as error:
        for named in _named_classes(settings.get("architectures")):
            check_trainable(named, "model.config")  # if it is none, that is the reason
        raise ModelError(_one_line(error), where="model.config") from error
    # transformers keeps unknown keys as attributes, so that a typo would train another model.
    known = _settings_of(type(config))
    for key in settings.keys() - known:
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.9):
            raise ModelError(
                f"{model_type} has no setting {key!r}", where="model.config", hint=f"did you mean {close[0]}?"
            )
    return config


def _settings_of(config_class: type[PreTrainedConfig]) -> set[str]:
    """The keys that a configuration knows, with old names and those that its `__post_init__` reads from other keys."""
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= {*dir(config_class), *config_class.attribute_map, *config_class.attribute_map.values()}
    with suppress(Exception):  # a few types have no default that their own checks let pass
        known |= vars(config_class()).keys()
    for base in config_class.__mro__:
        code = getattr(inspect.unwrap(vars(base).get("__post_init__", object)), "__code__", None)
        known |= {constant for constant in (code.co_consts if code else ()) if isinstance(constant, str)}
    return known


def _model_class(config: PreTrainedConfig, where: str) -> type[PreTrainedModel]:
    for named in _named_classes(config.architectures):
        # A bare backbone has no loss; the language model built on it has.
        if type(config) not in MODEL_MAPPING or named is not MODEL_MAPPING[type(config)]:
            check_trainable(named, where)
            return named
    causal, source_to_target, masked = _TRAINABLE
    first = masked if sees_both_ways(config) else source_to_target if config.is_encoder_decoder else causal
    for mapping in (first, *_TRAINABLE):
        if type(config) in mapping:
            model_class: type[PreTrainedModel] = mapping[type(config)]
            check_trainable(model_class, where)
            return model_class
    for beside in _language_models_beside(config):
        return beside
    raise ModelError(
        f"transformers has no language model of type {config.model_type!r}: causal, seq2seq or masked",
        where=where,
    )


def _classifier(config: PreTrainedConfig, where: str) -> type[PreTrainedModel]:
    """The classifier of texts that the configuration names, or that its type has."""
    for named in _named_classes(config.architectures):
        if named.__name__.endswith(CLASSIFIER):
            return named
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        model_class: type[PreTrainedModel] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        return model_class
    raise ModelError(
        f"transformers has no classifier of type {config.model_type!r}", where=where, hint="leave train.objective out"
    )


def _headless(config: PreTrainedConfig, where: str) -> type[PreTrainedModel]:
    """The class of the configuration's type that has no head, as AutoModel chooses it."""
    found: Any = MODEL_MAPPING.get(type(config), ())
    classes: tuple[type[PreTrainedModel], ...] = found if isinstance(found, tuple) else (found,)
    if config.is_encoder_decoder or not classes or not is_headless(classes[0]):
        what = "is an encoder-decoder" if config.is_encoder_decoder else "has no class without a head"
        raise ModelError(
            f"{config.model_type} {what}, and embedding pools the hidden states of one stack of layers",
            where=where,
            hint="train an encoder or a causal model, or leave train.objective out",
        )
    return next((named for named in _named_classes(config.architectures) if named in classes), classes[0])


def _named_classes(architectures: Sequence[str] | None) -> Iterator[type[PreTrainedModel]]:
    """Those of the classes with these names that transformers has."""
    for name in architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            yield named


def _language_models_beside(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes of a text part (emu3_text_model, mllama_text_model), listed only under the whole model."""
    if config.base_config_key == "text_config":
        modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        for name, found in vars(modeling).items():
            if name.endswith("ForCausalLM") and getattr(found, "config_class", None) is type(config):
                yield found


def _one_line(error: Exception) -> str:
    """The message of transformers' error, without its list of some 500 known model types."""
    return " ".join(str(error).partition(". Should contain one of")[0].split())


@contextmanager
def _parameters_on_meta(keep: Collection[int] = ()) -> Iterator[list[tuple[nn.Module, nn.Parameter]]]:
    """A context in which parameters go to the meta device when they are registered. Buffers stay where they are.

    Yields modules and their parameters in the order of registration; those at the positions `keep` stay real. (Inside
    torch.device("meta") buffers would be on the meta device, too.) The memory that `__init__` takes for a parameter is
    freed before the next one is made, and a torch.empty that nothing touches costs no memory.
    """
    registered: list[tuple[nn.Module, nn.Parameter]] = []
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            # A parameter that is on meta already may be tied to another name: keep the object.
            if not param.is_meta and len(registered) not in keep:
                param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            registered.append((self, param))
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield registered
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
