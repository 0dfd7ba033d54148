"""Units, their flats, and the arithmetic of slices."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tiny_models import CONFIGS, random_source
from zinf_cli.engine.units.store import overlap
from zinf_cli.engine.units.units import ALIGN, discover
from zinf_cli.model_state import SLICE_MULTIPLE
from zinf_cli.models.model import build_model

Shapes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=8)


@given(Shapes, st.integers(1, 7))
def test_slices_cover_every_parameter_once(shapes: list[list[int]], world_size: int) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    for number, shape in enumerate(shapes):
        model.blocks[0].register_parameter(f"p{number}", nn.Parameter(torch.empty(shape, device="meta")))
    (unit,) = discover(model, world_size)
    (flat,) = unit.flats
    assert flat.numel == world_size * flat.slice_numel
    assert flat.slice_numel % SLICE_MULTIPLE == 0
    whole = torch.zeros(flat.numel)
    for rank in range(world_size):
        begin = rank * flat.slice_numel
        for place in flat.params:
            first, last = overlap(place, begin, begin + flat.slice_numel)
            if first < last:
                flat.slice_of(whole, rank)[first - begin : last - begin] += 1
    end = 0
    for place in flat.params:
        assert place.offset % ALIGN == 0
        assert place.offset >= end
        assert bool((place.view(whole) == 1).all())
        end = place.offset + place.numel
    assert whole.sum() == sum(place.numel for place in flat.params)


def test_every_parameter_belongs_to_one_unit() -> None:
    for name in CONFIGS:
        model = build_model(random_source(name))
        names = [place.name for unit in discover(model, 2) for place in unit.params()]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_the_units_of_a_llama() -> None:
    untied = [unit.name for unit in discover(build_model(random_source("llama")), 1)]
    assert untied == ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head", "resident"]
    tied = discover(build_model(random_source("llama", tie_word_embeddings=True)), 1)
    assert tied[0].modules == ("model.embed_tokens", "lm_head")
    assert [place.name for place in tied[-1].params()] == ["model.norm.weight"]
