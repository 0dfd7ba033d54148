"""A fetch: what one visit brings, where it lies meanwhile, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pieces import LR, backward, forward, layer_of, let_update, loss_of, open_layers, pipeline_of, plain_layers
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.visit import Kind, Visit


def test_what_lies_in_the_memory_of_compute_is_used_there(tmp_path: Path) -> None:
    with open_layers(tmp_path, "device") as engine:
        pipeline = pipeline_of(engine)
        pipeline.acquire(forward(0)[0])
        home = engine.units[0].flats[0].slice.view()
        assert home is not None
        assert home.data_ptr() <= layer_of(engine, 0).weight.data_ptr() < home.data_ptr() + home.numel()
        assert engine.memory.slots.used == 0
        pipeline.release(forward(0)[0])


@pytest.mark.parametrize("tier", ["device", "nvme"])
def test_gradients_of_several_visits_are_added_up(tier: str, tmp_path: Path) -> None:
    """The norm is that of their sum."""
    plain = plain_layers().layer(0)
    for seed in range(3):
        torch.autograd.backward(loss_of(plain, seed))
    expected = torch.nn.utils.get_total_norm([param.grad for param in plain.parameters() if param.grad is not None])
    with open_layers(tmp_path, tier) as engine:
        backward(engine, [Visit(0, Kind.BACKWARD, nth, final=nth == 2) for nth in range(3)])
        assert torch.equal(pipeline_of(engine).norms.total(), expected)


def test_a_flush_updates_what_lies_on_the_tier_and_binds_nothing(tmp_path: Path) -> None:
    before = plain_layers().layer(0).weight
    with open_layers(tmp_path) as engine:
        backward(engine, [Visit(0, Kind.BACKWARD, final=True)])
        pipeline = pipeline_of(engine)
        let_update(engine, AdamW(LR))
        assert engine.units[0].life.update_due
        pipeline.flush([0])
        pipeline.finish_flushes()
        assert not engine.units[0].life.update_due
        assert layer_of(engine, 0).weight.isnan().all()
        pipeline.settle()
        assert engine.memory.slots.used == 0
        pipeline.acquire(forward(0)[0])
        assert not torch.equal(layer_of(engine, 0).weight, before)
        pipeline.release(forward(0)[0])
