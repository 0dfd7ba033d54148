"""`python -m benchmarks.verify`: what comparing checksums costs a step, all state on NVMe.

Runs with offload.verify on and off take turns, so that a moment that is slow for one is likely slow for the other. The
first step of a run is left out; each pair's median steps are compared. The losses must be the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.contenders import environment, launch_command
from benchmarks.results import add_save, report
from benchmarks.run import CASES


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps with checksums beside steps without.")
    parser.add_argument("--cases", nargs="*", default=["8x16", "8x16-never-clips"], choices=CASES)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the drive is")
    add_save(parser)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases:
        pairs = []
        for pair in range(arguments.pairs):
            order = ("on", "off") if pair % 2 else ("off", "on")
            found = {verify: _run(name, verify, arguments.steps, arguments.folder) for verify in order}
            assert found["on"][0] == found["off"][0], "checksums must change no loss"
            pairs.append({verify: seconds for verify, (_, seconds) in found.items()})
        ratios = [pair["on"] / pair["off"] for pair in pairs]
        row = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios), "pairs": len(ratios)}
        report(str(CASES[name]), [row], arguments.save, measured=pairs)


def _run(name: str, verify: str, steps: int, parent: Path) -> tuple[list[float], float]:
    """Losses, and seconds of the median step."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent)).absolute()
    try:
        command, run_dir = launch_command(CASES[name], "nvme", steps, folder)
        subprocess.run([*command, f"offload.verify={verify}"], env=environment(folder), check=True, capture_output=True)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [line["loss"] for line in lines], statistics.median(line["step_s"] for line in lines[1:])


if __name__ == "__main__":
    main()
