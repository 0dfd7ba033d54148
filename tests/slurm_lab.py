"""A real Slurm on the hosts of a lab: munged and slurmctld in its hub, a slurmd beside the sshd of every host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lab import ROOT, Lab, LabHost, namespace_lab, wait_until

_DAEMONS = {
    name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("munged", "slurmctld", "slurmd")
}

_CONF = """
ClusterName=lab
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
TaskProlog={folder}/prolog
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""
"""proctrack/linuxproc signals every process of a step; proctrack/cgroup, which most clusters have, only its task.

cred_expire is how long a job that is requeued waits.
"""


@dataclass(frozen=True)
class Node:
    """What Slurm takes a host for."""

    cpus: int = 4
    gpus: int = 0


class SlurmLab(Lab):
    """A lab whose hosts are the nodes of a cluster. A command of zinf runs in an allocation of all of them."""

    daemons: list[subprocess.Popen[bytes]]
    allocation: Sequence[str] = ()
    """More words for salloc."""
    program: Sequence[str] = (sys.executable, "-m", "zinf_cli.cli")
    """What `zinf` is for a batch script."""

    def zinf(self, *arguments: str) -> list[str]:
        command, at = super().zinf(*arguments), len(self.launcher)
        return [*command[:at], "salloc", "-Q", f"-N{len(self.hosts)}", *self.allocation, *command[at:]]

    def hostfile(self, slots: int = 1, hosts: Sequence[LabHost] | None = None) -> str:
        return "slurm"

    def launcher_of(self, started: subprocess.Popen[str]) -> int:
        (launcher,) = (one.pid for one in psutil.Process(started.pid).children() if "launch" in one.cmdline())
        return launcher

    def connections(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() == "srun" and process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(" ".join(process.cmdline()))
        return found

    def slurm(self, *command: str) -> str:
        """What a command of Slurm prints."""
        words = [*self.launcher, *command]
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True).stdout

    def submit(self, *words: str) -> str:
        """Submit the example of a batch script (hostfiles/slurm.sh), with `words` for its size. Returns its number."""
        zinf = self.home / "bin" / "zinf"
        zinf.write_text(f'#!/bin/sh\nexec {" ".join(self.program)} "$@"\n')
        zinf.chmod(0o755)
        lines = (ROOT / "hostfiles" / "slurm.sh").read_text().splitlines(keepends=True)
        example = self.folder / "slurm.sh"
        example.write_text("".join(line for line in lines if not re.match("#SBATCH --(nodes|ntasks|exclusive)", line)))
        options = [word for word in words if word.startswith("-")]
        rest = [word for word in words if not word.startswith("-")]
        return self.slurm("sbatch", "--parsable", "-o", f"{self.folder}/job-%j", *options, str(example), *rest).strip()

    def state(self, job: str) -> str:
        """As Slurm calls it: RUNNING, COMPLETED, ..."""
        (state,) = re.findall(r"JobState=(\w+)", self.slurm("scontrol", "show", "job", job))
        return str(state)

    def daemon(self, name: str, *arguments: str, host: LabHost | None = None) -> None:
        """Start a daemon in the hub, or on a host. It ends with this process, and with the host."""
        where = [*self.launcher, "unshare", "-u", "sh", "-c", 'hostname ctl && exec "$@"', "sh"]
        if host is not None:
            assert host.process is not None
            (sshd,) = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text().split()
            where = ["nsenter", "-t", sshd, "-m", "-u", "-n", "-p"]
        environment = {"PATH": os.environ["PATH"], "HOME": "/root", "SLURM_CONF": self.environment["SLURM_CONF"]}
        with (self.folder / f"{name}-{host.name if host else 'hub'}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *where, str(_DAEMONS[name]), *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )


@contextmanager
def slurm_lab(folder: Path, nodes: Sequence[Node], proctrack: str = "linuxproc") -> Iterator[SlurmLab]:
    """A cluster of node1, node2, ... They are the hosts of a namespace lab, so SSH reaches them as well."""
    if missing := [name for name, path in _DAEMONS.items() if path is None]:
        pytest.skip(f"no {missing[0]} here: apt-get install slurm-wlm munge")
    groups = folder / "cgroup" / "freezer"
    with _control_groups(groups, proctrack), namespace_lab(folder, len(nodes)) as hosts:
        lab = SlurmLab(folder, hosts.hosts, hosts.launcher)
        lab.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        lab.daemons = []
        _configure(lab, nodes, proctrack)
        try:
            lab.daemon(
                "munged",
                "-F",
                "--force",
                "--key-file",
                str(folder / "key"),
                "--socket",
                str(folder / "munge.socket"),
                "--pid-file",
                str(folder / "munged.pid"),
                "--seed-file",
                str(folder / "seed"),
                "--log-file",
                str(folder / "munged.log"),
            )
            wait_until((folder / "munge.socket").exists, 10)
            lab.daemon("slurmctld", "-D", "-c")
            for host in lab.hosts:
                lab.daemon("slurmd", "-D", "-N", host.name, host=host)
            wait_until(lambda: lab.slurm("sinfo", "-h", "-o", "%T").split() == ["idle"], 20)
            yield lab
        finally:
            for daemon in reversed(lab.daemons):
                daemon.kill()
                daemon.wait()
            lab.end()


@contextmanager
def _control_groups(at: Path, proctrack: str) -> Iterator[None]:
    """For proctrack/cgroup: the freezer, where nodes see it. `ip netns exec` hides /sys/fs/cgroup."""
    if proctrack != "cgroup":
        yield
        return
    at.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "cgroup", "-o", "freezer", "none", str(at)], capture_output=True).returncode:
        pytest.skip("no control groups of version 1 here")
    try:
        yield
    finally:
        for group in sorted(at.glob("slurm_node*/**/"), reverse=True):
            with suppress(OSError):  # of another lab
                group.rmdir()
        subprocess.run(["umount", "-l", str(at)], check=True)


def _configure(lab: SlurmLab, nodes: Sequence[Node], proctrack: str) -> None:
    lines = [
        f"NodeName={host.name} NodeAddr=10.77.0.{number} CPUs={node.cpus} RealMemory=1000"
        + (f" Gres=gpu:{node.gpus}" if node.gpus else "")
        for number, (host, node) in enumerate(zip(lab.hosts, nodes, strict=True), 1)
    ]
    (lab.folder / "slurm.conf").write_text(_CONF.format(folder=lab.folder, nodes="\n".join(lines), proctrack=proctrack))
    (lab.folder / "gres.conf").write_text(
        "".join(
            f"NodeName={host.name} Name=gpu File=/dev/tty[0-{node.gpus - 1}]\n"
            for host, node in zip(lab.hosts, nodes, strict=True)
            if node.gpus
        )
    )
    prolog = lab.folder / "prolog"
    prolog.write_text("#!/bin/sh\necho export LAB_HOST=$SLURMD_NODENAME\n")
    prolog.chmod(0o755)
    (lab.folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={lab.folder}/cgroup\n")
    for name in ("state", *(f"spool-{host.name}" for host in lab.hosts)):
        (lab.folder / name).mkdir()
    key = lab.folder / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
