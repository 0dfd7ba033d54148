"""A process that stands by: it lives through another one's end, goes on when it is told to, ends with the lifeline."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from zinf_cli.hosts import this_machine
from zinf_cli.launch.connection import Connection, Lifelines
from zinf_cli.launch.transport import Pipes

STANDS_BY = """
import os, sys
from pathlib import Path
Path(sys.argv[1]).write_text(str(os.getpid()))
print("told", sys.stdin.read(), os.getpid())
"""


def stand_by(connection: Connection, file: Path) -> tuple[list[str], int]:
    """The command, and the process it has become."""
    command = [sys.executable, "-c", STANDS_BY, str(file)]
    connection.request("stand_by", command=command, environment={}, defaults={})
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    return command, int(file.read_text())


def test_it_waits_until_it_is_told(tmp_path: Path) -> None:
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        command, pid = stand_by(connection, tmp_path / "pid")
        other = connection.capture([sys.executable, "-c", "print('other')"], within=20)
        assert (other["code"], other["output"]) == (0, "other\n")
        told = connection.capture(command, within=20, text="go on")
        assert (told["code"], told["output"]) == (0, f"told go on {pid}\n")
        again = connection.capture(command, within=20, text="another")
        assert again["output"].startswith("told another ")
        assert str(pid) not in again["output"]


def test_one_that_has_ended_is_started_anew(tmp_path: Path) -> None:
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        command, pid = stand_by(connection, tmp_path / "pid")
        os.kill(pid, 9)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        connection.request("own_address")
        assert connection.capture(command, within=20, text="go")["output"].startswith("told go ")


def test_it_ends_with_the_lifeline(tmp_path: Path) -> None:
    with Lifelines(Pipes()) as lifelines:
        _, pid = stand_by(lifelines.connect(this_machine(1)), tmp_path / "pid")
    with contextlib.suppress(FileNotFoundError):
        assert not Path(f"/proc/{pid}/cmdline").read_bytes()  # a zombie has none
