"""Hostfiles and filters as MPI's and DeepSpeed's users write them, and every mistake with its line."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.errors import HostfileError, UsageError
from zinf_cli.recipe.hosts import Host, load_hosts, parse_hostfile

ROOT = Path(__file__).parents[2]


def host(name: str, slots: int | tuple[int, ...], **more: object) -> Host:
    return Host(name, tuple(range(slots)) if isinstance(slots, int) else slots, **more)  # type: ignore[arg-type]


def problems_of(text: str) -> list[str]:
    with pytest.raises(HostfileError) as caught:
        parse_hostfile(text, "hosts")
    return caught.value.problems


def test_every_form_of_a_line() -> None:
    text = (
        "# two racks\n\nnode1 slots=8\n\tnode2.rack-b_1\tslots=1 # a tab\r\nalice@node3:2222 slots=2\n"
        "[2001:db8::7]:2222 slots=2\nbob@[fe80::1%eth0] slots=1\n10.0.0.1 slots=3"
    )
    assert parse_hostfile(text, "hosts") == (
        host("node1", 8),
        host("node2.rack-b_1", 1),
        host("node3", 2, user="alice", port=2222),
        host("2001:db8::7", 2, port=2222),
        host("fe80::1%eth0", 1, user="bob"),
        host("10.0.0.1", 3),
    )


def test_all_mistakes_come_at_once_with_their_lines() -> None:
    text = (
        "node1 slots=8\nnode2\nnode3 slots=0\nnode4 slots=many\nnode1 slots=4\n$(reboot) slots=1\n-oProxy slots=1\n"
        "node5:99999 slots=1\n@node6 slots=1\n2001:db8::7 slots=1\nnode7 slots=2 max_slots=4\nnode8: slots=1\n"
        "node9 slots=²\n"
    )
    said = problems_of(text)
    assert [line.split(" ")[0] for line in said] == [f"hosts:{number}:" for number in range(2, 14)]
    for number, part in {
        2: "expected slots=N after node2",
        3: "slots=0: expected a number from 1 to 1024",
        5: "node1 stands twice (first in line 1)",
        6: "'$(reboot)' is no host name",
        8: "'99999' is no port",
        9: "'' is no user name",
        10: "[2001:db8::7]:22",
        11: "not 'slots=2 max_slots=4'",
    }.items():
        assert part in said[number - 2]


@pytest.mark.parametrize("text", ["", "# nothing\n\n", "\r\n"])
def test_a_hostfile_without_hosts_is_an_error(text: str) -> None:
    assert problems_of(text) == ["hosts: no hosts in it; a line is: node1 slots=8"]


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"n\xf6de slots=1")
    (tmp_path / "windows").write_bytes("\ufeffnode1 slots=1\r\n".encode())
    assert load_hosts(str(tmp_path / "windows")) == (host("node1", 1),)
    for name, said in {"none": "No such file", "latin": "not UTF-8", ".": "Is a directory"}.items():
        with pytest.raises(HostfileError, match=said):
            load_hosts(str(tmp_path / name))


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=4\nnode2 slots=4\nnode3:22 slots=2\n")
    return str(path)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("node2", {"node2": (0, 1, 2, 3)}),
        ("node2:0,2@node1", {"node1": (0, 1, 2, 3), "node2": (0, 2)}),
        ("node2:2,0,2@node2:3", {"node2": (0, 2, 3)}),
        ("node3:1", {"node3": (1,)}),
    ],
)
def test_include(hostfile: str, text: str, left: dict[str, tuple[int, ...]]) -> None:
    assert {host.host: host.slots for host in load_hosts(hostfile, include=text)} == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("node2@node3", {"node1": (0, 1, 2, 3)}),
        ("node1:0,1@node3", {"node1": (2, 3), "node2": (0, 1, 2, 3)}),
        ("node1:0,1,2,3@node3:0", {"node2": (0, 1, 2, 3), "node3": (1,)}),
    ],
)
def test_exclude(hostfile: str, text: str, left: dict[str, tuple[int, ...]]) -> None:
    assert {host.host: host.slots for host in load_hosts(hostfile, exclude=text)} == left


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"include": ""}, "expected HOST or HOST:SLOT"),
        ({"include": "node1@"}, "expected HOST or HOST:SLOT"),
        ({"include": "node1:"}, "has no slot ''"),
        ({"include": "node9"}, "no host node9 in .*it has node1, node2, node3:22"),
        ({"include": "node1:4"}, "node1 has no slot '4' .it has 0 to 3"),
        ({"exclude": "node1@node2@node3"}, "leaves no host"),
        ({"include": "node1", "exclude": "node2"}, "can't be given together"),
    ],
)
def test_filters_that_make_no_sense(hostfile: str, filters: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_hosts(hostfile, **filters)


def test_the_hostfile_of_the_example_for_kubernetes(tmp_path: Path) -> None:
    service, pods = yaml.safe_load_all((ROOT / "hostfiles" / "kubernetes.yaml").read_text())
    spec = pods["spec"]["template"]["spec"]
    *shell, script = spec["initContainers"][0]["command"]
    script = script.replace("/etc/zinf", str(tmp_path))
    subprocess.run([*shell, script], check=True)
    gpus = spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    names = [f"{pods['metadata']['name']}-{n}.{service['metadata']['name']}" for n in range(pods["spec"]["replicas"])]
    assert load_hosts(str(tmp_path / "hosts")) == tuple(host(name, gpus) for name in names)


def test_the_hostfile_of_the_mpi_operator() -> None:
    """As mpi-operator v2 writes it: of Open MPI, and of Intel MPI, whose numbers of slots look like ports."""
    text = "pi-worker-0.pi.default.svc slots=8\npi-worker-1.pi.default.svc slots=8\n"
    assert parse_hostfile(text, "hosts") == tuple(host(f"pi-worker-{n}.pi.default.svc", 8) for n in (0, 1))
    assert problems_of("pi-worker-0.pi.default.svc:8") == [
        "hosts:1: expected slots=N after pi-worker-0.pi.default.svc:8"
    ]


@pytest.mark.parametrize("file", [path for path in (ROOT / "hostfiles").iterdir() if not path.suffix])
def test_the_examples_are_hostfiles(file: Path) -> None:
    assert sum(len(host.slots) for host in load_hosts(str(file))) == 16


names = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True)
addresses = names | st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
users = st.none() | st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
ports = st.none() | st.integers(1, 65535)


@given(
    st.lists(st.builds(Host, addresses, st.integers(1, 16).map(lambda n: tuple(range(n))), users, ports), min_size=1)
)
def test_what_is_written_is_read(hosts: list[Host]) -> None:
    hosts = list({(host.host, host.port): host for host in hosts}.values())
    lines = []
    for each in hosts:
        address = f"[{each.host}]" if ":" in each.host else each.host
        user = f"{each.user}@" if each.user else ""
        port = f":{each.port}" if each.port else ""
        lines.append(f"{user}{address}{port} slots={len(each.slots)}  # a comment\r\n")
    assert parse_hostfile("".join(lines), "hosts") == tuple(hosts)


@given(st.text() | st.text(alphabet="node1 @:[]=slots#\t\r\n,0", max_size=60))
def test_any_text_is_hosts_or_an_error_with_lines(text: str) -> None:
    hosts: tuple[Host, ...] = ()
    problems: list[str] = []
    try:
        hosts = parse_hostfile(text, "hosts")
    except HostfileError as error:
        problems = error.problems
    assert bool(hosts) != bool(problems)
    assert all(problem.startswith("hosts:") and "\n" not in problem for problem in problems)
    for each in hosts:
        assert each.slots
        assert not each.host.startswith("-")
        assert not set(each.host + (each.user or "")) & set(" ;&|$`'\"\\<>(){}*?!~\n")


@given(st.text() | st.text(alphabet="node123@:,0 []", max_size=30))
def test_any_filter_is_understood_or_refused(text: str) -> None:
    path = ROOT / "hostfiles" / "example"
    for include, exclude in ((text, None), (None, text)):
        try:
            left = load_hosts(str(path), include=include, exclude=exclude)
        except UsageError:
            continue
        assert left
        assert all(host.slots == tuple(sorted(set(host.slots))) for host in left)
