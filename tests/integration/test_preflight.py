"""Hosts that are not ready: every one of them is named with what is wrong, and nothing is started anywhere."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import IP, ROOT, Lab, loopback_lab, namespace_lab

THOROUGH = int(os.environ.get("ZINF_FAULT_MOMENTS", "1")) > 1


@pytest.fixture(params=["OpenSSH", "fabric"] if THOROUGH else ["OpenSSH"])
def by(request: pytest.FixtureRequest) -> str:
    """What reaches the hosts."""
    return str(request.param)


@pytest.fixture
def lab(tmp_path: Path, by: str) -> Iterator[Lab]:
    with loopback_lab(tmp_path, 3) as lab:
        if by == "fabric":
            lab.without("ssh")
        yield lab


def doctor(lab: Lab, hostfile: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, the report on each host, and what stands on the screen."""
    command = lab.zinf("doctor", "--hosts", hostfile, "--json")
    done = subprocess.run(command, env=lab.environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout) if done.stdout else [], done.stderr


def write_hostfile(lab: Lab, *addresses: str) -> str:
    path = lab.folder / "hosts"
    path.write_text("".join(f"{address} slots=1\r\n" for address in addresses))
    return str(path)


def problem_of(lab: Lab, address: str) -> str:
    """What is wrong with a single host."""
    code, (report,), said = doctor(lab, write_hostfile(lab, address))
    assert code == 3
    assert "1 of 1 hosts are not ready" in said
    (problem,) = report["problems"].values()
    return str(problem)


def test_hosts_that_are_ready(lab: Lab, by: str) -> None:
    code, reports, _ = doctor(lab, lab.hostfile(2))
    assert code == 0
    for host, report in zip(lab.hosts, reports, strict=True):
        assert report["host"] == host.address
        assert report["problems"] == {}
        assert report["checks"]["by"].startswith(by)
        assert report["checks"]["clock"] == "ok"
        assert report["checks"]["slots"] == "2 CPU"
        assert report["checks"]["rendezvous"] == "by lo"
        assert report["facts"]["memory"] > 2**20
    done = subprocess.run(
        lab.zinf("doctor", "--hosts", lab.hostfile(2)), env=lab.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0].split()[:4] == ["host", "by", "python", "zinf"]
    assert lab.left_behind() == []


def test_this_machine_needs_no_ssh(lab: Lab) -> None:
    done = subprocess.run(lab.zinf("doctor"), env=lab.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "localhost" in done.stdout
    assert "not needed" in done.stdout


def test_an_unknown_host_key_comes_with_the_line_to_add(lab: Lab) -> None:
    host = lab.hosts[0]
    lab.known_hosts.write_text("@cert-authority * ssh-ed25519 AAAA\nnot a line\n")
    problem = problem_of(lab, host.address)
    assert "its host key ssh-ed25519 SHA256:" in problem
    assert "is not known (" in problem
    assert f"if it is the right one, add this line to {lab.known_hosts}: " in problem
    line = problem.partition(f"{lab.known_hosts}: ")[2].rstrip(")")
    lab.known_hosts.write_text(f"{line}\n")
    assert doctor(lab, write_hostfile(lab, host.address))[0] == 0
    kind, key = line.split()[1:]
    lab.known_hosts.write_text(f"{line}\n@revoked * {kind} {key}\n")
    assert "its host key is revoked" in problem_of(lab, host.address)


def test_a_changed_host_key_is_refused(lab: Lab) -> None:
    first, second = lab.hosts[:2]
    keys = {host.name: (host.folder / "host_key.pub").read_text().strip() for host in (first, second)}
    lab.known_hosts.write_text(f"[{first.name}]:{first.port} {keys[second.name]}\n")
    problem = problem_of(lab, first.address)
    assert "its host key has changed" in problem
    assert f"ssh-keygen -R '[{first.name}]:{first.port}'" in problem
    assert keys[first.name] in problem


def test_ssh_that_does_not_come_through(lab: Lab) -> None:
    first, second, third = lab.hosts
    refused = f"{first.name}:{first.port + 1}" if first.port < 65535 else f"{first.name}:{first.port - 1}"
    assert "Connection refused" in problem_of(lab, refused)
    assert "no address is known for the name no-such-host.invalid" in problem_of(lab, "no-such-host.invalid")
    assert "no key of yours is accepted for user nobody-here" in problem_of(lab, f"nobody-here@{first.address}")
    lab.restart(second, "AuthorizedKeysFile none", "KbdInteractiveAuthentication yes", "PasswordAuthentication yes")
    assert "zinf asks for no password" in problem_of(lab, second.address)
    lab.restart(third, "ForceCommand exec /no/such/python")
    assert "/no/such/python: " in problem_of(lab, third.address)  # in the words of its shell


def test_everything_that_is_wrong_is_told_at_once(lab: Lab) -> None:
    """A host runs the zinf that lies where the launcher's does, whatever else its PYTHONPATH leads to."""
    first, second, third = lab.hosts
    other = lab.folder / "other"
    (other / "zinf_cli").mkdir(parents=True)
    (other / "zinf_cli" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'zinf_cli'\")\n")
    environment = (second.folder / "sshd_config").read_text().split("SetEnv ")[1]
    lab.restart(second, f"SetEnv {environment.replace(f'PYTHONPATH={ROOT}', f'PYTHONPATH={other}').strip()}")
    hosts = (first.address, second.address, f"{third.address.rpartition(':')[0]}:1", "127.0.0.1:2")
    code, reports, said = doctor(lab, write_hostfile(lab, *hosts))
    assert code == 3
    assert "2 of 4 hosts are not ready" in said
    assert [report["problems"] for report in reports[:2]] == [{}, {}]
    assert all("refused" in report["problems"]["by"] for report in reports[2:])
    assert first.address == reports[0]["host"]


def test_a_jump_host_is_taken_from_the_ssh_configuration(lab: Lab) -> None:
    """The target answers under a name that only the configuration knows, by way of another host."""
    jump, target = lab.hosts[:2]
    config = lab.home / ".ssh" / "config"
    route = f"Host inner\n  HostName {target.name}\n  Port {target.port}\n  ProxyJump {jump.address}\n"
    config.write_text(route + config.read_text())
    code, reports, said = doctor(lab, write_hostfile(lab, "inner"))
    assert code == 0, said
    assert reports[0]["problems"] == {}


def test_no_route_and_a_partition_between_hosts(tmp_path: Path) -> None:
    with namespace_lab(tmp_path, 2) as lab:
        hostfile = write_hostfile(lab, "node1", "node2", "10.77.0.99", "10.99.0.1")
        code, reports, _ = doctor(lab, hostfile)
        assert code == 3
        assert [bool(report["problems"]) for report in reports] == [False, False, True, True]
        assert "route" in reports[2]["problems"]["by"]
        assert "unreachable" in reports[3]["problems"]["by"]
        # the launcher reaches both, but they do not reach each other
        subprocess.run(
            [str(IP), "-n", str(lab.hosts[1].namespace), "route", "add", "blackhole", "10.77.0.1"], check=True
        )
        code, reports, _ = doctor(lab, write_hostfile(lab, "node1", "node2"))
        assert code == 3
        assert reports[0]["problems"] == {}
        assert "can't reach 10.77.0.1 port" in reports[1]["problems"]["rendezvous"]


@pytest.mark.skipif(not THOROUGH, reason="takes ten seconds: make test-faults")
def test_a_host_whose_first_address_is_dead(tmp_path: Path, by: str) -> None:
    with namespace_lab(tmp_path, 1) as lab:
        if by == "fabric":
            lab.without("ssh")
        names = Path("/etc/netns") / lab.launcher[-1] / "hosts"
        names.write_text(names.read_text() + "10.77.0.99 twice\n10.77.0.1 twice\n")
        lab.known_hosts.write_text(lab.known_hosts.read_text().replace("node1,", "node1,twice,"))
        code, reports, said = doctor(lab, write_hostfile(lab, "twice"))
        assert code == 0, (said, reports)
