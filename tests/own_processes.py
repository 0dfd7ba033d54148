"""Functions in processes of their own, which are forked from one clean process that has everything imported."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["zinf_cli.train.loop", "zinf_cli.train.figures", "zinf_cli.train.export"])


def in_processes(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
    """What `function` returns for each of `arguments`. The processes run at once."""
    with ProcessPoolExecutor(len(arguments), FORKS, _end_with_the_test) as pool:
        return [future.result() for future in [pool.submit(function, *some) for some in arguments]]


def _end_with_the_test() -> None:
    """Where a test is killed, nothing else would end the processes of its own. What is imported stays (conftest.py)."""
    gc.freeze()

    def wait() -> None:
        test = multiprocessing.parent_process()
        assert test is not None
        test.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def as_ranks(world_size: int, function: Callable[..., T], *arguments: Any) -> list[T]:
    """What `function(ranks, *arguments)` returns on each of `world_size` ranks on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return in_processes(_as_rank, [({**world, "RANK": str(n)}, function, arguments) for n in range(world_size)])


def _as_rank(variables: dict[str, str], function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    import torch

    from zinf_cli.engine.ranks import Ranks

    torch.set_num_threads(1)
    os.environ |= variables
    ranks = Ranks.join(torch.device("cpu"))
    result = function(ranks, *arguments)
    ranks.leave()
    return result
