"""What an engine is told of tiers and memory, and what it opens for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.errors import ZinfError
from zinf_cli.model_state import CHUNK_NUMEL, FP32_BYTES
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.memory import MemoryTier
from zinf_cli.tiers.nvme import STRIPE, NvmeTier
from zinf_cli.tiers.tier import Tier
from zinf_cli.trace import Trace

CPU = torch.device("cpu")


@dataclass(frozen=True)
class EngineOptions:
    """Where state lies, and how much memory the engine works in, per rank. Sizes are in bytes."""

    params: str = "cpu"
    grads: str = "cpu"
    optimizer: str = "cpu"
    activations: str = "cpu"
    """The tier of each class of state: "device", "cpu" or "nvme"."""
    cached_units: frozenset[int] = frozenset()
    cached_states: frozenset[str] = frozenset()
    cache_tier: str = "cpu"
    """Of `cached_units`, the classes `cached_states` lie there, whatever the tier of the class."""
    nvme_folders: tuple[Path, ...] = ()
    nvme_bytes: int = 0
    """Space taken on the drives at the start."""
    nvme_readers: int = 2
    nvme_writers: int = 2
    """Threads per folder."""
    nvme_block_bytes: int = STRIPE
    """Bytes of one transfer."""
    nvme_verify: bool = True
    """Whether to compare what drives give with what was written to them."""
    slot_bytes: int = 0
    resident_bytes: int = 0
    chunk_numel: int = CHUNK_NUMEL
    """Elements of an update's chunk: whole pieces of state (CHUNK_NUMEL), or fewer where no slice is as wide."""
    num_chunks: int = 8
    staging_bytes: int = 0
    """Memory through which activations go to another tier than the compute device's."""
    pin_memory: bool = True
    """Whether to page-lock CPU memory that an accelerator copies from and to."""
    device: torch.device = CPU
    micro_batches_per_sweep: int | None = None
    """None stands for all of a step."""
    kept_units: frozenset[int] = frozenset()
    """Units whose activations are kept for backward instead of being recomputed."""
    staying_units: frozenset[int] = frozenset()
    """Units whose inputs, and what autograd saves before them, stay in memory of the compute device."""
    glue_leaves: bool = False
    """Whether what autograd saves between units goes to the tier of activations as well."""
    spared: frozenset[str] = frozenset()
    """Names of Linears whose products a recompute leaves out (compute/spared.py)."""
    speculate: bool = False
    """Whether units that are not cached have shadows for speculative updates (see eager.py)."""
    clips_worth: float = 0.5
    """The share of steps that clip below which these updates pay (see clips.py)."""

    @property
    def placement(self) -> tuple[str, str, str, str]:
        """The tiers of the classes, in the order of TierSet."""
        return self.params, self.grads, self.optimizer, self.activations


def open_tiers(options: EngineOptions, trace: Trace, rank: int, notice: Callable[[str], None]) -> dict[str, Tier]:
    """The tiers that the options name, by name. CapacityError if a drive has no room for `nvme_bytes`.

    `notice` is told what a tier can't have as asked, such as direct I/O or page-locked memory.
    """
    opened: dict[str, Tier] = {}
    for name in (*options.placement, *([options.cache_tier] if options.cached_states else [])):
        if name in opened:
            continue
        if name == "nvme":
            tier = NvmeTier(
                options.nvme_folders,
                trace,
                rank=rank,
                readers=options.nvme_readers,
                writers=options.nvme_writers,
                block_bytes=options.nvme_block_bytes,
                verify=options.nvme_verify,
                notice=notice,
            )
            try:
                tier.reserve(options.nvme_bytes)
            except ZinfError:
                tier.close()
                raise
            opened[name] = tier
        else:
            device = options.device if name == "device" else torch.device("cpu")
            opened[name] = MemoryTier(name, device, options.device, trace, pin=options.pin_memory, notice=notice)
    return opened


def open_memory(options: EngineOptions) -> Memory:
    """The arenas on the compute device out of which fetches and updates take their buffers."""
    device = options.device
    return Memory(
        slots=Arena(options.slot_bytes, device),
        resident=Arena(options.resident_bytes, device),
        chunks=Arena(options.num_chunks * options.chunk_numel * FP32_BYTES, device),
        chunk_numel=options.chunk_numel,
    )
