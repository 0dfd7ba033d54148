"""Real torchrun, real ranks, real signals: how run_ranks() ends and what it leaves behind.

Each scenario is a launcher process of its own, since signals are sent to it. Two at a time run in the
background from the start, which is also how runs on one machine are shown not to clash.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from programs import command, environment
from zinf_cli.errors import CapacityError

pytestmark = pytest.mark.xdist_group("launch_runner")  # which the scenarios in the background belong to


@dataclass
class Ended:
    """A scenario that is over."""

    exit_code: int | None
    failure: dict[str, Any] | None
    interrupted: bool
    polls: int
    notes: list[str]
    others: str
    host_cpu_bytes: int
    run_dir: Path
    seconds: float
    ended_at: float
    left: list[str]
    """Command lines of what still ran 10 s after the launcher had ended."""

    def log(self, name: str) -> str:
        return (self.run_dir / "logs" / name).read_text()


def processes_with(mark: str) -> dict[int, str]:
    """Every process that inherited `mark` in its environment: pid to command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # gone, or another user's
    return found


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def run_scenario(folder: Path, scenario: str, disturb: Callable[[subprocess.Popen[str], Path], None]) -> Ended:
    """Launch two ranks in a launcher of their own, disturb them, and see how it ends."""
    mark = f"ZINF_TEST_MARK={uuid.uuid4().hex}"
    name, value = mark.split("=")
    cluster = {"GLOO_SOCKET_IFNAME": "ib7"}  # as a profile may say for what runs on many hosts
    run_dir = folder / f"run-{value}"
    started = time.monotonic()
    with subprocess.Popen(
        command("launcher", scenario, run_dir),
        env=environment(**cluster, **{name: value}),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            disturb(launcher, run_dir)
            answer, _ = launcher.communicate(timeout=50)
        finally:
            launcher.kill()
    seconds, ended_at = time.monotonic() - started, time.time()
    deadline = time.monotonic() + 10
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    nothing: dict[str, Any] = {
        "exit_code": None,
        "failure": None,
        "interrupted": False,
        "polls": 0,
        "notes": [],
        "others": "",
        "host_cpu_bytes": 0,
    }
    outcome = json.loads(answer) if answer else nothing
    return Ended(**outcome, run_dir=run_dir, seconds=seconds, ended_at=ended_at, left=list(left.values()))


def leave_alone(launcher: subprocess.Popen[str], run_dir: Path) -> None:
    pass


def await_ranks(run_dir: Path) -> None:
    wait_until(lambda: all((run_dir / f"standing-{rank}").exists() for rank in (0, 1)), 40)


def interrupt(launcher: subprocess.Popen[str], run_dir: Path) -> None:
    await_ranks(run_dir)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does


def interrupt_twice(launcher: subprocess.Popen[str], run_dir: Path) -> None:
    interrupt(launcher, run_dir)
    time.sleep(0.5)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does


def hang_up(launcher: subprocess.Popen[str], run_dir: Path) -> None:
    await_ranks(run_dir)
    (run_dir / "stop").mkdir()  # a folder in which nothing can be made would do as well
    for _ in range(2):  # the kernel's and the shell's
        os.killpg(launcher.pid, signal.SIGHUP)
        time.sleep(0.3)


def kill_launcher(launcher: subprocess.Popen[str], run_dir: Path) -> None:
    await_ranks(run_dir)
    launcher.kill()


def the_child(pid: int) -> int:
    """The one that leads a session of its own: a supervisor also has, for a moment each second, one that measures."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    (child,) = [child for child in children if session_of(child) == child]
    return child


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def kill_supervisor(launcher: subprocess.Popen[str], run_dir: Path) -> None:
    await_ranks(run_dir)
    os.kill(the_child(launcher.pid), signal.SIGKILL)


def kill_agent(launcher: subprocess.Popen[str], run_dir: Path) -> None:
    await_ranks(run_dir)
    os.kill(the_child(the_child(launcher.pid)), signal.SIGKILL)


SCENARIOS = {
    "success": ("success", leave_alone),
    "success beside it": ("success", leave_alone),
    "capacity": ("capacity", leave_alone),
    "peer_lost_first": ("peer_lost_first", leave_alone),
    "killed": ("killed", leave_alone),
    "frozen": ("frozen", leave_alone),
    "guard_killed": ("guard_killed", leave_alone),
    "deaf": ("deaf", leave_alone),
    "interrupt": ("stop", interrupt),
    "hang_up": ("stop", hang_up),
    "interrupt_twice": ("still", interrupt_twice),
    "kill_launcher": ("still", kill_launcher),
    "kill_agent": ("still", kill_agent),
    "kill_supervisor": ("orphan", kill_supervisor),
}

Run = Callable[[str], Ended]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("launch")
    with ThreadPoolExecutor(2) as background:
        ended: dict[str, Future[Ended]] = {
            name: background.submit(run_scenario, folder, scenario, disturb)
            for name, (scenario, disturb) in SCENARIOS.items()
        }
        yield lambda name: ended[name].result()


@pytest.mark.parametrize("name", ["success", "success beside it"])
def test_ranks_meet_and_end(run: Run, name: str) -> None:
    ended = run(name)
    assert (ended.exit_code, ended.failure, ended.interrupted) == (0, None, False)
    assert ended.host_cpu_bytes > 2 * 50e6  # two ranks that have imported torch
    for rank in (0, 1):
        assert "sum 3.0 threads 1" in ended.log(f"rank-{rank:05d}.log")
    assert ended.polls > 0.5 * ended.seconds / 0.2
    assert sorted(path.name for path in ended.run_dir.iterdir()) == ["logs"]


def test_ranks_of_one_host_listen_where_no_other_host_reaches_them(run: Run) -> None:
    assert "listeners ['127.0.0.1']\n" in run("success").log("rank-00000.log")


def test_zinf_error_decides_the_exit_code(run: Run) -> None:
    ended = run("capacity")
    assert ended.exit_code == 4
    assert ended.failure is not None
    assert ended.failure["rank"] == 1
    error = CapacityError("needs 9 GiB of 8", where="host:1", hint="less of it")
    assert ended.failure["error"] == error.to_json()
    assert ended.failure["log"] == str(ended.run_dir / "logs" / "rank-00001.log")
    assert "Traceback" in ended.log("rank-00001.log")


def test_the_culprit_is_named_although_its_peer_failed_earlier(run: Run) -> None:
    ended = run("peer_lost_first")
    innocent, culprit = (json.loads(ended.log(f"error-{rank:05d}.json")) for rank in (0, 1))
    assert innocent["secondary"]
    assert innocent["time"] < culprit["time"]
    assert ended.exit_code == 1
    assert ended.failure is not None
    assert ended.failure["rank"] == 1
    assert ended.failure["error"]["message"] == "RuntimeError: the real reason"


def test_a_killed_rank_is_named_with_its_signal(run: Run) -> None:
    ended = run("killed")
    assert ended.exit_code == 1
    assert ended.failure is not None
    assert ended.failure["rank"] == 1
    said = ended.failure["error"]["message"]
    assert "SIGKILL" in said
    assert "memory" in said


def test_a_rank_that_stands_still_is_not_waited_for_forever(run: Run) -> None:
    ended = run("frozen")
    assert ended.exit_code == 1
    assert ended.failure is not None
    assert ended.failure["rank"] == 0
    assert "imed out" in ended.failure["error"]["message"]


def test_a_rank_without_a_record_is_named_by_torchruns_agent(run: Run) -> None:
    ended = run("guard_killed")
    assert ended.exit_code == 1
    assert ended.failure is not None
    assert ended.failure["rank"] == 1
    assert ended.failure["error"]["message"] == "killed by SIGKILL, and left no record of an error"
    assert ended.failure["log"] == str(ended.run_dir / "logs" / "torchrun-00000.log")


def test_a_rank_deaf_to_sigterm_is_brought_down_soon(run: Run) -> None:
    ended = run("deaf")
    assert ended.exit_code == 7
    assert ended.failure is not None
    assert (ended.failure["rank"], ended.failure["error"]["message"]) == (1, "ended with exit code 7")
    record = json.loads(ended.log("error-00001.json"))
    assert ended.ended_at - record["time"] < 7


def test_ctrl_c_lets_the_ranks_end_their_step(run: Run) -> None:
    ended = run("interrupt")
    assert (ended.exit_code, ended.failure, ended.interrupted) == (130, None, True)
    for rank in (0, 1):
        assert "stopped in an orderly way" in ended.log(f"rank-{rank:05d}.log")
    assert len(ended.notes) == 1


def test_second_ctrl_c_kills(run: Run) -> None:
    ended = run("interrupt_twice")
    assert (ended.exit_code, ended.failure, ended.interrupted) == (130, None, True)


def test_a_terminal_that_closes_lets_the_ranks_end_their_step(run: Run) -> None:
    ended = run("hang_up")
    assert (ended.exit_code, ended.failure, ended.interrupted) == (130, None, True)
    for rank in (0, 1):
        assert "stopped in an orderly way" in ended.log(f"rank-{rank:05d}.log")


def test_a_lost_agent_is_a_failure(run: Run) -> None:
    ended = run("kill_agent")
    assert ended.exit_code == 1
    assert ended.failure is not None
    assert (ended.failure["rank"], ended.failure["error"]["message"]) == (None, "torchrun itself: killed by SIGKILL")


def test_a_lost_supervisor_is_a_failure(run: Run) -> None:
    ended = run("kill_supervisor")
    assert ended.exit_code == 1
    assert ended.failure is not None
    assert ended.failure["rank"] is None
    assert "supervisor killed" in ended.failure["error"]["message"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_left_running(run: Run, name: str) -> None:
    assert run(name).left == []
