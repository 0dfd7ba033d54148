"""A run that is killed again and again, and resumed each time, against one that never was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from forked_ranks import ForkedRanks
from tiny_models import CONFIGS
from zinf_cli.checkpoint.folder import checkpoints_of
from zinf_cli.checkpoint.manifest import Manifest

WARMUP = {"warmup_steps": 20}
NVME = {"params": "nvme", "grads": "nvme", "optimizer": "nvme", "activations": "nvme"}


@dataclass(frozen=True)
class TinyRun:
    """A recipe of a tiny llama with dropout, and what its run has left."""

    folder: Path

    @classmethod
    def write(cls, folder: Path, steps: int, **changes: Any) -> TinyRun:
        """`changes` override sections of the recipe."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "tokens.npy", np.arange(4000) * 7 % 91 + 3)
        recipe: dict[str, Any] = {
            "model": {"config": {"model_type": "llama", **CONFIGS["llama"], "attention_dropout": 0.1}},
            "dataset": {"path": str(folder / "tokens.npy")},
            "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 6, "max_steps": steps},
            "optimizer": {"lr": 1e-2},
            "lr_scheduler": {"name": "constant"},
            "offload": {**NVME, "nvme_path": str(folder / "nvme")},
            "checkpoint": {"interval": 2, "keep_latest_k": 2},
            "logging": {"tensorboard": False, "report": False},
            "output_dir": str(folder / "run"),
        }
        for section, content in changes.items():
            recipe[section] = {**recipe.get(section, {}), **content}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return cls(folder)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def log(self) -> str:
        return (self.run_dir / "logs" / "forked.log").read_text()

    @property
    def trajectory(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of every step."""
        lines = map(json.loads, (self.run_dir / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]

    @property
    def newest(self) -> Manifest:
        return Manifest.load(checkpoints_of(self.run_dir)[0])

    @property
    def state(self) -> dict[str, Any]:
        """The checksums of all state in the newest checkpoint, and what goes with it."""
        manifest = self.newest
        files = {name: file for name, file in manifest.files.items() if name.endswith(".safetensors")}
        return {**files, "units": manifest.units, "step": manifest.step, "sequences": manifest.sequences}


def random_kill(rng: random.Random, ranks: int) -> dict[str, Any]:
    """A moment: some time after the start, or somewhere inside the writing of a checkpoint."""
    if rng.random() < 0.3:
        return {"after_s": rng.uniform(0.1, 1.0)}
    rank = rng.randrange(ranks)
    most = {"posix_fallocate": 4, "pwritev": 40, "fsync": 16, "rename": 6, "unlink": 6, "symlink": 3, "rmdir": 3}
    if rank > 0:  # it writes its own file and nothing else
        most = {"posix_fallocate": 4, "pwritev": 40, "fsync": 3}
    call = rng.choice(sorted(most))
    return {"rank": rank, "call": call, "nth": rng.randint(1, most[call]), "before": rng.random() < 0.5}


def endless(folder: Path) -> TinyRun:
    """A run that is to be killed before it is done."""
    return TinyRun.write(folder, 100_000, lr_scheduler=WARMUP)


def assert_survives(forked: ForkedRanks, folder: Path, ranks: int, kills: int, seed: int) -> None:
    """Killed `kills` times, a run ends with the bits of one that was not."""
    broken = endless(folder / "broken")
    rng = random.Random(seed)
    for _ in range(kills):
        before = checkpoints_of(broken.run_dir)
        codes = forked.run(broken.recipe, ranks, kill=random_kill(rng, ranks))
        assert codes == [-9] * ranks, broken.log
        assert not before or checkpoints_of(broken.run_dir), "a kill costs no checkpoint"
    assert_ends_unharmed(broken, lambda run: forked.run(run.recipe, ranks) == [0] * ranks)


def assert_ends_unharmed(broken: TinyRun, runs: Callable[[TinyRun], bool]) -> None:
    """From its newest checkpoint a run ends with the bits of one that was never killed; `runs` runs it to its end."""
    reached = broken.newest.step if checkpoints_of(broken.run_dir) else 0  # all kills may have come before the first
    steps = reached + 3
    folder = broken.folder.parent
    assert runs(TinyRun.write(broken.folder, steps, lr_scheduler=WARMUP))
    assert runs(unbroken := TinyRun.write(folder / "unbroken", steps, lr_scheduler=WARMUP))
    assert broken.trajectory == unbroken.trajectory
    assert broken.state == unbroken.state
    assert len(checkpoints_of(broken.run_dir)) == 2
