"""A recipe of a tiny llama that tests launch as a user does: on this machine, on hosts, on hosts that share nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from forked_ranks import ForkedRanks
from lab import Lab
from tiny_models import CONFIGS

ZINF = [sys.executable, "-m", "zinf_cli.cli"]
NVME = {"params": "nvme", "grads": "nvme", "optimizer": "nvme", "activations": "nvme"}


@dataclass
class Ended:
    """A command that is over."""

    code: int
    out: str
    err: str
    run_dir: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics if "loss" in line]

    @property
    def summary(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return document

    @property
    def message(self) -> str:
        """What stands after "error: "."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert lines, self.err
        return "\n".join(lines)


class Workshop:
    """A folder with a recipe of a tiny llama and its text; `launch` runs it with changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nvme = folder / "nvme"
        self.recipe = folder / "tiny.yaml"
        np.save(folder / "tokens.npy", np.arange(4000) * 7 % 91 + 3)
        self.content: dict[str, Any] = {
            "model": {"config": {"model_type": "llama", **CONFIGS["llama"]}},
            "dataset": {"path": str(folder / "tokens.npy"), "eval_fraction": 0.1},
            "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 6, "max_steps": 4},
            "optimizer": {"lr": 1e-2},
            "offload": {**NVME, "nvme_path": str(self.nvme)},
            "logging": {"tensorboard": False, "report": False},
        }

    def write(self) -> None:
        self.recipe.write_text(yaml.safe_dump(self.content))

    def command(self, *arguments: str) -> list[str]:
        self.write()
        return [*ZINF, "launch", str(self.recipe), f"output_dir={self.folder / 'run'}", *arguments]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), "COLUMNS": "100"}

    def fork(self, forked: ForkedRanks, name: str, *changes: str, ranks: int = 1, most: int | None = None) -> Ended:
        """A run without a launcher, in the folder `name`: where it is its losses that count. `err` is its log.

        With `most`, the model is cut into parts of so many elements.
        """
        self.write()
        run_dir = self.folder / name
        codes = forked.run(self.recipe, ranks, [f"output_dir={run_dir}", *changes], most=most)
        ended = Ended(next(filter(None, codes), 0), "", (run_dir / "logs" / "forked.log").read_text(), run_dir)
        assert ended.code == 0, ended.err
        return ended

    def launch(self, *arguments: str) -> Ended:
        process = self.start(*arguments)
        return self.end(process)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, process: subprocess.Popen[str]) -> Ended:
        out, err = process.communicate(timeout=120)
        return Ended(process.returncode, out, err, self.folder / "run")

    def left_behind(self) -> list[str]:
        """Processes of a run in this folder, and files on its drives."""
        alive = [" ".join(process.cmdline()) for process in self.processes()]
        return alive + [str(path) for path in self.nvme.rglob("*")]

    def end_all(self) -> None:
        """Kill what a test has left running: one that failed, if left_behind() was to be empty."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """What runs in this folder: the launcher and all that it has started."""
        cache, found = self.environment()["XDG_CACHE_HOME"], []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("XDG_CACHE_HOME") == cache:
                    found.append(process)
        return found


class FarWorkshop(Workshop):
    """A workshop whose recipe is launched on the hosts of a lab."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        super().__init__(folder)
        self.lab = lab

    def command(self, *arguments: str) -> list[str]:
        self.write()
        return self.lab.zinf("launch", str(self.recipe), f"output_dir={self.run_dir}", *arguments)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def environment(self) -> dict[str, str]:
        return self.lab.environment

    def left_behind(self) -> list[str]:
        return self.lab.left_behind()


class ApartWorkshop(FarWorkshop):
    """The hosts share nothing: the run's folder and the drives are each one's own."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        super().__init__(folder, lab)
        self.nvme = folder / "local" / "nvme"
        self.content["offload"]["nvme_path"] = str(self.nvme)

    @property
    def run_dir(self) -> Path:
        return self.folder / "local" / "run"

    def end(self, process: subprocess.Popen[str]) -> Ended:
        ended = super().end(process)
        return Ended(ended.code, ended.out, ended.err, self.run_dir)


def wait_for_steps(run: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)
