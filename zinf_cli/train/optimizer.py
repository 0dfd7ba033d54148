"""The optimizer that a recipe names, as a kernel of the engine. The kernel says what state it keeps."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from zinf_cli.engine.traffic.adafactor import Adafactor
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.engine.traffic.lion import Lion
from zinf_cli.engine.traffic.muon import Muon
from zinf_cli.engine.traffic.sgd import Sgd
from zinf_cli.engine.units.origins import parts_of, update_whole
from zinf_cli.errors import RecipeError
from zinf_cli.model_state import STATE_DTYPES, OptimizerState
from zinf_cli.models.matrices import matrices_of
from zinf_cli.recipe.recipe import Optimizer, Recipe


def kernel_of(settings: Optimizer, lr: float) -> Kernel:
    """The kernel for one step with this learning rate."""
    return KERNELS[settings.name](settings, lr)


def state_of(recipe: Recipe) -> OptimizerState:
    """What is stored of a parameter."""
    settings = recipe.optimizer
    state = kernel_of(settings, settings.lr).state.stored_as(STATE_DTYPES[settings.state_dtype])
    return replace(state, adapts=recipe.adapter.type is not None)


def undecayed(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the parameters that match one of `patterns`; of a part of a parameter, the whole one's name counts.

    RecipeError if a pattern matches no parameter.
    """
    parts = parts_of(model)
    whole = {name: parts[id(p)].name if id(p) in parts else name for name, p in model.named_parameters()}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in whole.values()):
            raise RecipeError([f"optimizer.no_decay: {pattern!r} matches no parameter, such as {next(iter(whole))}"])
    return frozenset(
        name for name, origin in whole.items() if any(fnmatch.fnmatchcase(origin, each) for each in patterns)
    )


def mark_whole(model: PreTrainedModel, optimizer: str) -> None:
    """Mark what an optimizer updates whole: muon the matrices of layers, but for packed experts; adafactor all."""
    if optimizer == "muon":
        for _, module, name, param in matrices_of(model):
            if param.dim() == 2:
                update_whole(module, name)
    if optimizer == "adafactor":
        for module in model.modules():
            for name in (name for name, param in module._parameters.items() if param is not None):
                update_whole(module, name)


def check_ranks(recipe: Recipe, world_size: int) -> None:
    """RecipeError if an optimizer that updates whole matrices would get slices of them."""
    what = {"muon": "matrices", "adafactor": "parameters"}.get(recipe.optimizer.name)
    if what is not None and world_size > 1:
        raise RecipeError(
            [f"optimizer.name: {recipe.optimizer.name} updates whole {what}, and each of {world_size} ranks would have "
             "a slice of them: run it on one rank (--slots 1), or take another optimizer"]
        )  # fmt: skip


def newton_schulz_flops(rows: int, columns: int) -> float:
    """What muon's iteration takes for a matrix: five times a product with its transpose, and two with the result."""
    least, most = sorted((rows, columns))
    return 5.0 * (4 * least**2 * most + 2 * least**3)


def whole_flops(optimizer: str, shapes: Iterable[tuple[int, ...]]) -> float:
    """What an optimizer computes for what it updates whole, beside what it does with each element."""
    return sum(newton_schulz_flops(*shape) for shape in shapes) if optimizer == "muon" else 0.0


def _adamw(settings: Optimizer, lr: float) -> Kernel:
    assert settings.betas is not None
    return AdamW(lr, *settings.betas, settings.eps, weight_decay=settings.weight_decay)


def _sgd(settings: Optimizer, lr: float) -> Kernel:
    assert settings.momentum is not None
    return Sgd(lr, settings.momentum, weight_decay=settings.weight_decay)


def _lion(settings: Optimizer, lr: float) -> Kernel:
    assert settings.betas is not None
    return Lion(lr, *settings.betas, weight_decay=settings.weight_decay)


def _muon(settings: Optimizer, lr: float) -> Kernel:
    assert settings.betas is not None
    assert settings.momentum is not None
    return Muon(lr, settings.momentum, *settings.betas, settings.eps, weight_decay=settings.weight_decay)


def _adafactor(settings: Optimizer, lr: float) -> Kernel:
    return Adafactor(lr, weight_decay=settings.weight_decay)


KERNELS: dict[str, Callable[[Optimizer, float], Kernel]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
    "muon": _muon,
    "adafactor": _adafactor,
}
"""The kernels by `optimizer.name`."""
