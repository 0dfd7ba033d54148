"""The command line: flags in, one call, errors to exit codes. Nothing heavy is imported at top level."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zinf_cli.errors import FileError, UsageError, ZinfError

if TYPE_CHECKING:
    from zinf_cli.hosts import Host

app = typer.Typer(
    name="zinf",
    help="Train models that do not fit: parameters, gradients, optimizer states and activations "
    "streamed through device, CPU and NVMe memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_debug = False


@app.callback()
def common(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """Options of every command."""
    global _debug
    _debug = debug


@app.command()
def launch(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE ...]", help="Keys of the recipe, e.g. train.max_steps=20."),
    ] = None,
    hosts: Annotated[
        str | None, typer.Option(metavar="HOSTFILE", help="A hostfile, or slurm; without it, this machine.")
    ] = None,
    include: Annotated[
        str | None, typer.Option(metavar="FILTER", help='Only these hosts and slots, e.g. "node1@node2:0,2".')
    ] = None,
    exclude: Annotated[str | None, typer.Option(metavar="FILTER", help="All but these.")] = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on this machine [default: every accelerator, or one CPU rank]."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]", help="A variable for the ranks on every host; NCCL_*, GLOO_* and CUDA_* go anyway."
        ),
    ] = None,
    sync: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="A file or folder to bring to every host first.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan or the summary on stdout, as JSON.")] = False,
) -> None:
    """Plan a run, show the plan, train."""
    from rich.console import Console

    from zinf_cli.launch.service import Request
    from zinf_cli.launch.service import launch as run

    world = _hosts(hosts, include, exclude, slots)
    if sync and not world:
        raise UsageError("--sync brings files to --hosts, which is missing")
    variables = _environment(env or ())
    request = Request(recipe, tuple(overrides or ()), world, variables, tuple(sync or ()), slots, dry_run, as_json)
    run(request, Console(stderr=True))


def _hosts(source: str | None, include: str | None, exclude: str | None, slots: int | None) -> tuple[Host, ...]:
    """The hosts of a run; none stands for this machine."""
    from zinf_cli.hosts import load_hosts

    if source is None:
        if include is not None or exclude is not None:
            raise UsageError("--include and --exclude choose among --hosts, which is missing")
        return ()
    if slots is not None:
        raise UsageError("--slots is for this machine", hint="the hostfile says how many each host has; see --include")
    return load_hosts(source, include=include, exclude=exclude)


def _environment(given: Sequence[str]) -> dict[str, str]:
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


@app.command()
def doctor(
    hosts: Annotated[
        str | None, typer.Option(metavar="HOSTFILE", help="A hostfile, or slurm; without it, this machine.")
    ] = None,
    include: Annotated[str | None, typer.Option(metavar="FILTER", help="Only these hosts and slots.")] = None,
    exclude: Annotated[str | None, typer.Option(metavar="FILTER", help="All but these.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
) -> None:
    """What this machine, or every host, has and lacks."""
    from rich.console import Console

    from zinf_cli.launch.doctor import doctor as look

    look(_hosts(hosts, include, exclude, None), as_json=as_json, console=Console())


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(help="The folder of a run with profiler.enabled, or its trace.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
) -> None:
    """How busy each lane of a profiled run was, and its longest waits."""
    import json

    from rich.console import Console

    from zinf_cli.console import trace_screen
    from zinf_cli.trace import summarise_trace

    summary = summarise_trace(run / "trace.json" if run.is_dir() else run)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        Console().print(trace_screen(summary))


def main() -> None:
    """The entry point: run the app, turn errors into one red line and an exit code."""
    try:
        app(standalone_mode=False)
    except ZinfError as error:
        _report(error)
        raise SystemExit(error.exit_code) from None
    except typer.Exit as done:
        raise SystemExit(done.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:  # click's usage errors, or a bug
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        raise SystemExit(getattr(error, "exit_code", 2)) from None


def _report(error: ZinfError) -> None:
    from rich.console import Console
    from rich.text import Text

    if _debug:
        traceback.print_exception(error)
    lines = error.problems if isinstance(error, FileError) else [error.describe()]
    console = Console(file=sys.stderr)
    for line in lines:
        console.print(Text("error: ", style="bold red") + Text(line), soft_wrap=True)


if __name__ == "__main__":
    main()
