"""What the launcher does with its own drive while hosts run."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zinf_cli.errors import PreflightError
from zinf_cli.launch.connection import Lifelines
from zinf_cli.launch.mirrored_files import MirroredFiles
from zinf_cli.launch.pipes import Pipes
from zinf_cli.launch.program import Agent, Program
from zinf_cli.launch.runner import World, run_ranks


def program(run_dir: Path) -> Program:
    return Program(Agent("nothing"), "life", [], run_dir, {}, [], False, {})


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with Lifelines(Pipes()) as lifelines, pytest.raises(PreflightError, match="logs: can't be written: File exists"):
        run_ranks(program(tmp_path), World(lifelines, []), on_poll=lambda: None, notify=print)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As on a drive that is full: the kernel takes no byte beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_a_full_drive_does_not_take_of_a_hosts_files_is_written_later(tmp_path: Path) -> None:
    files = MirroredFiles(tmp_path, most_late=1 << 20)

    def host_says(offset: int, text: str) -> None:
        files.write("logs/rank-00000.log", offset, text.encode())

    with no_file_beyond(6):
        host_says(0, "abcd")
        host_says(4, "efgh")
        host_says(8, "ijkl")
    assert (tmp_path / "logs" / "rank-00000.log").read_text() == "abcdef"
    host_says(12, "mnop")
    assert (tmp_path / "logs" / "rank-00000.log").read_text() == "abcdefghijklmnop"


def test_no_host_writes_outside_of_the_runs_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    files = MirroredFiles(run_dir, most_late=1 << 20)
    for name in ("../outside", str(tmp_path / "outside")):
        files.write(name, 0, b"a")
    assert list(tmp_path.iterdir()) == [run_dir]
