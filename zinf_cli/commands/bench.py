"""`zinf bench`: measure, show, and keep the figures in a hardware.yaml."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from zinf_cli.amounts import format_bytes, parse_bytes
from zinf_cli.bench.fio import beside_fio
from zinf_cli.bench.nvme import BLOCK_SIZES, THREADS, Point, bench_nvme, check_folders, steps_of
from zinf_cli.errors import Interrupted, UsageError
from zinf_cli.launch.connection import Lifelines, transport_to
from zinf_cli.launch.preflight import check_hosts
from zinf_cli.launch.program import Agent, Program
from zinf_cli.launch.runner import World, run_ranks
from zinf_cli.machine.control_groups import cores_here
from zinf_cli.machine.profile_file import Beside, Best, Links, Nvme, save_measured, user_file
from zinf_cli.model_state import PAGE
from zinf_cli.recipe.hosts import Host, this_machine
from zinf_cli.run_folder.names import rank_log
from zinf_cli.screen import Screen
from zinf_cli.screens.bench import links_screen, nvme_screen
from zinf_cli.screens.launch import preflight_screen
from zinf_cli.screens.progress import progress

LINKS = "zinf_cli.bench.links"
"""The module that ranks run to measure links."""


@dataclass(frozen=True)
class NvmeRequest:
    """What was asked on the command line."""

    paths: Sequence[Path]
    size: str = "4GiB"
    block_sizes: str | None = None
    threads: str | None = None
    out: Path | None = None
    as_json: bool = False


def run_bench_nvme(request: NvmeRequest, console: Console) -> None:
    """Progress on `console`, the result on stdout and in the hardware.yaml."""
    folders = [path.expanduser().absolute() for path in request.paths] or [Path.cwd()]
    if len(set(folders)) < len(folders):
        raise UsageError("a folder is named twice", where=", ".join(map(str, folders)))
    size = _size("--size", request.size)
    blocks = _several("--block-sizes", request.block_sizes, BLOCK_SIZES, _size)
    threads = _several("--threads", request.threads, THREADS, _count)
    if size < 4 * max(blocks) * len(folders):
        raise UsageError(
            f"--size {format_bytes(size)} is too little for blocks of {format_bytes(max(blocks))}",
            hint="give at least four blocks for each folder",
        )
    check_folders(folders, size)
    moved, total = 0, steps_of(size, blocks, threads)
    with progress(console, "measuring the drives") as tell:

        def report(doing: str, num_bytes: int) -> None:
            nonlocal moved
            moved += num_bytes
            tell(moved / total, doing)

        result = bench_nvme(folders, size, blocks, threads, report)
    with progress(console, "the same with fio, in turn"):
        fio = beside_fio(result)
    out = request.out or user_file()
    measured = Nvme(
        folders=result.folders, space=result.space, read=_best(result.read), write=_best(result.write),
        both=result.both, beside=Beside(drives=result.beside[0], compute=result.beside[1]),
    )  # fmt: skip
    save_measured(out, "nvme", measured, socket.gethostname())
    if request.as_json:
        print(json.dumps({**result.to_json(), **({"fio": fio} if fio else {})}, indent=2))
    else:
        Screen().print(nvme_screen(result, fio, out))


def run_bench_links(hosts: Sequence[Host], out: Path | None, *, as_json: bool, console: Console) -> None:
    """Ranks measure, on this machine or on `hosts`; the result on stdout and in the hardware.yaml.

    Of several hosts the first one is measured by itself, and then what all of them gather together.
    """
    with Lifelines(transport_to(hosts)) as lifelines:
        preflight = check_hosts(hosts or (this_machine(1),), lifelines)
        if hosts:
            console.print(preflight_screen(preflight))
        preflight.require_ready()
        first, *others = preflight.connections
        first.host = replace(first.host, slots=(0,))
        found = _measured("alone", World(lifelines, [first]), console)
        here = found["accelerators"] or min(2, cores_here())
        inside = len(hosts[0].slots) if hosts else here
        if inside > 1:
            first.host = replace(first.host, slots=tuple(range(inside)))
            found |= _measured("together", World(lifelines, [first]), console)
        if others:
            first.host = hosts[0]
            together = _measured("together", World(lifelines, preflight.connections, preflight.rendezvous), console)
            found["across"] = together["collective"]
    links = Links.model_validate({**found, **{name: _whole_rows(found[name]) for name in ("matmul", "block")}})
    path = out or user_file()
    save_measured(path, "links", links, hosts[0].name if hosts else socket.gethostname())
    if as_json:
        print(json.dumps(links.model_dump(mode="json", exclude_none=True), indent=2))
    else:
        Screen().print(links_screen(links, path))


def _measured(part: str, world: World, console: Console) -> dict[str, Any]:
    """What rank 0 says at the end of one part."""
    count = sum(len(connection.host.slots) for connection in world.connections)
    with tempfile.TemporaryDirectory(prefix="zinf-") as folder:
        run_dir = Path(folder)
        program = Program(Agent(LINKS), "measure", [part], run_dir, {}, (), False, {})
        with progress(console, f"measuring, {count} {'rank' if count == 1 else 'ranks'}"):
            outcome = run_ranks(program, world, on_poll=lambda: None, notify=console.print)
        if outcome.ended_as_asked:
            raise Interrupted("interrupted")
        if outcome.failure is not None:
            raise outcome.failure.reported(log=False)  # which goes with the folder
        *_, last = (run_dir / rank_log(0)).read_text().splitlines()
    found: dict[str, Any] = json.loads(last)
    return found


def _whole_rows(matmul: dict[str, dict[str, float]]) -> dict[str, dict[int, float]]:
    """JSON has no numbers for keys."""
    return {precision: {int(rows): rate for rows, rate in rates.items()} for precision, rates in matmul.items()}


def _best(point: Point) -> Best:
    return Best(bytes_per_s=point.bytes_per_s, block_size=point.block_size, threads=point.threads)


def _several(flag: str, text: str | None, default: Sequence[int], parse: Callable[[str, str], int]) -> Sequence[int]:
    return default if text is None else tuple(parse(flag, item.strip()) for item in text.split(","))


def _size(flag: str, text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
    if size < PAGE or size % PAGE:
        raise UsageError(f"{flag}: expected a multiple of {PAGE} bytes, got {text}")
    return size


def _count(flag: str, text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 256:
        raise UsageError(f"{flag}: expected numbers from 1 to 256, such as 1,4,8, got {text!r}")
    return int(text)
