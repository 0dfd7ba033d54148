"""What is trained in which way on a machine: what its memories and its drive hold, and why the rest is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.case import Case
from benchmarks.contenders import CLASSES
from zinf_cli.amounts import format_bytes

STATES = {"params": (2, 4), "grads": (4, 4), "optimizer": (12, 8)}
"""Bytes per parameter of each class, where an accelerator computes in bf16, and where the CPU computes in fp32."""
FREE_SHARE = 0.05
"""Of each memory and of the drive, so much is for all that is not state of the model."""
LOGITS = 12
"""Bytes per logit: in bf16 and in fp32, each with its gradient."""
TRAFFIC = 36
"""Bytes per parameter that a step moves to and from the drive, if all state lies there."""


@dataclass(frozen=True)
class Machine:
    """Bytes that are free, and the rate of the drive in bytes per second. `device` is None where the CPU computes."""

    device: int | None
    cpu: int
    drive: int
    drive_bytes_per_s: float


@dataclass(frozen=True)
class Way:
    """A contender, and where its state lies."""

    contender: str
    states_on: str
    tiers: Mapping[str, str]
    """The tier of each class of STATES, and of the activations: device, cpu or nvme."""
    more_on_device: int = 0
    """Bytes per parameter on the device beside the state."""
    cpu_dtype: bool = False
    """Whether the state is as where the CPU computes, whatever computes."""


@dataclass(frozen=True)
class Trial:
    """A case that is trained in the first of `ways` that fits: arithmetic can't be sure of that."""

    case: Case
    ways: tuple[Way, ...]


def everything_on(tier: str) -> dict[str, str]:
    return dict.fromkeys(CLASSES, tier)


_CPU = everything_on("cpu")
CONTENDERS: tuple[tuple[Way, ...], ...] = (
    (
        Way("zinf", "CPU memory", _CPU),
        Way("zinf", "CPU memory, gradients on the device", {**_CPU, "grads": "device", "activations": "device"}),
        Way("zinf", "device, optimizer in CPU memory", {**everything_on("device"), "optimizer": "cpu"}),
    ),
    (Way("plain PyTorch", "device", everything_on("device")),),
    (
        Way(
            "FSDP2 with CPU offload",
            "CPU memory, whole gradients on the device",
            {**_CPU, "activations": "device"},
            more_on_device=4,
            cpu_dtype=True,
        ),
    ),
    (Way("zinf", "NVMe", everything_on("nvme")),),
)
"""Each by the places for its state, the farthest from the device first."""


def choose(
    machine: Machine, case: Case, models: Sequence[str], smaller: Sequence[str], longest_step_s: float
) -> tuple[list[Trial], list[str]]:
    """What is trained, and a line for each contender and model that is left out.

    Every contender trains `case` with those of `models` that fit, or, if none of them does, with the first of `smaller`
    that does. A step that the drive alone makes longer than `longest_step_s` does not fit either.
    """
    trials: list[Trial] = []
    left_out: list[str] = []
    for ways in CONTENDERS:
        found = False
        for model in (*models, *smaller):
            if found and model in smaller:
                break
            sized = replace(case, model=model)
            lacks = [lack(way, sized, machine, longest_step_s) for way in ways]
            fitting = tuple(way for way, why in zip(ways, lacks, strict=True) if why is None)
            if fitting:
                trials.append(Trial(sized, fitting))
                found = True
            else:
                reasons = dict.fromkeys(f"{way.states_on}: {why}" for way, why in zip(ways, lacks, strict=True))
                left_out.append(f"{ways[0].contender}, {model}: {'; '.join(reasons)}")
    return trials, left_out


def lack(way: Way, case: Case, machine: Machine, longest_step_s: float) -> str | None:
    """What is missing to train `case` in this way. None if it should fit."""
    need = needs(way, case, on_accelerator=machine.device is not None)
    have = {"device": machine.device, "cpu": machine.cpu, "nvme": machine.drive}
    for tier, num_bytes in need.items():
        free = have[tier]
        if free is not None and num_bytes > (1 - FREE_SHARE) * free:
            return f"it takes {format_bytes(num_bytes)} of {tier}, of which {format_bytes(free)} is free"
    if need["nvme"]:
        step_s = TRAFFIC * case.num_params / machine.drive_bytes_per_s
        if step_s > longest_step_s:
            rate = f"{machine.drive_bytes_per_s / 1e9:.2f} GB/s"
            return f"a step would take {step_s:.0f} s, as the drive reads and writes at {rate}"
    return None


def needs(way: Way, case: Case, *, on_accelerator: bool) -> dict[str, int]:
    """Bytes of each tier. Where the CPU computes, what is on the device lies in CPU memory."""
    found = {"device": 0, "cpu": 0, "nvme": 0}
    wide = way.cpu_dtype or not on_accelerator
    for name, sizes in STATES.items():
        found[way.tiers[name]] += sizes[wide] * case.num_params
    batches = 1 if way.contender != "zinf" else case.micro_batches  # of which activations are there at once
    found[way.tiers["activations"]] += batches * case.activation_numel * (2 if on_accelerator else 4)
    found["device"] += way.more_on_device * case.num_params + LOGITS * case.tokens * case.config["vocab_size"]
    if not on_accelerator:
        found["cpu"] += found.pop("device")
    return found
