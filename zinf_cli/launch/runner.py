"""Runs ranks under torchrun, with an agent on each host: starts, watches and stops them, and reports how they ended.

torchrun's agent starts the ranks of a host and, when one fails, sends SIGTERM to the others. The launcher and the
supervisor of each host do the rest: they handle Ctrl-C, ranks that hang and lost hosts, name the first
failure, and make sure that nothing is left running.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from zinf_cli.errors import HostError, Interrupted, PreflightError
from zinf_cli.launch.connection import Connection, Lifelines, at_all
from zinf_cli.launch.failure import Failure, first_failure
from zinf_cli.launch.part import Part
from zinf_cli.launch.program import Program
from zinf_cli.launch.rendezvous import Rendezvous
from zinf_cli.launch.stop_signals import StopSignals
from zinf_cli.launch.vitals import Vitals
from zinf_cli.recipe.hosts import first_names
from zinf_cli.run_folder.error_records import any_recorded, forget_errors
from zinf_cli.run_folder.names import LOGS

_POLL_S = 0.1

_MOST_LATE = 64 << 20
"""Most bytes of all hosts' files that wait in memory for room on the launcher's drive."""

_TEARDOWN_S = 4.0
"""Seconds from the first sign of a failure until all that still runs is killed. torchrun alone would wait for 30 s."""


@dataclass(frozen=True)
class World:
    """The hosts of a run, connected. Several hosts need a rendezvous."""

    lifelines: Lifelines
    connections: Sequence[Connection]
    rendezvous: Rendezvous | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code 0, the failure's, or 130 after Ctrl-C."""

    exit_code: int
    failure: Failure | None
    interrupted: bool
    """Whether the user has asked the run to stop."""
    others: str = ""
    """What became of the other hosts, if one failed."""
    host_cpu_bytes: int = 0
    """Peak of the CPU memory of the run's processes, on the host that took the most."""

    @property
    def ended_as_asked(self) -> bool:
        """Whether the user ended the run and no rank has raised an error on the way, such as a last checkpoint that
        could not be written."""
        return self.interrupted and (self.failure is None or not self.failure.raised)


def run_ranks(
    program: Program,
    world: World,
    *,
    on_poll: Callable[[], None],
    notify: Callable[[str], None],
    on_vitals: Callable[[Vitals], None] = lambda vitals: None,
) -> Outcome:
    """Run `program` as a rank for every slot of `world` until they end, one fails, or the user stops them.

    `on_poll` is called about every 0.1 s, and once after the end. `notify` gets a line for the user when Ctrl-C is
    first pressed or a host is lost. `on_vitals` gets what a host's processes take, about every second. The first
    SIGINT, SIGTERM, SIGUSR1 or SIGHUP (stop_signals.py) asks the ranks to stop after their step; the second kills them.
    Has to be called from the main thread, since it sets signal handlers; it puts them back at the end. PreflightError
    if a host can't start; then no host has.
    """
    logs = program.run_dir / LOGS
    mark = program.run_dir / f".{world.lifelines.launch_id}"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        forget_errors(program.run_dir)
        mark.touch()
    except OSError as error:
        raise PreflightError(f"can't be written: {error.strerror}", where=str(error.filename)) from error
    most_late = _MOST_LATE // max(1, len(world.connections))
    firsts = accumulate((len(connection.host.slots) for connection in world.connections), initial=0)
    parts = [
        Part(connection, first, logs / f"torchrun-{number:05d}.log", program, on_vitals, most_late)
        for number, (connection, first) in enumerate(zip(world.connections, firsts, strict=False))
    ]
    with StopSignals() as stop_signals, _marked(mark):
        try:
            _start(parts, world.rendezvous)
            outcome = _watch(parts, stop_signals, program.run_dir, on_poll, notify)
            return replace(outcome, host_cpu_bytes=max(part.peak_memory for part in parts))
        finally:
            _end(parts, world.lifelines)
            on_poll()


def _start(parts: Sequence[Part], rendezvous: Rendezvous | None) -> None:
    """Start all parts, or none."""
    _all_or_none(at_all(Part.prepare, parts))
    if rendezvous is None:
        (part,) = parts
        part.start(0, 1, None, None)
        return
    ways = [way if isinstance(way, str) else None for way in rendezvous.ways]
    meeting = {"address": rendezvous.address, "port": rendezvous.port, "word": secrets.token_hex(16)}

    def start(number: int) -> None:
        parts[number].start(number, len(parts), meeting, ways[number])

    start(0)  # the first supervisor frees the port of the rendezvous, and its agent takes it
    _all_or_none(at_all(start, range(1, len(parts))))


def _all_or_none(results: Sequence[Any]) -> None:
    problems = [result.line() for result in results if isinstance(result, HostError)]
    if problems:
        raise PreflightError("; ".join(problems))


def _watch(
    parts: Sequence[Part],
    stop_signals: StopSignals,
    run_dir: Path,
    on_poll: Callable[[], None],
    notify: Callable[[str], None],
) -> Outcome:
    asked_to_stop = False
    told: set[Part] = set()
    teardown_due: float | None = None
    while not all(part.over for part in parts):
        time.sleep(_POLL_S)
        for part in parts:
            part.listen()
        on_poll()
        if any(part.told_to_end for part in parts):
            stop_signals.told_elsewhere()
        if stop_signals.received >= 2:
            return Outcome(Interrupted.exit_code, None, interrupted=True)
        if stop_signals.received and not asked_to_stop:
            asked_to_stop = True
            # not waited for: a second Ctrl-C has to be heard, even if a host does not answer
            threading.Thread(target=at_all, args=(Part.ask_to_stop, parts), daemon=True).start()
            notify("stopping after this step; press Ctrl-C again to kill the ranks now")
        if teardown_due is None and (any_recorded(run_dir) or any(part.in_trouble for part in parts)):
            teardown_due = time.monotonic() + _TEARDOWN_S
        lost = [part for part in parts if part.lost is not None and part not in told]
        if lost:
            told.update(lost)
            notify(f"{first_names([part.host.name for part in lost])}: {lost[0].lost}; ending the run")
        falters = any(part.connection.falters for part in parts)  # what others tell may be the loss of this one
        if teardown_due is not None and time.monotonic() > teardown_due and not falters:
            break
    failure = first_failure(run_dir, [part.ending() for part in parts])
    if failure is not None:
        return Outcome(failure.error.exit_code, failure, asked_to_stop, _fate_of_others(parts, failure))
    return Outcome(Interrupted.exit_code if asked_to_stop else 0, None, interrupted=asked_to_stop)


def _fate_of_others(parts: Sequence[Part], failure: Failure) -> str:
    """What became of the other hosts. Those to look at come first."""
    others = [part for part in parts if part.host.name != failure.host]
    lost = [part.host.name for part in others if part.lost is not None]
    ended = [part.host.name for part in others if part.lost is None]
    words = [f"{first_names(lost)} lost as well"] if lost else []
    words += [f"ended on {first_names(ended)}"] if ended else []
    return "; ".join(words)


def _end(parts: Sequence[Part], lifelines: Lifelines) -> None:
    """Leave nothing of the run on any host that answers, and fetch what the ranks wrote."""
    at_all(Part.kill, parts)
    at_all(lambda part: part.leave(lifelines), parts)


@contextmanager
def _marked(mark: Path) -> Iterator[None]:
    """Remove `mark` at the end. While it is in the run's folder, a host that sees it has the launcher's own folder."""
    try:
        yield
    finally:
        with suppress(OSError):  # the next launch removes it; an error here would hide the one that ended this launch
            mark.unlink()
