"""`python -m benchmarks.scale`: launches on 512 to 4096 hosts that one process plays (played_hosts.py), 8 ranks each.

All that the launcher does is real but the transport: preflight, plan, start, heartbeats, mirrored logs, and the first
of thousands of failures by its name. Relays are real, in processes of their own (played_relays.py). Each message takes
50 ms each way, twice that where it passes a relay, and a login nine round trips. What the model
takes was asked before, as in the second launch of a recipe.

What a real connection costs the launcher's machine beside that is measured with `ssh` to a real sshd: `--clients`.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.launch_on_played import Played
from benchmarks.played_hosts import BURST_LINES, FAILING, LINE, RANKS
from benchmarks.results import add_save, report
from benchmarks.startup import LLAMA
from tests.lab import loopback_lab
from zinf_cli.launch.connection import Lifelines, at_all, find_ssh
from zinf_cli.recipe.hosts import Host
from zinf_cli.run_folder.names import rank_log

_LOOK_S = 0.1
_RELAYS_S = 2.0
"""Between two looks at the memory of relays, which take a while."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches on thousands of played hosts.")
    parser.add_argument("--hosts", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--clients", type=int, default=0, help="instead: connect by so many real programs of ssh")
    add_save(parser)
    arguments = parser.parse_args()
    if arguments.clients:
        report(f"{arguments.clients} logins by ssh", [_clients(arguments.clients)], arguments.save)
        return
    with tempfile.TemporaryDirectory(prefix="zinf-") as name:
        os.environ["XDG_CACHE_HOME"] = name
        rows = [_launch(Path(name) / str(count), count) for count in arguments.hosts]
    report("played hosts", rows, arguments.save)


@dataclass
class _Launcher:
    """What a launcher has taken so far."""

    process: psutil.Process
    began: float = field(default_factory=time.time)
    memory: int = 0
    threads: int = 0
    files: int = 0
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """(Time, seconds of CPU until then)."""

    def look(self) -> None:
        with self.process.oneshot():
            times = self.process.cpu_times()
            self.memory = max(self.memory, self.process.memory_info().rss)
            self.threads = max(self.threads, self.process.num_threads())
            self.files = max(self.files, self.process.num_fds())
        self.seconds.append((time.time(), times.user + times.system))

    def cores(self, since: float, until: float) -> float:
        """Cores that it kept busy between two times."""
        taken = [(when, seconds) for when, seconds in self.seconds if since <= when <= until]
        return (taken[-1][1] - taken[0][1]) / (taken[-1][0] - taken[0][0])


@dataclass
class _Relays:
    """What the relay that took the most has taken so far, of its own."""

    starts_them: psutil.Process
    memory: int = 0
    due: float = 0.0

    def look(self) -> None:
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + _RELAYS_S
            with suppress(psutil.Error):
                self.memory = max([self.memory, *(one.memory_full_info().uss for one in self.starts_them.children())])


def _launch(folder: Path, count: int) -> dict[str, Any]:
    """A row of the table."""
    folder.mkdir()
    recipe = _recipe(folder, count)
    _ask_for_figures(recipe, count)
    whole = BURST_LINES * len(LINE) * 3 // 4
    by_relays = count > Played.most_direct
    with _players(folder, hops=1 + by_relays) as (said, relays), (folder / "err").open("w") as errors:
        words = [sys.executable, "-m", "benchmarks.launch_on_played", str(folder / "socket"), str(recipe), str(count)]
        process = subprocess.Popen(words, stderr=errors, stdout=errors)
        launcher, mirrored = _Launcher(psutil.Process(process.pid)), None
        last = folder / "run" / rank_log(count * RANKS - 1)
        while process.poll() is None:
            launcher.look()
            relays.look()
            if mirrored is None and last.exists() and last.stat().st_size > whole:
                mirrored = time.time()
            time.sleep(_LOOK_S)
        over = time.time()
        at = {word: float(when) for when, word, *_ in map(str.split, said().splitlines())}
    failed = (folder / "err").read_text().splitlines()[-1]
    assert f":rank {FAILING % (count * RANKS)}: out of memory" in failed, failed
    assert "silent" not in at
    assert mirrored is not None
    return {
        "hosts": count,
        "ranks": count * RANKS,
        "links": math.isqrt(count - 1) + 1 if by_relays else count,
        "ranks_started_s": at["started"] - launcher.began,
        "peak_memory_bytes": launcher.memory,
        "a_relay_bytes": relays.memory if by_relays else None,
        "threads": launcher.threads,
        "open_files": launcher.files,
        "busy_cores": launcher.cores(at["started"] + 2, at["burst"]),
        "burst_bytes": whole * count * RANKS,
        "burst_mirrored_s": mirrored - at["burst"],
        "failure_to_end_s": over - at["failed"],
    }


def _ask_for_figures(recipe: Path, count: int) -> None:
    """As an earlier launch has done; the answer is kept."""
    hosts = recipe.parent / "hosts"
    hosts.write_text("".join(f"node{number} slots={RANKS}\n" for number in range(count)))
    words = [sys.executable, "-m", "zinf_cli.cli", "launch", str(recipe), "--hosts", str(hosts), "--dry-run"]
    subprocess.run(words, stderr=subprocess.DEVNULL, check=True)


@contextmanager
def _players(folder: Path, hops: int) -> Iterator[tuple[Callable[[], str], _Relays]]:
    """A process that plays hosts, and one that starts relays; gives what reads what the first has said, and these."""
    players = []
    try:
        for name, *more in (("played_hosts", str(hops)), ("played_relays",)):
            path = folder / name
            with path.open("w") as said:
                words = [sys.executable, "-m", f"benchmarks.{name}", str(folder / "socket"), *more]
                players.append(subprocess.Popen(words, stdout=said))
            while "open" not in path.read_text():
                time.sleep(_LOOK_S)
        yield (folder / "played_hosts").read_text, _Relays(psutil.Process(players[-1].pid))
    finally:
        for player in players:
            player.kill()
            player.wait()


def _recipe(folder: Path, count: int) -> Path:
    np.save(folder / "tokens.npy", np.arange(16 * count * RANKS + 1000) % 251)
    content = {
        "model": {"config": LLAMA},
        "dataset": {"path": str(folder / "tokens.npy")},
        "train": {"seq_len": 16, "micro_batch_size": 1, "global_batch_size": count * RANKS, "max_steps": 2},
        "offload": dict.fromkeys(("params", "grads", "optimizer", "activations"), "cpu"),
        "logging": {"tensorboard": False, "report": False},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _clients(count: int) -> dict[str, Any]:
    """What a program of `ssh` takes, of `count` that stay connected to one sshd."""
    with tempfile.TemporaryDirectory(prefix="zinf-") as name, loopback_lab(Path(name), 1) as lab:
        os.environ.update(lab.environment)
        (there,) = lab.hosts
        began = time.monotonic()
        with Lifelines(find_ssh()) as lifelines:
            at_all(lifelines.connect, [Host(there.name, (0,), port=there.port)] * count)
            seconds = time.monotonic() - began
            programs = [one for one in psutil.Process().children(recursive=True) if one.name() == "ssh"]
            assert len(programs) == count
            memory = sum(one.memory_full_info().pss for one in programs) / count
            cpu = sum(sum(one.cpu_times()[:2]) for one in programs) / count
    return {"programs": count, "all_connected_s": seconds, "memory_each_bytes": memory, "cpu_each_s": cpu}


if __name__ == "__main__":
    main()
