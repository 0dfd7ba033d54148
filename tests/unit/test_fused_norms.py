"""An accelerator computes RMSNorms in one kernel (engine/units/fused_norms.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from benchmarks.priced import norms_in_one_kernel
from happens_before import DEVICE, Checker
from plain import engine_losses, everything_on, open_engine, plain_losses
from tiny_models import random_source
from zinf_cli.engine.units.fused_norms import eps_of, fuse_norms
from zinf_cli.tiers import streams

WIDTH = 64


@pytest.fixture
def _an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(streams.implementations, "cpu", Checker())


def norm(*, dtype: torch.dtype = torch.bfloat16) -> LlamaRMSNorm:
    torch.manual_seed(0)
    made = LlamaRMSNorm(WIDTH, eps=1e-5).to(dtype)
    nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize(
    ("made", "eps"),
    [
        (LlamaRMSNorm(WIDTH, eps=1e-5), 1e-5),
        (T5LayerNorm(WIDTH), 1e-6),
        (Gemma2RMSNorm(WIDTH), None),  # one more than its weight
        (Olmo2RMSNorm(WIDTH), None),  # rounds after its weight
        (nn.RMSNorm(WIDTH), None),  # torch fuses its own
        (nn.LayerNorm(WIDTH), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_is_known_by_what_it_computes(made: nn.Module, eps: float | None) -> None:
    assert eps_of(made.to(torch.bfloat16)) == eps_of(made.to("meta")) == eps
    assert eps_of(made.float()) is None


@pytest.mark.usefixtures("_an_accelerator")
@pytest.mark.parametrize("in_one_kernel", [False, True])
def test_results_and_gradients_are_those_of_the_models_own_code(in_one_kernel: bool) -> None:
    """torch makes the kernel of other operations on a CPU, those of the model's code. Another one adds up otherwise."""
    own, fused = norm(), norm()
    (undo,) = fuse_norms(fused, DEVICE)
    found = []
    for each in (own, fused):
        x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        if each is fused and in_one_kernel:
            with norms_in_one_kernel():
                result = each(x)
                result.square().sum().backward()
        else:
            result = each(x)
            result.square().sum().backward()
        assert x.grad is not None
        assert each.weight.grad is not None
        found.append((result, x.grad, each.weight.grad))
    for one, other in zip(*found, strict=True):
        if in_one_kernel:
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)
    undo()
    assert "forward" not in vars(fused)


@pytest.mark.usefixtures("_an_accelerator")
def test_another_dtype_and_other_arguments_are_left_to_the_models_own_code() -> None:
    own, fused = norm(), norm()
    fuse_norms(fused, DEVICE)
    x = torch.randn(5, WIDTH)
    assert torch.equal(own(x), fused(x))
    assert torch.equal(own(hidden_states=x), fused(hidden_states=x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own(x.bfloat16()), fused(x.bfloat16()))
    assert fuse_norms(norm(dtype=torch.float32), DEVICE) == []


def test_a_cpu_computes_them_as_the_models_code_does() -> None:
    assert fuse_norms(norm(), torch.device("cpu")) == []


@pytest.mark.usefixtures("_an_accelerator")
def test_a_model_learns_with_them(tmp_path: Path) -> None:
    """Where the kernel is made of the same operations, with the bits of plain PyTorch."""
    options = replace(everything_on("device", tmp_path), device=DEVICE)
    engine = open_engine(random_source("llama"), options, dtype=torch.bfloat16)
    assert sum("forward" in vars(module) for module in engine.model.modules() if isinstance(module, LlamaRMSNorm)) > 2
    expected = plain_losses(random_source("llama"), 2, dtype=torch.bfloat16)
    assert engine_losses(engine, 2, device=DEVICE) == expected
