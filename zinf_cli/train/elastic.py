"""Runs torchrun's elastic launcher, and tells it who takes part, and where.

torchrun's own rendezvous are not used: they listen on every interface, and one of them, c10d, also unpickles what it
receives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.numa.binding import AffinityMode, NumaOptions

from zinf_cli.engine import meeting

_BACKEND = "zinf"
_PATIENCE = timedelta(minutes=15)
"""How long an agent waits for the agents of all hosts."""


def launch_ranks(part: Mapping[str, Any], function: Callable[..., None], *arguments: Any) -> None:
    """Fork this host's ranks and wait until they end.

    `part` is this host's part of the run: the number of its "ranks", its "number" among the "hosts" and, with several
    hosts, the "meeting" (meeting.py). torch's ChildFailedError if a rank fails.
    """
    handler = _Told(part)
    rendezvous_handler_registry.register(_BACKEND, lambda parameters: handler)
    config = LaunchConfig(
        min_nodes=part["hosts"],
        max_nodes=part["hosts"],
        nproc_per_node=part["ranks"],
        run_id=_BACKEND,
        rdzv_backend=_BACKEND,
        max_restarts=0,
        start_method="fork",
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # SIGTERM is the launcher's to obey (supervisor.py)
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else it leaves a folder in /tmp
        # else it asks for the devices here, which initialises CUDA if NVML is no help: no fork could use it then
        numa_options=NumaOptions(AffinityMode.NODE),
    )
    config.numa_options = None  # ranks stay on the cores that they are given
    elastic_launch(config, function)(*arguments)


class _Told(RendezvousHandler):
    """A rendezvous that knows who takes part. Agents agree on ranks, and on the end, by the store that ranks use."""

    def __init__(self, part: Mapping[str, Any]) -> None:
        self._part = part
        self._server: Any = None

    def next_rendezvous(self) -> RendezvousInfo:
        told = self._part["meeting"]
        if told is None:
            meeting.prepare_here()
        else:
            self._server = meeting.prepare_across(told, serve=self._part["number"] == 0)
        address = RendezvousStoreInfo("", 0)  # for MASTER_ADDR and MASTER_PORT: nothing listens there
        store = PrefixStore("agents", meeting.store(_PATIENCE))
        return RendezvousInfo(store, self._part["number"], self._part["hosts"], address)

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return _BACKEND

    def get_run_id(self) -> str:
        return _BACKEND

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: no host comes later."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True
