"""A pause is no loss: whoever was stopped counts anew, and nobody waits for a host that is not his."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import psutil
import pytest

from impatient import Impatient
from programs import command, environment
from zinf_cli.launch import process_tree
from zinf_cli.launch.connection import Lifelines
from zinf_cli.launch.pipes import Pipes, _PipeChannel
from zinf_cli.launch.process_tree import Gauge
from zinf_cli.launch.transport import supervisor_command, supervisor_program
from zinf_cli.recipe.hosts import this_machine

PAUSE_S = 4.0
"""Longer than any limit here."""


@contextmanager
def bare_supervisor(silence_s: float) -> Iterator[subprocess.Popen[bytes]]:
    program = supervisor_program("0" * 32, silence_s)
    words = supervisor_command(sys.executable, program, "0" * 32)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(program)
        assert json.loads(process.stdout.readline())["event"] == "hello"
        try:
            yield process
        finally:
            process.kill()


def test_a_supervisor_that_was_stopped_counts_anew_and_one_that_was_not_ends() -> None:
    with bare_supervisor(2.0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_S)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        process.stdin.write(b'{"do": "own_address"}\n')
        answers = (json.loads(line) for line in iter(process.stdout.readline, b"") if line.strip())
        assert "answer" in next(answers)
        assert process.wait(timeout=20) == 0  # nobody speaks to it now


@contextmanager
def launched(here_s: float, there_s: float) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """A launcher of its own, what it is told and what it says."""
    with subprocess.Popen(
        command("waiting_launcher", here_s, there_s),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        yield launcher, launcher.stdin, launcher.stdout


def test_a_launcher_that_was_stopped_counts_anew() -> None:
    with launched(2.0, math.inf) as (launcher, told, heard):
        supervisor = int(heard.readline())
        for pid in (supervisor, launcher.pid):  # the whole machine sleeps
            os.kill(pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        os.kill(launcher.pid, signal.SIGCONT)
        time.sleep(0.5)
        os.kill(supervisor, signal.SIGCONT)
        told.write("go\n")
        told.flush()
        assert heard.readline() == "answered\n"
        assert launcher.wait(timeout=20) == 0


def test_hosts_go_on_while_the_launcher_is_stopped_by_ctrl_z() -> None:
    with launched(60.0, 2.0) as (launcher, told, heard):
        assert heard.readline()
        launcher.send_signal(signal.SIGTSTP)
        while psutil.Process(launcher.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        time.sleep(PAUSE_S)
        launcher.send_signal(signal.SIGCONT)
        told.write("go\n")
        told.flush()
        assert heard.readline() == "answered\n"
        assert launcher.wait(timeout=20) == 0


def test_a_silent_host_is_given_up_but_not_at_the_other_end_of_a_pipe() -> None:
    assert math.isinf(_PipeChannel.silence_s)
    with Lifelines(Impatient(2.0, math.inf)) as lifelines:
        connection = lifelines.connect(this_machine(1))
        os.kill(connection._channel._process.pid, signal.SIGSTOP)  # type: ignore[attr-defined]
        assert connection.hear_event(20) is None
        assert connection.lost == "gave no sign of life for 2 s"


def test_what_came_before_a_loss_is_read_before_it() -> None:
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        connection.request("run", command=[sys.executable, "-c", "print('done')"])
        while not connection._events.num_bytes:
            time.sleep(0.01)
        os.kill(connection._channel._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        while connection.lost is None:
            time.sleep(0.01)
        event = connection.hear_event(20)
        assert event is not None
        assert event["output"] == "done\n"
        assert connection.hear_event(20) is None


def test_a_host_that_takes_nothing_does_not_silence_the_launcher_towards_others() -> None:
    with Lifelines(Impatient(math.inf, 2.5)) as lifelines:
        deaf, other = (lifelines.connect(this_machine(1)) for _ in range(2))
        pid: int = deaf._channel._process.pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGSTOP)

        def talk() -> None:
            with contextlib.suppress(Exception):
                deaf.request("run", command=[sys.executable, "-c", ""], text="x" * (1 << 20))

        talker = threading.Thread(target=talk)
        talker.start()
        time.sleep(PAUSE_S)
        assert other.lost is None
        other.request("own_address")
        os.kill(pid, signal.SIGKILL)
        talker.join()


def test_a_slow_look_at_the_memory_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge = Gauge()
    while (vitals := gauge.read()) is None:
        time.sleep(0.01)
    assert vitals["memory"] > 1 << 20
    monkeypatch.setattr(process_tree, "_vitals_of", lambda root: time.sleep(600))
    before = set(psutil.Process().children())
    while not (looks := set(psutil.Process().children()) - before):
        assert gauge.read() is None
        time.sleep(0.01)
    assert gauge.read() is None  # it is at it
    for look in looks:
        look.kill()
        look.wait()
    assert gauge.read() is None
