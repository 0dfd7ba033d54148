"""Real hosts on one machine, for tests: sshd processes with host keys of their own.

The *loopback* form is sshd on addresses of 127.0.0.0/8, and needs no root; the hosts share files, processes and the
network. The *namespace* form gives each host a network, process and mount namespace, on a bridge in one more: links
that go down, names, and a folder `local` that no two hosts share. It needs root.

A lab ends with the process that opened it: every host dies with its parent.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@dataclass
class LabHost:
    """A host: its name (in the loopback form its address), where sshd listens, the process all of it hangs on."""

    name: str
    port: int
    folder: Path
    namespace: str | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """As a hostfile has it."""
        return self.name if self.port == 22 else f"{self.name}:{self.port}"

    @property
    def local(self) -> Path:
        """Where, in the namespace form, the test sees the host's own folder `local`."""
        return self.folder / "local"

    def crash(self) -> None:
        """Pull the plug."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def link(self, state: str) -> None:
        """The network cable: "up" or "down"."""
        assert self.namespace is not None
        subprocess.run([str(IP), "-n", self.namespace, "link", "set", "eth0", state], check=True)


class Lab:
    """Some hosts, and what a user's home needs to reach them; everything lies in `folder`."""

    def __init__(self, folder: Path, hosts: Sequence[LabHost], launcher: Sequence[str] = ()) -> None:
        self.folder = folder
        self.hosts = list(hosts)
        self.launcher = list(launcher)
        """What a command is started by, to be in the hosts' network."""
        self.home = folder / "home"
        self.environment: dict[str, str] = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "SLURM_"))},
            "HOME": str(self.home),
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "140",
        }

    def hostfile(self, slots: int = 1, hosts: Sequence[LabHost] | None = None) -> str:
        path = self.folder / "hosts"
        lines = [
            f"{host.name}{':' + str(host.port) if host.port != 22 else ''} slots={slots}\n"
            for host in hosts or self.hosts
        ]
        path.write_text("".join(lines))
        return str(path)

    def zinf(self, *arguments: str) -> list[str]:
        """A command line of zinf, as it is run in this lab."""
        return [*self.launcher, sys.executable, "-m", "zinf_cli.cli", *arguments]

    def launcher_of(self, started: subprocess.Popen[str]) -> int:
        """The process of a launch that was started by `zinf`."""
        return started.pid

    def without(self, *names: str) -> None:
        """Make the launcher one that finds no programs of these names, of "ssh" and "rsync"."""
        programs = self.folder / "programs"
        programs.mkdir()
        for name in {"ip", "env", "ssh", "rsync"} - set(names):
            if (found := shutil.which(name, path=self.environment["PATH"])) is not None:
                (programs / name).symlink_to(found)
        self.environment["PATH"] = str(programs)

    def processes(self, host: LabHost | None = None, **variables: str) -> list[int]:
        """Processes that a launch has started, on one host or any, with these variables in their environment."""
        wanted = {f"XDG_CACHE_HOME={self.folder / 'cache'}", *(f"{name}={value}" for name, value in variables.items())}
        if host is not None:
            wanted.add(f"LAB_HOST={host.name}")
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit():
                    environment = set((entry / "environ").read_bytes().decode(errors="replace").split("\0"))
                    if wanted <= environment and any(word.startswith("LAB_HOST=") for word in environment):
                        found.append(int(entry.name))
        return sorted(found)

    def named(self, name: str, **variables: str) -> list[int]:
        """Of these, the ones that ps shows under a name."""
        found = []
        for pid in self.processes(None, **variables):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    found.append(pid)
        return found

    def left_behind(self) -> list[str]:
        """Command lines of what still runs on the hosts 10 s after it should be over, and files in their folders."""
        deadline = time.monotonic() + 10
        while (pids := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = []
        for pid in pids:
            with suppress(OSError):
                left.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        return left + [str(path) for host in self.hosts for path in host.local.rglob("*") if path.is_file()]

    def connections(self) -> list[str]:
        """Command lines of the launcher's processes that connect to hosts: each has the lab's folder in it."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                line = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
                if str(self.folder) in line and ("bin/ssh " in line or "hop_keeper" in line):
                    found.append(line)
        return found

    @property
    def known_hosts(self) -> Path:
        return self.home / ".ssh" / "known_hosts"

    def start(self, host: LabHost, command: Sequence[str], log: str) -> None:
        """Start the process of a host and wait until its sshd listens."""
        path = self.folder / f"{log}.log"
        with path.open("wb") as output:
            host.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until(lambda: "listening on" in path.read_text() or host.process.poll() is not None, 10)  # type: ignore[union-attr]
        assert host.process.poll() is None, path.read_text()

    def restart(self, host: LabHost, *lines: str) -> None:
        """Start the sshd of a host again, with other lines in front of its configuration. In the loopback form."""
        host.crash()
        config = host.folder / "sshd_config"
        config.write_text("".join(f"{line}\n" for line in lines) + config.read_text())
        self.start(host, [str(SSHD), "-D", "-e", "-f", str(config)], f"{host.folder.name}-again")

    def end(self) -> None:
        for host in self.hosts:
            if host.process is not None:
                host.crash()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@contextmanager
def loopback_lab(folder: Path, count: int) -> Iterator[Lab]:
    """`count` hosts on addresses of their own in 127.0.0.0/8."""
    _need_sshd()
    network = f"127.{random.randint(1, 250)}.{random.randint(0, 250)}"
    with socket.create_server((f"{network}.1", 0)) as free:
        port = free.getsockname()[1]
    lab = Lab(
        folder, [LabHost(f"{network}.{number}", port, folder / f"host{number}") for number in range(1, count + 1)]
    )
    _make_home(lab)
    try:
        for host in lab.hosts:
            config = _configure(lab, host, address=host.name)
            lab.start(host, [str(SSHD), "-D", "-e", "-f", str(config)], host.folder.name)
        yield lab
    finally:
        lab.end()


@contextmanager
def namespace_lab(folder: Path, count: int, zinf: Path = ROOT) -> Iterator[Lab]:
    """`count` hosts node1, node2, ... at 10.77.0.1, 10.77.0.2, ...; their folder/local is their own.

    On the hosts as for the launcher, zinf is looked for in the folder `zinf` first.
    """
    _need_sshd()
    _need_namespaces()
    prefix = f"zl{os.getpid()}"
    hub = f"{prefix}-hub"
    hosts = [LabHost(f"node{n}", 22, folder / f"node{n}", f"{prefix}-node{n}") for n in range(1, count + 1)]
    lab = Lab(folder, hosts, [str(IP), "netns", "exec", hub])
    lab.environment["PYTHONPATH"] = str(zinf)
    _make_home(lab)
    (folder / "local").mkdir()
    try:
        _wire(hub, hosts)
        for number, host in enumerate(hosts, 1):
            config = _configure(lab, host, address=f"10.77.0.{number}")
            host.local.mkdir()
            inside = (
                f"hostname {host.name}; mount --bind {host.local} {folder / 'local'}; exec {SSHD} -D -e -f {config}"
            )
            unshare = ["unshare", "-u", "-i", "-p", "-f", "--mount-proc", "--kill-child=KILL", "sh", "-c", inside]
            lab.start(host, [str(IP), "netns", "exec", str(host.namespace), *unshare], host.name)
        yield lab
    finally:
        lab.end()
        _unwire([hub, *(str(host.namespace) for host in hosts)])


def _need_sshd() -> None:
    if SSHD is None:
        pytest.skip("no sshd here: apt-get install openssh-server")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)


def _need_namespaces() -> None:
    if os.getuid() != 0 or IP is None:
        pytest.skip("hosts in network namespaces need root and iproute2")
    for name in subprocess.run([IP, "netns", "list"], capture_output=True, text=True, check=True).stdout.split():
        if name.startswith("zl") and not Path(f"/proc/{name[2:].split('-')[0]}").exists():
            _unwire([name])  # of a test run that was killed
    trial = subprocess.run([IP, "netns", "add", f"zl{os.getpid()}-try"], capture_output=True, text=True, check=False)
    if trial.returncode != 0:
        pytest.skip(f"no network namespaces here: {trial.stderr.strip()}")
    _unwire([f"zl{os.getpid()}-try"])


def _wire(hub: str, hosts: Sequence[LabHost]) -> None:
    """A bridge in the hub's namespace and a cable from it to each host; no way out."""
    names = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{n} {host.name}\n" for n, host in enumerate(hosts, 1))
    for namespace in (hub, *(str(host.namespace) for host in hosts)):
        etc = Path("/etc/netns") / namespace
        etc.mkdir(parents=True, exist_ok=True)
        (etc / "hosts").write_text(names)
        (etc / "resolv.conf").write_text("")
    _ip(f"netns add {hub}", *(f"netns add {host.namespace}" for host in hosts))
    _ip("link add br0 type bridge", "addr add 10.77.0.254/24 dev br0", "link set br0 up", "link set lo up", within=hub)
    for number, host in enumerate(hosts, 1):
        _ip(
            f"link add v{number} type veth peer name eth0 netns {host.namespace}",
            f"link set v{number} master br0 up",
            within=hub,
        )
        _ip(
            f"addr add 10.77.0.{number}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
            within=str(host.namespace),
        )


def _ip(*commands: str, within: str | None = None) -> None:
    where = ["-n", within] if within is not None else []
    subprocess.run([str(IP), *where, "-batch", "-"], input="\n".join(commands), text=True, check=True)


def _unwire(namespaces: Sequence[str]) -> None:
    for namespace in namespaces:
        subprocess.run([str(IP), "netns", "delete", namespace], capture_output=True, check=False)
        shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)
    with suppress(OSError):
        Path("/etc/netns").rmdir()


def _make_home(lab: Lab) -> None:
    ssh = lab.home / ".ssh"
    ssh.mkdir(parents=True)
    _make_key(ssh / "id_ed25519")
    (ssh / "config").write_text(
        f"Host *\n  IdentityFile {ssh / 'id_ed25519'}\n  UserKnownHostsFile {ssh / 'known_hosts'}\n"
    )
    (ssh / "known_hosts").touch()
    own = lab.home / "bin" / "ssh"  # OpenSSH takes the home of the user database; this is how it reads the lab's
    own.parent.mkdir()
    own.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {ssh / "config"} "$@"\n')
    own.chmod(0o755)


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)


def _configure(lab: Lab, host: LabHost, *, address: str) -> Path:
    """A host's key, made known to the user, and its sshd_config."""
    host.folder.mkdir()
    _make_key(host.folder / "host_key")
    key = (host.folder / "host_key.pub").read_text().strip()
    names = f"[{host.name}]:{host.port}" if host.port != 22 else f"{host.name},{address}"
    with lab.known_hosts.open("a") as known_hosts:
        known_hosts.write(f"{names} {key}\n")
    shared = ("PYTHONPATH", "XDG_CACHE_HOME", "PATH")  # by the last, hosts log in to each other as the user does
    variables = {"LAB_HOST": host.name, **{name: lab.environment[name] for name in shared}}
    if "OMP_WAIT_POLICY" in lab.environment:  # see the Makefile
        variables["OMP_WAIT_POLICY"] = lab.environment["OMP_WAIT_POLICY"]
    config = host.folder / "sshd_config"
    config.write_text(
        f"ListenAddress {address}\nPort {host.port}\nHostKey {host.folder / 'host_key'}\nPidFile none\nUsePAM no\n"
        f"StrictModes no\nPasswordAuthentication no\nMaxStartups 100\nSubsystem sftp internal-sftp\n"
        f"AuthorizedKeysFile {lab.home}/.ssh/id_ed25519.pub\n"
        f"SetEnv {' '.join(f'{name}={value}' for name, value in variables.items())}\n"
    )
    return config
