"""A Slurm job as its variables and `scontrol show job -d` tell it: the nodes, and the accelerators for ranks on each.

The variables say how many tasks each node has. Only scontrol says which GPUs: SLURM_GPUS_ON_NODE is about the first
node alone, and salloc sets no variable at all for --gres. SLURM_NTASKS_PER_NODE is a maximum, so it is no count.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from zinf_cli.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_GROUP = re.compile(r"(?P<before>[^\[]*)\[(?P<ranges>[^\]]*)\](?P<after>.*)")
_TASKS = re.compile(r"(?P<tasks>\d{1,9})(?:\(x(?P<nodes>\d{1,9})\))?", re.ASCII)
_NODES_OF_JOB = re.compile(r"^\s+Nodes=(?P<nodes>\S+) .*?\bGRES=(?P<gres>\S*)", re.MULTILINE)
_GRES = re.compile(r"[^,()]+(?:\([^)]*\))?")
_GPUS = re.compile(r"gpu(?::[^:()]+)?:(?P<count>\d{1,9})(?:\(IDX:(?P<numbers>[^)]*)\))?", re.ASCII)
_MOST_RANKS = 1024
_MOST_NODES = 100_000
_ANSWER_S = 60.0


@dataclass(frozen=True)
class Node:
    """What a job has of a node: room for `ranks`, and the numbers that its GPUs have there."""

    ranks: int
    gpus: tuple[int, ...]


def slurm_nodes(environment: Mapping[str, str]) -> dict[str, Node]:
    """The nodes of the job that this process runs in. UsageError if these can't be told."""
    job = environment.get("SLURM_JOB_ID")
    if not job or not (environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_HET_SIZE")):
        raise UsageError("--hosts slurm: no allocation here (no SLURM_JOB_ID)", hint="run it under salloc or sbatch")
    try:
        answer = subprocess.run(
            ["scontrol", "show", "job", "-d", job], capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--hosts slurm: scontrol can't be asked for the job's GPUs: {error}") from error
    if answer.returncode:
        raise UsageError(f"--hosts slurm: scontrol knows no job {job}: {answer.stderr.strip()}")
    return nodes_of_job(environment, answer.stdout)


def nodes_of_job(environment: Mapping[str, str], job: str) -> dict[str, Node]:
    """The nodes, from the variables of a job and what `scontrol show job -d` prints of it.

    There is a rank for each task if the user gave a number of tasks, or else for each GPU, or else one on each node.
    """
    if int(environment.get("SLURM_HET_SIZE") or 1) > 1:
        raise UsageError(
            "--hosts slurm: a heterogeneous job, of which only the first component would be used",
            hint="allocate all nodes in one component; they may have different numbers of GPUs",
        )
    listed, counts = environment.get("SLURM_JOB_NODELIST", ""), environment.get("SLURM_TASKS_PER_NODE", "")
    try:
        nodes = _names(listed)
        tasks = _tasks(counts)
        gpus = _gpus(job)
        if len(tasks) != len(nodes):
            raise ValueError(f"SLURM_TASKS_PER_NODE={counts} is about {len(tasks)} nodes, not {len(nodes)}")
        chosen = not any(gpus.values()) or bool({"SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"} & environment.keys())
        found: dict[str, Node] = {}
        for node, wanted in zip(nodes, tasks, strict=True):
            there = gpus.get(node, ())
            number = wanted if chosen else len(there)
            if any(gpus.values()) and (number > len(there) or not there):
                raise ValueError(f"{node} has {len(there)} GPUs of the job for {max(1, number)} ranks")
            if not 0 < number <= _MOST_RANKS:
                raise ValueError(f"{node} has {number} tasks")
            found[node] = Node(number, there)
    except ValueError as error:
        raise UsageError(
            f"--hosts slurm: SLURM_JOB_NODELIST={listed}: {error}",
            hint="run zinf in the batch script or under salloc, not under srun; see --ntasks-per-node, --gpus-per-node",
        ) from error
    return found


def _tasks(counts: str) -> list[int]:
    """`4(x2),3` spelled out: 4, 4, 3."""
    tasks: list[int] = []
    for part in counts.split(","):
        match = _TASKS.fullmatch(part)
        if match is None or int(match["nodes"] or 1) > _MOST_NODES:
            raise ValueError(f"SLURM_TASKS_PER_NODE={counts or '(not set)'} is no list of tasks")
        tasks += [int(match["tasks"])] * int(match["nodes"] or 1)
    return tasks


def _gpus(job: str) -> dict[str, tuple[int, ...]]:
    """The numbers of the job's GPUs on each node, from lines such as `Nodes=a[1-2] ... GRES=gpu:a100:2(IDX:0,3)`."""
    gpus: dict[str, tuple[int, ...]] = {}
    for line in _NODES_OF_JOB.finditer(job):
        numbers: list[int] = []
        for resource in _GRES.findall(line["gres"]):
            if resource.partition(":")[0] != "gpu":
                continue
            match = _GPUS.fullmatch(resource)
            if match is None:
                raise ValueError(f"scontrol says GRES={line['gres']}, which is no list of GPUs")
            if match["numbers"] in (None, "", "N/A"):  # GPUs without a device file have no numbers
                numbers += range(int(match["count"]))
            else:
                numbers += (int(number) for number in _numbers(match["numbers"]))
        gpus |= dict.fromkeys(_names(line["nodes"]), tuple(sorted(numbers)))
    return gpus


def _names(nodes: str) -> list[str]:
    """`a[1-2,5],b` spelled out."""
    groups: list[str] = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes)
    if ",".join(groups) != nodes:
        raise ValueError("its brackets or commas do not match")
    names = [name for group in groups for name in _names_of(group)]
    odd = [name for name in names if not _NAME.fullmatch(name)]
    if odd or not names:
        raise ValueError(f"{odd[0] if odd else nodes!r} is no host name")
    return list(dict.fromkeys(names))


def _names_of(group: str) -> Iterator[str]:
    """`rack[1-2]-node[07,09]` spelled out."""
    match = _GROUP.fullmatch(group)
    if match is None:
        yield group
        return
    endings = list(_names_of(match["after"]))
    for number in _numbers(match["ranges"]):
        yield from (f"{match['before']}{number}{ending}" for ending in endings)


def _numbers(ranges: str) -> Iterator[str]:
    """`07,09-10` spelled out; leading zeros stay."""
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)) or int(last or first) - int(first) > _MOST_NODES:
            raise ValueError(f"[{ranges}] is no list of numbers")
        yield from (f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
