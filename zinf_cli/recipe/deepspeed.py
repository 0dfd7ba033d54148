"""A DeepSpeed configuration, as choices of a recipe: what is taken over, is needless, or has no counterpart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zinf_cli.errors import UsageError
from zinf_cli.recipe.draft import Choice

_FROM = "as DeepSpeed's {}"
_PLANNED = {
    "zero_optimization": "the plan places and partitions every class of state; buffers and overlap follow from it",
    "aio": "zinf bench nvme finds threads and blocks",
    "communication_data_type": "gradients are reduced in fp32",
    "prescale_gradients": "the loss is a mean over the targets of all ranks",
    "gradient_predivide_factor": "the loss is a mean over the targets of all ranks",
    "zero_allow_untested_optimizer": "there is one optimizer, and it is tested",
    "zero_force_ds_cpu_optimizer": "the plan says where the update runs",
    "wall_clock_breakdown": "profiler.enabled, and zinf trace",
    "dump_state": "the plan shows what is chosen",
    "steps_per_print": "every step has a line; logging.interval",
    "activation_checkpointing": "activations are kept where memory is left for them, else computed again",
}
"""Keys that the plan, or another key of the recipe, makes needless."""
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_READ_TOGETHER = (*_BATCH, "bf16", "fp16", "gradient_clipping")
_SCHEDULE_KEYS = {
    "warmup_num_steps": "lr_scheduler.warmup_steps",
    "total_num_steps": "train.max_steps",
    "cos_min_ratio": "lr_scheduler.min_lr_ratio",
    "warmup_max_lr": "optimizer.lr",
}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


@dataclass
class Taken:
    """What became of the keys of a configuration."""

    choices: list[Choice] = field(default_factory=list)
    needless: dict[str, str] = field(default_factory=dict)
    """Keys that need no counterpart, with the reason."""
    without: list[str] = field(default_factory=list)
    """Keys that have no counterpart in a recipe: what they ask for is not done."""

    def take(self, key: str, value: Any, source: str) -> None:
        self.choices.append(Choice(key, value, _FROM.format(source)))


def from_deepspeed(config: Mapping[str, Any], num_ranks: int | None) -> Taken:
    """The choices that a DeepSpeed configuration makes. "auto" chooses nothing: its Trainer's arguments would.

    DeepSpeed accumulates gradients for each rank, a recipe for all ranks together: `num_ranks` is asked for if only the
    former is given. UsageError if it is not known then, or if the three sizes of a batch do not agree.
    """
    taken = Taken()
    given = {key: value for key, value in config.items() if value != "auto"}
    _batch(given, num_ranks, taken)
    _precision(config, taken)
    if config.get("gradient_clipping") != "auto":
        clipping = given.get("gradient_clipping", 0)
        taken.take("train.max_grad_norm", clipping or None, f"gradient_clipping {clipping:g}")
    readers: dict[str, Callable[[Any, Taken], None]] = {
        "optimizer": _optimizer,
        "scheduler": _scheduler,
        "zero_optimization": _offload,
    }
    for key, value in given.items():
        if key in readers:
            readers[key](value, taken)
        if key in _PLANNED:
            taken.needless[key] = _PLANNED[key]
        elif key not in readers and key not in _READ_TOGETHER:
            taken.without.append(key)
    return taken


def _batch(given: Mapping[str, Any], num_ranks: int | None, taken: Taken) -> None:
    whole, micro, accumulated = (given.get(key) for key in _BATCH)
    if micro is not None:
        taken.take("train.micro_batch_size", micro, "train_micro_batch_size_per_gpu")
    if whole is not None:
        if whole % (micro or 1):
            raise UsageError(f"train_batch_size {whole} is no multiple of train_micro_batch_size_per_gpu {micro}")
        taken.take("train.gradient_accumulation_steps", whole // (micro or 1), "train_batch_size, for all ranks")
        if accumulated is not None and num_ranks is not None and whole != (micro or 1) * accumulated * num_ranks:
            raise UsageError(
                f"train_batch_size {whole} is not {micro or 1} × {accumulated} × {num_ranks} ranks",
                hint="mend the JSON",
            )
    elif accumulated is not None:
        if num_ranks is None:
            raise UsageError(
                f"gradient_accumulation_steps {accumulated} is for each rank, and how many there are is not known",
                hint="give --hostfile, or train_batch_size in the JSON",
            )
        why = f"gradient_accumulation_steps {accumulated} on each of {num_ranks} ranks"
        taken.take("train.gradient_accumulation_steps", accumulated * num_ranks, why)


def _precision(config: Mapping[str, Any], taken: Taken) -> None:
    enabled = {name: (config.get(name) or {}).get("enabled", False) for name in ("bf16", "fp16")}
    if "auto" in enabled.values():
        return
    name = next((name for name, is_on in enabled.items() if is_on), None)
    taken.take("train.precision", name or "fp32", f"{name}.enabled" if name else "default, fp32")


def _optimizer(value: Mapping[str, Any], taken: Taken) -> None:
    name, params = str(value.get("type", "")).lower(), _given(value)
    if name not in ("adam", "adamw"):
        taken.without.append(f"optimizer.type {value.get('type')}: AdamW is the optimizer so far")
        return
    if name == "adam" and params.pop("adam_w_mode", True) is False and params.get("weight_decay"):
        taken.without.append("optimizer.params.adam_w_mode false: weight decay is decoupled from the gradient here")
    decay = 0.01 if params.pop("torch_adam", False) else 0.0
    for key, default in (("lr", 1e-3), ("betas", None), ("eps", None), ("weight_decay", decay)):
        if key in params:
            taken.take(f"optimizer.{key}", params.pop(key), f"optimizer.params.{key}")
        elif default is not None and value.get("params", {}).get(key) != "auto":
            taken.take(f"optimizer.{key}", default, f"default of optimizer.params.{key}")
    taken.without += [f"optimizer.params.{key}" for key in params if key not in ("fused", "bias_correction")]


def _scheduler(value: Mapping[str, Any], taken: Taken) -> None:
    kind, params = value.get("type"), _given(value)
    if kind not in _SCHEDULES:
        taken.without.append(f"scheduler.type {kind}")
        return
    taken.take("lr_scheduler.name", _SCHEDULES[kind], f"scheduler.type {kind}")
    if kind == "WarmupCosineLR":
        params.setdefault("cos_min_ratio", 0.0001)
    for key, into in _SCHEDULE_KEYS.items():
        if key in params:
            taken.take(into, params.pop(key), f"scheduler.params.{key}")
        elif key == "warmup_num_steps" and value.get("params", {}).get(key) != "auto":
            taken.take(into, 1000, f"default of scheduler.params.{key}")
    if params.pop("warmup_type", "log") != "linear":
        taken.without.append("scheduler.params.warmup_type log: a warmup is a straight line here")
    taken.without += [f"scheduler.params.{key}" for key, entry in params.items() if entry]


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    """The params of an optimizer or a scheduler that are not "auto"."""
    return {key: entry for key, entry in value.get("params", {}).items() if entry != "auto"}


def _offload(value: Mapping[str, Any], taken: Taken) -> None:
    for key in ("offload_param", "offload_optimizer"):
        offload = value.get(key) or {}
        if offload.get("device") == "nvme" and offload.get("nvme_path"):
            taken.take("offload.nvme_path", offload["nvme_path"], f"zero_optimization.{key}.nvme_path")
