"""`python -m benchmarks.gpu`: zinf on an accelerator, its state off it, against the matmul ceiling of the same minute.

Without an accelerator it runs in its smallest form on the CPU, so that it is known to run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.contenders import WARM_UP, environment, launch_command
from benchmarks.results import add_save, report

STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description="zinf on an accelerator beside its matrix products.")
    add_save(parser)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    cases = [Case(count, 2048, model) for model in ("3B", "8B") for count in (1, 4, 16)] if cuda else [Case(1, 16)]
    ceiling = matmul_flops(torch.device("cuda" if cuda else "cpu"))
    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="runs")).absolute()
    try:
        for case in cases:
            found = {tier: run(case, tier, folder) for tier in ("cpu", "nvme")}
            rows = [_row(tier, steps, ceiling) for tier, steps in found.items()]
            report(str(case), rows, arguments.save, f"matrix products: {ceiling / 1e12:.3g} TFLOP/s", found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _row(tier: str, steps: list[dict[str, Any]] | None, ceiling: float) -> dict[str, Any]:
    """Medians of the steps; the tier alone where the run failed."""
    if steps is None:
        return {"states_on": f"{tier}: failed"}
    flops = median(steps, "tflops_per_rank") * 1e12
    return {
        "states_on": tier,
        "step_s": median(steps, "step_s"),
        "tokens_per_second": median(steps, "tokens_per_s"),
        "TFLOP/s": flops / 1e12,
        "of_matmul_share": flops / ceiling,
        "device_memory_bytes": steps[-1].get("gpu_mem_bytes"),
        "waiting_share": median(steps, "wait_s") / median(steps, "step_s"),
    }


def run(case: Case, tier: str, folder: Path) -> list[dict[str, Any]] | None:
    """The metrics of the steps after the first; None, and the error on the screen, where the run failed."""
    command, run_dir = launch_command(case, tier, STEPS + WARM_UP, folder)
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{case} on {tier}: {done.stderr[-2000:]}")
        return None
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM_UP:]


def median(steps: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(step[key] for step in steps))


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large matrix product in the dtype that `precision: auto` computes in, best of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
