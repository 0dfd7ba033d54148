"""A model's random weights, read in parts."""

from __future__ import annotations

import random
from itertools import pairwise

import torch
from torch import nn

from zinf_cli.models.random_weights import RandomWeights


def assert_parts_are_the_whole(model: nn.Module) -> None:
    """Every parameter in some ranges is what it is when it is read with all the others, and by itself."""
    names = [name for name, _ in model.named_parameters()]
    whole, parts = RandomWeights(model, 0).read(names), RandomWeights(model, 0)
    chance = random.Random(0)
    for name in names:
        value = whole[name].reshape(-1)
        edges = sorted({0, value.numel(), *(chance.randrange(value.numel() + 1) for _ in range(3))})
        found = [parts.read_part(name, first, last) for first, last in pairwise(edges)]
        assert all(part.ndim == 1 and part.dtype == value.dtype for part in found)
        assert torch.equal(torch.cat([*found, value[:0]]), value), name
        assert torch.equal(parts.read([name])[name], whole[name]), name
    for name in chance.sample(names, 2):
        assert torch.equal(RandomWeights(model, 0).read([name])[name], whole[name]), name
