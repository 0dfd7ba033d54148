"""SGD and Lion beside torch.optim.SGD and Lion as published: the same bits wherever the state lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from plain import LR, engine_losses, everything_on, open_engine, plain_losses, relative_difference
from tiny_models import random_source
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.errors import RecipeError
from zinf_cli.model_state import num_factors
from zinf_cli.recipe.recipe import Optimizer
from zinf_cli.train.optimizer import KERNELS, kernel_of, undecayed

STEPS = 10


class PublishedLion(torch.optim.Optimizer):
    """arXiv 2302.06675, algorithm 2, on whole parameters."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                assert param.grad is not None
                moment = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                update = moment.lerp(param.grad, 1 - beta1)
                param.add_(torch.sign(update), alpha=-group["lr"])
                moment.lerp_(param.grad, 1 - beta2)


REFERENCES: dict[str, tuple[Optimizer, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (
        Optimizer(name="sgd", lr=30 * LR, momentum=0.8, weight_decay=0.1),
        partial(torch.optim.SGD, lr=30 * LR, momentum=0.8, weight_decay=0.1),
    ),
    "lion": (
        Optimizer(name="lion", lr=LR, weight_decay=0.1),
        partial(PublishedLion, lr=LR, betas=(0.9, 0.99), weight_decay=0.1),
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["in memory", "deferred", "speculative", "eager"])
@pytest.mark.parametrize("name", REFERENCES)
def test_it_trains_with_the_bits_of_its_reference(name: str, how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings, reference = REFERENCES[name]
    kernel = kernel_of(settings, settings.lr)
    clip = {"eager": None, "speculative": 1.12}.get(how, 1.0)
    expected: dict[str, torch.Tensor] = {}
    losses = plain_losses(
        random_source("llama"), STEPS, clip=clip, dtype=dtype, parameters=expected, optimizer_of=reference
    )
    options = replace(everything_on("cpu" if how == "in memory" else "nvme", tmp_path), speculate=how == "speculative")
    engine = open_engine(random_source("llama"), options, optimizer=kernel.state, dtype=dtype)
    assert engine_losses(engine, STEPS, clip=clip, eager=how == "eager", kernel=kernel, close=False) == losses
    found = {name: value for number in range(len(engine.units)) for name, value in engine.read_params(number).items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    engine.close()


def test_a_setting_of_another_optimizer_is_refused() -> None:
    assert (Optimizer().betas, Optimizer().momentum) == ((0.9, 0.999), None)
    assert (Optimizer(name="lion").betas, Optimizer(name="sgd").momentum) == ((0.9, 0.99), 0.9)
    sgd = Optimizer(name="sgd", momentum=0.0)
    assert (sgd.betas, sgd.momentum, Optimizer(**sgd.model_dump())) == (None, 0.0, sgd)
    with pytest.raises(ValidationError, match="sgd has no betas; its key is momentum"):
        Optimizer(name="sgd", betas=(0.9, 0.99))
    with pytest.raises(ValidationError, match="adamw has no momentum; its key is betas"):
        Optimizer(momentum=0.9)


@pytest.mark.parametrize("most", [None, 1000])
@pytest.mark.parametrize("how", ["deferred", "eager"])
def test_weight_decay_leaves_norms_out(how: str, most: int | None, tmp_path: Path) -> None:
    """As two parameter groups do; and in parts as well."""
    source, clip = random_source("llama"), None if how == "eager" else 1.0
    expected: dict[str, torch.Tensor] = {}
    losses = plain_losses(source, STEPS, clip=clip, parameters=expected, optimizer_of=_in_two_groups)
    engine = open_engine(source, everything_on("nvme", tmp_path), most=most)
    names = undecayed(engine.model, ["*norm*"])
    assert names == {name for name, value in expected.items() if value.dim() == 1}
    kernel = AdamW(LR, weight_decay=1.0, no_decay=names)
    found = engine_losses(engine, STEPS, clip=clip, eager=how == "eager", kernel=kernel, close=False)
    assert found == losses if most is None else relative_difference(found, losses) < 1e-6
    engine.close()
    with pytest.raises(RecipeError, match=r"optimizer.no_decay: '\*nrom\*' matches no parameter, such as model.embed"):
        undecayed(engine.model, ["*.weight", "*nrom*"])


def _in_two_groups(params: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    params = list(params)
    matrices, vectors = ([param for param in params if (param.dim() > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 1.0}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR)


@pytest.mark.parametrize("name", KERNELS)
def test_an_update_leaves_a_gradient_that_is_not_clipped(name: str) -> None:
    """A speculative update is made again from it, if the step clips."""
    kernel = kernel_of(Optimizer.model_validate({"name": name, "weight_decay": 0.5}), 0.1).of(torch.Size((3, 3)))
    kept = kernel.state.of(whole=bool(kernel.state.whole))
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(9, generator=generator) for _ in range(2))
    before = param.clone(), grad.clone()
    kernel.update(param, grad, *(torch.zeros(num_factors((3, 3)) if f.factored else 9) for f in kept.fields), 1)
    assert torch.equal(grad, before[1])
    assert not torch.equal(param, before[0])
