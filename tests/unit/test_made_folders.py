"""Folders that a run made go with it, however it ends; those of others stay."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from programs import command
from zinf_cli.errors import PreflightError
from zinf_cli.machine.hardware import drive_space
from zinf_cli.run_folder.folder import _remove_marks
from zinf_cli.run_folder.leftovers import leftovers_of, remove
from zinf_cli.run_folder.made_folders import MadeFolders, abandoned_in
from zinf_cli.run_folder.mirror import RunFolder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder, as far as zinf clean tells one."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    for name in ("recipe.yaml", "plan.json"):
        (folder / name).touch()
    return folder


def killed(run_dir: Path, *nvme: Path) -> None:
    """A supervisor that has made these folders and is killed."""
    words = command("killed_supervisor", run_dir, *nvme)
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    (run_dir / ".this").unlink()


def test_what_was_made_goes_with_its_parents_and_what_was_there_stays(run_dir: Path, tmp_path: Path) -> None:
    own, shared = tmp_path / "own", tmp_path / "drive"
    own.mkdir()
    (shared / "me").mkdir(parents=True)
    (run_dir / ".this").touch()
    folder = RunFolder(str(run_dir), [str(own), str(shared / "me" / "a" / "b"), str(tmp_path / "new")], "this")
    folder.open({})
    (tmp_path / "new" / "somebody's").touch()
    folder.remove()
    assert own.is_dir()
    assert [path.name for path in shared.rglob("*")] == ["me"]
    assert (tmp_path / "new").is_dir()  # it is not empty
    assert not list(run_dir.glob(".made-*"))


def test_the_next_run_removes_what_a_killed_one_made(run_dir: Path, tmp_path: Path) -> None:
    killed(run_dir, tmp_path / "drive" / "a")
    assert (tmp_path / "drive" / "a").is_dir()
    (run_dir / ".next").touch()
    folder = RunFolder(str(run_dir), [str(tmp_path / "drive" / "a"), str(tmp_path / "drive" / "b")], "next")
    folder.open({})
    assert not abandoned_in(run_dir)
    folder.remove()
    assert not (tmp_path / "drive").exists()


def test_clean_removes_what_a_killed_run_made(run_dir: Path, tmp_path: Path) -> None:
    killed(run_dir, tmp_path / "drive" / "a")
    (run_dir / f".{'0123456789abcdef' * 2}").touch()
    (run_dir / ".bashrc").touch()
    found = leftovers_of(run_dir)
    assert str(tmp_path / "drive" / "a") in "".join(leftover.what for leftover in found)
    for leftover in found:
        assert not leftover.keep
        remove(leftover)
    assert not (tmp_path / "drive").exists()
    assert sorted(path.name for path in run_dir.iterdir()) == [".bashrc", "logs", "plan.json", "recipe.yaml"]
    assert not leftovers_of(run_dir)


def test_a_living_run_keeps_its_folders(run_dir: Path, tmp_path: Path) -> None:
    made = MadeFolders(run_dir)
    made.make(tmp_path / "drive" / "a")
    assert not abandoned_in(run_dir)
    (record,) = run_dir.glob(".made-*")
    made.remove()
    record.write_bytes(b"")  # as a power cut leaves it
    assert abandoned_in(run_dir) == [(record, [])]


def test_a_folder_that_cant_be_made_leaves_none(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (run_dir / ".this").touch()
    folder = RunFolder(str(run_dir), [str(tmp_path / "drive" / "a"), str(tmp_path / "file" / "b")], "this")
    with pytest.raises(OSError, match="Not a directory"):
        folder.open({})
    assert not (tmp_path / "drive").exists()
    assert not list(run_dir.glob(".made-*"))


def test_marks_of_killed_launches_go_and_other_names_stay(run_dir: Path) -> None:
    for name in (f".{'a' * 32}", f".{'b' * 31}", f"{'c' * 32}"):
        (run_dir / name).touch()
    (run_dir / f".{'d' * 32}").write_text("a user's")
    _remove_marks(run_dir)
    left = {path.name[:2] for path in run_dir.iterdir()}
    assert left == {".b", "cc", ".d", "re", "pl"}


def test_a_link_that_leads_nowhere_is_no_drive(tmp_path: Path) -> None:
    (tmp_path / "drive").symlink_to("/nonexistent/drive")
    with pytest.raises(PreflightError, match=r"drive is a link to /nonexistent/drive, which is not there \(mount"):
        drive_space(tmp_path / "drive" / "zinf")
