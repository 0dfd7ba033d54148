"""An accelerator adds up the gradients of Linears' weights inside of the product (engine/units/weight_grads.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator_on_cpu import checking
from benchmarks.priced import products_added_up
from happens_before import DEVICE, Checker
from plain import engine_losses, everything_on, open_engine, plain_losses, relative_difference
from tiny_models import random_source
from zinf_cli.engine.units import chunked_loss, weight_grads
from zinf_cli.engine.units.weight_grads import add_up_in_products
from zinf_cli.tiers import streams

BF16 = torch.bfloat16


@contextmanager
def an_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch, products_added_up():
        patch.setitem(streams.implementations, "cpu", Checker())
        yield


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def linear(*, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, bias=bias, dtype=BF16)
    layer.weight.grad_dtype = None
    layer.weight.grad = torch.zeros(16, 24)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_the_sum_is_that_of_unrounded_products(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = linear(bias=bias), linear(bias=bias)
    expected, touched = torch.zeros(16, 24), list[str]()
    with an_accelerator(monkeypatch):
        (undo,) = add_up_in_products(layer, DEVICE, {id(layer.weight): lambda: touched.append("weight")})
        for _ in range(3):
            inputs = [torch.randn(2, 5, 24).to(BF16)]
            inputs.append(inputs[0].clone())
            grad = torch.randn(2, 5, 16).to(BF16)
            results = [each(x.requires_grad_()) for each, x in zip((layer, plain), inputs, strict=True)]
            assert torch.equal(*results)
            for result in results:
                result.backward(grad)
            assert torch.equal(*map(gradient, inputs))
            expected.addmm_(grad.flatten(0, 1).T.float(), inputs[0].detach().flatten(0, 1).float())
        undo()
    assert touched == ["weight"] * 3
    assert torch.equal(gradient(layer.weight), expected)
    assert not torch.equal(gradient(plain.weight), expected)
    assert not bias or torch.equal(gradient(layer.bias), gradient(plain.bias))
    assert "forward" not in vars(layer)


def test_a_weight_without_a_sum_gets_its_gradient_from_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = linear(bias=False), linear(bias=False)
    layer.weight.grad = plain.weight.grad = None
    x = torch.randn(5, 24).to(BF16)
    with an_accelerator(monkeypatch):
        add_up_in_products(layer, DEVICE, {id(layer.weight): lambda: pytest.fail("it has none")})
        for each in (layer, plain):
            each(x).sum().backward()
    assert torch.equal(gradient(layer.weight), gradient(plain.weight))


def test_all_is_left_to_autograd_on_a_cpu_and_where_torch_has_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(bias=False)
    touched = {id(layer.weight): lambda: None}
    with products_added_up():
        assert add_up_in_products(layer, DEVICE, touched) == []
    monkeypatch.setitem(streams.implementations, "cpu", Checker())
    assert add_up_in_products(layer, DEVICE, touched) == []
    with an_accelerator(monkeypatch):
        assert add_up_in_products(layer.float(), DEVICE, touched) == []


@pytest.mark.parametrize("unlearned", [None, 3])
def test_rows_that_were_looked_up_are_added_to_the_sum(unlearned: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, padding_idx=unlearned, dtype=BF16)
    weight, touched = table.weight, list[str]()
    weight.grad_dtype = None
    weight.grad, expected = torch.ones(10, 4), torch.ones(10, 4)
    ids = torch.tensor([[3, 1, 1], [7, 3, 1]])
    with an_accelerator(monkeypatch):
        (undo,) = add_up_in_products(table, DEVICE, {id(weight): lambda: touched.append("weight")})
        for _ in range(2):
            grad = torch.randn(2, 3, 4).to(BF16)
            found = table(ids)
            assert torch.equal(found, weight[ids])
            found.backward(grad)
            for token, row in zip(ids.flatten().tolist(), grad.flatten(0, 1), strict=True):
                expected[token] += 0.0 if token == unlearned else row.float()
        undo()
    assert touched == ["weight"] * 2
    assert torch.equal(gradient(weight), expected)
    weight.grad = None
    with an_accelerator(monkeypatch):
        add_up_in_products(table, DEVICE, {id(weight): lambda: pytest.fail("it has none")})
        table(ids).sum().backward()
    assert gradient(weight)[1].tolist() == [3.0] * 4


def test_a_head_whose_loss_is_in_chunks_adds_its_product(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once for each micro-batch, although its logits are made in several chunks."""
    monkeypatch.setattr(chunked_loss, "CHUNK", 7 * 96)
    source = random_source("llama", tie_word_embeddings=False)
    add, added = weight_grads._add_gradient, list[torch.Tensor]()

    def adds(weight: torch.Tensor, *rest: Any) -> None:
        added.append(weight)
        add(weight, *rest)

    monkeypatch.setattr(weight_grads, "_add_gradient", adds)
    with an_accelerator(monkeypatch):
        options = replace(everything_on("device", tmp_path), device=DEVICE)
        engine = open_engine(source, options, dtype=BF16, in_chunks=True)
        found = engine_losses(engine, 2, count=2, device=DEVICE)
    assert [weight.shape[1] for weight in added] == [32] * 4
    assert relative_difference(found, plain_losses(source, 2, count=2, dtype=BF16)) < 1e-3
    assert not any(hasattr(param, "add_product") for param in engine.model.parameters())


def test_every_placement_gives_the_same_bits(tmp_path: Path) -> None:
    expected = plain_losses(random_source("llama"), 3, dtype=BF16)

    def losses(tier: str, *, keep: bool) -> list[list[float]]:
        with checking(Checker()):
            options = replace(everything_on(tier, tmp_path), device=DEVICE)
            engine = open_engine(random_source("llama"), options, dtype=BF16, keep=keep)
            return engine_losses(engine, 3, device=DEVICE)

    found = losses("device", keep=False)
    assert found != expected
    assert relative_difference(found, expected) < 1e-3
    assert losses("cpu", keep=True) == losses("nvme", keep=False) == found
