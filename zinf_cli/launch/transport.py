"""The seam between the launcher and a host: how its supervisor is started, and how bytes go to and fro.

A Transport opens a Channel to a host; there is one for this machine (pipes.py) and one for any other (ssh.py).
Everything above knows neither.
"""

from __future__ import annotations

from importlib import resources
from typing import Protocol

from zinf_cli.recipe.hosts import Host

SILENCE_S = 10.0
"""An end of a lifeline to another machine that hears nothing for so long takes the other for lost."""

_MODULES = (
    "zinf_cli.durable", "zinf_cli.search_path", "zinf_cli.run_folder.names", "zinf_cli.run_folder.made_folders",
    "zinf_cli.run_folder.mirror", "zinf_cli.launch.patience", "zinf_cli.launch.process_tree",
    "zinf_cli.launch.addresses", "zinf_cli.launch.supervisor",
)  # fmt: skip
"""What a supervisor consists of, importers last. They need the standard library alone."""

_LOADER = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[1])))"
"""Takes the supervisor's program from the start of stdin. It has no quotes or newlines: any shell has to take it."""


class Channel(Protocol):
    """Bytes to and from a supervisor."""

    silence_s: float
    """How long both ends may be silent. Without a limit where the kernel itself tells an end that the other is gone."""

    def send(self, data: bytes) -> None:
        """All of it; OSError once the supervisor is gone."""

    def receive(self) -> bytes:
        """What has come, after waiting for some; b"" once the supervisor is gone."""

    def close(self) -> None:
        """Close the lifeline and wait until the supervisor has ended its run and itself."""

    def abort(self) -> None:
        """Give up a supervisor that does not answer, without a wait."""

    def last_words(self) -> str:
        """What the far side said on stderr, once it is gone."""


class Transport(Protocol):
    """Starts supervisors."""

    def open(self, host: Host, launch_id: str) -> Channel:
        """Start the supervisor of `host`; HostError says why that can't be."""


def supervisor_command(python: str, program: bytes) -> list[str]:
    """What to run on the host, before `program` is sent to its stdin. Isolated: nothing in its folder or on
    a PYTHONPATH is run in place of the standard library."""
    return [python, "-I", "-c", _LOADER, str(len(program))]


def supervisor_program(launch_id: str, silence_s: float) -> bytes:
    """The Python text of a supervisor, whole: modules are made from their sources, then it serves."""
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
