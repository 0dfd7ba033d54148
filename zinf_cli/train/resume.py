"""Resumes a run: finds the checkpoint, checks that the recipe fits it, and loads its state into the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from zinf_cli.checkpoint.folder import checkpoints_to_resume, set_damaged_aside
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.checkpoint.verify import read_file, verify
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import CheckpointError, DamagedError, UnreadableError, ZinfError
from zinf_cli.models.base_digest import base_digest
from zinf_cli.models.checkpoint_reader import CheckpointReader, check_params, load_buffers_of
from zinf_cli.models.model_files import CONFIG, config_of
from zinf_cli.recipe.batch import sequences_per_step
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.told import Tell, nobody
from zinf_cli.train.evaluation import Standing
from zinf_cli.train.setup import Text, model_source

_FIXED = ("seed", "train.seq_len", "dataset.shuffle")
"""Keys that decide a step's place in the text and its random numbers."""
_ADAPTER = tuple(f"adapter.{key}" for key in ("type", "r", "target_modules", "target_parameters", "modules_to_save"))
"""Keys that decide which parameters an adapter has."""
_BASE_DTYPE = "model.base_dtype"
_OF_NO_ACCOUNT = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
"""Entries of a config.json that do not change what a model computes here."""

_WHOLE, _DAMAGED, _UNREADABLE = 0, 1, 2
"""What a rank has found a checkpoint to be."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or after the state of a checkpoint."""

    folder: Path | None = None
    step: int = 0
    sequences: int = 0
    """Sequences that have been trained on."""
    loss_scale: tuple[float, int] | None = None
    """The loss scale and its finite steps, in fp16."""
    held_out: Standing | None = None
    """What the evaluations have come to. None if the checkpoint is of another run, or of none."""


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a manifest stores it."""
    tree: dict[str, Any] = yaml.safe_load(dump_recipe(recipe))
    return tree


def newest_manifest(recipe: Recipe, model: nn.Module, text: Text) -> Manifest | None:
    """The manifest of the checkpoint that a run would go on from. None if the run begins at step 0.

    Only small files are read, so the checkpoint's state may still turn out to be damaged. CheckpointError if the recipe
    does not fit the checkpoint.
    """
    problem: ZinfError | None = None
    for folder in checkpoints_to_resume(recipe.output_dir, recipe.checkpoint.resume):
        try:
            manifest = Manifest.load(folder)
            check_recipe(folder, manifest, recipe, model, text)
        except (DamagedError, UnreadableError) as error:
            problem = problem or error
        else:
            return manifest
    if problem is not None:
        raise problem
    return None


def check_recipe(folder: Path, manifest: Manifest, recipe: Recipe, model: nn.Module, text: Text) -> None:
    """Raise a CheckpointError that names the keys, if a recipe does not fit a checkpoint.

    These may change: the length of the run, batch sizes, the optimizer's settings, placement, precision and ranks.
    """
    before, now = (dict(_leaves(tree)) for tree in (manifest.recipe, plain(recipe)))
    before.setdefault(_BASE_DTYPE, "auto")
    adapted = recipe.adapter.type is not None
    fixed = (*_FIXED, *((*_ADAPTER, _BASE_DTYPE) if adapted or manifest.base is not None else ()))
    problems = [f"{key} was {before.get(key)}, is {now[key]}" for key in fixed if before.get(key) != now[key]]
    if adapted and manifest.base is not None and manifest.base != base_digest(recipe.model.folder):
        problems.append(f"the weights in {recipe.model.name_or_path} are not those that the adapter was trained on")
    stored, wanted = json.loads(read_file(folder, manifest, CONFIG)), json.loads(config_of(model_source(recipe), model))
    problems += [
        f"model.config.{key} was {stored.get(key)}, is {wanted.get(key)}"
        for key in sorted((stored.keys() | wanted.keys()) - _OF_NO_ACCOUNT)
        if stored.get(key) != wanted.get(key)
    ]
    if manifest.text != text.train.fingerprint:
        keys = [key for key in now if key.startswith("dataset.") and before.get(key) != now[key]]
        problems.append(f"{', '.join(keys) or 'dataset.path'}: the text is another one")
    if problems:
        raise CheckpointError(
            f"the recipe does not go on from step {manifest.step}: {'; '.join(problems)}",
            where=str(folder),
            hint="put these keys back, or begin anew with checkpoint.resume=never or another output_dir",
        )


def changed_keys(manifest: Manifest, recipe: Recipe) -> list[str]:
    """Keys of the recipe that have changed since the checkpoint and may change the run's numbers."""
    before, now = (dict(_leaves(tree)) for tree in (manifest.recipe, plain(recipe)))
    sections = ("train", "optimizer", "lr_scheduler", "adapter")
    return [key for key in now if key.split(".")[0] in sections and before.get(key) != now[key]]


def _sequences(manifest: Manifest) -> int:
    """The global batch of the run that wrote a checkpoint."""
    train = manifest.recipe["train"]
    micro, accumulated = train["micro_batch_size"], train["gradient_accumulation_steps"]
    if "global_batch_size" not in train:  # the accumulation was that of all ranks together
        return int(micro * accumulated)
    return sequences_per_step(micro, accumulated, train["global_batch_size"], manifest.world_size)


def resume(
    recipe: Recipe,
    engine: Engine,
    model: nn.Module,
    text: Text,
    ranks: Ranks,
    notice: Callable[[str], None],
    told: Tell = nobody,
) -> Start:
    """Load the newest checkpoint that is whole on every rank. If the run has no checkpoints, do nothing.

    `told` gets the share of a checkpoint that is loaded. On every rank, `notice` is told of each checkpoint that is not
    whole, and of keys that have changed. Damaged checkpoints are set aside; those that a drive can't read stay.
    CheckpointError if none is whole or the recipe does not fit. UnreadableError if none is whole, and some can't be
    read.
    """
    candidates = checkpoints_to_resume(recipe.output_dir, recipe.checkpoint.resume)
    damaged: list[Path] = []
    for folder in candidates:
        problem, state = None, _WHOLE
        try:
            manifest = _load(folder, recipe, engine, model, text, told)
        except (DamagedError, UnreadableError) as error:
            problem, state = error.line(), _DAMAGED if isinstance(error, DamagedError) else _UNREADABLE
        states = ranks.all(state)
        if not any(states):
            if damaged and ranks.rank == 0:
                try:
                    set_damaged_aside(recipe.output_dir, damaged)
                except (OSError, UnreadableError) as error:
                    notice(f"damaged checkpoints stay where they are: {error}")
            if changed := changed_keys(manifest, recipe):
                notice(f"resumed with another {', '.join(changed)}")
            before, now = _sequences(manifest), recipe.train.sequences_per_step(ranks.world_size)
            if before != now:
                notice(f"resumed with {now} sequences a step, {before} before")
            own = folder.resolve().parent.parent == recipe.output_dir.resolve()
            standing = Standing(**manifest.held_out) if own and manifest.held_out is not None else None
            return Start(folder, manifest.step, manifest.sequences, manifest.loss_scale, standing)
        if problem is None:
            found = next((f"{v.name} is {v.problem}" for v in verify(folder) if v.problem), "no longer")
            problem = f"{folder}: {found} (found by rank {next(rank for rank, flag in enumerate(states) if flag)})"
        notice(f"not resumed from {folder.name}: {problem}")
        damaged += [folder] * (_UNREADABLE not in states)
    if candidates and len(damaged) < len(candidates):
        raise UnreadableError(
            "none of the run's checkpoints can be read",
            where=str(candidates[0].parent),
            hint="nothing of them was moved: look at the drive, then start again",
        )
    if candidates:
        raise CheckpointError(
            "none of the run's checkpoints is whole",
            where=str(candidates[0].parent),
            hint="zinf doctor CHECKPOINT says what is wrong; checkpoint.resume=never begins anew",
        )
    return Start()


def _load(folder: Path, recipe: Recipe, engine: Engine, model: nn.Module, text: Text, told: Tell) -> Manifest:
    reader = CheckpointReader(folder)
    try:
        check_recipe(folder, reader.manifest, recipe, model, text)
        check_params(reader, model)
        engine.load_state(reader, told)
        engine.restore_places(load_buffers_of(folder, model))
    finally:
        reader.close()
    return reader.manifest


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
