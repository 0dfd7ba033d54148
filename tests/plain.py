"""The reference, a plain PyTorch loop with AdamW, accumulation and clip_grad_norm_; and the engine on its batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zinf_cli.engine.compute.survey import survey
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.compute.trial import Trial
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.engine.units.loss_chunks import has_many_logits, put_off_logits
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.side_outputs import CapturedOutputs
from zinf_cli.models.tiled_weights import TiledWeights, cut_model
from zinf_cli.models.weights import open_weights
from zinf_cli.train.optimizer import mark_whole
from zinf_cli.train.setup import model_loss, place_buffers

CPU = torch.device("cpu")
LR, CLIP = 1e-3, 1.0
OptimizerOf = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]
ADAMW: OptimizerOf = partial(torch.optim.AdamW, lr=LR, weight_decay=0.01)
MIB = 2**20


def batches(step: int, count: int, tokens: int = 12) -> list[torch.Tensor]:
    """`count` micro-batches of token ids, int64 [2, tokens]."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randint(3, 90, (2, tokens), generator=generator) for _ in range(count)]


def freeze_params(model: nn.Module, part: str) -> None:
    for name, param in model.named_parameters():
        if part and part in name:
            param.requires_grad_(False)


def plain_losses(
    source: ModelSource,
    steps: int,
    *,
    count: int = 3,
    clip: float | None = CLIP,
    dtype: torch.dtype = torch.float32,
    freeze: str = "",
    parameters: dict[str, torch.Tensor] | None = None,
    device: torch.device = CPU,
    infinite: tuple[int, int] | None = None,
    optimizer_of: OptimizerOf = ADAMW,
    experts: str | None = None,
) -> list[list[float]]:
    """The loss of each of `count` micro-batches of every step; `parameters` receives those of the last step.

    `experts`: how transformers computes those of a mixture, if not by its default.
    The loss of the micro-batch at `infinite` (step, number) is that, with the gradient that it had; such a step is left
    out.
    """
    blank: Any = build_model(source)
    model = type(blank)._from_config(blank.config, dtype=dtype)
    if dtype != torch.float32:  # as a user gets it, with what its class keeps in fp32
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = type(blank).from_pretrained(folder, dtype=dtype)
    if experts is not None:
        model.set_experts_implementation(experts)
    values = open_weights(blank, source).read([name for name, _ in blank.named_parameters()])
    model.to(device)
    values = {name: value.to(device) for name, value in values.items()}
    masters = {}
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])
            if param.dtype != torch.float32:
                param.grad_dtype = torch.float32
            masters[name] = values[name].clone() if param.dtype != torch.float32 else param
    model.train()
    freeze_params(model, freeze)
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizer = optimizer_of([masters[name] for name in named])
    losses: list[list[float]] = []
    for step in range(steps):
        losses.append([])
        for number, ids in enumerate(batches(step, count)):
            torch.manual_seed(1000 * step + number)
            loss = model_loss(model, ids.to(device), ids.to(device))
            if (step, number) == infinite:
                loss = loss + math.inf
            torch.autograd.backward((loss,), (torch.full_like(loss, 1 / count),))
            losses[-1].append(loss.item())
        if clip is not None:
            nn.utils.clip_grad_norm_(list(named.values()), clip)
        for name, param in named.items():
            masters[name].grad = param.grad
        if all(map(math.isfinite, losses[-1])):
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, param in named.items():
                param.grad = None
                if masters[name] is not param:
                    param.copy_(masters[name])
    if parameters is not None:
        parameters.update((name, param.detach()) for name, param in model.named_parameters())
    return losses


def open_engine(
    source: ModelSource,
    options: EngineOptions,
    ranks: Ranks | None = None,
    *,
    freeze: str = "",
    keep: bool = False,
    dtype: torch.dtype = torch.float32,
    room: int = 1,
    chunk_numel: int = 8192,
    most: int | None = None,
    slot_bytes: int | None = None,
    in_chunks: bool = False,
    experts: str | None = None,
    whole: str = "",
    **more: Any,
) -> Engine:
    """An engine with the weights of `source` loaded; `engine.model` is its model. `keep`: recompute no unit.

    `room`: how many times as large buffers are as a model of width 32 needs. `most`: elements of a part of the model.
    `slot_bytes`: the slots have these instead.
    `in_chunks`: the loss is computed in chunks. `experts`: as in plain_losses. `whole`: the optimizer
    that updates something whole.
    """
    model = build_model(source, dtype)
    if experts is not None:
        assert isinstance(model, PreTrainedModel)
        model.set_experts_implementation(experts)
    freeze_params(model, freeze)
    if whole:
        assert isinstance(model, PreTrainedModel)
        mark_whole(model, whole)
    weights = TiledWeights(open_weights(model, source), model)
    if most is not None:
        cut_model(model, most)
    if in_chunks:
        assert has_many_logits(model, 24)
        put_off_logits(model)
    ids = torch.zeros((2, 12), dtype=torch.long, device="meta")
    ranks = ranks or Ranks()
    side = CapturedOutputs()
    seen = survey(model, partial(model_loss, model, ids, ids), ranks.world_size, side=side, most=most)
    if seen.failure:  # it asks for data
        ids = batches(0, 1)[0].to(options.device)
        trial = Trial(weights.read, options.device)
        seen = survey(model, partial(model_loss, model, ids, ids), ranks.world_size, trial, seen.demoted, side, most)
    place_buffers(model, options.device)
    options = replace(
        options,
        nvme_bytes=room * 32 * MIB,
        slot_bytes=slot_bytes or room * 8 * MIB,
        resident_bytes=room * 4 * MIB,
        chunk_numel=chunk_numel,
        num_chunks=32,
        staging_bytes=room * 2 * MIB,
        kept_units=frozenset(seen.order if keep else ()),
        glue_leaves=most is not None,
        spared=seen.spared,
    )
    more = {"order": seen.order, "written": seen.written, "side_outputs": side, **more}
    engine = Engine(model, seen.units, options, ranks, **more)
    engine.load(weights.read)
    return engine


def engine_losses(
    engine: Engine,
    steps: int,
    *,
    first: int = 0,
    count: int = 3,
    rank: int = 0,
    world_size: int = 1,
    clip: float | None = CLIP,
    eager: bool = False,
    evaluate_every: int | None = None,
    close: bool = True,
    device: torch.device = CPU,
    infinite: tuple[int, int] | None = None,
    kernel: Kernel | None = None,
    tokens: int = 12,
) -> list[list[float]]:
    """What plain_losses returns from step `first` on, through the engine; of the micro-batches of `rank`."""
    losses = []
    share = count // world_size
    for step in range(first, steps):
        work = [
            MicroBatch(
                partial(_loss, engine, ids.to(device), infinite=(step, number) == infinite),
                1 / count,
                1000 * step + number,
            )
            for number, ids in enumerate(batches(step, count, tokens))
        ]
        mine = work[rank * share : (rank + 1) * share]
        more = step + 1 < steps
        losses.append(engine.train_step(mine, kernel or AdamW(LR), max_grad_norm=clip, eager=eager, more=more).losses)
        if evaluate_every is not None and step % evaluate_every == 0:
            engine.evaluate(mine[:2])
    engine.flush()
    if close:
        engine.close()
    return losses


def _loss(engine: Engine, ids: torch.Tensor, *, infinite: bool) -> torch.Tensor:
    loss = model_loss(engine.model, ids, ids)
    return loss + math.inf if infinite else loss


def everything_on(tier: str, folder: Path) -> EngineOptions:
    return EngineOptions(tier, tier, tier, tier, nvme_folders=(folder,))


def every_other_unit_cached(options: EngineOptions, *states: str) -> EngineOptions:
    """Units 0, 2, ... with all their state on the tier of cached units, or with some classes of it."""
    cached = frozenset(states or ("params", "grads", "optimizer"))
    return replace(options, cached_units=frozenset(range(0, 100, 2)), cached_states=cached)


def relative_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    """The largest over all losses."""
    return max(abs(a - b) / abs(b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
