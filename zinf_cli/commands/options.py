"""Options of the command line: those that several commands have, and those of `zinf estimate`; the commands' order."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from zinf_cli.errors import UsageError

if TYPE_CHECKING:
    from zinf_cli.recipe.hosts import Host

MODEL, STEP, MACHINE = "The model, without a recipe", "The step", "The machine"

Hosts = Annotated[str | None, typer.Option(metavar="HOSTFILE", help="A hostfile, or slurm; without it, this machine.")]
Ssh = Annotated[bool, typer.Option("--ssh", help="Reach the nodes of --hosts slurm by SSH; without it, by srun.")]
Exclude = Annotated[str | None, typer.Option(metavar="FILTER", help="All but these.")]
Include = Annotated[str | None, typer.Option(metavar="FILTER", help="Only these hosts and slots.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON on stdout.")]
Recipe = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE [KEY=VALUE ...]", help="A recipe, and keys to change in it."),
]
Params = Annotated[
    str | None, typer.Option(help="Parameters, e.g. 7B or 1T; a usual shape is chosen.", rich_help_panel=MODEL)
]
Layers = Annotated[int | None, typer.Option(min=1, help="Or: transformer blocks,", rich_help_panel=MODEL)]
Hidden = Annotated[int | None, typer.Option(min=1, help="their hidden size,", rich_help_panel=MODEL)]
Heads = Annotated[
    int | None, typer.Option(min=1, help="attention heads (default: hidden / 128).", rich_help_panel=MODEL)
]
Vocab = Annotated[int, typer.Option(min=0, help="Rows of a tied embedding.", rich_help_panel=MODEL)]
MaxModel = Annotated[
    bool, typer.Option("--max-model", help="Or: find the largest model that fits.", rich_help_panel=MODEL)
]
SeqLen = Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence (default: 1024).", rich_help_panel=STEP)]
MicroBatchSize = Annotated[
    int | None, typer.Option(min=1, help="Sequences a GPU computes at once (default: 1).", rich_help_panel=STEP)
]
GradientAccumulationSteps = Annotated[
    int | None,
    typer.Option(min=1, help="Micro-batches of a step on each GPU (default: 1).", rich_help_panel=STEP),
]
GlobalBatchSize = Annotated[
    int | None, typer.Option(min=1, help="Or the sequences of a step, on all GPUs.", rich_help_panel=STEP)
]
EstimateHosts = Annotated[
    str | None,
    typer.Option(metavar="HOSTFILE", help="Count the hosts in a file, or --nodes.", rich_help_panel=MACHINE),
]
Nodes = Annotated[int, typer.Option(min=1, help="Hosts.", rich_help_panel=MACHINE)]
GpusPerNode = Annotated[
    int | None, typer.Option(min=1, help="GPUs of a host (default: the profile's).", rich_help_panel=MACHINE)
]
Hardware = Annotated[
    str | None,
    typer.Option(
        metavar="PROFILE",
        help="dgx2, dgx-h100, h200, gh200, rtx4090-workstation, dgx-spark, or a hardware.yaml of zinf bench "
        "(default: this machine's, where it was measured, or dgx2).",
        rich_help_panel=MACHINE,
    ),
]
Strategy = Annotated[
    str,
    typer.Option(
        help="infinity, or to compare: infinity-cpu, zero-3, zero-offload, data-parallel.", rich_help_panel=MACHINE
    ),
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain", help="Show the terms of each sum and the formulas; of a RECIPE, what each choice would buy."
    ),
]
Timeline = Annotated[Path | None, typer.Option(help="Write the simulated steps, for Perfetto.")]
Out = Annotated[Path | None, typer.Option(help="The profile (default: ~/.config/zinf/hardware.yaml).")]


DEBUG = "--debug"
_ORDER = ("init", "launch", "report", "export", "estimate", "doctor", "bench", "trace", "clean", "recipe")
"""In which a newcomer needs the commands."""


class InOrder(TyperGroup):
    """Commands as `zinf --help` lists them; `--debug`, which is of every command, may stand behind any word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        others = [word for word in args if word != DEBUG]
        return super().parse_args(ctx, [DEBUG, *others] if others != args else args)

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)


def chosen_hosts(
    source: str | None, include: str | None, exclude: str | None, slots: int | None = None, *, ssh: bool = False
) -> tuple[Host, ...]:
    """The hosts of a run; none stands for this machine."""
    from zinf_cli.recipe.hosts import SLURM, load_hosts

    if ssh and source != SLURM:
        raise UsageError("--ssh is for --hosts slurm", hint="SSH reaches the hosts of a hostfile anyway")
    if source is None:
        if include is not None or exclude is not None:
            raise UsageError("--include and --exclude choose among --hosts, which is missing")
        return ()
    if slots is not None:
        raise UsageError("--slots is for this machine", hint="the hostfile says how many each host has; see --include")
    return load_hosts(source, include=include, exclude=exclude, ssh=ssh)


def counted_hosts(hostfile: str) -> tuple[int, int]:
    """Hosts, and the slots of each."""
    from zinf_cli.recipe.hosts import load_hosts

    hosts = load_hosts(hostfile)
    slots = {len(host.slots) for host in hosts}
    if len(slots) > 1:
        raise UsageError(
            f"{hostfile} has hosts with {min(slots)} and with {max(slots)} slots",
            hint="an estimate is of hosts that are alike: give --nodes and --gpus-per-node",
        )
    return len(hosts), slots.pop()


def variables_of(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as it stands, NAME with the value it has here."""
    variables = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"--env {name}: no name of a variable", hint="--env NAME or --env NAME=VALUE")
        if not equals and name not in os.environ:
            raise UsageError(f"--env {name}: not set here", hint=f"--env {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
    return variables
