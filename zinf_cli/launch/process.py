"""The process tree of one launch: none of it outlives the launcher, which can end all of it at once.

    launcher ── torchrun's agent ── one guard per rank ── the rank ── whatever it starts

Each link is tethered with PR_SET_PDEATHSIG: when a parent dies, however it dies, the kernel kills its
child, so a launcher lost to SIGKILL takes the agent with it, the agent its guards, a guard its rank. The
last two tethers are fastened by the rank itself (train/rank_process.py). The launcher is also a sub-reaper:
a process whose parent died becomes its child rather than init's, so a walk down from the launcher finds
every process of the run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import psutil

AGENT_PID = "ZINF_AGENT_PID"
"""In the environment of every rank: the process a rank is tethered to."""

_KILL_TIMEOUT_S = 10.0
"""A process that outlives SIGKILL this long sits in the kernel (a hung drive or GPU) and can't be ended."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_prctl = ctypes.CDLL(None).prctl


class ProcessTree:
    """Everything this process starts while the tree is open; closing it leaves none of it running.

    Children that were there before are bystanders and stay untouched.
    """

    def __enter__(self) -> ProcessTree:
        self._bystanders = set(psutil.Process().children())
        self._roots: list[subprocess.Popen[bytes]] = []
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        _prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def start(self, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Run `command` (an absolute path first), tethered to this thread, its output into `log`.

        It gets a session of its own, so that the terminal's Ctrl-C reaches the launcher alone.
        """
        tethered = [sys.executable, "-m", "zinf_cli.launch.process", str(os.getpid()), *command]
        with log.open("wb") as output:
            root = subprocess.Popen(
                tethered,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._roots.append(root)
        return root

    def kill(self) -> None:
        """SIGKILL to all of it, again until nothing is left: a process may fork while the others die."""
        for root in self._roots:
            root.kill()
            with suppress(subprocess.TimeoutExpired):
                root.wait(_KILL_TIMEOUT_S)
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while (left := self._living()) and time.monotonic() < deadline:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                with suppress(ChildProcessError):  # still its own parent's to reap
                    os.waitpid(process.pid, os.WNOHANG)
            time.sleep(0.02)

    def _living(self) -> list[psutil.Process]:
        children = [child for child in psutil.Process().children() if child not in self._bystanders]
        living = list(children)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                living += child.children(recursive=True)
        return living


def _exec_tethered(launcher: int, command: list[str]) -> NoReturn:
    """Become `command`, to die with the process `launcher`, which is this one's parent.

    A step of its own between fork and exec, since preexec_fn is unsafe in a launcher that has threads.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:
        sys.exit("the launcher died before this process was tethered to it")
    os.environ[AGENT_PID] = str(os.getpid())
    os.execv(command[0], command)


if __name__ == "__main__":
    _exec_tethered(int(sys.argv[1]), sys.argv[2:])
