"""The hosts of a run: a hostfile, or a SLURM allocation, in; a tuple of Host out, cut down by a filter.

A line is `[user@]host[:port] slots=N`, as MPI and DeepSpeed write it; an IPv6 address stands in brackets. A filter is
DeepSpeed's: `node1@node2:0,2` names all slots of node1, and slots 0 and 2 of node2.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zinf_cli.errors import HostfileError, UsageError
from zinf_cli.recipe.slurm import slurm_nodes

SLURM = "slurm"
"""Instead of a hostfile's name: the allocation this process runs in."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_V6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9_.-]+)?")
_ADDRESS = re.compile(r"(?:(?P<user>[^@]*)@)?(?:\[(?P<v6>[^\]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<port>[^:]*))?")
_NODE_SPEC = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<name>[^:\[\]]+))(?::(?P<slots>.*))?")
_MOST_SLOTS = 1024
_MOST_NAMED = 8


@dataclass(frozen=True)
class Host:
    """A machine of a run. What is None here, the user's ssh configuration says."""

    host: str
    """Its name or address, as ssh takes it."""
    slots: tuple[int, ...]
    """The accelerators it gives (for a CPU just numbers); one rank each."""
    user: str | None = None
    port: int | None = None
    job: str | None = None
    """The Slurm job that it is a node of, if srun is to reach it."""
    gpus: int = 0
    """How many accelerators that job has there. Slots are then positions among these."""

    @property
    def name(self) -> str:
        """As messages call it: the host, and the port where one was given."""
        host = f"[{self.host}]" if ":" in self.host and self.port is not None else self.host
        return host if self.port is None else f"{host}:{self.port}"


def first_names(names: Sequence[str]) -> str:
    """Names of hosts as a message has them: the first ones, if there are many."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def this_machine(slots: int) -> Host:
    """The only host of a run without a hostfile."""
    return Host("localhost", tuple(range(slots)))


def load_hosts(
    source: str, *, include: str | None = None, exclude: str | None = None, ssh: bool = False
) -> tuple[Host, ...]:
    """The hosts of the hostfile `source` (or of SLURM's allocation, for "slurm") that the filters leave.

    With `ssh`, SSH reaches the nodes of an allocation, else srun. HostfileError has every bad line as file:line;
    UsageError is for a filter, or an allocation, that makes no sense.
    """
    hosts = _allocated(ssh) if source == SLURM else _read(Path(source))
    if include is not None and exclude is not None:
        raise UsageError("--include and --exclude can't be given together", hint="--include names all that take part")
    if include is not None:
        return _included(hosts, include, source)
    if exclude is not None:
        return _excluded(hosts, exclude, source)
    return hosts


def parse_hostfile(text: str, file: str) -> tuple[Host, ...]:
    """The hosts of a hostfile's text; `file` is its name, for HostfileError."""
    hosts: dict[tuple[str, int | None], Host] = {}
    lines: dict[tuple[str, int | None], int] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        try:
            host = _host(words)
            key = (host.host, host.port)
            if key in hosts:
                raise ValueError(f"{host.name} stands twice (first in line {lines[key]})")
            hosts[key], lines[key] = host, number
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
    if not hosts and not problems:
        problems.append(f"{file}: no hosts in it; a line is: node1 slots=8")
    if problems:
        raise HostfileError(problems)
    return tuple(hosts.values())


def _allocated(ssh: bool) -> tuple[Host, ...]:
    """The nodes of the job around this process. By SSH, slots are the numbers that the job's GPUs have there."""
    nodes = slurm_nodes(os.environ).items()
    if ssh:
        return tuple(Host(name, node.gpus[: node.ranks] or tuple(range(node.ranks))) for name, node in nodes)
    job = os.environ["SLURM_JOB_ID"]
    return tuple(Host(name, tuple(range(node.ranks)), job=job, gpus=len(node.gpus)) for name, node in nodes)


def _read(path: Path) -> tuple[Host, ...]:
    try:
        return parse_hostfile(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise HostfileError([f"{path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise HostfileError([f"{path}: not UTF-8 text"]) from error


def _host(words: Sequence[str]) -> Host:
    """One line; ValueError says what is wrong with it."""
    address, *rest = words
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address!r} is no host (an IPv6 address is written [2001:db8::7] or [2001:db8::7]:22)")
    user, port = match["user"], match["port"]
    host = match["v6"] if match["name"] is None else match["name"]
    if not (_V6 if match["name"] is None else _NAME).fullmatch(host):
        raise ValueError(f"{host!r} is no host name or address")
    if user is not None and not _NAME.fullmatch(user):
        raise ValueError(f"{user!r} is no user name")
    if port is not None and not (_is_number(port) and 0 < int(port) < 65536):
        raise ValueError(f"{port!r} is no port (1 to 65535)")
    if len(rest) != 1 or not rest[0].startswith("slots="):
        said = f", not {' '.join(rest)!r}" if rest else ""
        raise ValueError(f"expected slots=N after {address}{said}")
    slots = rest[0].removeprefix("slots=")
    if not (_is_number(slots) and 0 < int(slots) <= _MOST_SLOTS):
        raise ValueError(f"slots={slots}: expected a number from 1 to {_MOST_SLOTS}")
    return Host(host, tuple(range(int(slots))), user, int(port) if port else None)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _included(hosts: Sequence[Host], text: str, source: str) -> tuple[Host, ...]:
    """Only what the filter names, in the hostfile's order."""
    chosen = _filter("--include", hosts, text, source)
    return tuple(replace(host, slots=chosen[host]) for host in hosts if host in chosen)


def _excluded(hosts: Sequence[Host], text: str, source: str) -> tuple[Host, ...]:
    """All but what the filter names; a host without a slot left is out."""
    chosen = _filter("--exclude", hosts, text, source)
    left = {host: tuple(slot for slot in host.slots if slot not in chosen.get(host, ())) for host in hosts}
    if not any(left.values()):
        raise UsageError(f'--exclude "{text}" leaves no host of {source}')
    return tuple(replace(host, slots=slots) for host, slots in left.items() if slots)


def _filter(option: str, hosts: Sequence[Host], text: str, source: str) -> dict[Host, tuple[int, ...]]:
    """The slots that `text` names of each host it names."""
    chosen: dict[Host, set[int]] = {}
    for spec in text.split("@"):
        match = _NODE_SPEC.fullmatch(spec.strip())
        if match is None:
            raise UsageError(f'{option} "{text}": expected HOST or HOST:SLOT,SLOT between the @, got {spec!r}')
        name = match["name"] or match["v6"]
        named = [host for host in hosts if host.host == name]
        if not named:
            there = first_names([host.name for host in hosts])
            raise UsageError(f'{option} "{text}": no host {name} in {source}', hint=f"it has {there}")
        for host in named:
            chosen.setdefault(host, set()).update(_filter_slots(option, host, match["slots"], text))
    return {host: tuple(sorted(slots)) for host, slots in chosen.items()}


def _spans(slots: Sequence[int]) -> str:
    """Slots as a message shows them: `0 to 7`, or one by one where they don't follow each other from 0."""
    return f"0 to {slots[-1]}" if slots == tuple(range(len(slots))) else ", ".join(map(str, slots))


def _filter_slots(option: str, host: Host, listed: str | None, text: str) -> Iterator[int]:
    if listed is None:
        yield from host.slots
        return
    for word in listed.split(","):
        if not _is_number(word.strip()) or int(word) not in host.slots:
            raise UsageError(
                f'{option} "{text}": {host.name} has no slot {word.strip()!r}', hint=f"it has {_spans(host.slots)}"
            )
        yield int(word)
