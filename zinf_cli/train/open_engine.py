"""Makes an engine of a recipe and its plan: the model with room for its state, and the source of its first weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.models.side_outputs import CapturedOutputs
from zinf_cli.models.tiled_weights import TiledWeights
from zinf_cli.models.weights import WeightSource, load_buffers
from zinf_cli.plan.plan import Plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.trace import Trace
from zinf_cli.train.setup import first_weights, model_source, open_model, place_buffers
from zinf_cli.train.surveyed import units_of


def open_engine(
    recipe: Recipe, plan: Plan, device: torch.device, ranks: Ranks, trace: Trace, notice: Callable[[str], None]
) -> tuple[Engine, torch.nn.Module, WeightSource]:
    """The model with room for its state on the plan's tiers, and the source of its first weights."""
    model = open_model(recipe, plan.precision)
    weights = TiledWeights(first_weights(recipe, plan.precision, model), model)
    load_buffers(model, model_source(recipe))
    found = plan.figures.model
    place_buffers(model, device)
    options = EngineOptions(
        **plan.placement,
        nvme_folders=tuple(Path(folder) for folder in plan.nvme_folders),
        nvme_bytes=plan.nvme_bytes,
        nvme_readers=plan.io.readers,
        nvme_writers=plan.io.writers,
        nvme_block_bytes=plan.io.block_bytes,
        nvme_verify=device.type != "cpu" if recipe.offload.verify == "auto" else recipe.offload.verify,
        slot_bytes=plan.working.slot_bytes,
        resident_bytes=plan.working.resident_bytes,
        chunk_numel=plan.working.chunk_numel,
        num_chunks=plan.working.num_chunks,
        staging_bytes=plan.working.staging_bytes,
        pin_memory=recipe.offload.pin_memory is not False,
        device=device,
        micro_batches_per_sweep=plan.per_sweep,
        kept_units=frozenset(plan.kept_units),
        staying_units=frozenset(plan.staying_units),
        cached_units=frozenset(plan.cached_units),
        cached_states=frozenset(plan.cached_states),
        cache_tier=plan.choice.cache_tier,
        glue_leaves=found.most is not None,
        spared=frozenset(found.spared),
        speculate=plan.update == "speculative",
        clips_worth=plan.clips_worth,
    )
    engine = Engine(
        model,
        units_of(model, found, ranks.world_size),
        options,
        ranks,
        trace,
        order=found.order if found.surveyed else None,
        learned=found.learned if found.surveyed else None,
        written=found.written,
        optimizer=plan.figures.optimizer,
        side_outputs=CapturedOutputs(),
        notice=notice,
    )
    return engine, model, weights
