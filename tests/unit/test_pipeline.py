"""The pipeline: units come in the order that was announced, ahead of time, and as far ahead as there is memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pieces import forward, layer_of, open_layers, pipeline_of, plain_layers
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.errors import CapacityError


def test_a_unit_has_its_weights_between_acquire_and_release(tmp_path: Path) -> None:
    expected = plain_layers()
    with open_layers(tmp_path) as engine:
        pipeline = pipeline_of(engine)
        pipeline.expect(forward(0, 1, 2))
        for visit in forward(0, 1, 2):
            layer = layer_of(engine, visit.unit)
            assert layer.weight.isnan().all()
            pipeline.acquire(visit)
            assert torch.equal(layer.weight, expected.layer(visit.unit).weight)
            pipeline.release(visit)
            assert layer.weight.isnan().all()
        assert pipeline.idle


def test_reads_run_ahead_as_far_as_there_is_memory(tmp_path: Path) -> None:
    with open_layers(tmp_path, slots=2) as engine:
        pipeline, slots = pipeline_of(engine), engine.memory.slots
        each = slots.capacity // 2
        pipeline.expect(forward(0, 1, 2))
        assert slots.used == 2 * each  # nothing was waited for yet
        assert engine.tiers.params.read_bytes == 2 * each
        pipeline.acquire(forward(0)[0])
        assert engine.tiers.params.read_bytes == 2 * each
        pipeline.release(forward(0)[0])  # makes room for the third
        assert engine.tiers.params.read_bytes == 3 * each
        assert slots.used == 2 * each


def test_a_unit_that_was_not_announced_is_there_too_and_the_rest_is_forgotten(tmp_path: Path) -> None:
    expected = plain_layers()
    with open_layers(tmp_path, slots=2) as engine:
        pipeline = pipeline_of(engine)
        pipeline.expect(forward(0, 1))
        pipeline.acquire(forward(2)[0])
        assert torch.equal(layer_of(engine, 2).weight, expected.layer(2).weight)
        assert pipeline.idle
        pipeline.release(forward(2)[0])
        assert engine.memory.slots.used == 0


def test_memory_that_can_never_be_enough_is_an_error_and_no_deadlock(tmp_path: Path) -> None:
    with open_layers(tmp_path, slots=1) as engine:
        pipeline = pipeline_of(engine)
        pipeline.acquire(forward(0)[0])
        with pytest.raises(CapacityError, match=r"no room for unit layers\.1"):
            pipeline.acquire(forward(1)[0])
        pipeline._fetches.clear()
        pipeline.release(forward(0)[0])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_visits_that_are_known_late_take_an_open_place(slots: int, tmp_path: Path) -> None:
    """Fetches behind it are called back where they hold the room."""
    expected = plain_layers()
    with open_layers(tmp_path, slots=slots) as engine:
        pipeline = pipeline_of(engine)
        pipeline.expect([Visit(0, Kind.OPEN), *forward(1), Visit(0, Kind.OPEN), *forward(2)])
        pipeline.put_first(forward(0, 2))
        for visit in forward(0, 2, 1, 2):  # nothing takes the second place
            pipeline.acquire(visit)
            assert torch.equal(layer_of(engine, visit.unit).weight, expected.layer(visit.unit).weight)
            pipeline.release(visit)
        assert pipeline.idle
        assert engine.memory.slots.used == 0
