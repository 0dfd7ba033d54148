"""Puts a LoRA adapter beside a model on the meta device, by peft's own code, and gives both their first weights.

peft puts a layer of its own in the place of each adapted module, which it keeps inside as `base_layer`. So parameters
of the model get other names, and `base_name` leads back. The model is frozen. It stays an object of its own class: a
PeftModel around it would add nothing to training.

Note "first weights of an adapter". peft draws them as it makes its layers, one after another, from torch's generator.
Here it makes them once more, beside a model whose parameters are placeholders of one element, on the CPU. So an adapter
begins with the values that peft gives after torch.manual_seed(seed), in plain PyTorch, whatever the ranks and tiers.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zinf_cli.engine.units.store import to_placeholders
from zinf_cli.errors import ModelError, RecipeError
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.objective import Objective, objective_of
from zinf_cli.models.weights import PretrainedWeights, open_weights, tied_names
from zinf_cli.recipe.adapter import Adapter

NAME = "default"
"""peft's name for the adapter, in names of parameters."""
_TASKS = {Objective.NEXT_TOKEN: "CAUSAL_LM", Objective.NEXT_TOKEN_GIVEN: "CAUSAL_LM"}
_TASKS |= {Objective.TARGET_OF_SOURCE: "SEQ_2_SEQ_LM", Objective.LABEL_OF_TEXT: "SEQ_CLS"}
_TASKS |= {Objective.SIMILARITY: "FEATURE_EXTRACTION"}


def peft_config(model: PreTrainedModel, settings: Adapter, base: Path) -> Any:
    """The LoraConfig of peft that a recipe asks for. `base` is the folder of the model, which it names.

    ModelError if peft is not installed.
    """
    if find_spec("peft") is None:
        raise ModelError("adapters are peft's, which is not installed", hint="pip install 'zinf[adapters]'")
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    targets: Any = settings.target_modules
    if targets == "auto":
        known = model.config.model_type in CHOICES or settings.target_parameters
        targets = None if known else "all-linear"
    return LoraConfig(
        base_model_name_or_path=str(base),
        task_type=_TASKS.get(objective_of(model)),
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        target_parameters=list(settings.target_parameters) or None,
        modules_to_save=list(settings.modules_to_save) or None,
    )


def adapt(model: PreTrainedModel, settings: Adapter, base: Path) -> nn.Module:
    """Put the adapter into `model`, which is frozen, and return its PeftModel. Where the model lies, it will lie.

    ModelError or RecipeError where that can't be.
    """
    config = peft_config(model, settings, base)
    _check_names(model, settings)
    from peft import get_peft_model

    on_meta = next(model.parameters()).is_meta
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is checked here, or can't be in a recipe
            adapted: nn.Module = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    except Exception as error:  # it has many ways to say that a module is not for it
        raise ModelError(f"peft can't adapt {type(model).__name__}: {' '.join(str(error).split())}") from error
    model.train()
    return adapted


def base_name(name: str) -> str | None:
    """The name in the model without an adapter. None for a parameter that only the adapter has."""
    parts = iter(name.split("."))
    kept = []
    for part in parts:
        if part.startswith("lora_"):
            return None
        if part == "modules_to_save":
            next(parts)
        elif part not in ("base_layer", "original_module"):
            kept.append(part)
    return ".".join(kept)


class AdaptedWeights:
    """A RangedWeights over an adapted model: those of the model without adapter, and the adapter's first ones.

    RecipeError if a new head would be lost: it is neither in the model's folder nor in the adapter.
    """

    def __init__(
        self,
        adapted: nn.Module,
        source: ModelSource,
        settings: Adapter,
        dtype: torch.dtype,
        notice: Callable[[str], None],
    ) -> None:
        self._source = source
        self._settings = settings
        self._dtype = dtype
        base = build_model(source, dtype)
        self._base = open_weights(base, source, notice)
        if isinstance(self._base, PretrainedWeights) and source.head == "classifier":
            _check_new(adapted, self._base.new)
        self._stored_as = {name: names[0] for names in tied_names(base) for name in names}

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """See WeightSource."""
        bases = {name: self._in_base(name) for name in names}
        values = self._base.read(list(dict.fromkeys(base for base in bases.values() if base is not None)))
        return {name: self._drawn[name] if base is None else values[base] for name, base in bases.items()}

    def read_part(self, name: str, first: int, last: int) -> torch.Tensor:
        """See RangedWeights."""
        base = self._in_base(name)
        return self._drawn[name].reshape(-1)[first:last] if base is None else self._base.read_part(base, first, last)

    def _in_base(self, name: str) -> str | None:
        base = base_name(name)
        return None if base is None else self._stored_as[base]

    @cached_property
    def _drawn(self) -> dict[str, torch.Tensor]:
        """The values of what only the adapter has: see "first weights of an adapter"."""
        twin: Any = build_model(self._source, self._dtype)
        to_placeholders(twin, torch.device("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._source.seed)
            adapt(twin, self._settings, self._source.name_or_path or Path())
        return {name: param.detach() for name, param in twin.named_parameters() if base_name(name) is None}


def _check_names(model: PreTrainedModel, settings: Adapter) -> None:
    """RecipeError if a name in the recipe is that of nothing, or of an embedding that the model ties to its head."""
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    tied = {name.rpartition(".")[0] for names in tied_names(model) if len(names) > 1 for name in names}
    problems = []
    for key, wanted, there in (
        ("target_modules", settings.target_modules, modules),
        ("target_parameters", settings.target_parameters, parameters),
        ("modules_to_save", settings.modules_to_save, modules),
    ):
        for name in wanted if isinstance(wanted, tuple) else ():
            found = [other for other in there if f".{other}".endswith(f".{name}")]
            if not found:
                problems.append(f"adapter.{key}: {type(model).__name__} has no {name!r}{_did_you_mean(name, there)}")
            elif shared := tied.intersection(found):
                problems.append(
                    f"adapter.{key}: {sorted(shared)[0]} shares its weight with another module, which would not be "
                    "adapted with it: leave it out"
                )
    if problems:
        raise RecipeError(problems)


def _check_new(adapted: nn.Module, new: Sequence[str]) -> None:
    """RecipeError if the adapter has no copy of a `new` parameter of the classifier: peft makes one of two names."""
    saved = {base_name(name) for name, _ in adapted.named_parameters() if ".modules_to_save." in name}
    lost = [name for name in new if name not in saved]
    if lost:
        paths = (name.split(".") for name in lost)
        modules = dict.fromkeys("pooler" if "pooler" in path else path[0] for path in paths)
        raise RecipeError(
            [f"adapter.modules_to_save: {', '.join(lost)} of {type(adapted).__name__} are new, drawn from the seed, "
             f"and an adapter would neither train nor hold them: add [{', '.join(modules)}]"]
        )  # fmt: skip


def _did_you_mean(name: str, there: Sequence[str]) -> str:
    ends = list(dict.fromkeys(_ends(there, name.count("."))))
    near = difflib.get_close_matches(name, ends, n=3, cutoff=0.5)
    return f", did you mean {' or '.join(near)}?" if near else f", but {', '.join(ends[-8:])}"


def _ends(names: Sequence[str], dots: int) -> Iterator[str]:
    for name in names:
        end = ".".join(name.split(".")[-1 - dots :])
        if not end.split(".")[0].isdigit():
            yield end
