"""A run as it goes, its summary, and what `zinf doctor` and `zinf trace` find in its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zinf_cli.amounts import format_bytes, format_decimal, format_number
from zinf_cli.checkpoint.verify import Verdict
from zinf_cli.launch.vitals import Vitals
from zinf_cli.plan.plan import Plan
from zinf_cli.run_folder.metrics import ACCURACY, HELD_OUT
from zinf_cli.screen import outside

_MOST_HOSTS_SHOWN = 16
"""While a run goes on: those that take most memory."""


class RunView:
    """A run as it goes: a live panel on a terminal, one plain line per logged step elsewhere."""

    def __init__(self, console: Console, plan: Plan, interval: int) -> None:
        self._console = console
        self._plan = plan
        self._interval = interval
        self._latest: dict[str, Any] = {}
        self._eval_loss: float | None = None
        self._live: Live | None = None
        self._vitals: dict[str, tuple[Vitals, Vitals]] = {}

    def start(self) -> None:
        if self._console.is_terminal:
            self._live = Live(Text("starting the ranks ..."), console=self._console, transient=True)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def loading(self, share: float) -> None:
        """How much of the state the ranks have loaded."""
        if self._live is not None and not self._latest:
            bar = ProgressBar(total=1.0, completed=share, width=40)
            self._live.update(Columns([Text("reading the model"), bar, Text(f"{share:.0%}")]))

    def begun(self, step: int) -> None:
        """The run has begun after `step`. No step is over yet, and the first one may come behind an evaluation."""
        if self._live is not None and not self._latest:
            held_out = "" if self._eval_loss is None else f"held-out {self._eval_loss:.4f}   "
            self._live.update(Text(f"{held_out}step {step + 1} of {self._plan.max_steps} ..."))

    def say(self, line: str | Text) -> None:
        """One line for the user, above the live panel where there is one."""
        shown = outside(line) if isinstance(line, str) else line
        self._console.print(shown, highlight=False, soft_wrap=True)

    def host(self, vitals: Vitals) -> None:
        """News of a host."""
        _, before = self._vitals.get(vitals.host, (vitals, vitals))
        self._vitals[vitals.host] = (before, vitals)

    def show(self, metrics: dict[str, Any]) -> None:
        """A new line of metrics.jsonl."""
        if "eval_loss" in metrics:
            self._eval_loss = metrics["eval_loss"]
        if "loss" in metrics:
            self._latest = metrics
        for sample in metrics.get("samples", ()):
            self.say(f"after step {metrics['step']}: {sample['prompt']!r} → {sample['text']!r}")
        if self._live is not None:
            if self._latest:
                self._live.update(self._panel())
        elif "loss" not in metrics:
            if "eval_loss" in metrics:
                self.say(f"before the first step:{_evaluated(metrics, ' ')}")
        elif metrics["step"] % self._interval == 0 or metrics["step"] == self._plan.max_steps:
            slow = self._straggler(metrics)
            self.say(step_line(metrics, self._plan.max_steps) + (f"  waits for {slow}" if slow else ""))

    def _straggler(self, metrics: dict[str, Any]) -> str | None:
        """The host that the others wait for."""
        if metrics.get("straggler") is None or len(self._plan.hosts) < 2:
            return None
        rank: int = metrics["straggler"]
        return [host.name for host in self._plan.hosts for _ in host.slots][rank]

    def _panel(self) -> RenderableType:
        values = self._latest
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        table.add_row("step", f"{values['step']} of {self._plan.max_steps}")
        table.add_row("", ProgressBar(total=self._plan.max_steps, completed=values["step"], width=40))
        held_out = "" if self._eval_loss is None else f"   held-out {self._eval_loss:.4f}"
        table.add_row(
            "loss", f"{_number(values['loss'], '.4f')}{held_out}   gradient norm {_number(values['grad_norm'], '.3g')}"
        )
        table.add_row(
            "speed",
            f"{values['tokens_per_s']:.0f} tokens/s   {values['tflops_per_rank']:.3g} TFLOP/s per rank",
        )
        on_drives = f"   nvme {format_bytes(values['nvme_bytes'])}" if values["nvme_bytes"] else ""
        table.add_row("memory", f"cpu {format_bytes(values['cpu_bytes'])}{on_drives}")
        if on_drives:
            table.add_row("drive", _drive(values))
        table.add_row("waiting", f"{100 * values['wait_s'] / values['step_s']:.0f} % of the step")
        parts: list[RenderableType] = [table]
        if len(self._plan.hosts) > 1:
            slow = self._straggler(values)
            first = sorted(self._vitals.values(), key=lambda pair: (pair[1].host != slow, -pair[1].memory))
            shown = sorted(first[:_MOST_HOSTS_SHOWN], key=lambda pair: pair[1].host)
            parts += [Text(), hosts_table(shown, slow)]
        return Panel(Group(*parts), title="zinf", expand=False)


def hosts_table(vitals: Sequence[tuple[Vitals, Vitals]], slow: str | None = None) -> Table:
    """Hosts by what they took between two looks at them; `slow` is the one that the others wait for."""
    table = Table(box=None, pad_edge=False)
    for column in ("host", "memory", "read", "write", ""):
        table.add_column(column, justify="right" if column in ("memory", "read", "write") else "left")
    for before, now in vitals:
        seconds = max(1e-3, now.time - before.time)
        rates = ((now.read - before.read) / seconds, (now.written - before.written) / seconds)
        cells = [format_bytes(now.memory), *(f"{format_decimal(max(0.0, rate))}/s" for rate in rates)]
        late = now.host == slow
        table.add_row(now.host, *cells, "the others wait for it" if late else "", style="yellow" if late else "")
    return table


def step_line(values: dict[str, Any], max_steps: int) -> str:
    """A step on one line of a log."""
    loss = "skipped" if values.get("skipped") else f"loss {_number(values['loss'], '.4f')}"
    return (
        f"step {values['step']}/{max_steps}  {loss}{_evaluated(values)}  "
        f"{values['step_s']:.2f} s  {values['tokens_per_s']:.0f} tokens/s  waiting "
        f"{100 * values['wait_s'] / values['step_s']:.0f} %  cpu {format_bytes(values['cpu_bytes'])}"
        + (f"  nvme {format_bytes(values['nvme_bytes'])}, {_drive(values)}" if values["nvme_bytes"] else "")
    )


def _evaluated(values: dict[str, Any], before: str = "  ") -> str:
    """What a line of metrics.jsonl has of held-out text."""
    loss = f"{before}eval_loss {_number(values[HELD_OUT], '.4f')}" if HELD_OUT in values else ""
    return loss + (f"  eval_accuracy {values[ACCURACY]:.1%}" if ACCURACY in values else "")


def _number(value: float | None, form: str) -> str:
    """metrics.jsonl has null for what is not finite."""
    return "nan" if value is None else format(value, form)


def _drive(values: dict[str, Any]) -> str:
    seconds = values["step_s"]
    return (
        f"read {format_decimal(values['nvme_read_bytes'] / seconds)}/s  "
        f"write {format_decimal(values['nvme_write_bytes'] / seconds)}/s"
    )


def summary_screen(summary: dict[str, Any]) -> RenderableType:
    """The end of a run: the loss, speed, memory and traffic beside what was planned."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "measured", "planned"):
        table.add_column(title, justify="left" if not title else "right")
    measured, predicted = summary["measured"], summary["predicted"]

    def row(name: str, key: str, form: Any) -> None:
        cells = [form(part[key]) if part.get(key) is not None else "" for part in (measured, predicted)]
        if any(cells):
            table.add_row(name, *cells)

    row("seconds per step (median)", "step_s", lambda v: f"{v:.2f}")
    row("tokens per second (median)", "tokens_per_s", lambda v: f"{v:.0f}")
    row("waiting for data", "wait_share", lambda v: f"{100 * v:.0f} %")
    row("CPU memory of the host, peak", "host_cpu_bytes", format_bytes)
    row("CPU memory of rank 0, peak", "cpu_bytes", format_bytes)
    row("on NVMe, per rank", "nvme_bytes", lambda v: format_bytes(v) if v else "")
    row("NVMe traffic per step and rank", "nvme_traffic", lambda v: format_bytes(v) if v else "")
    row("written to a host's drives", "drives_written", lambda v: _written(v, summary["endurance_bytes"]))
    row("experts that tokens reach", "experts_reached", lambda v: f"{100 * v:.0f} %")
    lines: list[RenderableType] = [table, Text()]
    lines += [Text(line, style="bold") for line in _losses(summary)]
    lines += [outside(f"{count} sequences from {path}") for path, count in summary["sources"].items()]
    title = f"{summary['status']} after {summary['steps']} of {summary['max_steps']} steps"
    if summary["moments"] != "fp32":
        title += f", moments in {summary['moments']}"
    if summary["skipped_steps"]:
        title += f", {summary['skipped_steps']} of them skipped"
    return Panel(Group(*lines), title=outside(title), expand=False)


def _losses(summary: dict[str, Any]) -> Iterator[str]:
    """The losses at the start and at the end, in lines."""
    first, last = summary["first_loss"], summary["last_loss"]
    if first is not None:
        yield f"loss {first:.4f} → {_number(last, '.4f')}"
    ends = {"": [summary["first_eval_loss"], summary["last_eval_loss"]], **summary["held_out"]}
    for name, (first, last) in ends.items():
        if first is not None and last is not None:
            told = f"held-out{f' {name}' if name else ''} {first:.4f} → {last:.4f}"
            if summary["perplexity"]:
                told += f", perplexity {_perplexity(first)} → {_perplexity(last)}"
            if name in summary["accuracy"]:
                told += ", accuracy {:.1%} → {:.1%}".format(*summary["accuracy"][name])
            yield told
    if (best := summary["best_eval"]) is not None and best["eval_loss"] != summary["last_eval_loss"]:
        yield f"the lowest held-out loss is {best['eval_loss']:.4f}, after step {best['step']}"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 100 else "inf"


def _written(num_bytes: float, endurance_bytes: float | None) -> str:
    """Bytes, and their share of what drives are rated for; nothing if there are none."""
    share = "" if endurance_bytes is None else f", {format_number(100 * num_bytes / endurance_bytes)} % of their life"
    return f"{format_decimal(num_bytes)}{share}" if num_bytes else ""


def checkpoint_screen(folder: Path, verdicts: Sequence[Verdict]) -> RenderableType:
    """Every file of a checkpoint, and whether it is as it was written."""
    table = Table(box=None, pad_edge=False)
    table.add_column(str(folder))
    table.add_column("", justify="right")
    table.add_column("")
    for verdict in verdicts:
        state = Text("whole", style="green") if verdict.problem is None else outside(verdict.problem, "bold red")
        table.add_row(verdict.name, format_bytes(verdict.num_bytes), state)
    return table


def trace_screen(summary: dict[str, Any]) -> RenderableType:
    """Of every rank: how busy its lanes were, what it waited for longest, and what it computed longest."""
    parts: list[RenderableType] = []
    for rank in summary["ranks"]:
        lanes = Table(box=None, pad_edge=False)
        lanes.add_column(f"rank {rank['rank']}, {rank['seconds']:.1f} s")
        lanes.add_column("busy", justify="right")
        lanes.add_column("")
        lanes.add_column("bytes", justify="right")
        for name, lane in rank["lanes"].items():
            bar = ProgressBar(total=1.0, completed=lane["busy"], width=30)
            moved = format_bytes(lane["bytes"]) if lane["bytes"] else ""
            lanes.add_row(name, f"{100 * lane['busy']:.0f} %", bar, moved)
        waits = Table(box=None, pad_edge=False)
        for heading in ("longest waits", "seconds", "at"):
            waits.add_column(heading, justify="left" if heading == "longest waits" else "right")
        for wait in rank["longest_waits"]:
            waits.add_row(wait["what"], f"{wait['seconds']:.3f}", f"{wait['at']:.2f} s")
        computed = Table(box=None, pad_edge=False)
        computed.add_column("most compute")
        computed.add_column("seconds", justify="right")
        for unit in rank["most_compute"]:
            computed.add_row(unit["what"], f"{unit['seconds']:.3f}")
        parts += [lanes, Text(), waits, Text(), computed, Text()]
    return Group(*parts)
