"""The optimizer that a recipe names, as a kernel of the engine. The kernel says what state it keeps."""

from __future__ import annotations

from collections.abc import Callable

from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.engine.traffic.lion import Lion
from zinf_cli.engine.traffic.sgd import Sgd
from zinf_cli.recipe.recipe import Optimizer


def kernel_of(settings: Optimizer, lr: float) -> Kernel:
    """The kernel for one step with this learning rate."""
    return KERNELS[settings.name](settings, lr)


def _adamw(settings: Optimizer, lr: float) -> Kernel:
    assert settings.betas is not None
    return AdamW(lr, *settings.betas, settings.eps, settings.weight_decay)


def _sgd(settings: Optimizer, lr: float) -> Kernel:
    assert settings.momentum is not None
    return Sgd(lr, settings.momentum, settings.weight_decay)


def _lion(settings: Optimizer, lr: float) -> Kernel:
    assert settings.betas is not None
    return Lion(lr, *settings.betas, settings.weight_decay)


KERNELS: dict[str, Callable[[Optimizer, float], Kernel]] = {"adamw": _adamw, "sgd": _sgd, "lion": _lion}
"""The kernels by `optimizer.name`."""
