"""Ranges of random weights are, to the bit, those of the whole, in memory that follows the range."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from own_processes import in_processes
from peaks import peak_of_tiles
from ranges import assert_parts_are_the_whole
from tiny_models import CONFIGS, KEPT_IN_FP32, random_source
from zinf_cli.models import recorded
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.random_weights import RandomWeights
from zinf_cli.models.recorded import Recording

GPT = {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}
BLOCK_BYTES = 4 * (2048 * (2 * 2048 + 2 * 32 + 3 * 8192))
Initialise = Callable[[torch.Tensor], object]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_PIECE", 32)


@pytest.mark.parametrize("name", [*CONFIGS, *sorted(KEPT_IN_FP32.keys() - CONFIGS.keys() - {"deepseek_v4"})])
def test_parts_are_the_whole(name: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = build_model(random_source(name))
    assert_parts_are_the_whole(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_parts_of_what_init_builds_are_the_whole() -> None:
    assert_parts_are_the_whole(build_model(ModelSource(None, GPT, "random", 0)))


def test_parts_of_subtrees_in_turn() -> None:
    model = build_model(random_source("llama"))
    names = [name for name, _ in model.named_parameters()]
    whole, parts = RandomWeights(model, 0).read(names), RandomWeights(model, 0)
    for name in (*names[::-1], *names):
        assert torch.equal(parts.read_part(name, 5, 21), whole[name].reshape(-1)[5:21]), name


ROWS = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)
OPERATIONS: dict[str, Initialise] = {
    "normal": lambda tensor: tensor.normal_(1.0, 0.02),
    "uniform": lambda tensor: tensor.uniform_(-0.3, 0.3),
    "xavier": lambda tensor: nn.init.xavier_normal_(tensor) if tensor.numel() else None,
    "kaiming": lambda tensor: nn.init.kaiming_uniform_(tensor, a=5**0.5) if tensor.numel() else None,
    "zero": lambda tensor: tensor.zero_(),
    "ones": lambda tensor: nn.init.ones_(tensor),
}


@given(
    columns=st.integers(1, 40),
    operations=st.lists(st.tuples(st.sampled_from([*OPERATIONS]), ROWS), max_size=5),
    cuts=st.lists(st.integers(0, 360)),
)
def test_any_range_of_any_operations(columns: int, operations: list[tuple[str, list[int]]], cuts: list[int]) -> None:
    real = torch.full((9, columns), float("nan"))
    recording = Recording(real.shape)
    generators = []
    for tensor in (real, recording.tensor()):
        torch.manual_seed(1)
        for name, (first, last) in operations:
            OPERATIONS[name](tensor[first:last])
        generators.append(torch.get_rng_state())
    assert not recording.is_real
    edges = sorted({0, real.numel(), *(min(cut, real.numel()) for cut in cuts)})
    parts = [recording.read(first, last) for first, last in pairwise(edges)]
    assert torch.equal(torch.cat(parts).nan_to_num(9.0), real.reshape(-1).nan_to_num(9.0))
    assert torch.equal(*generators)
    assert recording.is_incomplete() == bool(real.isnan().any())


NOT_BY_RANGES: dict[str, Initialise] = {
    "orthogonal": nn.init.orthogonal_,
    "truncated": lambda tensor: nn.init.trunc_normal_(tensor, std=1.0, a=-1.0, b=1.0),
    "copied": lambda tensor: tensor.copy_(torch.arange(40.0).log1p()),
    "read": lambda tensor: tensor.copy_(tensor.normal_() / 3),
    "scaled": lambda tensor: tensor.normal_().mul_(0.5),
    "transposed": lambda tensor: tensor.t().normal_(),
    "columns": lambda tensor: tensor.zero_()[:, 3:30].uniform_(),
    "indexed": lambda tensor: tensor.zero_().__setitem__(tensor[:, 0] == 0, 2.0),
    "own generator": lambda tensor: tensor.normal_(generator=torch.Generator().manual_seed(3)),
    "in new memory": lambda tensor: tensor.data.copy_(torch.randn(tensor.shape, device=tensor.device)),
}


@pytest.mark.parametrize("name", NOT_BY_RANGES)
def test_what_is_not_done_to_ranges_is_done_to_the_whole(name: str) -> None:
    real = torch.full((20, 40), float("nan"))
    recording = Recording(real.shape)
    generators = []
    for tensor in (real, nn.Parameter(recording.tensor(), requires_grad=False)):
        torch.manual_seed(1)
        tensor[2:7].normal_()
        NOT_BY_RANGES[name](tensor)
        tensor[4].fill_(0.5)
        generators.append(torch.get_rng_state())
    assert recording.is_real
    assert not recording.is_incomplete()
    assert torch.equal(recording.read(33, 780), real.reshape(-1)[33:780])
    assert torch.equal(*generators)


@pytest.mark.parametrize("how", ["parts", "one"])
def test_memory_follows_what_is_read(how: str) -> None:
    (peak,) = in_processes(peak_of_tiles, [(how,)])
    assert peak < BLOCK_BYTES / 8
