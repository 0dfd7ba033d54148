"""A drive that fails once; a sample, `make test-storage` goes through all of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fault_lab import Fault, FaultyFolder
from storage import Lab
from zinf_cli.checkpoint.folder import checkpoints_of, set_aside_in
from zinf_cli.errors import UnreadableError

SAMPLE = {
    "train": ["write-30-EIO", "write-50-short", "fsync-16-EIO", "fallocate-2-ENOSPC", "open-16-ENOSPC"],
    "resume": ["read-9-EIO", "read-25-short", "write-40-ENOSPC", "fsync-9-ENOSPC", "link-1-EIO"],
    "export": ["read-3-EIO", "read-5-short", "write-4-ENOSPC", "write-3-short", "fsync-3-EIO", "open-9-EIO"],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.sampled
@pytest.mark.parametrize(("scenario", "fault"), [(name, fault) for name, faults in SAMPLE.items() for fault in faults])
def test_a_fault_is_named_or_makes_no_difference(scenario: str, fault: str, lab: Lab) -> None:
    kind, nth, how = fault.split("-")
    assert lab.survives(scenario, Fault(kind, int(nth), how))


def refuse(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of files whose path has `part` in it fail from now on."""
    preadv = os.preadv

    def refused(descriptor: int, *arguments: Any) -> int:
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", refused)


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_a_checkpoint_that_the_drive_does_not_give_stays(file: str, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refuse(f"step-00000003/{file}", patch)
        said = lab.goes_on()
    assert (
        f"not resumed from step-00000003: {lab.run_dir}/checkpoints/step-00000003/{file}: can't be read: Input" in said
    )
    assert {path.name for path in checkpoints_of(lab.run_dir)} == {"step-00000003", "step-00000004"}
    assert set_aside_in(lab.run_dir) == []


def test_where_none_can_be_read_nothing_is_moved(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refuse("/rank-00000", patch)
        with pytest.raises(UnreadableError, match="none of the run's checkpoints can be read"):
            lab.goes_on()
    assert {path.name for path in checkpoints_of(lab.run_dir)} == {"step-00000002", "step-00000003"}
    assert set_aside_in(lab.run_dir) == []


def test_the_lab_fails_what_it_is_told_to(tmp_path: Path) -> None:
    (inside := tmp_path / "in").mkdir()
    with FaultyFolder(inside, Fault("write", 2, "ENOSPC"))() as drive:
        (tmp_path / "other").write_bytes(b"1")
        (inside / "first").write_bytes(b"12")
        with pytest.raises(OSError, match="No space left") as caught:
            (inside / "second").write_bytes(b"12")
        assert caught.value.errno == errno.ENOSPC
        (inside / "third").write_bytes(b"12")
    assert drive.met == str(inside / "second")
    assert drive.counts["write"] == 3
    assert [(inside / name).read_bytes() for name in ("first", "second", "third")] == [b"12", b"", b"12"]
    descriptor = os.open(inside / "first", os.O_RDWR)
    with FaultyFolder(inside, Fault("write", 1, "short"))():
        assert [os.pwrite(descriptor, b"34", 0), os.pwrite(descriptor, b"5", 1)] == [1, 1]
    with FaultyFolder(inside, Fault("read", 1, "short"))():
        assert [os.pread(descriptor, 2, 0), os.pread(descriptor, 2, 0)] == [b"3", b"35"]
        assert (inside / "first").read_bytes() == b"35"
    os.close(descriptor)
    with FaultyFolder(inside, Fault("rename", 1, "EIO"))(), pytest.raises(OSError, match="Input/output error"):
        (inside / "first").rename(inside / "fourth")
