"""Modules that compute each token by itself: what is proved to be one, and that chunks change nothing but memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from in_process import run
from tiny_models import random_source
from tiny_recipes import recipe_of
from zinf_cli.engine.units import token_chunks
from zinf_cli.engine.units.row_wise import proof
from zinf_cli.engine.units.token_chunks import in_chunks
from zinf_cli.models.model import build_model
from zinf_cli.plan.parts import plan_in_parts
from zinf_cli.plan.search import best_plan
from zinf_cli.plan.temporaries import compute_bytes
from zinf_cli.train.figures import find_figures

SHAPE = (2, 64, 32)


@pytest.mark.parametrize(
    ("name", "path", "saved"),
    [
        ("llama", "model.layers.0.mlp", 4),
        ("gemma2", "model.layers.0.mlp", 4),
        ("phi3", "model.layers.0.mlp", 4),
        ("gpt_neox", "gpt_neox.layers.0.mlp", 2),
    ],
)
def test_mlps_are_proved_to_compute_each_token_by_itself(name: str, path: str, saved: int) -> None:
    """Their inside has so many tensors of 48 values a token."""
    found = proof(build_model(random_source(name)).get_submodule(path), SHAPE, torch.float32)
    assert found is not None
    assert found.saved_bytes == saved * 2 * 64 * 48 * 4


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("mixtral", "model.layers.0.mlp"),
        ("llama", "model.layers.0.self_attn"),
        ("llama", "model.layers.0"),
        ("gpt2", "transformer.h.0.mlp"),  # it has dropout
    ],
)
def test_other_modules_of_a_block_are_not(name: str, path: str) -> None:
    assert proof(build_model(random_source(name)).get_submodule(path), SHAPE, torch.float32) is None


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        with torch.device("meta"):
            self.inside, self.along, self.places = (
                nn.Linear(32, 32),
                nn.Linear(64, 64),
                nn.Parameter(torch.ones(64, 32)),
            )

    def forward(self, x: torch.Tensor) -> Any:
        found = getattr(self, self.kind)(self.inside(x))
        return x if self.kind == "input" else found

    def each(self, x: torch.Tensor) -> torch.Tensor:
        x *= torch.sigmoid(x).mean(-1, keepdim=True)
        return torch.cat([F.layer_norm(x, (32,))[..., :16], x.softmax(-1)[..., 16:]], -1)

    def input(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)

    def of_all(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().sum()

    def cumulated(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)

    def rolled(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, 1)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.transpose(1, 2), self.along.weight).transpose(1, 2)

    def in_pairs(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.reshape(2, 32, 64), self.along.weight).reshape(2, 64, 32)

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(1)

    def placed(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.places

    def numbered(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1], device=x.device)[:, None]

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.1)

    def counted(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x

    def of_values(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] + x

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x[..., 0].reshape(2, 64), self.along.weight).unsqueeze(-1) + x

    def two(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(x.split(32, 1)[::-1], 1)

    def shorter(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:]


@pytest.mark.parametrize(
    "kind", [name for name in vars(Odd) if not name.startswith("_") and name not in ("forward", "each")]
)
def test_what_mixes_tokens_or_may_do_so_is_not(kind: str) -> None:
    assert proof(Odd("each"), SHAPE, torch.float32) is not None
    assert proof(Odd(kind), SHAPE, torch.float32) is None


def test_a_number_that_follows_the_length_shows_in_the_operations() -> None:
    module = Odd("each")
    module.each = lambda x: x * (1.0 / x.shape[1])  # type: ignore[method-assign]
    found = [proof(module, (2, length, 32), torch.float32) for length in (64, 16)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].operations != found[1].operations


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("input_learns", [False, True])
def test_chunks_have_the_results_and_gradients_of_all_tokens(
    frozen: bool, input_learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_chunks, "LEAST", 10)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)).requires_grad_(not frozen)
    value, of_result = torch.randn(2, *SHAPE)
    found = []
    for chunked in (False, True):
        if chunked:
            in_chunks(module, SHAPE)
        module.zero_grad()
        given = value.clone().requires_grad_(input_learns)
        result = module(given)
        if not frozen or input_learns:
            result.backward(of_result)
        found.append([result, given.grad, *(param.grad for param in module.parameters())])
    for whole, chunks in zip(*found, strict=True):
        assert (whole is None) == (chunks is None)
        if whole is not None:
            torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_a_plan_takes_chunks_where_nothing_fits_without(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MLP is 64 times as wide as a token. Of deepseek_v3 only the dense one and shared experts are in chunks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_chunks, "LEAST", 10)
    recipe = recipe_of(tmp_path, name, seq_len=64)
    config = {**(recipe.model.config or {}), "intermediate_size": 2048, "moe_intermediate_size": 512}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    figures = find_figures(recipe, 1)
    paths = [path for path, _ in figures.model.chunkable]
    assert paths == [f"model.layers.{n}.mlp{'.shared_experts' if n and name == 'deepseek_v3' else ''}" for n in (0, 1)]
    whole = best_plan(recipe, figures)
    tight = recipe.model_copy(update={"offload": recipe.offload.model_copy(update={"cpu_memory": 1})})
    least = best_plan(tight, figures).limits[0].needed
    tight = recipe.model_copy(update={"offload": recipe.offload.model_copy(update={"cpu_memory": least - 1})})
    plan = plan_in_parts(tight, figures, lambda most: pytest.fail("it was cut"))
    assert plan.fits
    assert plan.figures.model.tokens_in_chunks
    assert not whole.figures.model.tokens_in_chunks
    assert compute_bytes(plan.figures, plan.choice) < compute_bytes(figures, plan.choice)
    assert plan.compute_s > 1.1 * whole.compute_s
    sizes: set[int] = set()
    monkeypatch.setattr(token_chunks, "_split", lambda tensor: _noted(tensor.split(10, -2), sizes))
    expected = [line["loss"] for line in run(recipe, whole)]
    assert not sizes
    assert [line["loss"] for line in run(recipe, plan)] == pytest.approx(expected, rel=1e-6)
    assert sizes == {10, 4}


def _noted(chunks: Sequence[torch.Tensor], sizes: set[int]) -> Sequence[torch.Tensor]:
    sizes.update(chunk.shape[-2] for chunk in chunks)
    return chunks
