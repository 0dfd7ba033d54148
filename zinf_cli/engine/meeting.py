"""Where the ranks of a run find each other: a store of torch.distributed that nobody else should reach.

On one host the store is a nameless file in memory. Ranks inherit it from the process that forks them, and nothing
listens. On several hosts it is a TCPStore of the first one, bound to the address by which the others reach it; torch's
own store (env://) takes connections on every interface. A TCPStore asks nobody who they are, so the keys of a run lie
under a word that only its ranks are told. Whoever can connect can still list and change all keys: only a firewall stops
that.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import FileStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from zinf_cli.errors import HostError

_VARIABLE = "ZINF_MEETING"


def prepare_here() -> None:
    """Prepare the store for ranks that are forked from this process, and no others."""
    os.environ[_VARIABLE] = json.dumps({"path": f"/proc/self/fd/{os.memfd_create('zinf ranks')}"})


def prepare_across(meeting: Mapping[str, Any], *, serve: bool) -> Any:
    """Prepare the store for ranks of several hosts: `meeting` has "address", "port" and "word". One host must `serve`.

    Returns the store, which has to live as long as the ranks; None on other hosts. HostError where the port is taken.
    """
    os.environ[_VARIABLE] = json.dumps(dict(meeting))
    if not serve:
        return None
    address, port = meeting["address"], meeting["port"]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        raise HostError(f"can't listen on {address} port {port}, where the ranks meet: {error.strerror}") from error
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def store(timeout: timedelta) -> Any:
    """The store, whose calls wait up to `timeout` for a key; None where nothing was prepared."""
    if _VARIABLE not in os.environ:
        return None
    meeting = json.loads(os.environ[_VARIABLE])
    if "path" in meeting:
        found = FileStore(meeting["path"])
        found.set_timeout(timeout)
        return found
    client = TCPStore(meeting["address"], meeting["port"], is_master=False, timeout=timeout)
    return PrefixStore(meeting["word"], client)
