"""Finds the figures of a recipe: what the plan needs to know of model, text and machine.

It looks at all of the input, and so finds all that can be wrong with it: the model's config, the checkpoint's tensors,
the text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zinf_cli.bench.block import Block
from zinf_cli.bench.links import HIDDEN, ROWS, block_rate
from zinf_cli.checkpoint.folder import checkpoints_to_resume
from zinf_cli.engine.compute.survey import Survey, UnitUse
from zinf_cli.engine.compute.trial import Trial
from zinf_cli.engine.precision import DTYPES
from zinf_cli.engine.units.origins import parts_of
from zinf_cli.engine.units.tiles import Tile, cut_together
from zinf_cli.engine.units.token_chunks import Chunkable
from zinf_cli.engine.units.units import ParamLayout, UnitLayout
from zinf_cli.machine.control_groups import cores_here
from zinf_cli.model_state import FP32_BYTES
from zinf_cli.models.positions import check_seq_len
from zinf_cli.models.tiled_weights import TiledWeights
from zinf_cli.plan.layout import DataFigures, Figures, LeastPart, MachineFigures, ModelFigures, UnitFigures
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.text.text_files import find_texts
from zinf_cli.told import Tell, nobody
from zinf_cli.train.optimizer import check_ranks, state_of, undecayed, whole_flops
from zinf_cli.train.process_memory import process_memory, return_free_memory
from zinf_cli.train.resume import newest_manifest
from zinf_cli.train.setup import (
    first_weights,
    open_model,
    open_text,
    resolve_precision,
)
from zinf_cli.train.surveyed import Prepared, first_micro_batch, held_whole, prepare, survey_on_data


def find_figures(
    recipe: Recipe,
    slots: int | None,
    world_size: int | None = None,
    most: int | None = None,
    tell: Tell = nobody,
    *,
    in_part: bool = False,
) -> Figures:
    """Build the model on the meta device, judge its checkpoint, tokenise the text, measure the machine.

    `slots` is the number of ranks on this host, `world_size` that of all hosts; by default there is a rank for every
    accelerator here, or one CPU rank. With `most`, the model is cut into parts of `most` elements. `tell` gets the
    share of the text that is tokenised; `in_part`, a part of a long one is enough, unless a run goes on. Raises a
    ZinfError for whatever is wrong with the input.
    """
    forked_with = process_memory().get("RssAnon", 0)
    accelerators = torch.cuda.device_count()
    device = torch.device("cuda" if accelerators else "cpu")
    ranks = slots or accelerators or 1
    world_size = world_size or ranks
    check_ranks(recipe, world_size)
    precision = resolve_precision(recipe, device)
    model = open_model(recipe, precision)
    check_seq_len(model, recipe.train.seq_len)
    undecayed(model, recipe.optimizer.no_decay)  # finds a pattern that matches nothing
    left_out: list[str] = []
    weights = first_weights(recipe, precision, model, left_out.append)
    notes: list[str] = []
    in_part = in_part and not checkpoints_to_resume(recipe.output_dir, recipe.checkpoint.resume)
    text = open_text(recipe, model, world_size, notes.append, tell, in_part=in_part)
    if (resumed := newest_manifest(recipe, model, text)) is not None:
        text.order.start_at(resumed.step, resumed.sequences)
    batch = first_micro_batch(text, recipe, resumed.step if resumed is not None else 0)
    like = batch if batch.beside else None
    prepared = prepare(model, recipe, world_size, most, packed=text.is_packed, like=like)
    seen = prepared.seen
    left_out += prepared.notes
    if seen.failure:
        flops = _flops_per_token(model, recipe.train.seq_len) / 3 * batch.input_ids.numel()
        trial = Trial(TiledWeights(weights, model).read, device)
        seen, said = survey_on_data(model, recipe, world_size, seen, batch, trial, flops, most)
        left_out.append(said)
    left_out += held_whole(seen.units, most) if most is not None else ()
    sources = tuple(map(str, recipe.dataset.paths)) if recipe.dataset.weights else ()
    lines = (*_texts(recipe), *text.lines)
    if text.share < 1:
        lines += (f"looked at {text.share:.2%} of it for this plan; a launch reads and checks all of it",)
    about = text.share < 1 and recipe.train.max_steps is None
    of_tokens = text.collator.objective.is_of_tokens
    data = DataFigures(text.max_steps(recipe.train), lines, tuple(notes), sources, text.share, about, of_tokens)
    shape = (recipe.train.seq_len * recipe.train.sequences_at_once, _hidden(model))
    machine = _machine(device, precision, ranks, forked_with, shape)
    figures = model_figures(model, prepared, recipe, seen, tuple(left_out))
    return Figures(figures, data, machine, world_size, ranks, precision, state_of(recipe))


def _texts(recipe: Recipe) -> tuple[str, ...]:
    held_out = [
        f"held out{f', {name}' if name else ''}: {text.line()}"
        for name, paths in recipe.dataset.held_out.items()
        for text in find_texts(paths)
    ]
    shares = [f"{weight:.1%} from " for weight in recipe.dataset.weights] or [""] * len(recipe.dataset.paths)
    texts = find_texts(recipe.dataset.paths)
    return (*(share + text.line() for share, text in zip(shares, texts, strict=True)), *held_out)


def model_figures(
    model: nn.Module, prepared: Prepared, recipe: Recipe, seen: Survey | None = None, notes: tuple[str, ...] = ()
) -> ModelFigures:
    """What the plan needs to know of `model`. `seen` is a survey on data, where that of `prepared` has failed."""
    seen = seen or prepared.seen
    calls, learned, whole = Counter(seen.order), Counter(seen.learned), prepared.whole
    return ModelFigures(
        architecture=type(model).__name__,
        num_params=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        units=tuple(
            _unit_figures(
                layout,
                seen.uses.get(number, UnitUse()),
                calls[number],
                learned[number],
                _least_part(model, layout, whole),
                _reached(model, layout, recipe.train.seq_len * recipe.train.sequences_at_once),
                prepared.chunkable.get(number, ()),
                seen.spared,
                product=number in seen.products,
                optimizer=recipe.optimizer.name,
            )
            for number, layout in enumerate(seen.units)
        ),
        order=seen.order,
        learned=seen.learned,
        glue_bytes=seen.glue_bytes,
        loss_bytes=seen.loss_bytes,
        live_bytes=seen.live_bytes,
        surveyed=not seen.failure,
        demoted=tuple(sorted(seen.demoted)),
        written=tuple(sorted(seen.written)),
        bounds=tuple((p.name, *p.bounds) for unit in seen.units for p in unit.params() if p.bounds is not None),
        flops_per_token=_flops_per_token(model, recipe.train.seq_len),
        most=prepared.most,
        whole=whole,
        loss_in_chunks=prepared.in_chunks,
        chunkable=tuple((found.path, found.shape) for each in prepared.chunkable.values() for found in each),
        notes=notes,
        spared=tuple(sorted(seen.spared)),
    )


def _least_part(model: nn.Module, layout: UnitLayout, whole: Collection[str]) -> LeastPart:
    """Of the parameters of a unit, those that can be parted least: all of the resident unit, else those of a module."""
    modules: dict[str, list[ParamLayout]] = {}
    for place in layout.params():
        modules.setdefault("" if layout.resident else place.name.rpartition(".")[0], []).append(place)
    parts = []
    for path, places in modules.items():
        module = model.get_submodule(path)
        cuttable = module._parameters if isinstance(module, Tile) else cut_together(module)
        names = {f"{path}.{name}" for name in cuttable}
        largest = max(places, key=lambda place: place.numel)
        stays = layout.resident or not names or not names.isdisjoint(whole)
        rows = places if stays else [place for place in places if place.name in names]
        numel = sum(place.numel // (1 if stays else place.shape[0]) for place in rows)
        parts.append(LeastPart(largest.origin, numel, stays))
    return max(parts, key=lambda part: part.numel)


def _reached(model: nn.Module, layout: UnitLayout, num_tokens: int) -> float:
    """See UnitFigures. A token misses `some` of `count` experts if all that it takes are among the others."""
    place = next(layout.params())
    taken = _experts_per_token(model)
    if not layout.on_demand or taken is None or place.part is None:
        return 1.0
    count, some = place.part.shape[0], place.shape[0]
    if not 0 < taken <= count:
        return 1.0
    return float(1 - (math.comb(count - some, taken) / math.comb(count, taken)) ** num_tokens)


def _experts_per_token(model: nn.Module) -> int | None:
    """How many experts of a layer each token takes; None if the config does not say so."""
    config: Any = model.config
    text = config.get_text_config()
    names = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token")
    found = (getattr(text, name, None) for name in names)
    return next((count for count in found if isinstance(count, int)), None)


def _unit_figures(
    layout: UnitLayout,
    use: UnitUse,
    calls: int,
    learned: int,
    least: LeastPart,
    reached: float,
    chunkable: Sequence[Chunkable],
    spared: Collection[str],
    *,
    product: bool,
    optimizer: str,
) -> UnitFigures:
    packed = [flat for flat in layout.flats if flat.packing is not None]
    whole = [flat for flat in layout.flats if flat.whole]
    return UnitFigures(
        name=layout.name,
        trainable_numel=sum(flat.numel for flat in layout.trainable),
        frozen_numel=sum(flat.numel for flat in layout.flats if not flat.trainable),
        trainable_bytes=sum(flat.num_bytes for flat in layout.trainable),
        frozen_bytes=sum(flat.moved_bytes for flat in layout.flats if not flat.trainable),
        master_numel=sum(flat.numel for flat in layout.trainable if flat.dtype != torch.float32),
        largest_param_numel=max((param.numel for param in layout.params()), default=0),
        largest_trained_numel=max((param.numel for flat in layout.trainable for param in flat.params), default=0),
        resident=layout.resident,
        calls=calls,
        learned=learned,
        input_bytes=use.input_bytes,
        call_bytes=use.call_bytes,
        saved_bytes=use.saved_bytes,
        mapped_bytes=use.mapped_bytes,
        output_bytes=use.output_bytes,
        before_bytes=use.before_bytes,
        taken_bytes=use.taken_bytes,
        sent_bytes=use.sent_bytes,
        again_bytes=use.again_bytes,
        least=least,
        reached=reached,
        product=product,
        chunkable_bytes=calls * sum(found.spared_bytes for found in chunkable),
        chunkable_numel=sum(found.numel for found in chunkable),
        packed_bytes=sum(flat.moved_bytes for flat in packed),
        unpacked_bytes=sum(flat.num_bytes for flat in packed),
        whole_numel=sum(flat.numel for flat in whole),
        whole_master_numel=sum(flat.numel for flat in whole if flat.dtype != torch.float32),
        spared_numel=sum(place.numel for place in layout.params() if place.name.removesuffix(".weight") in spared),
        whole_flops=whole_flops(optimizer, [place.shape for flat in whole for place in flat.params]),
        factor_bytes=sum(flat.factors[1] for flat in whole) * FP32_BYTES if optimizer == "adafactor" else 0,
    )


def _flops_per_token(model: nn.Module, seq_len: int) -> float:
    """6 per weight that multiplies a token, or 4 if it is frozen; 6·seq_len·hidden per layer for causal attention."""
    causal: Any = model
    output = causal.get_output_embeddings()
    tied = id(output.weight) if output is not None else 0
    looked_up = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = sum(_weight_flops(p) for p in model.parameters() if p.dim() >= 2) - _idle_flops(model)
    weights -= sum(_weight_flops(weight) for key, weight in looked_up.items() if key != tied)
    layers = getattr(causal.config, "num_hidden_layers", 0)
    return weights + 6.0 * layers * _hidden(model) * seq_len


def _weight_flops(weight: torch.Tensor) -> float:
    """Of each token that it multiplies: forward, the gradient of the input and, if it is trained, its own gradient."""
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


def _idle_flops(model: nn.Module) -> float:
    """Those of weights of experts that a token is not multiplied with."""
    taken, parts = _experts_per_token(model), parts_of(model)
    modules = (m._parameters if isinstance(m, Tile) else cut_together(m) for m in model.modules())
    packed = [weight for weights in modules for weight in weights.values() if weight is not None and weight.dim() == 3]
    counts = [parts[id(weight)].shape[0] if id(weight) in parts else len(weight) for weight in packed]
    shares = [1.0 if taken is None else min(1.0, taken / count) for count in counts]
    return sum(_weight_flops(weight) * (1 - share) for weight, share in zip(packed, shares, strict=True))


def _hidden(model: nn.Module) -> int:
    """The width of the model's layers; 0 where its config does not say."""
    config: Any = model.config
    return getattr(config, "hidden_size", 0)


def _machine(
    device: torch.device, precision: str, ranks: int, forked_with: int, shape: tuple[int, int]
) -> MachineFigures:
    """This host as the plan sees it. `shape` is that of a micro-batch between units: tokens by hidden."""
    cores = cores_here()
    free, one_pool = 0, False
    if device.type == "cuda":
        one_pool = bool(torch.cuda.get_device_properties(device).is_integrated)
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    with _threads(max(1, cores // ranks)):
        a = torch.randn(1024, 1024, dtype=DTYPES[precision], device=device)
        (a @ a).sum().item()  # libraries are loaded and threads started now, as in a rank
        return_free_memory()  # of the tokenizer, say, which a rank does not run
        memory = process_memory()
        shared = forked_with + memory.get("RssFile", 0) + memory.get("RssShmem", 0)
        flops = _flops(device, precision, shape)
    return MachineFigures(torch.cuda.device_count(), free, cores, flops, memory["VmRSS"], shared, one_pool=one_pool)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch computes with so many; afterwards with as many as before, for whoever has asked."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flops(device: torch.device, precision: str, shape: tuple[int, int]) -> float:
    """FLOP/s of a pass over a block of the model's width, but no wider than the block of `zinf bench links`."""
    rows, hidden = min(shape[0], max(ROWS[device.type])), min(shape[1], HIDDEN[device.type])
    block = Block(max(64, hidden // 64 * 64), rows, device=device, dtype=DTYPES[precision])
    return block_rate([block], rows, 1)
