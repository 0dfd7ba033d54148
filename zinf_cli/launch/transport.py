"""The seam between the launcher and a host: it starts the host's supervisor, and moves bytes to and fro.

A Transport opens a Channel to a host. There is one for this machine (pipes.py), and two for others: by the system's
`ssh` where it is installed (openssh.py), by fabric where it is not (fabric_ssh.py). The code above knows none of them.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Sequence
from importlib import resources
from typing import Protocol

from zinf_cli.launch.process_tree import LAUNCH_ID
from zinf_cli.recipe.hosts import Host

SILENCE_S = 10.0
"""Seconds of silence after which an end of a lifeline to another machine takes the other end for lost."""

MOST_RECEIVED = 1 << 16
_MOST_DROPPED = 1 << 16

_MODULES = (
    "zinf_cli.durable", "zinf_cli.search_path", "zinf_cli.run_folder.names", "zinf_cli.run_folder.made_folders",
    "zinf_cli.run_folder.mirror", "zinf_cli.launch.patience", "zinf_cli.launch.process_tree",
    "zinf_cli.launch.addresses", "zinf_cli.launch.supervisor",
)  # fmt: skip
"""The modules of a supervisor, each after those that it imports. They need only the standard library."""

_LOADER = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[1])))"
"""Runs the supervisor's program from the start of stdin. Without quotes and newlines, any shell takes it."""


class Gone(OSError):  # noqa: N818
    """Raised by a channel that knows why the supervisor is gone."""


class Channel(Protocol):
    """Bytes to and from a supervisor."""

    silence_s: float
    """How long both ends may be silent. Infinite if the kernel itself tells an end that the other is gone."""
    first: bytes
    """What the supervisor has sent already."""

    def fileno(self) -> int:
        """What can be polled: `receive` does not wait once it can be read."""

    def receive(self, most: int = MOST_RECEIVED) -> bytes:
        """Wait for bytes, and return those that have come, at most so many. b"" or Gone once the supervisor is gone."""

    def has_room(self) -> bool:
        """Whether a few bytes can be sent without waiting for the supervisor."""

    def send(self, data: bytes) -> None:
        """Send all of `data`. OSError once the supervisor is gone."""

    def hang_up(self) -> None:
        """Close the lifeline, and wait until the supervisor has ended the run and itself. Others go on to receive."""

    def abort(self) -> None:
        """Give up a supervisor that does not answer, without waiting for it."""

    def last_words(self) -> str:
        """What the supervisor's side has printed to stderr. To be called once it is gone."""

    def close(self) -> None:
        """Close what is left of the channel, after `hang_up` or `abort`."""


def give_up(channel: Channel, name: str) -> None:
    """Abort a channel to `name`, in a thread: whoever hears other hosts does not wait. Where no thread starts, here."""
    try:
        threading.Thread(target=channel.abort, name=f"gives up {name}", daemon=True).start()
    except RuntimeError:
        channel.abort()


class Transport(Protocol):
    """Starts supervisors."""

    name: str
    """By what it reaches hosts, as preflight shows it."""

    def open(self, host: Host, launch_id: str) -> Channel:
        """Start the supervisor of `host`. HostError says why that is not possible."""

    def close(self) -> None:
        """End what several channels share. All of them are closed by then."""


class Greeting:
    """Finds where a supervisor's output begins. A login shell may print anything before it, also half a line."""

    def __init__(self, launch_id: str) -> None:
        self._mark = f"zinf supervisor {launch_id}\n".encode()
        self.dropped = b""
        """What has come before the mark."""

    @property
    def words(self) -> bytes:
        """What the supervisor prints first: the mark, which nothing else prints."""
        return self._mark

    def after(self, data: bytes) -> bytes | None:
        """Take in what has come. Returns what follows the mark, None while it has not come."""
        before, mark, rest = (self.dropped + data).partition(self._mark)
        self.dropped = before[-_MOST_DROPPED:]
        return rest if mark else None


def supervisor_command(python: str, program: bytes, launch_id: str) -> list[str]:
    """The command to run on the host, before `program` is sent to its stdin.

    Its Python is isolated: nothing in the working directory or on PYTHONPATH takes the place of the standard library.
    """
    return marked_command(launch_id, [python, "-I", "-c", _LOADER, str(len(program))])


def marked_command(launch_id: str, command: Sequence[str]) -> list[str]:
    """`command` with the launch's id in its environment: by that a supervisor finds it there (Supervisor.do_sweep)."""
    mark = f'export {LAUNCH_ID}={launch_id}; exec "$@"'  # `env` would take a word with "=" for a variable
    return ["/bin/sh", "-c", mark, "sh", *command]


def remote_line(command: Sequence[str]) -> str:
    """The line for a login shell that runs `command`, word by word. All else that a host is told goes through stdin."""
    return "exec " + shlex.join(command)


def supervisor_program(launch_id: str, silence_s: float, greeting: Greeting | None = None) -> bytes:
    """The whole program of a supervisor, as Python text. It greets, makes modules from their sources, and serves."""
    sources = {}
    for module in _MODULES:
        package, _, name = module.rpartition(".")
        sources[module] = (resources.files(package) / f"{name}.py").read_text(encoding="utf-8")
    return _PROGRAM.format(
        packages=["zinf_cli", "zinf_cli.launch", "zinf_cli.run_folder"],
        sources=sources,
        launch_id=launch_id,
        silence_s=str(silence_s),
        words=greeting.words if greeting is not None else b"",
    ).encode()


_PROGRAM = """
import os, sys, types
os.write(1, {words!r})
for name in {packages!r}:
    sys.modules[name] = types.ModuleType(name)
for name, source in {sources!r}.items():
    sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), sys.modules[name].__dict__)
sys.modules["zinf_cli.launch.supervisor"].main({launch_id!r}, float({silence_s!r}))
"""
