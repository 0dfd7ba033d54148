"""`python -m benchmarks.accelerator`: the accelerator of this machine, or its CPU, as a line of JSON.

This runs in a process of its own: a process that has asked a GPU for something holds memory of it until it ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Accelerator:
    name: str | None
    """None where the CPU computes."""
    free_bytes: int
    """Of its memory; 0 where the CPU computes."""
    matmul_flops: float
    """FLOP/s of a large matrix product, in the dtype that `precision: auto` computes in."""


def find_accelerator() -> Accelerator:
    done = subprocess.run([sys.executable, "-m", "benchmarks.accelerator"], stdout=subprocess.PIPE, check=True)
    return Accelerator(**json.loads(done.stdout))


def _look() -> Accelerator:
    if not torch.cuda.is_available():
        return Accelerator(None, 0, _matmul_flops(torch.device("cpu"), 1024, torch.float32, calls=2))
    device = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info(device)
    return Accelerator(torch.cuda.get_device_name(device), free, _matmul_flops(device, 8192, torch.bfloat16, calls=10))


def _matmul_flops(device: torch.device, size: int, dtype: torch.dtype, calls: int) -> float:
    """The best of five rounds of `calls` products that are queued at once."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    into = torch.empty_like(a)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(a, b, out=into)
        into[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * calls / best


if __name__ == "__main__":
    print(json.dumps(asdict(_look())))
