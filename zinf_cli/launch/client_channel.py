"""Channels to other machines through a program that connects to them: the system's `ssh`, or Slurm's `srun`."""

from __future__ import annotations

import os
import resource
import selectors
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress

from zinf_cli.errors import HostError
from zinf_cli.launch.pipes import OverPipes
from zinf_cli.launch.said import Said
from zinf_cli.launch.transport import SILENCE_S, Greeting

_MOST_FILES = 1 << 16
_LAST_WORDS_S = 20.0
"""Seconds from the end of the program's output to its own end."""


def allow_files() -> None:
    """Raise the limit of open files, which is 1024 in many places: each host takes three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class ClientChannel(OverPipes, ABC):
    """A Channel (transport.py) through a program. What the program says of a failure is for its own kind to explain."""

    silence_s = SILENCE_S

    def __init__(
        self, command: Sequence[str], program: bytes, greeting: Greeting, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start `command`, send `program` to the supervisor and wait for its greeting. HostError if none comes."""
        self._said = Said()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said.file,
            start_new_session=True,  # so that the terminal's Ctrl-C reaches the launcher alone, and nobody is asked
            bufsize=0,
            env=environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._ending = threading.Lock()
        try:
            self.first = self._greeted(program, greeting)
        except BaseException:
            self.abort()
            self.close()
            raise

    def _greeted(self, program: bytes, greeting: Greeting) -> bytes:
        """Send the program; return what follows the greeting."""
        began = time.monotonic()
        os.set_blocking(self._in.fileno(), False)
        with selectors.DefaultSelector() as ready:
            ready.register(self._out, selectors.EVENT_READ)
            ready.register(self._in, selectors.EVENT_WRITE)
            while True:
                for key, _ in ready.select(0.2):
                    if key.fileobj is self._in:
                        with suppress(BlockingIOError, BrokenPipeError):
                            program = program[os.write(self._in.fileno(), program) :]
                        if not program:
                            ready.unregister(self._in)
                            os.set_blocking(self._in.fileno(), True)
                        continue
                    data = os.read(self._out.fileno(), 1 << 16)
                    if not data:
                        is_over(self._process, _LAST_WORDS_S)
                        self.abort()
                        raise self._why_ended(self._process.returncode, greeting)
                    if (rest := greeting.after(data)) is not None:
                        return rest
                self._check_time(time.monotonic() - began)

    @abstractmethod
    def _check_time(self, seconds: float) -> None:
        """HostError if the greeting should have come by now."""

    @abstractmethod
    def _why_ended(self, code: int, greeting: Greeting) -> HostError:
        """Why the program has ended, with exit code `code`, before the greeting came."""

    def hang_up(self) -> None:
        with suppress(OSError):
            self._in.close()
        is_over(self._process, SILENCE_S)  # the supervisor ends its descendants first, then itself
        self.abort()

    def abort(self) -> None:
        with self._ending:
            end_group(self._process)

    def last_words(self) -> str:
        return "\n".join(self._said.lines)

    def close(self) -> None:
        with suppress(OSError):
            self._in.close()
        self._out.close()
        self._said.close()


def is_over(process: subprocess.Popen[bytes], within: float) -> bool:
    """Whether a process ends within so many seconds. It is not reaped, so its number stays its own."""
    until = time.monotonic() + within
    while process.returncode is None:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.01)
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a program that leads a session, and what it has started: a ProxyCommand. One thread at a time."""
    if process.returncode is not None:  # reaped: by now its number may be another's
        return
    os.killpg(process.pid, signal.SIGTERM)
    is_over(process, 1.0)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
