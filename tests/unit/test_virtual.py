"""The step in virtual time (benchmarks/virtual.py): its lanes, and a small model on them."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.case import Case
from benchmarks.lanes import IN, KERNELS, OUT, Lanes, Rates
from benchmarks.priced import DEVICE
from benchmarks.virtual import Played, plan_for, play, recipe_of
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.units.store import to_placeholders
from zinf_cli.model_state import CHUNK_NUMEL, DEVICE_BLOCK_NUMEL, DEVICE_CHUNK_NUMEL, STATES
from zinf_cli.plan.plan import Plan
from zinf_cli.screens.plan import plan_screen
from zinf_cli.tiers import streams

RATES = Rates(launch=1.0, event=0.0)
CASE = Case(2, 64)
RECIPE = recipe_of({**CASE.config, "num_hidden_layers": 2}, CASE, {})


@pytest.fixture(scope="module")
def planned() -> Plan:
    """With deferred updates, of which none is under way at the end of a step."""
    return replace(plan_for(RECIPE), update="deferred")


@pytest.fixture(scope="module")
def played(planned: Plan) -> Played:
    return play(RECIPE, planned, Rates(), steps=3)


def test_streams_run_beside_each_other_and_an_event_orders_them() -> None:
    lanes = Lanes(RATES)
    copies = lanes.new(DEVICE)
    with lanes.use(copies):
        lanes.launch("copy", IN, 10.0)
    kernel = lanes.launch("first", KERNELS, 3.0)
    arrived = lanes.event()
    arrived.record(copies)
    lanes.current(DEVICE).wait_event(arrived)
    after = lanes.launch("second", KERNELS, 1.0)
    assert not arrived.query()
    lanes.current(DEVICE).synchronize()
    assert (kernel.end, after.end, lanes.now) == (5.0, 12.0, 12.0)
    assert lanes.busy == {IN: 10.0, KERNELS: 4.0}
    assert sum(lanes.waited.values()) == 9.0


def test_a_lane_does_one_operation_at_a_time() -> None:
    lanes = Lanes(RATES)
    for _ in range(2):
        with lanes.use(lanes.new(DEVICE)):
            last = lanes.launch("copy", OUT, 10.0)
    lanes.synchronize(DEVICE)
    assert last.end == 21.0


def test_a_lane_takes_what_has_waited_longest() -> None:
    """Kernels of an update come between those of compute, though compute always has some that can begin."""
    lanes = Lanes(Rates(launch=0.0, event=0.0))
    compute = [lanes.launch("compute", KERNELS, 2.0) for _ in range(3)]
    with lanes.use(lanes.new(DEVICE)):
        update = lanes.launch("update", KERNELS, 1.0)
    lanes.synchronize(DEVICE)
    assert [compute[0].end, update.end, compute[1].end] == [2.0, 3.0, 5.0]


def test_an_update_is_one_kernel_for_each_block_of_a_chunk(planned: Plan, played: Played) -> None:
    numels, most = [unit.trainable_numel for unit in planned.figures.model.units], planned.working.chunk_numel
    chunks = [min(most, numel - begin) for numel in numels for begin in range(0, numel, most)]
    assert played.launches["_fused_adamw_"] == sum(-(-chunk // DEVICE_BLOCK_NUMEL) for chunk in chunks)


def test_the_links_carry_what_the_step_moves(planned: Plan, played: Played) -> None:
    """In: parameters twice (the last unit's once), gradient, moments, remainder. Out: all of these once."""
    units = [unit for unit in planned.figures.model.units if not unit.resident]
    numel = sum(unit.trainable_numel for unit in units)
    resident = sum(unit.trainable_numel for unit in planned.figures.model.units if unit.resident)
    last = units[-1].trainable_numel
    link = Rates().link
    assert played.busy[IN] * link == pytest.approx(18 * (numel + resident) - 2 * (last + resident), rel=1e-3)
    assert played.busy[OUT] * link == pytest.approx(16 * (numel + resident), rel=1e-3)


def test_state_in_cpu_memory_is_updated_in_backward_where_there_is_room_for_shadows() -> None:
    plan = plan_for(RECIPE)
    shadows = [line for line in plan.lines if line.what == "second"]
    assert (plan.update, [line.tier for line in shadows]) == ("speculative", ["cpu"])
    numel = sum(unit.trainable_numel for unit in plan.figures.model.units)
    assert shadows[0].num_bytes == 12 * numel
    needed = next(limit.needed for limit in plan.limits if limit.tier == "cpu")
    assert plan_for(RECIPE, cpu_bytes=needed).update == "deferred"  # some of it is left to others


def test_memory_of_the_device_that_is_left_holds_units() -> None:
    case = Case(16, 2048, "8B")
    plan = plan_for(recipe_of(case.config, case, {f"offload.{state}": "auto" for state in STATES}))
    numels = [unit.trainable_numel for unit in plan.figures.model.units]
    cached = sum(numels[number] for number in plan.cached_units)
    assert {plan.figures.model.order[0], plan.figures.model.order[-1]} <= set(plan.cached_units)
    assert plan.update == "speculative"
    assert plan.fits
    assert [(line.tier, line.num_bytes) for line in plan.lines if line.what == "cached"] == [("device", 16 * cached)]
    assert next(line.num_bytes for line in plan.lines if line.what == "second") == 12 * (sum(numels) - cached)
    assert "units: their parameters, gradients, optimizer states stay on the accelerator" in shown(plan)


def test_the_state_of_units_that_are_cached_on_the_device_takes_no_link() -> None:
    plan = plan_for(RECIPE)
    numels = [unit.trainable_numel for unit in plan.figures.model.units]
    played = play(RECIPE, replace(plan, cached_units=(0,), cached_states=STATES), Rates())
    assert played.busy[OUT] * Rates().link == pytest.approx(16 * sum(numels[1:]), rel=0.02)


def test_the_same_step_takes_the_same_time(planned: Plan, played: Played) -> None:
    again = play(RECIPE, planned, Rates(), steps=3)
    assert again == played


def test_large_chunks_shrink_by_pieces_before_there_are_fewer(planned: Plan) -> None:
    working = replace(planned.working, chunk_numel=DEVICE_CHUNK_NUMEL)
    less = working.shrunk(working.num_chunks * CHUNK_NUMEL * 4 + 1)
    assert (less.chunk_numel, less.num_chunks) == (14 * CHUNK_NUMEL, working.num_chunks)
    least = working.shrunk(working.total)
    assert (least.chunk_numel, least.num_chunks, least.slot_bytes) == (CHUNK_NUMEL, 8, working.least_slot_bytes)


def test_the_fused_kernel_differs_in_last_bits_of_parameters_alone() -> None:
    torch.manual_seed(0)
    exact = (torch.randn(4096), torch.zeros(4096), torch.zeros(4096))
    fused = (exact[0].clone(), exact[1].clone(), exact[2].clone())
    for step in range(1, 4):
        grad, clip = torch.randn(4096), torch.tensor(0.5)
        AdamW(1e-3, clip=clip).update(exact[0], grad.clone(), exact[1], exact[2], step)
        AdamW(1e-3, clip=clip, fused=True).update(fused[0], grad.clone(), fused[1], fused[2], step)
    torch.testing.assert_close(fused, exact, rtol=1e-6, atol=1e-9)


def shown(plan: Plan) -> str:
    screen = StringIO()
    Console(width=200, file=screen).print(plan_screen(plan, "8B", []))
    return screen.getvalue()


class Copies(TorchDispatchMode):
    """Counts copies into another dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_an_accelerator_adds_a_16_bit_gradient_to_its_sum_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        with torch.device("meta"):
            layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        to_placeholders(layer, torch.device("cpu"))
        layer.weight.data = torch.randn(8, 8).bfloat16()
        layer.weight.grad = torch.zeros(8, 8)
        for _ in range(3):
            layer(torch.randn(4, 8).bfloat16()).float().square().sum().backward()
        return layer.weight.grad

    with Copies() as on_cpu:
        expected = gradient()
    monkeypatch.setitem(streams.implementations, "cpu", Lanes(RATES))
    with Copies() as on_device:
        assert torch.equal(gradient(), expected)
    assert on_cpu.count - on_device.count == 3
