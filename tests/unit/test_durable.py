"""A name is given to what is on the drive, and whatever ends a writer leaves what was there."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from programs import command
from small_drives import fill
from zinf_cli import durable
from zinf_cli.durable import publish, reserve, reserve_behind, write_durably, write_reserved

ROOT = Path(durable.__file__).parent


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and what is renamed, in order."""
    made: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(descriptor: int) -> None:
        made.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def seen_rename(source: Any, target: Any, **options: Any) -> None:
        made.append(("rename", Path(target).name))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    return made


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    write_durably(tmp_path / "plan.json", "{}")
    assert calls == [("fsync", f"plan.json.{os.getpid()}.partial"), ("rename", "plan.json"), ("fsync", tmp_path.name)]
    assert (tmp_path / "plan.json").read_text() == "{}"


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    made = tmp_path / "out.partial"
    (made / "deep").mkdir(parents=True)
    (made / "a").write_text("a")
    (made / "deep" / "b").write_text("b")
    publish(made, tmp_path / "out")
    before = calls[: calls.index(("rename", "out"))]
    assert {name for _, name in before} == {"a", "b", "deep", "out.partial"}
    assert calls[-1] == ("fsync", tmp_path.name)


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_a_failure_leaves_what_was_there(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_durably(path, "old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if call == "write":  # a limit on the size of files is as real as a full drive
        words = ["bash", "-c", "ulimit -f 1; trap '' XFSZ; \"$@\"", "bash", *command("writes_durably", path)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert "File too large" in done.stderr
    else:
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError, match="Input/output"):
            write_durably(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_reserved_is_written_though_the_drive_is_full(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", tmp_path], check=True)
    try:
        reserved = [reserve(tmp_path, 8192) for _ in range(2)]
        subprocess.run(["dd", "if=/dev/zero", f"of={tmp_path}/filler", "bs=4k"], capture_output=True, check=False)
        with pytest.raises(OSError, match="No space left"):
            write_durably(tmp_path / "record", "content")
        first, second = reserved
        assert first is not None
        assert second is not None
        write_reserved(first, tmp_path / "record", b"content")
        assert (tmp_path / "record").read_bytes() == b"content"
        with pytest.raises(FileExistsError):
            write_reserved(second, tmp_path / "record", b"other")
        for descriptor in (first, second):
            os.close(descriptor)
        assert {path.name for path in tmp_path.iterdir()} == {"filler", "record"}
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_is_appended_has_its_room_though_the_drive_is_full(small_drive: Path) -> None:
    log = os.open(small_drive / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, b"began\n")
    reserve_behind(log, 16384)
    assert os.fstat(log).st_size == 6
    fill(small_drive)
    assert os.write(log, b"x" * 16000) == 16000
    os.fsync(log)
    os.close(log)
    assert (small_drive / "log").read_bytes() == b"began\n" + b"x" * 16000
    with pytest.raises(OSError, match="No space left"):
        (small_drive / "other").write_bytes(b"x")


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders(answer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync: Callable[[int], None] = os.fsync

    def no_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path:
            raise OSError(answer, os.strerror(answer))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    write_durably(tmp_path / "f", b"content")
    assert (tmp_path / "f").read_bytes() == b"content"


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_durably(tmp_path / "link", "text", mode=0o600)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    write_durably(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


def test_nothing_else_renames_what_it_wrote() -> None:
    """A name that is given elsewhere is given to a folder or a link that was there before, or by the kernel."""
    allowed = {
        "checkpoint/folder.py",  # a link, and checkpoints that are whole
        "run_folder/names.py",  # what an earlier run left goes to earlier/N
        "launch/sync.py",  # on another host
    }
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if re.search(r"\.rename\(|os\.replace\(|\.replace\((?:path|entry|out)\)", path.read_text())
    }
    assert found - {"durable.py"} <= allowed
