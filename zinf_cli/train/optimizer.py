"""The optimizer that a recipe names, as a kernel of the engine. The kernel says what state it keeps."""

from __future__ import annotations

from collections.abc import Callable

from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.recipe.recipe import Optimizer


def kernel_of(settings: Optimizer, lr: float) -> Kernel:
    """The kernel for one step with this learning rate."""
    return KERNELS[settings.name](settings, lr)


def _adamw(settings: Optimizer, lr: float) -> Kernel:
    return AdamW(lr, *settings.betas, settings.eps, settings.weight_decay)


KERNELS: dict[str, Callable[[Optimizer, float], Kernel]] = {"adamw": _adamw}
"""The kernels by `optimizer.name`."""
