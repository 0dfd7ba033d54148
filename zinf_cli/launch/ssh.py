"""SSH to other machines, however it is done: a transport that can bring files as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from zinf_cli.launch.transport import Transport
from zinf_cli.recipe.hosts import Host


class Files(Protocol):
    """A way to bring files to a host."""

    @property
    def shell(self) -> Sequence[str] | None:
        """The command of `ssh` without the host, for rsync. None where there is no `ssh`."""

    def succeeds(self, line: str) -> bool:
        """Run a line on the host; whether its exit code is 0."""

    def sftp(self) -> Any:
        """A client of paramiko for SFTP."""

    def close(self) -> None:
        """End all of it."""


class Ssh(Transport, Protocol):
    """Starts supervisors on other machines, and brings files there."""

    def files(self, host: Host) -> Files:
        """A way to bring files to `host`. HostError says why there is none."""
