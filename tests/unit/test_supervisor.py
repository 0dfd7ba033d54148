"""A process that stands by: it lives through another one's end, goes on when it is told to, ends with the lifeline."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from programs import command
from zinf_cli.launch.connection import Connection, Lifelines
from zinf_cli.launch.part import visible_accelerators
from zinf_cli.launch.pipes import Pipes
from zinf_cli.launch.process_tree import LAUNCH_ID
from zinf_cli.recipe.hosts import Host, this_machine


def stand_by(connection: Connection, file: Path) -> tuple[list[str], int]:
    """The command, and the process it has become."""
    words = command("stands_by", file)
    connection.request("stand_by", command=words, environment={}, defaults={}, opening="")
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    return words, int(file.read_text())


def test_it_waits_until_it_is_told(tmp_path: Path) -> None:
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        words, pid = stand_by(connection, tmp_path / "pid")
        other = connection.capture([sys.executable, "-c", "print('other')"], within=20)
        assert (other["code"], other["output"]) == (0, "other\n")
        told = connection.capture(words, within=20, text="go on")
        assert (told["code"], told["output"]) == (0, f"told go on {pid}\n")
        again = connection.capture(words, within=20, text="another")
        assert again["output"].startswith("told another ")
        assert str(pid) not in again["output"]


def test_one_that_has_ended_is_started_anew(tmp_path: Path) -> None:
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        words, pid = stand_by(connection, tmp_path / "pid")
        os.kill(pid, 9)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        connection.request("own_address")
        assert connection.capture(words, within=20, text="go")["output"].startswith("told go ")


def test_it_ends_with_the_lifeline(tmp_path: Path) -> None:
    with Lifelines(Pipes()) as lifelines:
        _, pid = stand_by(lifelines.connect(this_machine(1)), tmp_path / "pid")
    with contextlib.suppress(FileNotFoundError):
        assert not Path(f"/proc/{pid}/cmdline").read_bytes()  # a zombie has none


def heard(connection: Connection) -> dict[str, Any]:
    event = connection.hear_event(20)
    assert event is not None
    return event


def test_it_reads_its_opening_at_once_and_what_it_says_is_heard() -> None:
    words = command("speaks")
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        connection.request("stand_by", command=words, environment={}, defaults={}, opening="this\n")
        assert heard(connection) == {"event": "said", "line": "I have read this"}
        more = "x" * (3 << 20)
        connection.request("ask", text=f"{more}\n")
        assert heard(connection) == {"event": "said", "line": f"I have read {more}"}
        told = connection.capture(words, within=20, text="\ngo")
        assert told["output"] == f"I have read this\nI have read {more}\ntold go\n"
        anew = connection.capture(words, within=20, opening="that\n", text="\ngo")
        assert anew["output"] == "I have read that\ntold go\n"


def test_that_it_has_ended_is_heard() -> None:
    words = [sys.executable, "-c", "import sys; print('half'); sys.exit('for a reason')"]
    with Lifelines(Pipes()) as lifelines:
        others = set(psutil.Process().children())
        connection = lifelines.connect(this_machine(1))
        (supervisor,) = set(psutil.Process().children()) - others
        held = supervisor.num_fds()
        connection.request("stand_by", command=words, environment={}, defaults={}, opening="")
        assert heard(connection) == {"event": "said", "line": "half"}
        assert heard(connection) == {"event": "fell", "code": 1, "errors": "for a reason\n"}
        connection.request("own_address")  # answered after the supervisor has let go of it
        assert supervisor.num_fds() == held


def test_its_environment_is_this_hosts_and_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_HERE", "here")
    words = [
        sys.executable,
        "-c",
        "import os; print([os.environ[f'LAB_{name}'] for name in ('HERE', 'MORE', 'TOLD')])",
    ]
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        defaults = {"LAB_HERE": "default", "LAB_MORE": "more"}
        connection.request("run", command=words, environment={"LAB_TOLD": "told"}, defaults=defaults)
        assert heard(connection)["output"] == "['here', 'more', 'told']\n"


def test_a_wish_to_stop_is_heard_without_a_file() -> None:
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        connection.request("run", command=command("stops_when_asked"))
        time.sleep(0.2)
        assert connection.event() is None
        connection.request("stop")
        assert heard(connection)["output"] == "asked\n"


def test_sigterm_is_left_to_the_launcher() -> None:
    """As Slurm and service managers send it: to every process."""
    with Lifelines(Pipes()) as lifelines:
        others = set(psutil.Process().children())
        connection = lifelines.connect(this_machine(1))
        (supervisor,) = set(psutil.Process().children()) - others
        connection.request("run", command=command("stops_when_asked"))
        for process in (supervisor, *supervisor.children(recursive=True)):
            process.terminate()
        assert heard(connection) == {"event": "told to end"}
        connection.request("stop")
        assert heard(connection)["output"] == "asked\n"


def test_slots_of_a_job_are_positions_among_its_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    chosen = {Host("node1", (1,), job="7", gpus=2): "5", Host("node1", (0, 1), job="7", gpus=2): None}
    chosen |= {Host("node1", (1,)): "1", Host("node1", (2, 5)): "2,5"}  # by SSH they are the host's own numbers
    with Lifelines(Pipes()) as lifelines:
        for host, variable in chosen.items():
            found = visible_accelerators(lifelines.connect(host))
            assert found.get("CUDA_VISIBLE_DEVICES") == variable


def test_the_port_that_other_hosts_try_is_open_at_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)  # which names the address
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        port = connection.request("listen", peer=None)
        found = [one for child in psutil.Process().children() for one in child.net_connections("inet")]
        assert [one.laddr for one in found if one.status == psutil.CONN_LISTEN] == [("127.0.0.1", port["port"])]
        assert connection.request("reach", address=port["address"], port=port["port"], timeout_s=5) == "lo"


def test_a_supervisor_that_hangs_is_ended_by_another_one(tmp_path: Path) -> None:
    with Lifelines(Pipes()) as lifelines:
        hanging, other = (lifelines.connect(this_machine(1)) for _ in range(2))
        _, pid = stand_by(hanging, tmp_path / "pid")
        os.kill(psutil.Process(pid).ppid(), signal.SIGSTOP)
        assert other.request("sweep") >= 1
        assert hanging.hear_event(20) is None
        assert hanging.lost == "the connection was lost, or its supervisor killed"
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_sweep_spares_what_has_started_the_supervisor() -> None:
    """As a relay does, on its own host."""
    script = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    sweeps = "import sys; from zinf_cli.launch.process_tree import end_marked; print(end_marked('a-launch'))"
    words = [sys.executable, "-c", script, sys.executable, "-c", sweeps]
    done = subprocess.run(
        words, env={**os.environ, LAUNCH_ID: "a-launch"}, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "0\n"
