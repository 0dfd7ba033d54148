"""Runs of a recipe in ranks that are forked from a process with torch imported: a start takes half a second.

That process is itself a fork (own_processes.py), and does one job after the other.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from own_processes import FORKS

if TYPE_CHECKING:
    from zinf_cli.recipe.recipe import Recipe


class ForkedRanks:
    """The process, from a test's side."""

    def __enter__(self) -> ForkedRanks:
        self._jobs, theirs = FORKS.Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = FORKS.Process(target=_serve, args=(theirs, environment), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._jobs.close()

    def run(
        self,
        recipe: Path,
        ranks: int,
        changes: Sequence[str] = (),
        kill: dict[str, Any] | None = None,
        most: int | None = None,
    ) -> list[int]:
        """The exit codes of the ranks, negative for a signal; their output is in the run's logs/forked.log.

        `changes` are KEY=VALUE. With `most` the model is cut into parts of so many elements, whether it has to be or
        not. `kill` is SIGKILL to the process group of all ranks: {"after_s": 0.7} after their start, or
        {"rank": 1, "call": "fsync", "nth": 5, "before": True} just before or after a rank's nth call of a function of
        `os`.
        """
        self._jobs.send((str(recipe), list(changes), ranks, kill, most))
        codes: list[int] = self._jobs.recv()
        return codes


def _serve(jobs: Connection, environment: Mapping[str, str]) -> None:
    """Do jobs until the test's process is gone."""
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # as the agent does
    with suppress(EOFError):
        while True:
            jobs.send(_run(*jobs.recv()))


def _run(recipe: str, changes: list[str], ranks: int, kill: dict[str, Any] | None, most: int | None) -> list[int]:
    from zinf_cli.recipe.recipe_file import load_recipe

    loaded = load_recipe(Path(recipe), changes)
    run_dir = loaded.output_dir
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    planned = _ended(_fork(lambda: _plan(loaded, ranks, most), run_dir, group=0))
    if planned != 0:
        return [planned]
    port = _free_port()
    pids: list[int] = []
    for rank in range(ranks):
        group = pids[0] if pids else 0
        pids.append(_fork(lambda rank=rank: _rank(run_dir, rank, ranks, port, kill), run_dir, group))  # type: ignore[misc]
    if kill is None:
        return _all_ended(pids)
    timer = threading.Timer(kill.get("after_s", 60), os.killpg, (pids[0], signal.SIGKILL))
    timer.start()
    codes = _all_ended(pids)
    timer.cancel()
    return codes


def _fork(work: Callable[[], int], run_dir: Path, group: int) -> int:
    """A child that does `work` in process group `group` (0: its own), and exits with what it returns."""
    import torch

    pid = os.fork()
    if pid:
        with suppress(OSError):
            os.setpgid(pid, group)  # here and there, so that whoever comes first is right
        return pid
    code = 1
    try:
        with suppress(OSError):
            os.setpgid(0, group)
        log = os.open(run_dir / "logs" / "forked.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _plan(recipe: Recipe, ranks: int, most: int | None) -> int:
    from zinf_cli.plan.search import best_plan
    from zinf_cli.recipe.recipe_file import dump_recipe
    from zinf_cli.train import figures
    from zinf_cli.train.figures import find_figures

    figures._flops = lambda *_: 1e13  # to measure it takes as long as the run
    plan = best_plan(recipe, find_figures(recipe, ranks, most=most))
    (recipe.output_dir / "plan.json").write_text(json.dumps(plan.to_json()))
    (recipe.output_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    return 0


def _rank(run_dir: Path, rank: int, ranks: int, port: int, kill: dict[str, Any] | None) -> int:
    from zinf_cli.train.loop import train

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if kill is not None and kill.get("rank") == rank:
        _die_at(kill["call"], kill["nth"], before=kill["before"])
    return train(run_dir)


def _die_at(name: str, nth: int, *, before: bool) -> None:
    """Kill this process group at the nth call of os.`name` from now on."""
    call = getattr(os, name)
    numbers = itertools.count(1)  # several threads call

    def counted(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)
        if number == nth and before:
            os.kill(0, signal.SIGKILL)
        result = call(*args, **kwargs)
        if number == nth:
            os.kill(0, signal.SIGKILL)
        return result

    setattr(os, name, counted)


def _all_ended(pids: list[int]) -> list[int]:
    return [_ended(pid, pids[0] if len(pids) > 1 else None) for pid in pids]


def _ended(pid: int, group: int | None = None) -> int:
    """The exit code; where it is not 0, the rest of `group` can't go on and is killed."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code and group is not None:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
