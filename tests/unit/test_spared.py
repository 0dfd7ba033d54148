"""A recompute leaves out the products whose results backward does not need (engine/compute/spared.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blocks import WIDTH, Block, Blocks, Mode, assert_exact, make_batch, on_meta, open_blocks
from tiny_models import random_source
from zinf_cli.engine.compute.survey import survey
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.models.model import build_model
from zinf_cli.train.setup import model_loss


class Ends(Block):
    """Ends with a product, which is added to the input; or, where values are computed, as a test wants it."""

    otherwise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(torch.tanh(x))
        own = type(self).otherwise
        return x + y * 0.5 if own is None or x.is_meta else own(x, y)


def _changes_a_summand(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    moved = x * 1.0
    result = moved + y
    moved.mul_(2.0)
    return torch.tanh(result) + moved


OTHERWISE = {
    "saves it": lambda x, y: torch.tanh(x + y),
    "saves it in a multiplication": lambda x, y: x + y * x,
    "changes it": lambda x, y: torch.tanh(y.add_(x)),
    "reads it": lambda x, y: torch.tanh(x) * (2.0 if (x + y).sum().item() > 0 else 1.0) + y,
    "changes what is added": _changes_a_summand,
    "multiplies it": lambda x, y: x + y @ y.T @ y * 0.01,
}


class Products(TorchDispatchMode):
    """Counts products with a bias, which forward and recompute make, and backward does not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten.addmm.default and not args[0].is_meta
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "ends"), [("llama", ".mlp.down_proj"), ("gemma2", None), ("gpt2", None), ("qwen3_moe", None)]
)
def test_the_survey_finds_what_backward_does_not_need(name: str, ends: str | None) -> None:
    """gemma2 has a norm behind the product, gpt2 a dropout and no Linear, a mixture weighs what its experts give."""
    model = build_model(random_source(name))
    ids = torch.zeros((2, 12), dtype=torch.long, device="meta")
    found = survey(model, partial(model_loss, model, ids, ids), 1).spared
    layers = {name.split(ends)[0] for name, _ in model.named_modules() if ends is not None and name.endswith(ends)}
    assert found == {f"{layer}{ends}" for layer in layers}
    assert bool(found) == (ends is not None)


def test_no_such_product_is_computed_again(tmp_path: Path) -> None:
    counted = []
    with torch.random.fork_rng():
        engine = open_blocks(on_meta(Blocks(Ends)), Mode(), tmp_path)
        for step in range(2):
            work = [MicroBatch(partial(engine.model, make_batch(step, 0)))]
            with Products() as products:
                engine.train_step(work, AdamW(1e-2), more=step == 0)
            counted.append(products.number)
    engine.close()
    assert counted == [4 + 3, 4]  # the last of four turns; the first step compares results
    assert all("forward" not in vars(module) for module in engine.model.modules())


@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", keep=True, per_sweep=2)], ids=str)
def test_losses_have_the_bits_of_plain_pytorch(mode: Mode, tmp_path: Path) -> None:
    assert_exact(partial(Blocks, Ends), mode, tmp_path)


@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_bits_are_the_same_if_the_run_needs_what_the_survey_did_not(
    otherwise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ends, "otherwise", staticmethod(OTHERWISE[otherwise]))
    model = on_meta(Blocks(Ends))
    assert survey(model, partial(model, torch.zeros((3, WIDTH), device="meta")), 1).spared
    assert_exact(partial(Blocks, Ends), Mode(), tmp_path)
