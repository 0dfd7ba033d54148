"""What the paper ran, planned and simulated on its own machine: the profile dgx2, one constant for all runs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from torch import nn

from benchmarks.paper import (
    DGX2,
    FIGURE_1,
    FIGURE_5A,
    FIGURE_5B,
    FIGURE_6A,
    FIGURE_6B,
    FRAGMENT,
    TABLE_1,
    Run,
    classic_tflops,
    fits,
    largest,
    largest_hidden,
    pflops_of_1t,
    sweep_tflops,
    tiles_of_matrix,
)
from zinf_cli.engine.units.tiles import cut
from zinf_cli.plan.estimate import estimate
from zinf_cli.plan.needs import PART_BYTES, Scenario, needs_of
from zinf_cli.plan.sizes import Transformer

runs = pytest.mark.parametrize("run", TABLE_1, ids=lambda run: f"{run.params} on {run.nodes}")


@runs
def test_every_run_of_table_1_fits(run: Run) -> None:
    assert fits(run)


@runs
def test_every_run_of_table_1_fits_where_the_paper_put_it(run: Run) -> None:
    """All but one: by section 3's 20 bytes the states of 1T are 20.1 TB, and 512 GPUs have 17.6."""
    batches = max(1, round(run.batch))
    scenario = replace(run.scenario, micro_batch_size=run.batch / batches, micro_batches=batches)
    missing = needs_of(scenario, run.placement, 1).missing
    assert (missing == {}) != ((run.params, run.nodes) == ("1T", 32))


@pytest.mark.parametrize("run", FIGURE_5A, ids=lambda run: run.params)
def test_throughput_is_that_of_figure_5a(run: Run) -> None:
    assert classic_tflops(run) == pytest.approx(run.tflops, rel=0.15)


@pytest.mark.parametrize("run", FIGURE_5A, ids=lambda run: run.params)
def test_updates_under_the_backward_pass_lose_nothing_at_that_scale(run: Run) -> None:
    assert sweep_tflops(run, eager=True) > classic_tflops(run)


def test_scaling_is_super_linear_as_in_figure_5b() -> None:
    pflops = {gpus: pflops_of_1t(gpus) for gpus in FIGURE_5B}
    for (few, slow), (many, fast) in itertools.pairwise(pflops.items()):
        assert fast / slow > many / few
    for gpus, measured in FIGURE_5B.items():
        assert pflops[gpus] == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("strategy", FIGURE_6A)
def test_the_largest_model_is_that_of_figure_6a(strategy: str) -> None:
    assert largest(strategy) == pytest.approx(FIGURE_6A[strategy], rel=0.15)


@pytest.mark.parametrize("nodes", FIGURE_1)
def test_the_largest_model_grows_with_the_nodes_as_in_figure_1(nodes: int) -> None:
    assert largest(nodes=nodes) == pytest.approx(FIGURE_1[nodes], rel=0.15)


def test_the_hidden_sizes_of_figure_6b_are_reached_with_tiles_and_not_without() -> None:
    assert largest_hidden(1) == FIGURE_6B[1]
    largest = FIGURE_6B[16]
    assert largest_hidden(tiles_of_matrix(largest)) == largest
    layer = estimate(Scenario(Transformer(1, largest * 1024, largest * 8), DGX2, ranks=DGX2.accelerators))
    assert layer.fits
    assert layer.needs.tiles > 1


def test_the_closed_form_cuts_as_the_engine_does() -> None:
    for hidden in FIGURE_6B.values():
        model = nn.ModuleDict(
            {
                "up": nn.Linear(hidden * 1024, 4 * hidden * 1024, bias=False, device="meta"),
                "down": nn.Linear(4 * hidden * 1024, hidden * 1024, bias=False, device="meta"),
            }
        )
        cut(model, FRAGMENT // PART_BYTES)
        assert max(len(getattr(up.weight, "tiles", [up])) for up in model.values()) == tiles_of_matrix(hidden)
