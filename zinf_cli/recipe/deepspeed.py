"""A DeepSpeed configuration, as choices of a recipe: what is taken over, is needless, or has no counterpart."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from zinf_cli.errors import UsageError
from zinf_cli.recipe.draft import Choice
from zinf_cli.recipe.recipe import Recipe

_PLANNED = {
    "zero_optimization": "the plan places and partitions every class of state; buffers and overlap follow from it",
    "aio": "zinf bench nvme finds threads and blocks",
    "communication_data_type": "gradients are reduced in fp32",
    "prescale_gradients": "the loss is a mean over the targets of all ranks",
    "gradient_predivide_factor": "the loss is a mean over the targets of all ranks",
    "zero_allow_untested_optimizer": "every optimizer is tested",
    "zero_force_ds_cpu_optimizer": "the plan says where the update runs",
    "wall_clock_breakdown": "profiler.enabled, and zinf trace",
    "dump_state": "the plan shows what is chosen",
    "steps_per_print": "every step has a line; logging.interval",
    "activation_checkpointing": "activations are kept where memory is left for them, else computed again",
}
"""Keys that the plan, or another key of the recipe, makes needless."""
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16"}
_READ_TOGETHER = (*_BATCH, *_PRECISIONS, "gradient_clipping")
_SCHEDULE_KEYS = {
    "warmup_num_steps": "lr_scheduler.warmup_steps",
    "total_num_steps": "train.max_steps",
    "cos_min_ratio": "lr_scheduler.min_lr_ratio",
    "warmup_max_lr": "optimizer.lr",
}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_SCHEDULE_DEFAULTS: dict[str, dict[str, float]] = {
    "WarmupLR": {"warmup_max_lr": 1e-3},
    "WarmupDecayLR": {"warmup_max_lr": 1e-3},
    "WarmupCosineLR": {"cos_min_ratio": 1e-4},
}
"""The first two set the learning rate of their own, whatever that of the optimizer is."""


@dataclass
class Taken:
    """What became of the keys of a configuration."""

    choices: list[Choice] = field(default_factory=list)
    needless: dict[str, str] = field(default_factory=dict)
    """Keys that need no counterpart, with the reason."""
    without: list[str] = field(default_factory=list)
    """Keys that have no counterpart in a recipe: what they ask for is not done."""

    def take(self, key: str, value: Any, source: str, why: str = "") -> None:
        """Choose `value`, which is that of DeepSpeed's `source`. UsageError if the key takes no such value."""
        section, _, name = key.partition(".")
        kind = Recipe.model_fields[section].annotation
        assert kind is not None
        try:
            kind.model_validate({name: value})
            if isinstance(value, int) and value >= 2**63:
                raise _refused(source, value, "too large a number")
        except ValidationError as error:
            raise _refused(source, value, error.errors()[0]["msg"]) from error
        self.choices.append(Choice(key, value, f"as DeepSpeed's {why or source}"))


def _refused(source: str, value: Any, why: str) -> UsageError:
    return UsageError(f"{source} {json.dumps(value):.60}: {why.replace('Input should', 'it should')}")


def _section(of: Mapping[str, Any], key: str, path: str = "") -> dict[str, Any]:
    """What lies below a key; nothing if that is null or missing."""
    value = of.get(key)
    if value is not None and not isinstance(value, dict):
        raise _refused(path + key, value, "a mapping is expected")
    return value or {}


def from_deepspeed(config: Mapping[str, Any], num_ranks: int | None) -> Taken:
    """The choices that a DeepSpeed configuration makes. "auto" chooses nothing: its Trainer's arguments would.

    UsageError if the three sizes of a batch do not agree on `num_ranks`, where that is known.
    """
    taken = Taken()
    given = {key: value for key, value in config.items() if value is not None and value != "auto"}
    _batch(given, {key for key in _BATCH if config.get(key) == "auto"}, num_ranks, taken)
    _precision(config, taken)
    if config.get("gradient_clipping") != "auto":
        clipping = given.get("gradient_clipping", 0)
        limit = None if isinstance(clipping, int | float) and clipping == 0 else clipping
        taken.take("train.max_grad_norm", limit, "gradient_clipping", f"gradient_clipping {clipping}")
    readers: dict[str, Callable[[dict[str, Any], Taken], None]] = {
        "optimizer": _optimizer,
        "scheduler": _scheduler,
        "zero_optimization": _offload,
    }
    for key in given:
        if key in readers:
            readers[key](_section(given, key), taken)
        if key in _PLANNED:
            taken.needless[key] = _PLANNED[key]
        elif key not in readers and key not in _READ_TOGETHER:
            taken.without.append(key)
    return taken


def _batch(given: Mapping[str, Any], automatic: Collection[str], num_ranks: int | None, taken: Taken) -> None:
    """Of the three sizes, as DeepSpeed does, a missing one follows from the others."""
    for key in _BATCH:
        if key in given and (type(given[key]) is not int or given[key] < 1):
            raise _refused(key, given[key], "an integer of 1 or more is expected")
    whole, micro, accumulated = (given.get(key) for key in _BATCH)
    if whole is None and accumulated is None and micro is not None and not automatic:
        accumulated = 1
    if whole is not None and accumulated is not None and micro is None and num_ranks is not None:
        micro = max(1, whole // (accumulated * num_ranks))
    if micro is not None:
        taken.take("train.micro_batch_size", micro, "train_micro_batch_size_per_gpu")
    if whole is not None:
        taken.take("train.global_batch_size", whole, "train_batch_size")
        if accumulated is not None and num_ranks is not None and whole != (micro or 1) * accumulated * num_ranks:
            raise UsageError(
                f"train_batch_size {whole} is not {micro or 1} × {accumulated} × {num_ranks} ranks",
                hint="mend the JSON",
            )
    elif accumulated is not None:
        taken.take("train.gradient_accumulation_steps", accumulated, "gradient_accumulation_steps")


def _precision(config: Mapping[str, Any], taken: Taken) -> None:
    sections = {name: _section(config, name) for name in _PRECISIONS}
    enabled = {name: section.get("enabled", False) for name, section in sections.items()}
    for name, value in enabled.items():
        if value != "auto" and not isinstance(value, bool):
            raise _refused(f"{name}.enabled", value, "true or false is expected")
    if scale := sections["fp16"].get("loss_scale"):
        taken.without.append(f"fp16.loss_scale {scale}: the scale adapts itself here")
    on = [name for name, value in enabled.items() if value is True]
    if len({_PRECISIONS[name] for name in on}) > 1:
        raise UsageError("bf16 and fp16 are both enabled", hint="leave one of them on")
    if on:
        taken.take("train.precision", _PRECISIONS[on[0]], f"{on[0]}.enabled")
    elif "auto" not in enabled.values():
        taken.take("train.precision", "fp32", "default, fp32")


def _optimizer(value: dict[str, Any], taken: Taken) -> None:
    name, path = str(value.get("type", "")).lower(), "optimizer.params."
    params = _section(value, "params", "optimizer.")
    if name not in ("adam", "adamw"):
        taken.without.append(
            f"optimizer.type {value.get('type')}: optimizer.name has sgd, lion, muon and adafactor, whose settings are "
            "left to you"
        )
        return
    if name == "adam" and params.get("adam_w_mode", True) is False and params.get("weight_decay"):
        taken.without.append(f"{path}adam_w_mode false: weight decay is decoupled from the gradient here")
    if params.get("bias_correction", True) is False:
        taken.without.append(f"{path}bias_correction false: moments are corrected here")
    decay = 0.01 if params.get("torch_adam") else 0.0
    for key, default in (("lr", 1e-3), ("betas", None), ("eps", None), ("weight_decay", decay)):
        if key in params:
            _take_given(params, key, f"optimizer.{key}", path, taken)
        elif default is not None:
            taken.take(f"optimizer.{key}", default, f"default of {path}{key}")
    known = ("lr", "betas", "eps", "weight_decay", "fused", "bias_correction", "torch_adam", "adam_w_mode")
    taken.without += [f"{path}{key}" for key, entry in params.items() if key not in known and entry != "auto"]


def _scheduler(value: dict[str, Any], taken: Taken) -> None:
    kind, path = str(value.get("type")), "scheduler.params."
    params = _section(value, "params", "scheduler.")
    if kind not in _SCHEDULES:
        taken.without.append(f"scheduler.type {kind}")
        return
    taken.take("lr_scheduler.name", _SCHEDULES[kind], f"scheduler.type {kind}")
    defaults = {"warmup_num_steps": 1000} | _SCHEDULE_DEFAULTS[kind]
    for key, into in _SCHEDULE_KEYS.items():
        if key in params:
            _take_given(params, key, into, path, taken)
        elif key in defaults:
            taken.take(into, defaults[key], f"default of {path}{key}")
    if params.get("warmup_type", "log") != "linear":
        taken.without.append(f"{path}warmup_type log: a warmup is a straight line here")
    known = (*_SCHEDULE_KEYS, "warmup_type")
    taken.without += [f"{path}{key}" for key, entry in params.items() if key not in known and entry and entry != "auto"]


def _take_given(params: Mapping[str, Any], key: str, into: str, path: str, taken: Taken) -> None:
    value = params[key]
    if value is None:
        raise _refused(path + key, value, "a value is expected")
    if value != "auto":
        steps = isinstance(value, float) and value.is_integer() and key.endswith("_num_steps")  # JSON's 1e4
        taken.take(into, int(value) if steps else value, path + key)


def _offload(value: dict[str, Any], taken: Taken) -> None:
    for key in ("offload_param", "offload_optimizer"):
        offload = _section(value, key, "zero_optimization.")
        if offload.get("device") == "nvme" and offload.get("nvme_path"):
            taken.take("offload.nvme_path", offload["nvme_path"], f"zero_optimization.{key}.nvme_path")
