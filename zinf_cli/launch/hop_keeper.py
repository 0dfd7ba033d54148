"""The program that keeps the connection to a jump host, and leaves nothing of it behind.

    launcher ── keeper ── ssh -M, the connection ══ jump host
                          socket, for every ssh to a host behind it

The launcher may be killed at any moment, and `ssh -M -N` would go on without it. So this process stands between them.
At the end of its stdin, which is the end of the launcher, it ends the connection and removes the socket with its
folder. The folder is private (0700): who can open the socket can log in as the user.

On stdout it prints the socket's path, then "ready" once the connection is there. Standard library only: it is run as a
file, by `python -I`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

SOCKET = "{socket}"
"""Stands for the socket's path in the command."""

_MOST_BYTES = 108 - 1 - 17
"""Of a socket's path. The kernel takes 108 with the zero; ssh first binds it under a name that is 17 longer."""
_GRACE_S = 1.0
_PR_SET_PDEATHSIG = 1


def main(command: Sequence[str]) -> None:
    """Run `command` until it ends, or until stdin does."""
    signal.signal(signal.SIGTERM, _end)
    folder = _make_folder()
    try:
        _keep([word.replace(SOCKET, f"{folder}/s") for word in command], f"{folder}/s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(command: Sequence[str], socket: str) -> None:
    connection = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        print(socket, flush=True)
        ready = False
        while connection.poll() is None:
            if not ready and os.path.exists(socket):  # noqa: PTH110
                ready = True
                print("ready", flush=True)
            if select.select([0], [], [], 0.5 if ready else 0.02)[0] and not os.read(0, 4096):
                break
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):  # the group has what ssh started, too
                os.killpg(connection.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                connection.wait(_GRACE_S)


def _make_folder() -> str:
    """A private folder with a path that is short enough."""
    places = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp", "/dev/shm")
    for place in filter(None, places):
        if len(os.fsencode(f"{place}/zinf-12345678/s")) <= _MOST_BYTES:
            with contextlib.suppress(OSError):
                return tempfile.mkdtemp(prefix="zinf-", dir=place)
    sys.exit(f"no folder for a socket: {', '.join(filter(None, places))} are too long or can't be written")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
