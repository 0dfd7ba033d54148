"""Loss in chunks: logits of a few tokens at a time give the losses, gradients and weights that all of them give."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checkpoints import resumed, save
from in_process import run
from plain import engine_losses, every_other_unit_cached, everything_on, open_engine, plain_losses, relative_difference
from programs import command, environment
from tiny_models import random_source
from tiny_recipes import recipe_of
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.units import loss_chunks
from zinf_cli.engine.units.loss_chunks import has_many_logits, put_off_logits
from zinf_cli.errors import ModelError
from zinf_cli.plan.search import make_plan
from zinf_cli.train.figures import find_figures
from zinf_cli.train.model import build_model

STEPS = 10
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"tie_word_embeddings": False, "final_logit_softcapping": 1.0},
    "cohere": {"tie_word_embeddings": False, "logit_scale": 0.5},
    "phi": {},
    "gpt2": {"tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {},
    "mamba": {"tie_word_embeddings": False},
}


@pytest.fixture(autouse=True)
def few_tokens_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of a vocabulary of 96: the last chunk of 24 tokens is shorter."""
    monkeypatch.setattr(loss_chunks, "CHUNK", 7 * 96)


def in_chunks(name: str, options: EngineOptions, **more: Any) -> Engine:
    return open_engine(random_source(name, **MODELS[name]), options, in_chunks=True, **more)


@pytest.mark.parametrize("name", MODELS)
def test_learns_as_plain_pytorch_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_chunks, "linear_rows", None)  # would compute them all at once
    engine = in_chunks(name, everything_on("nvme", tmp_path))
    found = engine_losses(engine, STEPS, evaluate_every=4)
    assert relative_difference(found, plain_losses(random_source(name, **MODELS[name]), STEPS)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_all_placements_have_the_same_bits(name: str, tmp_path: Path) -> None:
    nvme = everything_on("nvme", tmp_path)
    expected = engine_losses(in_chunks(name, nvme), STEPS)
    for options in (
        EngineOptions(),
        EngineOptions("device", "device", "device", "device"),
        replace(nvme, speculate=True),
        every_other_unit_cached(nvme),
    ):
        assert engine_losses(in_chunks(name, options), STEPS) == expected, options


def test_in_bf16_chunks_change_nothing_but_rounding() -> None:
    expected = plain_losses(random_source("llama"), STEPS, dtype=torch.bfloat16)
    engine = in_chunks("llama", EngineOptions(), dtype=torch.bfloat16)
    assert relative_difference(engine_losses(engine, STEPS), expected) < 2e-3


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_goes_on_with_chunks_and_without(first: bool, tmp_path: Path) -> None:
    engine = open_engine(random_source("llama"), EngineOptions(), in_chunks=first)
    engine_losses(engine, 3, close=False)
    folder = save(engine, tmp_path, 3)
    engine.close()
    losses = engine_losses(resumed(folder, "llama", EngineOptions(), in_chunks=not first), STEPS, first=3)
    assert relative_difference(losses, plain_losses(random_source("llama"), STEPS)[3:]) < 1e-6


class Head(nn.Module):
    """A head alone."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(32, 96)
        self.head.weight.requires_grad_(not frozen)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def a_pair_of_heads(frozen: bool = False) -> tuple[Head, Head]:
    """The same head twice, and the second one puts its logits off."""
    whole, put_off = Head(frozen), Head(frozen)
    assert has_many_logits(put_off, 24)
    put_off_logits(put_off)
    put_off.get_parameter("head.tiles_of_weight.0.weight").data = whole.head.weight.detach().clone()
    return whole, put_off


def loss_and_gradients(head: Head, of: Callable[[torch.Tensor, torch.Tensor], Any]) -> list[torch.Tensor | None]:
    torch.manual_seed(1)
    hidden = torch.randn(2, 12, 32, requires_grad=True)
    labels = torch.randint(0, 96, (2, 12))
    labels[0, :7] = labels[1, 3:9] = -100  # a chunk of nothing else, and some
    result = of(head.head(hidden), labels)
    result.backward()
    return [result.detach(), hidden.grad, *(param.grad for param in sorted(head.parameters(), key=torch.Tensor.dim))]


def flat_loss(logits: torch.Tensor, labels: torch.Tensor, **more: Any) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, 96), labels.view(-1), **more)


def in_place(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits /= 3.0
    logits[..., 5] = -2.0
    return flat_loss(logits, labels)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "mean": flat_loss,
    "sum": lambda logits, labels: flat_loss(logits, labels, reduction="sum"),
    "another index": lambda logits, labels: flat_loss(logits, labels.clamp(min=0), ignore_index=0),
    "module": lambda logits, labels: nn.CrossEntropyLoss()(logits.reshape(24, -1), labels.flatten()),
    "shifted": lambda logits, labels: F.cross_entropy(
        logits[..., :-1, :].contiguous().float().view(-1, logits.size(-1)), labels[..., 1:].reshape(-1)
    ),
    "capped": lambda logits, labels: flat_loss(torch.tanh((logits * 0.5 + 1) / 2.0) * 2.0, labels),
    "scaled after": lambda logits, labels: flat_loss(logits.to(torch.float32), labels) * 2 + 1,
}
OF_THE_WHOLE: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "smoothed": lambda logits, labels: flat_loss(logits, labels, label_smoothing=0.1),
    "weighted": lambda logits, labels: flat_loss(logits, labels, weight=torch.arange(96.0)),
    "each": lambda logits, labels: flat_loss(logits, labels, reduction="none").square().sum(),
    "classes first": lambda logits, labels: F.cross_entropy(logits.transpose(1, 2), labels),
    "log": lambda logits, labels: F.log_softmax(logits, -1)[labels >= 0].mean(),
    "some of a row": lambda logits, labels: logits[..., :50].logsumexp(-1).sum(),
    "one of a row": lambda logits, labels: logits[..., 3].sum() + logits[:, 1, 4].sum(),
    "in place": in_place,
    "with others": lambda logits, labels: (torch.cat([logits, logits * 2]) * torch.ones(96)).tanh().mean(),
    "twice": lambda logits, labels: flat_loss(logits, labels) + logits.logsumexp(-1).square().mean(),
}
"""Losses that need all logits."""


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, *OF_THE_WHOLE])
def test_whatever_is_done_with_logits_has_its_loss_and_gradients(
    name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {**LOSSES, **OF_THE_WHOLE}[name]
    whole, put_off = a_pair_of_heads(frozen)
    expected = loss_and_gradients(whole, loss)
    if name in LOSSES:
        monkeypatch.setattr(loss_chunks, "linear_rows", None)  # would compute them all at once
    for found, right in zip(loss_and_gradients(put_off, loss), expected, strict=True):
        assert (found is None) == (right is None)
        if found is not None:
            torch.testing.assert_close(found, right, rtol=2e-6, atol=1e-7)


def test_logits_have_their_shape_before_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_chunks, "linear_rows", None)
    logits = a_pair_of_heads()[1].head(torch.randn(2, 12, 32))
    assert (logits.shape, logits.size(-1), logits.dim(), len(logits)) == ((2, 12, 96), 96, 3, 2)
    assert (logits.dtype, logits.device, logits.is_floating_point()) == (torch.float32, torch.device("cpu"), True)
    assert logits.to(torch.float64).dtype == torch.float64
    assert logits[:, -1].shape == (2, 96)
    assert logits[0].unsqueeze(0).shape == (1, 12, 96)


def test_a_change_in_place_of_logits_with_another_view_is_refused() -> None:
    logits = a_pair_of_heads()[1].head(torch.randn(2, 12, 32))
    rows = logits.view(-1, 96)
    with pytest.raises(ModelError, match="in place"):
        logits.div_(2.0)
    assert rows.shape == (24, 96)


def test_only_a_head_of_its_own_with_more_logits_than_a_chunk() -> None:
    for config, tokens, many in (
        ({}, 8, True),
        ({}, 7, False),
        ({"tie_word_embeddings": True}, 1000, False),
    ):
        assert has_many_logits(build_model(random_source("llama", **config)), tokens) == many


def test_the_plan_counts_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, "llama", seq_len=64)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chunks = find_figures(recipe, 1)
    monkeypatch.setattr(loss_chunks, "CHUNK", 1 << 24)
    whole = find_figures(recipe, 1)
    assert (chunks.model.loss_in_chunks, whole.model.loss_in_chunks) == (True, False)
    assert chunks.model.surveyed
    assert chunks.model.notes == ()
    needed = {}
    for figures, chunk in ((chunks, 7 * 96), (whole, 1 << 24)):
        monkeypatch.setattr(loss_chunks, "CHUNK", chunk)
        plan = make_plan(recipe, figures)
        lines = run(recipe, replace(plan, working=plan.working.shrunk(1 << 60)))
        needed[chunk] = (plan, [line["loss"] for line in lines])
    assert needed[7 * 96][1] == pytest.approx(needed[1 << 24][1], rel=1e-6)
    turns = [figures.model.units[figures.model.turn or 0] for figures in (chunks, whole)]
    taken = [
        3 * turn.output_bytes + turn.saved_bytes + m.model.loss_bytes
        for turn, m in zip(turns, (chunks, whole), strict=True)
    ]
    assert taken[0] < taken[1] / 3


def test_a_model_that_does_more_with_its_heads_weight_keeps_its_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = recipe_of(tmp_path, "llama")
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)
    figures = find_figures(recipe, 1)
    assert not figures.model.loss_in_chunks
    assert "lm_head" in [unit.name for unit in figures.model.units]
    run(recipe, make_plan(recipe, figures))


def test_memory_of_the_loss_does_not_follow_the_batch(tmp_path: Path) -> None:
    """2048 tokens of a vocabulary of 128K: the logits alone would take a GiB, and with their loss more than 3."""
    done = subprocess.run(command("peak_of_loss", tmp_path), check=True, capture_output=True, env=environment())
    told = json.loads(done.stdout.splitlines()[-1])
    taken_by_all = 3 * 2048 * 2**17 * 4
    assert told["peak"] < told["planned"]
    assert told["peak"] - (told["planned"] - told["compute"]) < taken_by_all / 8
    assert told["compute"] < told["whole"] / 8
