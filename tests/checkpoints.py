"""An engine's checkpoint in a run's folder, and the engine that goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from plain import open_engine
from tiny_models import random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.models.model import ModelSource
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position
from zinf_cli.train.resume import plain

RECIPE = plain(Recipe.model_validate({"model": {"config": {"model_type": "llama"}}, "dataset": {"path": __file__}}))
"""Of a checkpoint that is exported. Its text only has to be there."""


def save(engine: Engine, run_dir: Path, step: int, keep: int | None = None) -> Path:
    """A checkpoint of `engine` in the folder of a run."""
    files = [("config.json", b'{"model_type": "llama"}')]
    writer = CheckpointWriter(run_dir, engine, Ranks(), lambda: iter(files), keep)
    writer.write(Position(step, "fp32", step * 3, "text", None, {"seed": 0}))
    return folders.step_folder(run_dir, step)


def resumed(folder: Path, name: str, options: EngineOptions, **more: Any) -> Engine:
    """An engine whose own weights are others, with the state of a checkpoint."""
    return resumed_from(folder, random_source(name, seed=1), options, **more)


def resumed_from(folder: Path, source: ModelSource, options: EngineOptions, **more: Any) -> Engine:
    """An engine of `source` with the state of a checkpoint."""
    engine = open_engine(source, options, **more)
    reader = CheckpointReader(folder)
    engine.load_state(reader)
    reader.close()
    return engine


def params_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value for number in range(len(engine.units)) for name, value in engine.read_params(number).items()}
