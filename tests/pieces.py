"""An engine of three linear layers, each a unit, for tests of the pieces that it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from plain import everything_on
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.pipeline import Pipeline
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.engine.units.units import discover

WIDTH = 64
CHUNK = 1024
"""Elements of an update's chunk: a layer has five."""
LR = 1e-2


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def layer(self, number: int) -> nn.Linear:
        found = self.layers[number]
        assert isinstance(found, nn.Linear)
        return found


def plain_layers() -> Layers:
    """The same in plain PyTorch, with the same weights."""
    torch.manual_seed(0)
    return Layers()


@contextmanager
def open_layers(folder: Path, tier: str = "nvme", *, slots: int = 8, chunks: int = 32) -> Iterator[Engine]:
    """With room for the parameters of `slots` units, and for `chunks` pieces of an update."""
    with torch.device("meta"):
        model = Layers()
    layouts = discover(model, 1)
    options = replace(
        everything_on(tier, folder),
        nvme_bytes=8 << 20,
        slot_bytes=slots * layouts[0].num_bytes,
        chunk_numel=CHUNK,
        num_chunks=chunks,
        staging_bytes=1 << 20,
    )
    engine = Engine(model, layouts, options)
    values = dict(plain_layers().named_parameters())
    engine.load(lambda names: {name: values[name].detach() for name in names})
    try:
        yield engine
    finally:
        engine.close()


def pipeline_of(engine: Engine) -> Pipeline:
    return engine._pipeline


def layer_of(engine: Engine, number: int) -> nn.Linear:
    """The layer whose parameters are unit `number`."""
    assert isinstance(engine.model, Layers)
    return engine.model.layer(number)


def forward(*numbers: int) -> list[Visit]:
    return [Visit(number, Kind.FORWARD) for number in numbers]


def inputs(seed: int) -> torch.Tensor:
    """fp32 [4, WIDTH]."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(layer: nn.Linear, seed: int, *, bias: bool = True) -> torch.Tensor:
    """Without `bias`, the layer's bias gets no gradient."""
    return F.linear(inputs(seed), layer.weight, layer.bias if bias else None).square().mean()


def backward(engine: Engine, visits: Sequence[Visit], *, bias: bool = True) -> None:
    """Compute the gradients of a step in these visits, each on inputs of its own."""
    pipeline = pipeline_of(engine)
    pipeline.begin_step()
    for seed, visit in enumerate(visits):
        pipeline.acquire(visit)
        torch.autograd.backward(loss_of(layer_of(engine, visit.unit), seed, bias=bias))
        pipeline.release(visit)
    pipeline.finish_gradients()


def let_update(engine: Engine, adamw: AdamW) -> None:
    """The step's gradient norm is known: what is due may be updated."""
    for number in pipeline_of(engine).completed:
        engine.units[number].life.count_update()
    pipeline_of(engine).updates.kernel = adamw
