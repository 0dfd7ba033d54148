"""A drive that others fill up while a run writes to it: the run goes on as long as it can, and loses nothing it has."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import wait_until
from small_drives import fill
from workshop import Workshop
from zinf_cli.checkpoint.folder import FOLDER, LATEST, checkpoints_of, step_of
from zinf_cli.checkpoint.verify import verify

EVERY = 6
NO_ROOM = "metrics.jsonl: can't be written now"


class FullDrive:
    """A run on one small drive, with a checkpoint every six steps, that ends when it is told to."""

    def __init__(self, drive: Path) -> None:
        self.workshop = Workshop(drive)
        self.workshop.content["checkpoint"] = {"interval": EVERY, "keep_latest_k": 2}
        self.workshop.content["logging"] = {"tensorboard": True}
        self.run_dir = drive / "run"
        self.drive = drive

    @contextmanager
    def standing_still(self) -> Iterator[list[Path]]:
        """Between two checkpoints, with two that are whole: nothing of zinf's is about to come, or to go.

        So what happens next follows from what is done to the drive meanwhile, and not from who is faster.
        """
        deadline = time.monotonic() + 60
        wait_until(lambda: len(checkpoints_of(self.run_dir)) == 2, 60)
        (rank,) = [process for process in self.workshop.processes() if process.name() == "zinf rank 0"]
        while True:
            rank.suspend()
            wait_until(lambda: all(state == "T" for state in states_of_threads(rank.pid)), 60)
            whole = checkpoints_of(self.run_dir)
            if len(whole) == 2 and self.names == {LATEST, *(path.name for path in whole)}:
                break
            rank.resume()
            assert time.monotonic() < deadline, "the run is always in a checkpoint"
            time.sleep(0.01)
        yield whole
        rank.resume()

    @property
    def names(self) -> set[str]:
        return {path.name for path in (self.run_dir / FOLDER).iterdir()}

    def wait_for(self, words: str, count: int) -> None:
        """Until the run has said that so often."""
        log = self.run_dir / "logs" / "rank-00000.log"
        wait_until(lambda: log.read_text().count(words) >= count, 60)


def states_of_threads(pid: int) -> list[str]:
    """As ps has them: T for one that is stopped."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


@pytest.fixture
def run(small_drive: Path) -> Iterator[FullDrive]:
    run = FullDrive(small_drive)
    yield run
    for process in run.workshop.processes():  # of a test that has failed: the drive is to be unmounted
        process.kill()
        process.wait()


@pytest.mark.parametrize(("ranks", "room"), [(1, 64 << 10), (2, 0)])
def test_a_run_goes_on_without_checkpoints_and_keeps_those_it_has(run: FullDrive, ranks: int, room: int) -> None:
    """The drive has `room` for the folder of a checkpoint and not for its files, or not even for that.

    Without room, state lies elsewhere: no file of it goes before the rank records why it failed.
    """
    if not room:
        run.workshop.nvme = run.drive.parent / "nvme"
        run.workshop.content["offload"]["nvme_path"] = str(run.workshop.nvme)
    process = run.workshop.start("train.max_steps=100000", "--slots", str(ranks))
    with run.standing_still() as whole:
        others = fill(run.drive, leave=room)
    if not room:
        run.wait_for(NO_ROOM, 1)
    run.wait_for("the run goes on without", 2)
    os.killpg(process.pid, signal.SIGINT)
    ended = run.workshop.end(process)
    said = " ".join(ended.err.split())

    assert ended.code == 4, ended.err
    assert "the first failure" in said
    assert said.count(f"{NO_ROOM}: No space left on device; the run goes on") == (not room)
    first = step_of(whole[0]) + EVERY
    for step in (first, first + EVERY):
        assert f"note: no checkpoint step-{step:08d}, the run goes on without: {run.run_dir}" in said
    assert f"localhost:rank 0: {run.run_dir}/checkpoints/step-" in ended.message
    assert "No space left on device" in ended.message
    assert "free space, or set checkpoint.keep_latest_k; earlier checkpoints are as they were" in ended.message
    assert "Exception in thread" not in said
    assert "CapacityError: " in json.loads((run.run_dir / "logs" / "error-00000.json").read_text())["traceback"]

    assert run.names == {LATEST, *(path.name for path in whole)}
    assert not [verdict for path in whole for verdict in verify(path) if verdict.problem]
    assert run.workshop.left_behind() == []

    others.unlink()
    again = run.workshop.launch(f"train.max_steps={first + 1}")
    assert again.code == 0, again.err
    assert again.summary["resumed_from_step"] == step_of(whole[0])
    assert [line["step"] for line in again.metrics] == list(range(first + 2))
