"""Channels to a supervisor on this machine: a pair of pipes."""

from __future__ import annotations

import math
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from zinf_cli.launch.transport import MOST_RECEIVED, Channel, supervisor_command, supervisor_program
from zinf_cli.recipe.hosts import Host


class Pipes:
    """Channels to supervisors on this machine. These end after so many seconds of silence.

    The kernel itself tells a supervisor that the launcher is gone. It does not tell that a relay hangs.
    """

    name = "not needed"

    def __init__(self, silence_s: float = math.inf) -> None:
        self._silence_s = silence_s

    def open(self, host: Host, launch_id: str) -> Channel:
        program = supervisor_program(launch_id, self._silence_s)
        channel = _PipeChannel(supervisor_command(sys.executable, program, launch_id))
        channel.send(program)
        return channel

    def close(self) -> None:
        pass


class OverPipes:
    """The part of a channel that is two unbuffered pipes: `_in` leads to the supervisor, `_out` comes from it."""

    _in: IO[bytes]
    _out: IO[bytes]

    def fileno(self) -> int:
        return self._out.fileno()

    def receive(self, most: int = MOST_RECEIVED) -> bytes:
        return os.read(self._out.fileno(), most)

    def has_room(self) -> bool:
        """Whether a few bytes are taken at once. OSError where the pipe is closed."""
        poll = select.poll()
        poll.register(self._into(), select.POLLOUT)
        return bool(poll.poll(0))

    def send(self, data: bytes) -> None:
        """Write all. A pipe takes as much at a time as it has room for; another thread may close it."""
        left = memoryview(data)
        while left:
            left = left[os.write(self._into(), left) :]

    def _into(self) -> int:
        try:
            return self._in.fileno()
        except ValueError:
            raise BrokenPipeError("given up") from None


class _PipeChannel(OverPipes):
    silence_s = math.inf
    first = b""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that the terminal's Ctrl-C reaches the launcher alone
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def hang_up(self) -> None:
        with suppress(OSError):
            self._in.close()
        self._process.wait()

    def abort(self) -> None:
        self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        return ""  # its stderr is the launcher's

    def close(self) -> None:
        with suppress(OSError):
            self._in.close()
        self._out.close()
