"""`python -m benchmarks.paper`: the runs of the ZeRO-Infinity paper beside what zinf's planner says of them.

No machine is needed: memory comes from closed forms, time from the simulation on the profile dgx2. The tables are those
of docs/paper.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from zinf_cli.machine.profiles import BUILT_IN
from zinf_cli.plan.estimate import estimate, largest_model, paper_simulation, step_of
from zinf_cli.plan.needs import PART_BYTES, Scenario, largest_part, needs_of
from zinf_cli.plan.schedule import sweep_steps
from zinf_cli.plan.simulate import Cluster, play, rates_of
from zinf_cli.plan.sizes import Transformer, shape_of

DGX2 = BUILT_IN["dgx2"]


@dataclass(frozen=True)
class Run:
    """A row of the paper's table 1. `batch` is sequences of 1024 tokens a GPU; `hidden` is in K = 1024."""

    params: str
    nodes: int
    layers: int
    hidden: int
    batch: float
    model_parallel: int
    params_on: str
    optimizer_on: str
    tflops: float | None = None
    """Per GPU, figure 5a."""

    @property
    def scenario(self) -> Scenario:
        hidden = self.hidden * 1024
        model = Transformer(self.layers, hidden, hidden // 128)
        return Scenario(model, DGX2, self.nodes, DGX2.accelerators, self.batch)

    @property
    def placement(self) -> dict[str, str]:
        """Gradients with the optimizer states; checkpoints of activations in CPU memory."""
        grads = self.optimizer_on
        return {"params": self.params_on, "grads": grads, "optimizer": self.optimizer_on, "activations": "cpu"}


TABLE_1 = (
    Run("10B", 1, 50, 4, 8, 1, "device", "device"),
    Run("50B", 1, 62, 8, 26, 1, "cpu", "nvme"),
    Run("100B", 1, 125, 8, 24, 1, "cpu", "nvme"),
    Run("0.5T", 1, 124, 18, 8, 1, "nvme", "nvme"),
    Run("1T", 1, 128, 25, 7, 1, "nvme", "nvme"),
    Run("0.5T", 32, 124, 18, 7, 4, "device", "device", 46.3),
    Run("1T", 32, 128, 25, 5, 4, "device", "device", 48.9),
    Run("5T", 32, 174, 48, 3, 4, "nvme", "nvme", 44.0),
    Run("10T", 32, 200, 64, 2, 4, "nvme", "nvme", 42.8),
    Run("20T", 32, 205, 88, 1.25, 8, "nvme", "nvme", 37.2),
)
FIGURE_5A = tuple(run for run in TABLE_1 if run.tflops is not None)
FIGURE_5B = {64: 2.81, 128: 6.23, 256: 11.75, 512: 24.98}
"""PFLOP/s of 1T on that many GPUs."""
FIGURE_6A = {"data-parallel": 1.4e9, "zero-offload": 13e9, "zero-3": 20e9, "infinity-cpu": 70e9, "infinity": 1e12}
"""The largest model on one DGX-2, by strategy."""
FIGURE_1 = {1: 1e12, 8: 8e12, 16: 16e12, 32: 32e12}
"""The largest model on that many DGX-2."""

FIGURE_6B = {1: 8, 16: 64}
"""The largest hidden size (in K = 1024) by tiles of a matrix, where no 2 GiB of GPU memory lie side by side."""
FRAGMENT = 2 * 2**30
"""Bytes that do."""
HIDDEN = (4, 8, 16, 32, 64, 128)
"""Hidden sizes that are tried, in K."""


def fits(run: Run) -> bool:
    """Whether the run's model fits its hosts where zinf would put it, one sequence a GPU at a time."""
    batches = max(1, round(run.batch))
    return estimate(replace(run.scenario, micro_batch_size=run.batch / batches, micro_batches=batches)).fits


def classic_tflops(run: Run) -> float:
    """Per GPU, under the paper's schedule."""
    return _tflops(run.scenario, paper_simulation(run.scenario, run.placement, run.model_parallel).step_s)


def sweep_tflops(run: Run, *, eager: bool = False) -> float:
    """Per GPU, under zinf's schedule with the same placement, gradients with the optimizer states."""
    scenario, placement = run.scenario, run.placement
    step = replace(
        step_of(scenario, placement, 1, needs_of(scenario, placement, 1)), update="eager" if eager else "deferred"
    )
    rates = rates_of(DGX2, Cluster(scenario.hosts, scenario.ranks, "fp16", run.batch * 1024))
    return _tflops(scenario, play(*sweep_steps(step), rates).step_s)


def pflops_of_1t(gpus: int) -> float:
    """Figure 5b: where the states of 1T do not fit GPU memory, they are on NVMe."""
    where = "device" if gpus == 512 else "nvme"
    run = Run("1T", gpus // DGX2.accelerators, 128, 25, 5, 4, where, where)
    return classic_tflops(run) * gpus / 1000


def largest(strategy: str = "infinity", nodes: int = 1) -> float:
    """Parameters of the largest model, one sequence a GPU."""
    model = largest_model(Scenario(shape_of(1e9), DGX2, nodes, DGX2.accelerators, strategy=strategy))
    return float(model.params) if model is not None else 0.0


def tiles_of_matrix(hidden: int) -> int:
    """Figure 6b: tiles of the largest matrix of a layer, `hidden` in K, if a part has to lie in one FRAGMENT.

    0: the whole layer does. A part is parameters and their gradient, as they lie in a slot of the engine.
    """
    return largest_part(Transformer(1, hidden * 1024, hidden * 8), FRAGMENT / PART_BYTES)[1]


def largest_hidden(most_tiles: int) -> int:
    """The largest of HIDDEN with at most so many tiles of a matrix."""
    return max(hidden for hidden in HIDDEN if tiles_of_matrix(hidden) <= most_tiles)


def one_node(run: Run, micro_batches: int) -> tuple[float, float]:
    """TFLOP/s per GPU of the paper's schedule and of zinf's, with the batch cut into micro-batches."""
    scenario = replace(run.scenario, micro_batch_size=run.batch / micro_batches, micro_batches=micro_batches)
    classic = paper_simulation(scenario, run.placement, run.model_parallel)
    needs = needs_of(scenario, run.placement, micro_batches)
    rates = rates_of(DGX2, Cluster(scenario.hosts, scenario.ranks, "fp16", scenario.micro_batch_size * 1024))
    sweep = play(*sweep_steps(step_of(scenario, run.placement, micro_batches, needs)), rates)
    return _tflops(scenario, classic.step_s), _tflops(scenario, sweep.step_s)


def _tflops(scenario: Scenario, step_s: float) -> float:
    return scenario.model.step_flops(scenario.sequences) / step_s / 1e12


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def main() -> None:
    console = Console(width=120)
    table = _table("Figure 5a: TFLOP/s per GPU, 512 GPUs", "", "paper", "simulated", "off", "sweep", "eager")
    for run in FIGURE_5A:
        assert run.tflops is not None
        mine = classic_tflops(run)
        sweep, eager = sweep_tflops(run), sweep_tflops(run, eager=True)
        off = 100 * (mine / run.tflops - 1)
        table.add_row(run.params, f"{run.tflops}", f"{mine:.1f}", f"{off:+.0f} %", f"{sweep:.1f}", f"{eager:.1f}")
    console.print(table)
    table = _table("Figure 5b: PFLOP/s of 1T", "GPUs", "paper", "simulated", "linear from 64")
    for gpus, pflops in FIGURE_5B.items():
        linear = pflops_of_1t(64) * gpus / 64
        table.add_row(str(gpus), f"{pflops}", f"{pflops_of_1t(gpus):.2f}", f"{linear:.2f}")
    console.print(table)
    table = _table("Figures 6a and 1: the largest model", "", "paper", "planned", "off")
    rows = [(name, size, largest(name)) for name, size in FIGURE_6A.items()]
    rows += [(f"{nodes} DGX-2", size, largest(nodes=nodes)) for nodes, size in FIGURE_1.items()]
    for name, size, planned in rows:
        table.add_row(name, f"{size / 1e9:g}B", f"{planned / 1e9:.4g}B", f"{100 * (planned / size - 1):+.0f} %")
    console.print(table)
    table = _table("Figure 6b: a layer in parts of 2 GiB", "hidden", "paper: tiles", "planned: tiles")
    tiles = {hidden: count for count, hidden in FIGURE_6B.items()}
    for hidden in HIDDEN:
        table.add_row(f"{hidden}K", str(tiles.get(hidden, "")), str(tiles_of_matrix(hidden) or "whole layer"))
    console.print(table)
    table = _table("The batch of table 1 in micro-batches of one sequence", "", "paper's schedule", "sweep", "faster")
    for run in (run for run in TABLE_1 if run.params_on != "device" and run.batch == int(run.batch)):
        classic, sweep = one_node(run, int(run.batch))
        name = f"{run.params}, {run.nodes} × 16 GPUs, {run.batch:g}"
        table.add_row(name, f"{classic:.1f}", f"{sweep:.1f}", f"{sweep / classic:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
