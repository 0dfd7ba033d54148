"""`zinf_cli.train.agent MODULE` (search_path.py): torchrun's agent on a host. It forks the host's ranks.

It imports MODULE, and with it torch, before it gets its order: that can happen while the plan is made. A rank then
imports nothing, and ranks share what was imported. A fork takes over all memory, but no other threads. So nothing here
may use the device or start torch's threads.

Lines of JSON come on stdin. The first is null, or a question about the recipe (question.py), which is answered on
stdout. Others may follow, about the model in parts. The last line is the order: this host's "part" of the run
(elastic.py), the "function" of MODULE that ranks run, its "run_dir" and "arguments", the "environment" of the ranks,
"defaults" for variables that this host does not set, and the "log" for all output of the agent. If something fails, the
last line on stdout is {"failed": ...}. It has the first "rank" of this host that failed, and its exit "code" (negative
for a signal), or the "error" that ended the agent.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from zinf_cli.errors import ZinfError
from zinf_cli.train.question import Question, answers_to
from zinf_cli.train.rank_process import run_rank


def main() -> None:
    """Answer what is asked, wait for the order and follow it."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # an import that asks for devices must not start CUDA
    out, line = answers_to(), sys.stdin.readline()
    question = Question(line, out) if json.loads(line) else None
    if question is not None and question.answered_at_once():
        question = None
    gc.disable()  # during imports it would scan all objects again and again, for a tenth of the time
    module = import_module(sys.argv[1])
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from zinf_cli.train.elastic import launch_ranks

    gc.freeze()  # else the ranks' garbage collector touches, and so copies, all of it
    gc.enable()
    if question is not None:
        question.answer()
    while "recipe" in (order := json.loads(line := sys.stdin.readline())):
        Question(line, out).answer()
    with Path(order["log"]).open("wb") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    for name, value in order["defaults"].items():
        os.environ.setdefault(name, value)
    os.environ.update(order["environment"])
    life = partial(getattr(module, order["function"]), Path(order["run_dir"]), *order["arguments"])
    try:
        launch_ranks(order["part"], _rank, life, Path(order["run_dir"]))
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        _say(out, rank=rank, code=first.exitcode)
        raise
    except ZinfError as error:
        _say(out, error=error.to_json())
        sys.exit(f"error: {error.line()}")


def _say(out: IO[str], **failed: Any) -> None:
    """Tell the launcher what failed. The supervisor hands it on when this process has ended."""
    print(json.dumps({"failed": failed}), file=out, flush=True)


def _rank(life: partial[int], run_dir: Path) -> None:
    """Run a rank, in the fork, after undoing what torchrun and the start of this process have set up."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    run_rank(partial(_with_its_threads, life), run_dir)


def _with_its_threads(life: partial[int]) -> int:
    """Live, in the rank itself: torch starts threads when it is told their number, and the guard has yet to fork."""
    import torch

    from zinf_cli.train.process_memory import heap_for_each

    if "OMP_NUM_THREADS" in os.environ:  # which torch read when it was imported
        threads = int(os.environ["OMP_NUM_THREADS"])
        torch.set_num_threads(threads)
        heap_for_each(threads)
    return life()


if __name__ == "__main__":
    main()
