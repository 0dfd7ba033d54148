"""Recipes of tiny models, with text written for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import dataset_for, random_source
from zinf_cli.recipe.recipe import Recipe

CLASSES = ("params", "grads", "optimizer", "activations")


def recipe_of(folder: Path, name: str, tier: str = "nvme", **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"config": random_source(name).config},
            "dataset": dataset_for(name, folder),
            "train": {
                "seq_len": 16, "micro_batch_size": 2, "global_batch_size": 6, "max_steps": 3, **train
            },
            "offload": {**dict.fromkeys(CLASSES, tier), "nvme_path": str(folder / "nvme")},
            "logging": {"tensorboard": False},
            "output_dir": str(folder / "run"),
        }
    )  # fmt: skip
