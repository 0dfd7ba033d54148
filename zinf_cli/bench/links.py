"""`python -m zinf_cli.bench.links RUN_DIR PART`, started by torchrun: what one rank measures of its machine.

PART is "alone" (matrix products, a block's pass, AdamW, copies of one accelerator) or "together" (copies of all
accelerators at once, the all-gather between them). The last line of rank 0 is JSON, in the words of profile_file.Links.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from zinf_cli.bench.block import Block, pass_over
from zinf_cli.engine.precision import DTYPES
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.machine.control_groups import cores_here
from zinf_cli.tiers.streams import streams_of
from zinf_cli.trace import Trace

ROWS = {"cpu": (16, 64, 256), "cuda": (256, 1024, 4096, 16384)}
"""Tokens of a micro-batch."""
HIDDEN = {"cpu": 1024, "cuda": 4096}
PRECISIONS = {"cpu": ("fp32",), "cuda": ("bf16", "fp16", "fp32")}
BLOCKS, MICRO_BATCHES = 2, 4
"""Of a timed pass: weights come from memory, as in a sweep, and serve several micro-batches."""
UPDATE_NUMEL = 1 << 23
COPY_BYTES = 1 << 28
GATHER_BYTES = 1 << 26
ROUNDS = 3
"""Of everything in turn."""
SECONDS = 0.3
"""What is timed at once, at least. The mean counts: a run, too, has its share of what else the machine does."""
ENOUGH_S = 0.3
"""A first call that takes so long has one more behind it, and no others."""


def measure_alone() -> dict[str, Any]:
    """Of one rank with the machine to itself."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "accelerators": torch.cuda.device_count(),
        "cpu_memory": psutil.virtual_memory().total,
        **_mean([_rates(device) for _ in range(ROUNDS)]),
    }
    if device.type == "cuda":
        found["device_memory"] = torch.cuda.get_device_properties(device).total_memory
    return found


def _mean(found: Sequence[Any]) -> Any:
    """Of rates, in documents of one form: the harmonic mean, that of the time they stand for."""
    if isinstance(found[0], dict):
        return {key: _mean([each[key] for each in found]) for key in found[0]}
    return statistics.harmonic_mean(found)


def _rates(device: torch.device) -> dict[str, Any]:
    """A round."""
    kinds = {"matmul": _linear_rate, "block": _rate_of_blocks}
    found: dict[str, Any] = {
        name: {
            precision: {rows: rate(rows, precision, device) for rows in ROWS[device.type]}
            for precision in PRECISIONS[device.type]
        }
        for name, rate in kinds.items()
    }
    found["adamw"] = _adamw_rate()
    if device.type == "cuda":
        found["device_bandwidth"] = _device_bandwidth(device)
        found["copy_alone"] = found["copy_host"] = _copy_rate(device)
    return found


def measure_together() -> dict[str, Any]:
    """Of all ranks at once."""
    cuda = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        streams_of(device).set_device(device)
    ranks = Ranks.join(device)
    flat = torch.zeros(GATHER_BYTES // 4, device=device)
    own = flat.view(ranks.world_size, -1)[ranks.rank]
    trace = Trace()

    def gather() -> None:
        ranks.gather(flat, own, trace, "bench").wait()
        dist.barrier()

    others = (ranks.world_size - 1) / ranks.world_size
    found: dict[str, Any] = {"collective": GATHER_BYTES * others / _seconds(gather, device, times=9)}
    if cuda:
        dist.barrier()
        rates = ranks.all(round(_copy_rate(device)))
        found["copy_host"] = sum(rates)
    ranks.leave()
    return found


def _linear_rate(rows: int, precision: str, device: torch.device) -> float:
    """FLOP/s of a linear layer: forward, and the gradients of its input and of its weight."""
    hidden = HIDDEN[device.type]
    weight = torch.randn(hidden, 4 * hidden, device=device, dtype=DTYPES[precision])
    x = torch.randn(rows, hidden, device=device, dtype=DTYPES[precision])
    y = x @ weight

    def products() -> None:
        torch.mm(x, weight)
        torch.mm(y, weight.T)
        torch.mm(x.T, y)

    return 3 * 2 * rows * weight.numel() / _seconds(products, device)


def _rate_of_blocks(rows: int, precision: str, device: torch.device) -> float:
    """FLOP/s of a transformer block's forward, recomputed forward and backward."""
    return block_rate(_blocks(precision, device), rows, MICRO_BATCHES)


@lru_cache(maxsize=1)
def _blocks(precision: str, device: torch.device) -> list[Block]:
    kind = device.type
    return [Block(HIDDEN[kind], max(ROWS[kind]), device=device, dtype=DTYPES[precision]) for _ in range(BLOCKS)]


def block_rate(blocks: Sequence[Block], rows: int, micro_batches: int) -> float:
    """FLOP/s of `micro_batches` of `rows` tokens on each of `blocks` in turn, with recomputation."""
    weight = blocks[0].down.weight  # hidden x inner
    batches = [
        torch.randn(1, rows, len(weight), requires_grad=True, device=weight.device, dtype=weight.dtype)
        for _ in range(micro_batches)
    ]
    flops: float = 4 * len(blocks) * micro_batches * blocks[0].flops(rows)
    return flops / _seconds(lambda: pass_over(blocks, batches), weight.device)


def _adamw_rate() -> float:
    """Parameters per second of the engine's AdamW on all cores of the CPU."""
    kernel: Kernel = AdamW(lr=1e-3, clip=torch.tensor(1.0))
    tensors = [torch.rand(UPDATE_NUMEL) for _ in ("param", "grad", *kernel.state.fields)]
    return UPDATE_NUMEL / _seconds(lambda: kernel.update(*tensors, 2), torch.device("cpu"))


def _copy_rate(device: torch.device) -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    into = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    return COPY_BYTES / _seconds(lambda: into.copy_(source, non_blocking=True), device)


def _device_bandwidth(device: torch.device) -> float:
    """Read and written bytes per second."""
    a, b = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPY_BYTES / _seconds(lambda: a.copy_(b), device)


def _seconds(work: Callable[[], Any], device: torch.device, times: int | None = None) -> float:
    """What one call takes; `times` fixes the number of calls, which ranks have to agree on.

    The first call does not count: it loads kernels and takes memory, on an accelerator for longer than it computes.
    """

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        streams_of(device).synchronize(device)
        return time.perf_counter() - start

    once = timed(1)
    if times is not None:
        return timed(times) / times
    if once > ENOUGH_S:
        return timed(1)
    calls, took = 0, 0.0
    while took < SECONDS:  # not as often as the first call promises: on a busy machine that may be 100 times too often
        more = max(1, calls)
        took += timed(more)
        calls += more
    return took / calls


def measure(run_dir: Path, part: str) -> int:
    """The life of a rank: measure "alone" or "together", and have rank 0 print what was found."""
    torch.set_num_threads(max(1, cores_here() // int(os.environ["LOCAL_WORLD_SIZE"])))
    found = measure_alone() if part == "alone" else measure_together()
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
    return 0
