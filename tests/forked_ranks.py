"""Runs of a recipe in ranks that are forked from a process with torch imported: a start takes half a second.

`python -m forked_ranks` reads a job a line and answers each with the exit codes of its ranks, negative for a signal:

    {"recipe": "r.yaml", "changes": ["train.max_steps=3"], "ranks": 2, "kill": {"after_s": 0.7}}
    {"recipe": "r.yaml", "changes": [], "ranks": 2, "kill": {"rank": 1, "call": "fsync", "nth": 5, "before": true}}
    {"recipe": "r.yaml", "changes": [], "ranks": 2, "most": 1000}

With "most" the model is cut into parts of so many elements, whether it has to be or not. A kill is SIGKILL to the
process group of all ranks: some time after their start, or just before or after a rank's nth call of a function of
`os`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zinf_cli.recipe.recipe import Recipe


class ForkedRanks:
    """The process, from a test's side."""

    def __enter__(self) -> ForkedRanks:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "forked_ranks"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            process.kill()

    def run(
        self,
        recipe: Path,
        ranks: int,
        changes: Sequence[str] = (),
        kill: dict[str, Any] | None = None,
        most: int | None = None,
    ) -> list[int]:
        """The exit codes of the ranks; their output is in the run's logs/forked.log. `changes` are KEY=VALUE."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"recipe": str(recipe), "changes": list(changes), "ranks": ranks, "kill": kill, "most": most}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        codes: list[int] = json.loads(self._process.stdout.readline())
        return codes


def _serve() -> None:
    import zinf_cli.train.figures
    import zinf_cli.train.loop  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), file=answers, flush=True)


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


if __name__ == "__main__":
    _serve()
