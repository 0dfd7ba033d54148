"""Loss in chunks: logits of a few tokens at a time give the losses, gradients and weights that all of them give."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checkpoints import resumed, save
from in_process import run
from own_processes import in_processes
from peaks import peak_of_loss
from plain import engine_losses, every_other_unit_cached, everything_on, open_engine, plain_losses, relative_difference
from tiny_models import random_source
from tiny_recipes import recipe_of
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.units import chunked_loss, loss_chunks
from zinf_cli.engine.units.chunked_loss import backward_follows
from zinf_cli.engine.units.loss_chunks import HeadWeight, has_many_logits, keep_logits, put_off_logits
from zinf_cli.engine.units.origins import parts_of
from zinf_cli.engine.units.tiles import cut
from zinf_cli.errors import ModelError
from zinf_cli.models.model import build_model
from zinf_cli.plan.search import best_plan
from zinf_cli.train.figures import find_figures

STEPS = 6
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {},
    "gemma2": {"final_logit_softcapping": 1.0},
    "cohere": {"logit_scale": 0.5},
    "phi": {},
    "gpt2": {"tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "mixtral": {},
    "mamba": {"tie_word_embeddings": False},
}
SOME_ROWS = 40 * 32
"""Elements of a part: a head of 96 rows has three tiles."""
IN_TILES = ("llama", "gemma2", "cohere", "phi")


@pytest.fixture(autouse=True)
def few_tokens_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of a vocabulary of 96: the last chunk of 24 tokens is shorter."""
    monkeypatch.setattr(chunked_loss, "CHUNK", 7 * 96)


def in_chunks(name: str, options: EngineOptions, **more: Any) -> Engine:
    return open_engine(random_source(name, **MODELS[name]), options, in_chunks=True, **more)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "most"), [*((name, None) for name in MODELS), *((name, SOME_ROWS) for name in IN_TILES)]
)
def test_learns_as_plain_pytorch_does(
    name: str, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_chunks, "linear", None)  # would compute them all at once
    engine = in_chunks(name, everything_on("nvme", tmp_path), most=most)
    found = engine_losses(engine, STEPS, evaluate_every=4)
    assert relative_difference(found, plain_losses(random_source(name, **MODELS[name]), STEPS)) < 1e-6


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "most"), [("llama", None), ("gemma2", None), ("gemma2", SOME_ROWS)])
def test_all_placements_have_the_same_bits(name: str, most: int | None, tmp_path: Path) -> None:
    nvme = everything_on("nvme", tmp_path)
    expected = engine_losses(in_chunks(name, nvme, most=most), STEPS)
    placements = [replace(nvme, speculate=True), EngineOptions()]
    if most is None:
        placements += [EngineOptions("device", "device", "device", "device"), every_other_unit_cached(nvme)]
    for options in placements:
        assert engine_losses(in_chunks(name, options, most=most), STEPS) == expected, options


@pytest.mark.parametrize("most", [None, SOME_ROWS])
def test_a_kept_graph_of_the_head_has_its_gradients(most: int | None) -> None:
    """Where ranks agree on every visit, nothing turns: the head's backward comes in a later visit."""
    engine = in_chunks("gemma2", EngineOptions(), most=most, keep=True)
    engine._sweep._lockstep = engine._sweep._disagreed = True
    found = engine_losses(engine, 3)
    assert relative_difference(found, plain_losses(random_source("gemma2", **MODELS["gemma2"]), 3)) < 1e-6


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "most"), [("llama", None), ("gemma2", None), ("gemma2", SOME_ROWS)])
def test_in_bf16_chunks_change_nothing_but_rounding(name: str, most: int | None) -> None:
    expected = plain_losses(random_source(name, **MODELS[name]), STEPS, dtype=torch.bfloat16)
    engine = in_chunks(name, EngineOptions(), dtype=torch.bfloat16, most=most)
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


def a_pair_of_heads(frozen: bool = False, most: int | None = None) -> tuple[Head, Head]:
    """The same head twice, and the second one puts its logits off; it has tiles of `most` elements."""
    whole, put_off = Head(frozen), Head(frozen)
    if most is not None:
        cut(put_off, most)
    assert has_many_logits(put_off, 24)
    put_off_logits(put_off)
    for param, part in ((param, part) for param in put_off.parameters() if (part := parts_of(put_off).get(id(param)))):
        param.data = whole.head.weight.detach().flatten()[part.first :][: param.numel()].view(param.shape).clone()
    return whole, put_off


def loss_and_gradients(head: Head, of: Callable[[torch.Tensor, torch.Tensor], Any]) -> list[torch.Tensor | None]:
    """The loss; the gradients of the input, of the bias and of the weight."""
    torch.manual_seed(1)
    hidden = torch.randn(2, 12, 32, requires_grad=True)
    labels = torch.randint(0, 96, (2, 12))
    labels[0, :7] = labels[1, 3:9] = -100  # a chunk of nothing else, and some
    result = of(head.head(hidden), labels)
    result.backward()
    of_rows = [param.grad for param in head.parameters() if param.dim() == 2]
    of_weight = torch.cat([grad for grad in of_rows if grad is not None]) if of_rows[0] is not None else None
    return [result.detach(), hidden.grad, head.head.bias.grad, of_weight]


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


@pytest.mark.parametrize("most", [None, SOME_ROWS])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, *OF_THE_WHOLE])
def test_whatever_is_done_with_logits_has_its_loss_and_gradients(
    name: str, frozen: bool, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {**LOSSES, **OF_THE_WHOLE}[name]
    whole, put_off = a_pair_of_heads(frozen, most)
    expected = loss_and_gradients(whole, loss)
    if name in LOSSES:
        monkeypatch.setattr(loss_chunks, "linear", None)  # would compute them all at once
    for scale in (None, 1.0, 2.0**-20, 0.0):  # what the loss is said to be multiplied by for its backward
        put_off.zero_grad()
        with nullcontext() if scale is None else backward_follows(scale):
            results = loss_and_gradients(put_off, loss)
        for found, right in zip(results, expected, strict=True):
            assert (found is None) == (right is None)
            if found is not None:
                torch.testing.assert_close(found, right, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("most", [None, SOME_ROWS])
def test_labels_outside_of_the_vocabulary_are_refused_and_a_chunk_of_none_gives_nothing(most: int | None) -> None:
    _, head = a_pair_of_heads(most=most)
    hidden = torch.randn(2, 12, 32)
    with pytest.raises((IndexError, RuntimeError)):
        flat_loss(head.head(hidden), torch.full((2, 12), 96))
    loss = flat_loss(head.head(hidden), torch.full((2, 12), -100))
    assert loss.isnan()
    loss.backward()
    assert not any(param.grad.any() for param in head.parameters() if param.grad is not None)


def test_logits_have_their_shape_before_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_chunks, "linear", None)
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


def test_only_where_there_are_more_logits_than_a_chunk() -> None:
    for name in ("llama", "llama-tied"):
        assert has_many_logits(build_model(random_source(name)), 8)
        assert not has_many_logits(build_model(random_source(name)), 7)
    tied: Any = build_model(random_source("llama-tied"))
    tied.model.embed_tokens.max_norm = 1.0
    assert not has_many_logits(tied, 1000)


@pytest.mark.parametrize("most", [None, SOME_ROWS])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_logits_that_were_put_off_can_be_kept_again(name: str, most: int | None) -> None:
    model = build_model(random_source(name))
    if most is not None:
        cut(model, most)
    before = {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)}
    put_off_logits(model)
    keep_logits(model)
    assert {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)} == before or most is None
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == list(before)
    assert not any(isinstance(value, HeadWeight) for module in model.modules() for value in vars(module).values())


def test_the_plan_counts_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, "llama", seq_len=64)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chunks = find_figures(recipe, 1)
    monkeypatch.setattr(chunked_loss, "CHUNK", 1 << 24)
    whole = find_figures(recipe, 1)
    assert (chunks.model.loss_in_chunks, whole.model.loss_in_chunks) == (True, False)
    assert chunks.model.surveyed
    assert chunks.model.notes == ()
    needed = {}
    for figures, chunk in ((chunks, 7 * 96), (whole, 1 << 24)):
        monkeypatch.setattr(chunked_loss, "CHUNK", chunk)
        plan = best_plan(recipe, figures)
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
    run(recipe, best_plan(recipe, figures))


def test_memory_of_the_loss_does_not_follow_the_batch(tmp_path: Path) -> None:
    """2048 tokens of a vocabulary of 128K: the logits alone would take a GiB, and with their loss more than 3."""
    (found,) = in_processes(peak_of_loss, [(tmp_path,)])
    taken_by_all = 3 * 2048 * 2**17 * 4
    assert found.peak < found.planned
    assert found.peak - (found.planned - found.compute) < taken_by_all / 8
    assert found.compute < found.whole / 8


@pytest.mark.parametrize(("most", "products"), [(0, 4), (14 * 96, 2), (24 * 96, 1)])
def test_an_accelerator_multiplies_gradients_of_several_chunks_at_once(
    most: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 tokens are four chunks. One product rounds the gradient of the weight once, as plain PyTorch does."""
    counted: list[None] = []
    join = torch.Tensor.__matmul__

    def multiply(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        counted.extend([None] * (one.shape[0] == 96))
        return join(one, other)

    monkeypatch.setattr(chunked_loss, "streams_of", lambda device: SimpleNamespace(on_cpu=not most))
    monkeypatch.setattr(chunked_loss, "DEVICE_LOGITS", most)
    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    torch.manual_seed(0)
    weight, hidden = torch.randn(96, 32).bfloat16(), torch.randn(24, 32).bfloat16()
    target = torch.randint(96, (24,))
    found = []
    for way in (weight.float(), hidden.float()), (weight, hidden):
        leaf, rows = (tensor.detach().clone().requires_grad_() for tensor in way)
        if leaf.dtype == torch.float32:
            F.cross_entropy(F.linear(rows, leaf), target).backward()
        else:
            leaf.grad_dtype = None
            with backward_follows(1.0):
                loss = chunked_loss.loss_in_chunks(leaf, rows, None, target, (), -100, "mean", torch.float32)
            loss.backward()
        assert leaf.grad is not None
        assert rows.grad is not None
        found.append((leaf.grad.float(), rows.grad.float(), leaf.grad.dtype))
    (weights, inputs, _), (of_weight, of_input, dtype) = found
    assert len(counted) == products
    assert dtype == (torch.bfloat16 if products == 1 else torch.float32)
    assert (of_weight - weights).norm() < 1e-2 * weights.norm()
    assert (of_input - inputs).norm() < 1e-2 * inputs.norm()
