"""What the paper ran, planned and simulated on its own machine: the profile dgx2, one constant for all runs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks.paper import (
    FIGURE_1,
    FIGURE_5A,
    FIGURE_5B,
    FIGURE_6A,
    TABLE_1,
    Run,
    classic_tflops,
    fits,
    largest,
    pflops_of_1t,
    sweep_tflops,
)
from zinf_cli.plan.needs import needs_of

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
