"""The seam between the launcher and a host: it starts the host's supervisor, and moves bytes to and fro.

A Transport opens a Channel to a host. There is one for this machine (pipes.py) and one for others (ssh.py). The code
above works with both and knows neither.
"""

from __future__ import annotations

from importlib import resources
from typing import Protocol

from zinf_cli.recipe.hosts import Host

SILENCE_S = 10.0
"""Seconds of silence after which an end of a lifeline to another machine takes the other end for lost."""

_MODULES = (
    "zinf_cli.durable", "zinf_cli.search_path", "zinf_cli.run_folder.names", "zinf_cli.run_folder.made_folders",
    "zinf_cli.run_folder.mirror", "zinf_cli.launch.patience", "zinf_cli.launch.process_tree",
    "zinf_cli.launch.addresses", "zinf_cli.launch.supervisor",
)  # fmt: skip
"""The modules of a supervisor, each after those that it imports. They need only the standard library."""

_LOADER = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[1])))"
"""Runs the supervisor's program from the start of stdin. Without quotes and newlines, any shell takes it."""


class Channel(Protocol):
    """Bytes to and from a supervisor."""

    silence_s: float
    """How long both ends may be silent. Infinite if the kernel itself tells an end that the other is gone."""

    def send(self, data: bytes) -> None:
        """Send all of `data`. OSError once the supervisor is gone."""

    def receive(self) -> bytes:
        """Wait for bytes, and return those that have come. b"" once the supervisor is gone."""

    def close(self) -> None:
        """Close the lifeline, and wait until the supervisor has ended the run and itself."""

    def abort(self) -> None:
        """Give up a supervisor that does not answer, without waiting for it."""

    def last_words(self) -> str:
        """What the supervisor's side has printed to stderr. To be called once it is gone."""


class Transport(Protocol):
    """Starts supervisors."""

    def open(self, host: Host, launch_id: str) -> Channel:
        """Start the supervisor of `host`. HostError says why that is not possible."""


def supervisor_command(python: str, program: bytes) -> list[str]:
    """The command to run on the host, before `program` is sent to its stdin.

    Its Python is isolated: nothing in the working directory or on PYTHONPATH takes the place of the standard library.
    """
    return [python, "-I", "-c", _LOADER, str(len(program))]


def supervisor_program(launch_id: str, silence_s: float) -> bytes:
    """The whole program of a supervisor, as Python text. It makes the modules from their sources, then serves."""
    sources = {}
    for module in _MODULES:
        package, _, name = module.rpartition(".")
        sources[module] = (resources.files(package) / f"{name}.py").read_text(encoding="utf-8")
    return _PROGRAM.format(
        packages=["zinf_cli", "zinf_cli.launch", "zinf_cli.run_folder"],
        sources=sources,
        launch_id=launch_id,
        silence_s=str(silence_s),
    ).encode()


_PROGRAM = """
import sys, types
for name in {packages!r}:
    sys.modules[name] = types.ModuleType(name)
for name, source in {sources!r}.items():
    sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), sys.modules[name].__dict__)
sys.modules["zinf_cli.launch.supervisor"].main({launch_id!r}, float({silence_s!r}))
"""
