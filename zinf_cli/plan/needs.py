"""What a transformer takes on each tier of a host, by closed forms (sizes.py), and what a host has for it.

A *strategy* says which states every rank holds whole and where they may lie. Strategies are the systems of
ZeRO-Infinity's figure 6a. Working memory is the paper's: the largest matrix, one block's activations, and the buffers
of an update. "infinity" is zinf: it has two blocks in memory, or two parts of blocks, cut as zinf's engine cuts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from zinf_cli.machine.profiles import GIB, MEMORY_SHARE, Profile
from zinf_cli.model_state import ADAMW, GRAD, ITEM_BYTES, PRECISIONS
from zinf_cli.plan.memory import CLASSES, LEAST_PART, MIB, churn_bytes, host_bytes
from zinf_cli.plan.placement import TIERS
from zinf_cli.plan.sizes import BYTES_PER_PARAM, Transformer

PROCESS_BYTES = 430 * MIB
"""Memory of a process that has imported torch and transformers, and has built a model without weights."""
SHARED_BYTES = 100 * MIB
"""The part of PROCESS_BYTES that all ranks of a host share: pages of libraries."""
CONTEXT_BYTES = 3 * GIB // 2
"""Device memory of one rank for CUDA's context, libraries and communication buffers."""
PART_BYTES = ITEM_BYTES["BF16"] + GRAD.item_bytes
"""What a parameter takes while its part is computed: itself, and its gradient in fp32."""
LOGIT_BYTES = 10
"""Bytes of one logit: in the compute precision, in fp32, and its fp32 gradient."""


@dataclass(frozen=True)
class Strategy:
    """`replicated` states are whole on every rank; the others are cut into slices. `tiers`: where each may lie."""

    replicated: tuple[str, ...]
    tiers: Mapping[str, tuple[str, ...]]
    cuts: bool = False
    """Whether blocks may be computed in parts (ZeRO-Infinity, section 5.1.3)."""


def _only(**tiers: str) -> dict[str, tuple[str, ...]]:
    return {state: (tier,) for state, tier in tiers.items()}


STRATEGIES: Mapping[str, Strategy] = {
    "infinity": Strategy((), dict.fromkeys(CLASSES, TIERS), cuts=True),
    "infinity-cpu": Strategy(
        (), {**_only(params="cpu", grads="cpu", optimizer="cpu"), "activations": ("device", "cpu")}, cuts=True
    ),
    "zero-3": Strategy((), _only(params="device", grads="device", optimizer="device", activations="device")),
    "zero-offload": Strategy(("params",), _only(params="device", grads="cpu", optimizer="cpu", activations="device")),
    "data-parallel": Strategy(
        ("params", "grads", "optimizer"),
        _only(params="device", grads="device", optimizer="device", activations="device"),
    ),
}
OWN = ("infinity", "infinity-cpu")
"""Those that zinf is, in bytes as well."""


@dataclass(frozen=True)
class Scenario:
    """A model, a machine and the size of a step.

    A rank computes `micro_batch_size` sequences at once, and `micro_batches` times as many in a step.
    """

    model: Transformer
    profile: Profile
    hosts: int = 1
    ranks: int = 1
    """On one host."""
    micro_batch_size: float = 1
    micro_batches: int = 1
    per_sweep: int | None = None
    strategy: str = "infinity"
    pinned: Mapping[str, str] = field(default_factory=dict)
    """Class to the tier that the user asks for."""
    as_in_paper: bool = True
    """Whether model states have the bytes of the paper (sizes.py), and not those of zinf's engine."""

    @property
    def precision(self) -> str:
        """What the machine computes in."""
        return "fp16" if "fp16" in self.profile.matmul else "bf16"

    @property
    def bytes_per_param(self) -> Mapping[str, float]:
        """Of each class of model states."""
        if self.as_in_paper:
            return BYTES_PER_PARAM
        dtype = PRECISIONS[self.precision]
        return {"params": ITEM_BYTES[dtype], "grads": GRAD.item_bytes, "optimizer": ADAMW.bytes_per_param(dtype)}

    @property
    def state_bytes(self) -> int:
        """Of parameters, gradients and optimizer states, all hosts together."""
        return round(sum(self.bytes_per_param.values()) * self.model.params)

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks

    @property
    def compute_tier(self) -> str:
        """The tier whose memory the compute device uses."""
        return "device" if self.profile.accelerators else "cpu"

    @property
    def sequences(self) -> float:
        """Sequences of a step, on one rank."""
        return self.micro_batch_size * self.micro_batches


@dataclass(frozen=True)
class Needs:
    """What one host needs: bytes by tier and by what they are for, and how much of each tier may be used."""

    terms: Mapping[str, Mapping[str, float]]
    may_use: Mapping[str, float]
    tiles: int
    """Of the largest matrix; 0 if blocks are computed whole."""
    chunk_params: float
    """How many parameters of an update may be under way at once, on one rank."""

    def total(self, tier: str) -> float:
        """Bytes that a host needs on a tier."""
        return sum(self.terms[tier].values())

    @property
    def missing(self) -> dict[str, float]:
        """Bytes that do not fit, by tier."""
        short = {tier: self.total(tier) - self.may_use[tier] for tier in TIERS}
        return {tier: num_bytes for tier, num_bytes in short.items() if num_bytes > 0}


def capacity(profile: Profile, ranks: int) -> dict[str, float]:
    """Bytes that a host has, by tier."""
    return {"device": profile.device_memory * ranks, "cpu": profile.cpu_memory, "nvme": profile.drives.space}


def class_bytes(scenario: Scenario, per_sweep: int) -> dict[str, float]:
    """Bytes of the model states and activations on one host, by class."""
    model, strategy = scenario.model, STRATEGIES[scenario.strategy]
    sizes = {
        state: model.params * size * (scenario.ranks if state in strategy.replicated else 1 / scenario.hosts)
        for state, size in scenario.bytes_per_param.items()
    }
    sizes["activations"] = model.checkpoint_bytes(scenario.micro_batch_size * per_sweep) * scenario.ranks
    return sizes


def needs_of(scenario: Scenario, placement: Mapping[str, str], per_sweep: int) -> Needs:
    """What `placement` takes: with as large parts of blocks, and then as large update buffers, as fit."""
    model, ranks, compute = scenario.model, scenario.ranks, scenario.compute_tier
    held = _zero_tiers()
    for state, num_bytes in class_bytes(scenario, per_sweep).items():
        held[placement[state] if placement[state] != "device" else compute][state] = num_bytes
    held["cpu"]["framework"] = host_bytes(ranks, SHARED_BYTES) + ranks * (PROCESS_BYTES + churn_bytes(per_sweep))
    if compute == "device":
        held["device"]["context"] = ranks * CONTEXT_BYTES
    sequences = scenario.micro_batch_size
    held[compute]["compute"] = ranks * (
        model.activation_working_bytes(sequences) + sequences * model.seq_len * model.vocab * LOGIT_BYTES
    )
    may_use = {tier: num_bytes * MEMORY_SHARE for tier, num_bytes in capacity(scenario.profile, ranks).items()}
    may_use["nvme"] = scenario.profile.drives.may_use
    room = may_use[compute] - sum(held[compute].values())
    if STRATEGIES[scenario.strategy].cuts:
        part, tiles = largest_part(model, room / ranks / 2 / PART_BYTES)
        held[compute]["buffers"] = ranks * 2 * part * PART_BYTES
    else:
        part, tiles = model.block_params, 0
        held[compute]["matrix"] = ranks * model.state_working_bytes
    if compute == "device" and "nvme" in placement.values():
        # drives reach an accelerator through CPU memory: two parts on their way, in slices
        held["cpu"]["staging"] = 2 * part * scenario.bytes_per_param["params"]
    slice_params = model.block_params / scenario.world_size
    chunk_params = 0.0
    if placement["optimizer"] not in (compute, "device"):
        each = scenario.bytes_per_param["optimizer"]
        left = (may_use[compute] - sum(held[compute].values())) / ranks / each
        chunk_params = max(min(2 * slice_params, left), slice_params / 64)
        held[compute]["update_buffers"] = ranks * chunk_params * each
    if scenario.profile.one_pool:
        held["cpu"]["device"] = sum(held["device"].values())
    return Needs(held, may_use, tiles, chunk_params or 2 * slice_params)


def largest_part(model: Transformer, most: float) -> tuple[int, int]:
    """(parameters, tiles of the largest matrix) of the largest part of at most `most` parameters; 0 tiles: a block.

    The engine cuts a block into its matrices, and these into tiles of rows. The largest matrix is hidden × 4 hidden. A
    tile has LEAST_PART parameters or one row at least.
    """
    if model.block_params <= most:
        return model.block_params, 0
    rows, row = model.hidden, 4 * model.hidden
    count = min(rows, math.ceil(rows * row / max(most, LEAST_PART)))
    each = max(1, min(math.ceil(rows / count), int(max(most, LEAST_PART) // row)))
    return each * row, math.ceil(rows / each)


def _zero_tiers() -> dict[str, dict[str, float]]:
    return {tier: {} for tier in TIERS}
