"""The command line: flags in, one call, errors to exit codes. Nothing heavy is imported at top level."""

from __future__ import annotations

# ruff: noqa: E402
from zinf_cli.command_line import hide_values
from zinf_cli.search_path import leave_out_working_directory

leave_out_working_directory()  # before anything is imported that could be shadowed
hide_values("--env")  # before what takes time

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from zinf_cli.commands.options import (
    DEBUG,
    AsJson,
    EstimateHosts,
    Exclude,
    Explain,
    GlobalBatchSize,
    GpusPerNode,
    GradientAccumulationSteps,
    Hardware,
    Heads,
    Hidden,
    Hosts,
    Include,
    InOrder,
    Layers,
    MaxModel,
    MicroBatchSize,
    Nodes,
    Out,
    Params,
    Recipe,
    SeqLen,
    Ssh,
    Strategy,
    Timeline,
    Vocab,
    chosen_hosts,
    counted_hosts,
    variables_of,
)
from zinf_cli.commands.recipe import recipes
from zinf_cli.commands.report import report
from zinf_cli.errors import FileError, UsageError, ZinfError
from zinf_cli.unfailing_stream import stand_on_open_descriptors

app = typer.Typer(
    name="zinf",
    cls=InOrder,
    help="Train models that do not fit: parameters, gradients, optimizer states and activations "
    "streamed through device, CPU and NVMe memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure this machine: what estimate and launch then go by.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(recipes, name="recipe")
app.command()(report)
_debug = False


@app.callback()
def common(debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False) -> None:
    """Options of every command."""
    global _debug
    _debug = debug


@app.command()
def launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe, e.g. train.max_steps=20."),
    ] = None,
    hosts: Hosts = None,
    include: Annotated[
        str | None, typer.Option(metavar="FILTER", help='Only these hosts and slots, e.g. "node1@node2:0,2".')
    ] = None,
    exclude: Exclude = None,
    ssh: Ssh = False,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on this machine (default: every accelerator, or one CPU rank)."),
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the whole plan and stop.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the whole plan first: bytes by tier, and every default.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan or the summary on stdout, as JSON.")] = False,
) -> None:
    """Plan a run, show the plan, train."""
    from zinf_cli.commands.launch import Request
    from zinf_cli.commands.launch import launch as run
    from zinf_cli.screen import Screen

    world = chosen_hosts(hosts, include, exclude, slots, ssh=ssh)
    if sync and not world:
        raise UsageError("--sync brings files to --hosts, which is missing")
    if sync and world[0].job is not None:
        raise UsageError("--sync brings files by SSH", hint="add --ssh, or see sbcast for the nodes of a job")
    variables = variables_of(env or ())
    request = Request(
        recipe, tuple(overrides or ()), world, variables, tuple(sync or ()), slots, dry_run, explain, as_json
    )
    run(request, Screen(stderr=True))


@app.command()
def init(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face checkpoint directory, or a run.")],
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT", help="Files or folders to train on.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The recipe (default: MODEL's name with .yaml).")
    ] = None,
    from_deepspeed: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Take over what a DeepSpeed configuration says.")
    ] = None,
    hostfile: Annotated[
        str | None, typer.Option(metavar="HOSTFILE", help="Its ranks, for the sizes of DeepSpeed's batch.")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Train an adapter (LoRA) in the model's place.")] = False,
) -> None:
    """Write a recipe that runs, each choice with its reason."""
    from zinf_cli.commands.init import InitRequest
    from zinf_cli.commands.init import init as write
    from zinf_cli.screen import Screen

    slots = sum(len(host.slots) for host in chosen_hosts(hostfile, None, None)) if hostfile else None
    write(InitRequest(model, tuple(texts), out, from_deepspeed, slots, adapter), Screen())


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT", help="A run's folder or one of its checkpoints, read and checked in full."
        ),
    ] = None,
    hosts: Hosts = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh: Ssh = False,
    as_json: AsJson = False,
) -> None:
    """What this machine, every host or a checkpoint has and lacks."""
    from zinf_cli.commands.doctor import check_checkpoint
    from zinf_cli.commands.doctor import doctor as look
    from zinf_cli.screen import Screen

    if checkpoint is not None:
        check_checkpoint(checkpoint.absolute(), as_json=as_json, console=Screen())
        return
    look(chosen_hosts(hosts, include, exclude, ssh=ssh), as_json=as_json, console=Screen())


@app.command()
def estimate(
    recipe: Recipe = None,
    params: Params = None,
    layers: Layers = None,
    hidden: Hidden = None,
    heads: Heads = None,
    vocab: Vocab = 0,
    max_model: MaxModel = False,
    seq_len: SeqLen = None,
    micro_batch_size: MicroBatchSize = None,
    gradient_accumulation_steps: GradientAccumulationSteps = None,
    global_batch_size: GlobalBatchSize = None,
    hosts: EstimateHosts = None,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    hardware: Hardware = None,
    strategy: Strategy = "infinity",
    explain: Explain = False,
    timeline: Timeline = None,
    as_json: AsJson = False,
) -> None:
    """Will it fit, and how fast will it be? Nothing is loaded and nothing is run.

    Training a model takes 16 or 18 bytes for each parameter, and activations besides.

    The answer says what of them lies in GPU memory, in CPU memory and on NVMe, how long a step takes, and why.

    With a RECIPE (or a config.json): the exact plan that launch would make. With --params: an answer in a blink.
    """
    from zinf_cli.commands.estimate import Flags, estimate_by_flags
    from zinf_cli.screen import Screen

    if hosts is not None:
        if nodes > 1 or gpus_per_node:
            raise UsageError("give either --hosts or --nodes and --gpus-per-node")
        nodes, gpus_per_node = counted_hosts(hosts)
    given = list(recipe or ())
    path = Path(given.pop(0)) if given and "=" not in given[0] else None
    flags = Flags(
        params, layers, hidden, heads, vocab, seq_len, micro_batch_size, gradient_accumulation_steps,
        global_batch_size, nodes, gpus_per_node, hardware, strategy, max_model, explain, timeline, as_json,
        tuple(given),
    )  # fmt: skip
    if path is None:
        estimate_by_flags(flags, Screen())
        return
    if params or layers or hidden or heads or vocab:
        raise UsageError("give either a RECIPE or the flags of a model", hint=f"{path} is taken for the recipe")
    from zinf_cli.commands.estimate_recipe import estimate_recipe

    estimate_recipe(path, given, flags, Screen())


@bench.command("nvme")
def bench_nvme(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="Folders on drives, used together (default: here)."),
    ] = None,
    size: Annotated[str, typer.Option(help="Bytes of the files, all together; free again afterwards.")] = "4GiB",
    block_sizes: Annotated[str | None, typer.Option(help="Of the sweep, e.g. 1MiB,4MiB,8MiB.")] = None,
    threads: Annotated[str | None, typer.Option(help="Of the sweep, e.g. 1,2,4,8,16.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """How fast drives read and write, cache bypassed, by block size and threads; fio beside it where there is one."""
    from zinf_cli.commands.bench import NvmeRequest, run_bench_nvme
    from zinf_cli.screen import Screen

    request = NvmeRequest(tuple(paths or ()), size, block_sizes, threads, out, as_json)
    run_bench_nvme(request, Screen(stderr=True))


@bench.command("links")
def bench_links(
    hosts: Hosts = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh: Ssh = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """How fast a machine computes, updates, and moves data: to its accelerators, between its ranks, between hosts."""
    from zinf_cli.commands.bench import run_bench_links
    from zinf_cli.screen import Screen

    run_bench_links(chosen_hosts(hosts, include, exclude, ssh=ssh), out, as_json=as_json, console=Screen(stderr=True))


@app.command()
def trace(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run with profiler.enabled, or its trace.json.")
    ],
    as_json: AsJson = False,
) -> None:
    """How busy each lane of a profiled run was, and its longest waits."""
    import json

    from zinf_cli.run_folder.names import TRACE
    from zinf_cli.screen import Screen
    from zinf_cli.screens.run import trace_screen
    from zinf_cli.trace import summarise_trace

    summary = summarise_trace(run / TRACE if run.is_dir() else run)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        Screen().print(trace_screen(summary))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new folder.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights: fp32, as they are trained, bf16 or fp16; merged ones are as the model is."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was written, as JSON on stdout.")] = False,
) -> None:
    """Write an ordinary Hugging Face checkpoint, unit by unit; of an adapter, the folder that peft loads."""
    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise UsageError(f"--dtype is fp32, bf16 or fp16, not {dtype}")
    import dataclasses
    import json

    from zinf_cli.amounts import format_bytes
    from zinf_cli.screen import Screen, printable
    from zinf_cli.screens.progress import progress

    with progress(Screen(stderr=True), "writing the model") as tell:
        from zinf_cli.train.export import export as write  # torch, whose import takes its time

        done = write(run.absolute(), out.absolute(), dtype, merge=merge, tell=tell)
    if as_json:
        print(json.dumps(dataclasses.asdict(done), indent=2, default=str))
        return
    files = "1 file" if done.num_shards == 1 else f"{done.num_shards} files"
    print(printable(f"{done.folder}: step {done.step}, {format_bytes(done.num_bytes)} of {done.dtype} in {files}"))


@app.command()
def clean(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", help="Runs, or folders of runs (default: runs).")
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Checkpoints too that were set aside as damaged, if they still are.")
    ] = False,
) -> None:
    """List and remove what killed runs have left behind."""
    from zinf_cli.amounts import format_bytes
    from zinf_cli.checkpoint.folder import kept_back
    from zinf_cli.run_folder.leftovers import leftovers_of, remove
    from zinf_cli.screen import printable

    found = [leftover for path in paths or [Path("runs")] for leftover in leftovers_of(path.absolute(), damaged)]
    for leftover in found:
        print(printable(f"{leftover.path}: {leftover.what}, {format_bytes(leftover.num_bytes)}"))
    going = [leftover for leftover in found if not leftover.keep]
    left = [path for leftover in going for path in remove(leftover)]
    if left:
        print(printable(kept_back(left)))
    total = format_bytes(sum(leftover.num_bytes for leftover in going))
    print(f"{len(going)} removed, {total}" if going else "nothing removed" if found else "nothing left behind")


def main() -> None:
    """The entry point: run the app, turn errors into one red line and an exit code."""
    stand_on_open_descriptors()
    try:
        code = app(standalone_mode=False)
        if code:  # typer makes 130 of Ctrl-C
            raise SystemExit(code)
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
            _print_traceback(error)
            raise SystemExit(1) from None
        from zinf_cli.screen import printable

        error.message = printable(error.message)  # type: ignore[attr-defined]
        show()
        raise SystemExit(getattr(error, "exit_code", 2)) from None


def _print_traceback(error: Exception) -> None:
    from zinf_cli.screen import printable

    print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _report(error: ZinfError) -> None:
    from rich.text import Text

    from zinf_cli.screen import Screen, outside

    if _debug:
        _print_traceback(error)
    lines = error.problems if isinstance(error, FileError) else [error.line()]
    console = Screen(stderr=True)
    for line in lines:
        console.print(Text("error: ", style="bold red") + outside(line), soft_wrap=True)


if __name__ == "__main__":
    main()
