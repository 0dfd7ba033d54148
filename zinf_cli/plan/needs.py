"""What a transformer takes on each tier of a host, by closed form (sizes.py), and what a host has for it.

A *strategy* says which states every rank holds whole and where they may lie: the systems of ZeRO-Infinity's figure 6a,
of which zinf is the last. Working memory is the paper's: the largest matrix (in tiles where it must be), one block's
activations, and the buffers of an update that streams by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from zinf_cli.machine.profiles import GIB, MEMORY_SHARE, Profile
from zinf_cli.plan.memory import CLASSES, MIB, churn_bytes, host_bytes
from zinf_cli.plan.placement import TIERS
from zinf_cli.plan.sizes import BYTES_PER_PARAM, Transformer

PROCESS_BYTES = 430 * MIB
"""A process that has imported torch and transformers, and has built a model without weights."""
SHARED_BYTES = 100 * MIB
"""Of these, the pages of libraries that all ranks of a host share."""
CONTEXT_BYTES = 3 * GIB // 2
"""CUDA context, libraries and communication buffers of one rank."""
TILES = (1, 2, 4, 8, 16)
"""Into how many pieces the largest matrix may be cut (ZeRO-Infinity, section 5.1.3 and figure 6b)."""
LOGIT_BYTES = 10
"""Of one logit: in the compute precision, in fp32, and its fp32 gradient."""


@dataclass(frozen=True)
class Strategy:
    """`replicated` states are whole on every rank; the others are cut into slices. `tiers` are those it may use."""

    replicated: tuple[str, ...]
    tiers: Mapping[str, tuple[str, ...]]


def _only(**tiers: str) -> dict[str, tuple[str, ...]]:
    return {state: (tier,) for state, tier in tiers.items()}


STRATEGIES: Mapping[str, Strategy] = {
    "infinity": Strategy((), dict.fromkeys(CLASSES, TIERS)),
    "infinity-cpu": Strategy(
        (), {**_only(params="cpu", grads="cpu", optimizer="cpu"), "activations": ("device", "cpu")}
    ),
    "zero-3": Strategy((), _only(params="device", grads="device", optimizer="device", activations="device")),
    "zero-offload": Strategy(("params",), _only(params="device", grads="cpu", optimizer="cpu", activations="device")),
    "data-parallel": Strategy(
        ("params", "grads", "optimizer"),
        _only(params="device", grads="device", optimizer="device", activations="device"),
    ),
}


@dataclass(frozen=True)
class Question:
    """A model on a machine. `micro_batch_size` sequences at once a rank, `micro_batches` of them a step."""

    model: Transformer
    profile: Profile
    hosts: int = 1
    ranks: int = 1
    """Of one host."""
    micro_batch_size: float = 1
    micro_batches: int = 1
    per_sweep: int | None = None
    strategy: str = "infinity"
    pinned: Mapping[str, str] = field(default_factory=dict)
    """Tiers the user asks for."""

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks

    @property
    def compute_tier(self) -> str:
        return "device" if self.profile.accelerators else "cpu"

    @property
    def sequences(self) -> float:
        """Of a step, on one rank."""
        return self.micro_batch_size * self.micro_batches


@dataclass(frozen=True)
class Needs:
    """Bytes by what they are for, on each tier of one host, and what it may fill."""

    terms: Mapping[str, Mapping[str, float]]
    may_use: Mapping[str, float]
    tiles: int
    chunk_params: float
    """Parameters of an update that may be under way at once, on one rank."""

    def total(self, tier: str) -> float:
        return sum(self.terms[tier].values())

    @property
    def missing(self) -> dict[str, float]:
        """Bytes that do not fit, by tier."""
        short = {tier: self.total(tier) - self.may_use[tier] for tier in TIERS}
        return {tier: num_bytes for tier, num_bytes in short.items() if num_bytes > 0}


def capacity(profile: Profile, ranks: int) -> dict[str, float]:
    """Bytes of each tier of a host."""
    return {"device": profile.device_memory * ranks, "cpu": profile.cpu_memory, "nvme": profile.drives.space}


def class_bytes(question: Question, per_sweep: int) -> dict[str, float]:
    """Bytes of each class on one host."""
    model, strategy = question.model, STRATEGIES[question.strategy]
    sizes = {
        state: model.params * size * (question.ranks if state in strategy.replicated else 1 / question.hosts)
        for state, size in BYTES_PER_PARAM.items()
    }
    sizes["activations"] = model.checkpoint_bytes(question.micro_batch_size * per_sweep) * question.ranks
    return sizes


def needs_of(question: Question, placement: Mapping[str, str], per_sweep: int) -> Needs:
    """What `placement` takes; the largest matrix in as few tiles, and update buffers as large, as fit."""
    model, ranks, compute = question.model, question.ranks, question.compute_tier
    held = _zero_tiers()
    for state, num_bytes in class_bytes(question, per_sweep).items():
        held[placement[state] if placement[state] != "device" else compute][state] = num_bytes
    held["cpu"]["framework"] = host_bytes(ranks, SHARED_BYTES) + ranks * (PROCESS_BYTES + churn_bytes(per_sweep))
    if compute == "device":
        held["device"]["context"] = ranks * CONTEXT_BYTES
        if "nvme" in placement.values():
            # drives reach an accelerator through CPU memory: two blocks on their way, in slices
            held["cpu"]["staging"] = 2 * model.block_params * BYTES_PER_PARAM["params"]
    sequences = question.micro_batch_size
    held[compute]["compute"] = ranks * (
        model.activation_working_bytes(sequences) + sequences * model.seq_len * model.vocab * LOGIT_BYTES
    )
    may_use = {tier: num_bytes * MEMORY_SHARE for tier, num_bytes in capacity(question.profile, ranks).items()}
    may_use["nvme"] = question.profile.drives.may_use
    room = may_use[compute] - sum(held[compute].values())
    whole = ranks * model.state_working_bytes
    tiles = next((count for count in TILES if whole / count <= room), TILES[-1])
    held[compute]["matrix"] = whole / tiles
    slice_params = model.block_params / question.world_size
    chunk_params = 0.0
    if placement["optimizer"] not in (compute, "device"):
        left = (room - whole / tiles) / ranks / BYTES_PER_PARAM["optimizer"]
        chunk_params = max(min(2 * slice_params, left), slice_params / 64)
        held[compute]["update_buffers"] = ranks * chunk_params * BYTES_PER_PARAM["optimizer"]
    return Needs(held, may_use, tiles, chunk_params or 2 * slice_params)


def _zero_tiers() -> dict[str, dict[str, float]]:
    return {tier: {} for tier in TIERS}
