"""The link between a launcher and a relay, and both of its ends: what is said, by whom, and what of it waits where."""

from __future__ import annotations

import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from programs import command
from simulated_hosts import HOSTS, RelayChannel, SimulatedTree
from zinf_cli.errors import HostError
from zinf_cli.launch.branches import Relay, RelayedChannel
from zinf_cli.launch.frames import MOST_BYTES, WINDOW, Frames, Kind, frame, frames_of, language, taken
from zinf_cli.launch.process_tree import LAUNCH_ID
from zinf_cli.launch.sender import Sender
from zinf_cli.launch.switchboard import Switchboard
from zinf_cli.launch.transport import MOST_RECEIVED, Gone
from zinf_cli.search_path import module_command


def opened(number: int = 1, host: str = "node000", *, own: bool = True) -> bytes:
    """The frame that has a relay start a supervisor."""
    return frame(Kind.OPEN, number, json.dumps({"host": host, "user": None, "port": None, "own": own}).encode())


@pytest.mark.parametrize("size", [11, 1 << 20])
def test_frames_may_come_in_pieces(size: int) -> None:
    data = bytes(range(256)) * 1000
    sent = b"".join([frame(Kind.BEAT), *frames_of(3, data), frame(Kind.END, 3, b"bye")])
    frames, found = Frames(), []
    for start in range(0, len(sent), size):
        found += list(frames.after(sent[start : start + size]))
    assert found[0] == (Kind.BEAT, 0, b"")
    assert found[-1] == (Kind.END, 3, b"bye")
    assert b"".join(content for _, _, content in found[1:-1]) == data
    assert max(len(content) for _, _, content in found) == MOST_BYTES


def test_a_relay_sends_no_more_of_a_host_than_is_taken_in() -> None:
    transport = SimulatedTree()
    link = RelayChannel(transport, "id")
    link.send(opened())
    frames = Frames()

    def come(least: int) -> int:
        """So many bytes of the host, and what follows them within half a second."""
        found = 0
        link.link.settimeout(20)
        try:
            while data := link.receive():
                found += sum(len(content) for kind, _, content in frames.after(data) if kind is Kind.DATA)
                if found >= least:
                    link.link.settimeout(0.5)
        except TimeoutError:
            return found
        raise AssertionError("the relay is gone")

    there = come(1)  # its greeting
    transport.talk_on("node000", 1000, 1000)
    there += come(WINDOW - there)
    assert there == WINDOW
    link.send(taken(1, there))
    more = come(WINDOW)
    assert more == WINDOW
    link.close()


def test_a_relay_that_hears_nothing_hangs_up_on_its_hosts() -> None:
    link = RelayChannel(SimulatedTree(), "id", silence_s=0.3)
    link.send(opened())
    frames, kinds = Frames(), []
    while data := link.receive():
        kinds += [kind for kind, _, _ in frames.after(data)]
    assert {Kind.OPENED, Kind.DATA} <= set(kinds)
    link.close()


def test_a_relay_that_nobody_reads_ends_by_the_silence_as_well() -> None:
    """As behind a cable that is cut while files are mirrored: what a relay sends finds no room."""
    transport = SimulatedTree()
    link = RelayChannel(transport, "id", silence_s=0.5)
    for number, host in enumerate(HOSTS[:30]):
        link.send(opened(number, host.name))
    while len(transport.channels) < 30:
        time.sleep(0.01)
    for host in HOSTS[:30]:
        transport.talk_on(host.name, 1000, 1000)
    for number in range(30):
        link.send(taken(number, 1 << 20))
    link._serves.join(30)
    assert not link._serves.is_alive()
    link.close()


class ByHand:
    """A link whose relay says what a test does."""

    silence_s = math.inf
    first = b""

    def __init__(self) -> None:
        self._come, self._says = os.pipe()
        self.heard: list[tuple[Kind, int, bytes]] = []
        self.frames = Frames()
        self.given_up = threading.Event()

    def say(self, data: bytes) -> None:
        os.write(self._says, data)

    def fileno(self) -> int:
        return self._come

    def receive(self, most: int = MOST_RECEIVED) -> bytes:
        return os.read(self._come, most)

    def has_room(self) -> bool:
        return True

    def send(self, data: bytes) -> None:
        self.heard += self.frames.after(data)

    def hang_up(self) -> None:
        os.close(self._says)

    def abort(self) -> None:
        self.given_up.set()

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        os.close(self._come)


@contextmanager
def by_hand() -> Iterator[tuple[ByHand, Relay]]:
    switchboard, link = Switchboard(), ByHand()
    switchboard.start()
    relay = Relay(HOSTS[0], link, switchboard)
    yield link, relay
    assert switchboard._thread.is_alive()
    relay.close()
    switchboard.close()


def test_what_a_relay_says_after_it_was_given_up_disturbs_nobody() -> None:
    """It was silent for too long while a host logged in, and is heard again before whoever waits for that host is."""
    with by_hand() as (link, relay):
        there = relay._hosts[1] = RelayedChannel(relay, 1, "its relay is lost: ")
        relay._patience._until = 0.0  # it is over
        assert link.given_up.wait(20)
        link.say(frame(Kind.OPENED, 1) + frame(Kind.DATA, 1, b"hello"))
        with pytest.raises(HostError, match="gave no sign of life"):
            there.opened.result(20)
        time.sleep(0.3)  # the switchboard hears it
        with pytest.raises(Gone, match="its relay is lost: gave no sign of life"):
            there.receive()
        there.close()


def test_what_else_prints_at_a_relay_costs_its_group_and_nothing_else() -> None:
    """A login script may have left something that goes on to print."""
    with by_hand() as (link, relay):
        link.say(frame(Kind.BEAT) + b"disk quota: 3 of 5 GB\n")
        assert link.given_up.wait(20)
        assert relay.lost is not None
        assert "something else prints there" in relay.lost


def test_ctrl_z_is_the_last_that_a_relay_hears() -> None:
    sent: list[bytes] = []
    waits = threading.Event()

    def send(message: bytes) -> None:
        waits.wait(20)
        sent.append(message)

    sender = Sender(send, "")
    sender.say(b"host: stopping")
    hold = sender.hold(b"stopping")
    sender.say(b"beat")
    assert not hold.reached.is_set()
    waits.set()
    assert hold.reached.wait(20)
    time.sleep(0.05)
    assert sent == [b"host: stopping", b"stopping"]
    hold.released.set()
    sender.close(20)
    assert sent[2:] == [b"beat"]


def start_relay(*arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        module_command("zinf_cli.launch.relay", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, LAUNCH_ID: "id", **variables},
    )


def test_a_relay_of_another_zinf_is_none() -> None:
    out, error = start_relay("0123456789abcdef", "ssh").communicate()
    assert (out, error) == (b"", b"its zinf is not the launcher's\n")


def test_a_relay_ends_logins_that_go_on(tmp_path: Path) -> None:
    """The program takes SIGTERM as the kernel has it, and ends with the relay though nobody answers it."""
    ssh, takes = tmp_path / "ssh", tmp_path / "takes"
    ssh.write_text(f'#!/bin/sh\nexec {" ".join(command("ssh_that_hangs"))} "$@"\n')
    ssh.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    relay = start_relay(language(), "ssh", PATH=path, HANGING_SSH=str(takes))
    assert relay.stdin is not None
    assert relay.stdout is not None
    relay.stdin.write(opened(own=False))
    relay.stdin.flush()
    while not takes.exists() or not takes.read_text():
        time.sleep(0.02)
    assert "SIG_DFL" in takes.read_text()
    relay.communicate(timeout=30)
    assert [pid for pid in psutil.pids() if str(takes) in variables(pid)] == []


def variables(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""
