"""Modules as users write them: what torch offers inside a block is as exact as plain PyTorch is, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from blocks import WIDTH, Block, Blocks, Mode, assert_exact, open_blocks
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.errors import ModelError
from zinf_cli.models.model import _parameters_on_meta

Forward = Callable[[Any, torch.Tensor], Any]
Change = Callable[[Any], Any]
IN_MODES = [Mode("nvme"), Mode(keep=True), Mode(per_sweep=1)]


def block(forward: Forward | None = None, begin: Change = lambda own: None) -> Callable[[], Blocks]:
    """Makes a model of blocks of this kind."""
    body = {"begin": begin, **({} if forward is None else {"forward": forward})}
    return lambda: Blocks(type("Kind", (Block,), body))


def with_param(value: torch.Tensor, forward: Forward, *, trained: bool = True) -> Callable[[], Blocks]:
    def begin(own: Any) -> None:
        own.more = nn.Parameter(value.clone(), requires_grad=trained)

    return block(forward, begin)


def normed(norm: Callable[[nn.Linear], nn.Module]) -> Callable[[], Blocks]:
    return block(None, lambda own: setattr(own, "linear", norm(own.linear)))


def times_more(own: Any, x: torch.Tensor) -> Any:
    return (x + torch.tanh(own.linear(x)) * own.more).float()


class Scaled(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        Scaled.calls += 1
        ctx.scale = 1 + 0.1 * (Scaled.calls % 3)
        return x * ctx.scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.scale


class ScaledByBackwards(Scaled):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        ctx.scale = 1 + 0.1 * (ScaledByBackwards.calls % 3)
        return x * ctx.scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ScaledByBackwards.calls += 1
        return grads[0] * ctx.scale


def counted_in_backward() -> Blocks:
    """In the first two layers, whose backward is the last."""
    ScaledByBackwards.calls = 0

    def forward(own: Any, x: torch.Tensor) -> Any:
        hidden = own.linear(x)
        return x + torch.tanh(hidden if own.number > 1 else ScaledByBackwards.apply(hidden))  # type: ignore[no-untyped-call]

    return block(forward)()


def counted() -> Blocks:
    Scaled.calls = 0
    return block(lambda own, x: x + torch.tanh(Scaled.apply(own.linear(x))))()  # type: ignore[no-untyped-call]


def hooked(own: Any, x: torch.Tensor) -> Any:
    hidden = own.linear(x)
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: grad * 0.5)
    return x + torch.tanh(hidden)


def differentiated(own: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        given = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(torch.tanh(own.linear(given)).sum(), given, create_graph=True)
    return x + torch.tanh(own.linear(x)) + 0.1 * grad


def in_bf16(own: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = own.linear(x)
        with torch.autocast("cpu", enabled=False):
            return x + torch.tanh(hidden.float())


def replaced(own: Any, x: torch.Tensor) -> torch.Tensor:
    weights = {name: value * 0.9 for name, value in own.linear.named_parameters()}
    return x + torch.tanh(torch.func.functional_call(own.linear, weights, (x,)))


def frozen_in_part(own: Any) -> None:
    own.linear.bias.requires_grad_(False)
    if own.number == 1:
        own.requires_grad_(False)


class Dropping(Blocks):
    """LayerDrop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if torch.rand(()) < 0.6 else x
        return x.square().mean()


def halved(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(grad * 0.5 if grad is not None else None for grad in inputs)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": normed(parametrizations.weight_norm),
    "spectral norm": normed(parametrizations.spectral_norm),
    "orthogonal, exponential": normed(partial(parametrizations.orthogonal, orthogonal_map="matrix_exp")),
    "orthogonal, Cayley": normed(partial(parametrizations.orthogonal, orthogonal_map="cayley")),
    "orthogonal, Householder": normed(
        partial(parametrizations.orthogonal, orthogonal_map="householder", use_trivialization=False)
    ),
    "weight norm by a hook": normed(nn.utils.weight_norm),
    "spectral norm by a hook": normed(nn.utils.spectral_norm),
    "autograd function with a counter": counted,
    "autograd function with a counter in backward": counted_in_backward,
    "checkpoint": block(lambda own, x: x + checkpoint(lambda y: torch.tanh(own.linear(y)), x, use_reentrant=False)),
    "hook on a tensor": block(hooked),
    "hooks on gradients of modules": block(
        None, lambda own: [part.register_full_backward_hook(halved) for part in (own, own.linear)]
    ),
    "gradient inside": block(differentiated),
    "autocast": block(in_bf16),
    "other weights in a call": block(replaced),
    "in place": block(lambda own, x: x + torch.relu_(own.linear(x))),
    "layer drop": Dropping,
    "frozen in part": block(None, frozen_in_part),
    "scalar": with_param(torch.ones(()), times_more),
    "complex": with_param(
        torch.ones(WIDTH, dtype=torch.complex64), lambda own, x: (x + own.linear(x).tanh() * own.more).real
    ),
    "integers": with_param(torch.ones(WIDTH, dtype=torch.int32), times_more, trained=False),
    "booleans": with_param(torch.ones(WIDTH, dtype=torch.bool), times_more, trained=False),
    "nothing": with_param(torch.ones(0, WIDTH), lambda own, x: x + torch.tanh(own.linear(x)) + own.more.sum()),
    "transposed": with_param(torch.ones(WIDTH, 9).t(), lambda own, x: x + own.linear(x) * own.more[3]),
}


@pytest.mark.filterwarnings("ignore")  # of torch, of old hooks and of gradients that an input does not need
@pytest.mark.sampled
@pytest.mark.parametrize("mode", IN_MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_a_user_is_exact(kind: str, mode: Mode, tmp_path: Path) -> None:
    """On some CPUs (AMD EPYC), vectorised kernels of complex numbers have other last bits at other places in memory."""
    assert_exact(KINDS[kind], mode, tmp_path, within=1e-6 if kind == "complex" else 0.0)


def keep_a_view(own: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(own, "turned") and not (own.late and x.is_meta):
        own.turned = own.linear.weight.t()
    return x + torch.tanh(own.linear(x)) + (0.1 * x @ own.turned if hasattr(own, "turned") else 0.0)


def prune_late(own: Any, x: torch.Tensor) -> torch.Tensor:
    own.calls += 1
    if own.calls > 2:
        own.linear.weight.data.mul_(0.9)
    return x + torch.tanh(own.linear(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a view that is kept": (
        block(keep_a_view, lambda own: setattr(own, "late", False)),
        "the model keeps a view of a weight in layers.0.turned",
    ),
    "a view that is kept on a way that no survey takes": (
        block(keep_a_view, lambda own: setattr(own, "late", True)),
        r"the model keeps a view of a weight in layers.\d.turned",
    ),
    "a write on such a way": (
        block(prune_late, lambda own: setattr(own, "calls", 0)),
        "the model's forward changes its weight layers.0.linear.weight",
    ),
    "a module in a list": (
        block(lambda own, x: own.parts[0](x), lambda own: setattr(own, "parts", [nn.Linear(WIDTH, WIDTH)])),
        r"layers.0.parts\[0\] has parameters, and is no module of the model's own",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_exact_is_refused(kind: str, tmp_path: Path) -> None:
    make, why = REFUSED[kind]
    with _parameters_on_meta():
        model = make()
    with pytest.raises(ModelError, match=why):
        train(model, tmp_path)


def train(model: nn.Module, folder: Path) -> None:
    """Two steps."""
    opened = open_blocks(model, Mode("nvme"), folder)
    try:
        for step in range(2):
            work = [MicroBatch(partial(model, torch.randn(3, WIDTH)), 0.5, number) for number in range(2)]
            opened.train_step(work, AdamW(1e-3), more=step == 0)
    finally:
        opened.close()
