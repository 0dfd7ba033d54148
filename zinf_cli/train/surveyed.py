"""Surveys a recipe's model: on the meta device, or else on the run's first micro-batch, or else by a guess."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from zinf_cli.batches.collator import Batch, Sample
from zinf_cli.batches.mixture import MixedStream
from zinf_cli.batches.pictured import PicturedStream
from zinf_cli.engine.compute.meta_answers import packed_positions
from zinf_cli.engine.compute.survey import Survey, survey
from zinf_cli.engine.compute.trial import Trial
from zinf_cli.engine.compute.unsurveyed import guessed
from zinf_cli.engine.units.loss_chunks import has_many_logits, keep_logits, put_off_logits
from zinf_cli.engine.units.origins import updated_whole
from zinf_cli.engine.units.tiles import TiledWeight
from zinf_cli.engine.units.token_chunks import Chunkable, Inputs, find_chunkable, in_chunks, noted_inputs
from zinf_cli.engine.units.units import ParamLayout, UnitLayout, discover
from zinf_cli.engine.units.written_weights import bounded
from zinf_cli.errors import ModelError, UncuttableError
from zinf_cli.models.objective import Objective, objective_of
from zinf_cli.models.side_outputs import CapturedOutputs
from zinf_cli.models.tiled_weights import cut_model, uncut
from zinf_cli.models.weights import load_buffers
from zinf_cli.plan.layout import ModelFigures
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train.process_memory import return_free_memory
from zinf_cli.train.setup import Text, loss_of, model_source

TRIAL_FLOPS = {"cpu": 1e13, "cuda": 1e16}
"""FLOP that a forward for the plan alone may take, by device: minutes."""
MORE = 1.5
"""What to plan for, as a multiple of what the first micro-batch takes: others may take more."""
TRIED = (
    "what the model computes depends on data: its activations were counted on the first micro-batch, and half as much "
    "again is planned"
)
GUESSED = "what the model's activations take is guessed, and generously, since "


@dataclass(frozen=True)
class Prepared:
    """A model that was cut, and whose logits were put off, as far as it serves; and its survey."""

    seen: Survey
    most: int | None
    """Elements of a part; None: the model is whole."""
    in_chunks: bool
    """Whether logits are computed for a few tokens at a time."""
    whole: tuple[str, ...]
    """Weights that were to be cut, and stay whole."""
    notes: tuple[str, ...]
    chunkable: dict[int, list[Chunkable]]
    """What of each unit may be computed in chunks of tokens."""


def prepare(
    model: nn.Module,
    recipe: Recipe,
    world_size: int,
    most: int | None,
    *,
    packed: bool = False,
    like: Batch | None = None,
) -> Prepared:
    """Cut `model` into parts of `most` elements, put off its logits where they are many, and survey it.

    `packed`: its sequences have several documents, which it keeps apart. `like`: a micro-batch, if it has pictures.
    What only a whole weight can serve is undone, for this weight and its like in other layers.
    """
    whole = sorted(updated_whole(model)) if most is not None else []
    if most is not None:
        cut_model(model, most, whole)
    if logits_put_off := has_many_logits(model, recipe.train.sequences_at_once * recipe.train.seq_len):
        put_off_logits(model)
    notes: list[str] = []
    while True:
        try:
            with noted_inputs(model) as inputs:
                seen = survey_model(model, recipe, world_size, most, packed=packed, like=like)
            chunkable = _chunkable(model, seen, inputs) if most is None and not seen.failure else {}
            return Prepared(seen, most, logits_put_off, tuple(whole), tuple(notes), chunkable)
        except ModelError as error:
            if isinstance(error, UncuttableError) and (alike := _cut_alike(model, error.weight)):
                uncut(model, alike)
                whole += alike
                others = f", and {len(alike) - 1} like it," if len(alike) > 1 else ""
                notes.append(f"{error.weight}{others} can't be cut: {error.why}")
            elif logits_put_off:
                keep_logits(model)
                logits_put_off = False
            else:
                raise


def _cut_alike(model: nn.Module, weight: str) -> list[str]:
    """The weights that were cut and have the name of `weight`, but for the numbers in it."""
    held = [value for module in model.modules() for value in module.__dict__.values()]
    names = {value.origin for value in held if type(value) is TiledWeight}  # what puts off logits is no cut
    return sorted(name for name in names if _pattern(name) == _pattern(weight))


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def held_whole(units: Sequence[UnitLayout], most: int) -> Iterator[str]:
    """Notes on matrices, alike and together larger than a part, that a model in parts of `most` elements holds whole.

    They are resident: what takes them is no Linear, no Embedding and no call of a layer's experts.
    """
    alike: dict[str, list[ParamLayout]] = {}
    for place in (place for unit in units if unit.resident for place in unit.params()):
        if len(place.shape) > 1:
            alike.setdefault(_pattern(place.name), []).append(place)
    for places in alike.values():
        if (numel := sum(place.numel for place in places)) > most:
            others = f", and {len(places) - 1} like it," if len(places) > 1 else ""
            stay = "stay" if others else "stays"
            yield f"{places[0].name}{others} can't be cut, and {stay} in memory for the whole step: {numel} parameters"


def survey_model(
    model: nn.Module,
    recipe: Recipe,
    world_size: int,
    most: int | None = None,
    *,
    packed: bool = False,
    like: Batch | None = None,
) -> Survey:
    """The survey of `model` by one micro-batch on the meta device. It has a `failure` if the model needs values.

    `most` is the largest number of elements of a part, if the model was cut. Of pictures, it takes what `like` has.
    """
    ids = torch.zeros((recipe.train.sequences_at_once, recipe.train.seq_len), dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    objective = objective_of(model)
    if objective in (Objective.TARGET_OF_SOURCE, Objective.LABEL_OF_TEXT, Objective.SIMILARITY):
        inputs["attention_mask"] = torch.ones_like(ids)
    if objective is Objective.LABEL_OF_TEXT:
        number = model.config.problem_type == "regression"  # type: ignore[union-attr]
        inputs["labels"] = ids[:, 0].float() if number else ids[:, 0]
    if objective is Objective.SIMILARITY:
        inputs["labels"] = torch.arange(recipe.train.micro_batch_size, device="meta")
    if packed:
        inputs["position_ids"] = packed_positions(ids)
    if like is not None:
        inputs = {name: tensor.to("meta") for name, tensor in like.inputs(torch.device("cpu")).items()}
    if recipe.train.objective == "dpo":
        inputs["reference"] = torch.zeros(len(ids) // 2, device="meta")
    forward = partial(loss_of(recipe, model), model, **inputs)
    return survey(model, forward, world_size, side=CapturedOutputs(), most=most)


def _chunkable(model: nn.Module, seen: Survey, inputs: Inputs) -> dict[int, list[Chunkable]]:
    """What of each unit may be computed in chunks of tokens. `inputs` were noted in the survey, on the meta device."""
    return {
        number: [found for path in unit.modules for found in find_chunkable(model.get_submodule(path), path, inputs)]
        for number, unit in enumerate(seen.units)
    }


def survey_on_data(
    model: nn.Module,
    recipe: Recipe,
    world_size: int,
    dry: Survey,
    batch: Batch,
    trial: Trial,
    flops: float,
    most: int | None = None,
) -> tuple[Survey, str]:
    """Complete a `dry` survey that failed. Returns it with a note for the plan. `flops` are those of one forward."""
    why = f"it can't be tried without data, and one micro-batch takes {flops / 1e12:.0f} TFLOP"
    if flops <= TRIAL_FLOPS[trial.device.type]:
        load_buffers(model, model_source(recipe))
        forward = partial(loss_of(recipe, model), model, **batch.inputs(trial.device))
        seen = survey(model, forward, world_size, trial, dry.demoted, CapturedOutputs(), most)
        return_free_memory()
        if trial.device.type == "cuda":
            torch.cuda.empty_cache()
        if not seen.failure:
            return seen.grown(MORE), TRIED
        dry, why = seen, f"its first micro-batch fails: {' '.join(seen.failure.split())[:200]}"
    return guessed(model, dry, recipe.train.sequences_at_once, recipe.train.seq_len), GUESSED + why


def first_micro_batch(text: Text, recipe: Recipe, step: int) -> Batch:
    """The first micro-batch of the step that a run begins with, on its first rank; of texts with pictures, that of
    those with most to see, since others call fewer units, and take less."""
    first, size = text.order.sequences_before(step), recipe.train.micro_batch_size
    there = text.train.num_windows(recipe.train.seq_len)
    windows = [window % there for window in text.order.windows(step)[:size]]  # a part of a text has fewer
    parts = text.train.parts if isinstance(text.train, MixedStream) else (text.train,)
    if seen := [part.seen for part in parts if isinstance(part, PicturedStream)]:
        windows = np.argsort(-np.concatenate(seen), kind="stable")[:size].tolist()
    return text.collator.collate(text.train, [Sample(window, first + n) for n, window in enumerate(windows)], 0)


def units_of(model: nn.Module, figures: ModelFigures, world_size: int) -> tuple[UnitLayout, ...]:
    """The units that a survey has found, made from the plan's figures. The model is cut as the plan says."""
    if figures.most is not None:
        cut_model(model, figures.most, figures.whole)
    if figures.loss_in_chunks:
        put_off_logits(model)
    for path, shape in figures.chunkable if figures.tokens_in_chunks else ():
        in_chunks(model.get_submodule(path), shape)
    units = discover(model, world_size, frozenset(figures.demoted), figures.most)
    return bounded(units, {name: (least, most) for name, least, most in figures.bounds})
