"""Which trackers a recipe asks for, and whether their libraries are here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from zinf_cli.errors import PreflightError
from zinf_cli.recipe.recipe import Logging, Recipe
from zinf_cli.recipe.recipe_file import values_by_key
from zinf_cli.run_folder.names import TENSORBOARD, WANDB
from zinf_cli.tracking.board import Board
from zinf_cli.tracking.ml_flow import NAME as MLFLOW
from zinf_cli.tracking.ml_flow import MlflowRun
from zinf_cli.tracking.trackers import Open, Tracking
from zinf_cli.tracking.weights_and_biases import WandbRun


def check_trackers(asked: Logging) -> None:
    """PreflightError if the library of one that is asked for is not installed."""
    for name in (WANDB, MLFLOW):
        if getattr(asked, name) is not None and find_spec(name) is None:
            hint = f"pip install 'zinf[{name}]', or leave the key out"
            raise PreflightError(f"{name} is not installed", where=f"logging.{name}", hint=hint)


def tracking_of(recipe: Recipe, run_dir: Path, say: Callable[[str], None]) -> Tracking:
    """Those that the recipe asks for, each opened in its own thread."""
    asked, keys, trackers = recipe.logging, values_by_key(recipe), dict[str, Open]()
    if asked.tensorboard:
        trackers[TENSORBOARD] = partial(Board, run_dir / TENSORBOARD)
    if asked.wandb is not None:
        trackers[WANDB] = partial(WandbRun, run_dir, asked.wandb, keys, say)
    if asked.mlflow is not None:
        trackers[MLFLOW] = partial(MlflowRun, run_dir, asked.mlflow, keys, say)
    return Tracking(trackers, asked.interval, say)
