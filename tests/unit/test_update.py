"""The deferred update: AdamW piece by piece, with the bits of torch.optim.AdamW on the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pieces import CHUNK, LR, backward, forward, layer_of, let_update, loss_of, open_layers, pipeline_of, plain_layers
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.visit import Kind, Visit

LAST = [Visit(0, Kind.BACKWARD, final=True)]


@pytest.mark.parametrize(("tier", "chunks"), [("nvme", 32), ("nvme", 3), ("cpu", 3)])
def test_the_next_visit_has_the_bits_of_torchs_adamw(tier: str, chunks: int, tmp_path: Path) -> None:
    """However few chunk buffers there are: three hold a piece's gradient and its two moments."""
    plain = plain_layers().layer(0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR)
    with open_layers(tmp_path, tier, chunks=chunks) as engine:
        pipeline = pipeline_of(engine)
        for _ in range(3):
            torch.autograd.backward(loss_of(plain, 0))
            optimizer.step()
            optimizer.zero_grad()
            backward(engine, LAST)
            let_update(engine, AdamW(LR))
            pipeline.acquire(forward(0)[0])
            assert torch.equal(layer_of(engine, 0).weight, plain.weight)
            assert torch.equal(layer_of(engine, 0).bias, plain.bias)
            pipeline.release(forward(0)[0])
            pipeline.settle()
        assert engine.memory.chunks.peak <= chunks * CHUNK * 4


def test_nothing_is_updated_before_the_step_knows_its_norm(tmp_path: Path) -> None:
    with open_layers(tmp_path) as engine:
        pipeline = pipeline_of(engine)
        backward(engine, LAST)
        pipeline.settle()
        read, written = engine.tiers.optimizer.read_bytes, engine.tiers.optimizer.write_bytes
        pipeline.updates.kernel = None
        pipeline.expect(forward(0))
        assert engine.tiers.optimizer.read_bytes > read  # what it needs is on its way
        assert engine.tiers.optimizer.write_bytes == written
        let_update(engine, AdamW(LR))
        pipeline.acquire(forward(0)[0])
        pipeline.release(forward(0)[0])
        pipeline.settle()
        assert engine.tiers.optimizer.write_bytes > written


def test_a_parameter_without_a_gradient_stays_and_is_not_counted(tmp_path: Path) -> None:
    """Weight decay, too, is for what is updated."""
    before = plain_layers().layer(0).bias
    with open_layers(tmp_path) as engine:
        backward(engine, LAST, bias=False)
        pipeline = pipeline_of(engine)
        let_update(engine, AdamW(LR, weight_decay=0.5))
        pipeline.acquire(forward(0)[0])
        assert torch.equal(layer_of(engine, 0).bias, before)
        pipeline.release(forward(0)[0])
