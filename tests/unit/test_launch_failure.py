"""Which failure ended a run; and an error stays what it is on its way from a rank to the screen."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from zinf_cli.commands.launch import _may_restart
from zinf_cli.errors import CapacityError, HostError, NonFiniteError, RankError, ReportedError, TierError, ZinfError
from zinf_cli.launch.failure import Ending, Failure, first_failure
from zinf_cli.launch.runner import Outcome
from zinf_cli.recipe.hosts import Host
from zinf_cli.run_folder.error_records import ErrorPlace, ErrorRecord
from zinf_cli.train.rank_process import _is_secondary, _run_main


def record(run_dir: Path, rank: int, **changes: object) -> None:
    """What a rank records, by hand."""
    error = {"rank": rank, "host": "its-own-name", "error": {"message": "m"}, "time": 10.0 + rank}
    error |= {"secondary": False, "traceback": ""}
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / "logs" / f"error-{rank:05d}.json").write_text(json.dumps(error | changes))


def endings(run_dir: Path, *, codes: tuple[int | None, ...] = (1, 1), lost: str | None = None) -> list[Ending]:
    """Of node1 with two ranks and node2 with one, which `lost` is about."""
    hosts = (Host("node1", (0, 1)), Host("node2", (0,)))
    logs = [run_dir / "logs" / f"torchrun-{number:05d}.log" for number in (0, 1)]
    return [Ending(hosts[0], 0, logs[0], codes[0], None), Ending(hosts[1], 2, logs[1], codes[1], lost)]


def test_the_earliest_primary_error_is_first(tmp_path: Path) -> None:
    record(tmp_path, 0, secondary=True, time=1.0)
    record(tmp_path, 1, time=3.0)
    record(tmp_path, 2, time=2.0)
    failure = first_failure(tmp_path, endings(tmp_path))
    assert failure is not None
    assert (failure.rank, failure.host, failure.local_rank) == (2, "node2", 0)


def test_secondary_errors_count_where_nothing_else_is_known(tmp_path: Path) -> None:
    record(tmp_path, 0, secondary=True, time=2.0)
    record(tmp_path, 1, secondary=True, time=1.0)
    failure = first_failure(tmp_path, endings(tmp_path, codes=(None, None)))
    assert failure is not None
    assert (failure.rank, failure.host, failure.local_rank) == (1, "node1", 1)


def test_a_lost_host_explains_the_errors_of_its_peers(tmp_path: Path) -> None:
    record(tmp_path, 0, secondary=True, time=1.0)
    failure = first_failure(tmp_path, endings(tmp_path, codes=(1, None), lost="gave no sign of life"))
    assert failure is not None
    assert (failure.rank, failure.host, failure.error.message) == (None, "node2", "gave no sign of life")
    record(tmp_path, 1, time=9.0)
    failure = first_failure(tmp_path, endings(tmp_path, codes=(1, None), lost="gave no sign of life"))
    assert failure is not None
    assert failure.rank == 1


ERRORS = [
    (CapacityError("9 GiB of 8", where="a: b", hint="less (of it)"), False),
    (NonFiniteError("the loss is nan", where="step 3", hint="a lower lr"), False),
    (TierError("short read", where="/drive/file"), True),
    (HostError("can't listen"), True),
    (ReportedError("KeyError: 'x'"), True),
]


@pytest.mark.parametrize(("error", "may_restart"), ERRORS)
def test_an_error_of_a_rank_keeps_its_fields(tmp_path: Path, error: ZinfError, may_restart: bool) -> None:
    failure = recorded(tmp_path, error)
    assert failure.error.to_json() == error.to_json()
    assert _may_restart(Outcome(failure.error.exit_code, failure, interrupted=False)) == may_restart
    shown = failure.reported(log=True)
    assert (shown.message, shown.exit_code) == (error.message, error.exit_code)
    place, log = f"{socket.gethostname()}:rank 3", f"log: {tmp_path}/logs/rank-00003.log"
    assert shown.where == (f"{place}: {error.where}" if error.where else place)
    assert shown.hint == (f"{error.hint}; {log}" if error.hint else log)


def test_what_a_rank_raises_after_ctrl_c_is_how_the_run_ended(tmp_path: Path) -> None:
    failure = recorded(tmp_path, CapacityError("no room for a checkpoint"))
    assert not Outcome(4, failure, interrupted=True).ended_as_asked
    ErrorPlace(tmp_path, 3).write(ErrorRecord(3, 1, RankError("killed by SIGTERM").to_json()))
    killed = first_failure(tmp_path, [])
    assert killed is not None
    assert Outcome(1, killed, interrupted=True).ended_as_asked
    assert not Outcome(1, killed, interrupted=False).ended_as_asked


def test_what_a_rank_says_of_a_peer_is_not_the_first_failure(tmp_path: Path) -> None:
    record(tmp_path, 3, time=1.0, secondary=_is_secondary(RankError("rank 4 can't write a checkpoint")))
    record(tmp_path, 4, time=2.0, secondary=_is_secondary(CapacityError("no room for a checkpoint")))
    failure = first_failure(tmp_path, [])
    assert failure is not None
    assert failure.rank == 4


def test_an_error_that_zinf_does_not_know_is_told_with_its_kind(tmp_path: Path) -> None:
    failure = recorded(tmp_path, KeyError("x"))
    assert failure.error.to_json() == ReportedError("KeyError: 'x'").to_json()


def recorded(run_dir: Path, error: Exception) -> Failure:
    """The failure of a run in which rank 3 raises `error`."""

    def life() -> int:
        raise error

    (run_dir / "logs").mkdir()
    _run_main(life, 3, ErrorPlace(run_dir, 3))
    failure = first_failure(run_dir, [])
    assert failure is not None
    return failure


def test_an_error_of_the_agent_itself_keeps_its_fields(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting = {"address": "127.0.0.1", "port": taken.getsockname()[1], "word": "3f1c"}
        order = {
            "part": {"ranks": 1, "number": 0, "hosts": 2, "meeting": meeting},
            "function": "run_module", "run_dir": str(tmp_path), "arguments": [], "environment": {}, "defaults": {},
            "log": str(tmp_path / "log"),
        }  # fmt: skip
        told = f"null\n{json.dumps(order)}\n"
        command = [sys.executable, "-m", "zinf_cli.train.agent", "runpy"]
        done = subprocess.run(command, input=told, stdout=subprocess.PIPE, text=True, check=False)
    report = json.loads(done.stdout)["failed"]
    ending = Ending(Host("node1", (0,)), 0, tmp_path / "log", done.returncode, None, report)
    failure = first_failure(tmp_path, [ending])
    assert failure is not None
    assert (failure.rank, failure.error.exit_code, failure.error.may_restart) == (None, 3, True)
    assert failure.error.message.startswith("can't listen on 127.0.0.1 port ")
