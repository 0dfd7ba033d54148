"""Models of a few small blocks, trained by plain PyTorch and by the engine: losses and buffers of both."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from plain import everything_on
from zinf_cli.engine.compute.survey import survey
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW

WIDTH, STEPS, COUNT, LR = 32, 3, 3, 1e-2
MIB = 2**20


class Block(nn.Module):
    """Kinds override `forward`, and `begin` for what they own beside the linear layer."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.begin()

    def begin(self) -> None: ...

    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.tanh(self.linear(x))


class Blocks(nn.Module):
    """Kinds override `between`, what the model makes of a block's result, or `forward`."""

    def __init__(self, kind: type[Block] = Block, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(number) for number in range(count))

    def between(self, before: torch.Tensor, result: Any) -> torch.Tensor:
        return result  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.between(x, layer(x))
        return x.square().mean()


@dataclass(frozen=True)
class Mode:
    """How the engine runs: the tier of everything, which activations are kept, micro-batches of a sweep."""

    tier: str = "cpu"
    keep: bool = False
    per_sweep: int | None = None

    def __str__(self) -> str:
        return f"{self.tier}-{'kept' if self.keep else 'recomputed'}-{self.per_sweep or 'all'}"


MODES = [Mode(), Mode(keep=True), Mode("nvme"), Mode("nvme", per_sweep=1), Mode("nvme", keep=True, per_sweep=2)]


@dataclass
class Result:
    losses: list[float]
    """Of every micro-batch, and of an evaluation after the second step."""
    buffers: dict[str, torch.Tensor]


def plain(make: Callable[[], nn.Module]) -> Result:
    """One micro-batch after the other, AdamW."""
    _seed()
    model = make()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(_weights(name, param.shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        for number in range(COUNT):
            torch.manual_seed(100 * step + number)
            loss = model(make_batch(step, number))
            (loss / COUNT).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            model.eval()
            torch.manual_seed(7)
            with torch.no_grad():
                losses.append(model(make_batch(step, 0)).item())
            model.train()
    return Result(losses, {name: buffer.clone() for name, buffer in model.named_buffers()})


def engine(make: Callable[[], nn.Module], mode: Mode, folder: Path) -> Result:
    """The same through the engine."""
    _seed()
    model = on_meta(make())
    opened = open_blocks(model, mode, folder)
    try:
        return Result(list(_losses(opened)), {name: buffer.clone() for name, buffer in model.named_buffers()})
    finally:
        opened.close()


def on_meta(model: nn.Module) -> nn.Module:
    """The model itself, with its parameters on the meta device."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                new = nn.Parameter(own.detach().to("meta"), own.requires_grad)
                module._parameters[name] = parameters.setdefault(id(own), new)
    return model


def open_blocks(
    model: nn.Module,
    mode: Mode,
    folder: Path,
    ranks: Ranks | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> Engine:
    """An engine for a model whose parameters lie on the meta device."""
    ranks = ranks or Ranks()
    seen = survey(model, partial(model, torch.zeros((3, WIDTH), device="meta")), ranks.world_size)
    options = replace(
        everything_on(mode.tier, folder), nvme_bytes=8 * MIB, slot_bytes=2 * MIB, resident_bytes=MIB, chunk_numel=4096,
        num_chunks=16, staging_bytes=2 * MIB, micro_batches_per_sweep=mode.per_sweep,
        kept_units=frozenset(seen.order if mode.keep else ()), spared=seen.spared,
    )  # fmt: skip
    order = seen.order if not seen.failure else None
    opened = Engine(model, seen.units, options, ranks, order=order, written=seen.written, notice=notice)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    opened.load(lambda names: {name: _weights(name, shapes[name]) for name in names})
    return opened


def assert_exact(make: Callable[[], nn.Module], mode: Mode, folder: Path, within: float = 0.0) -> None:
    """Losses and buffers are plain PyTorch's, to the bit; or losses are `within` a share of them."""
    expected, found = plain(make), engine(make, mode, folder)
    assert found.losses == pytest.approx(expected.losses, rel=within, abs=0)
    assert found.buffers.keys() == expected.buffers.keys()
    assert all(torch.equal(found.buffers[name], buffer) for name, buffer in expected.buffers.items())


def _losses(engine: Engine) -> Iterator[float]:
    model = engine.model
    _seed()
    for step in range(STEPS):
        work = [
            MicroBatch(partial(model, make_batch(step, number)), 1 / COUNT, 100 * step + number)
            for number in range(COUNT)
        ]
        yield from engine.train_step(work, AdamW(LR), max_grad_norm=None, more=step == 0).losses
        if step == 1:
            model.eval()
            yield from engine.evaluate([MicroBatch(partial(model, make_batch(step, 0)), 0.0, 7)])
            model.train()


def _seed() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def _weights(name: str, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()))) * 0.3


def make_batch(step: int, number: int) -> torch.Tensor:
    """The input of a micro-batch."""
    return torch.randn((3, WIDTH), generator=torch.Generator().manual_seed(10 * step + number))
