"""Whether a folder can hold state and how: real file systems, on loop devices where they can be had."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from plain import open_engine
from tiny_models import random_source
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import PreflightError
from zinf_cli.launch.facts import facts
from zinf_cli.launch.preflight import Row, _judge_drive, drives_of
from zinf_cli.launch.runner import _marked
from zinf_cli.machine import drive_files
from zinf_cli.machine.drive_files import file_system_of, open_nameless, set_direct
from zinf_cli.machine.hardware import Space, drive_space, room_of, share_in_memory
from zinf_cli.machine.profile_file import Best, Measured, Nvme
from zinf_cli.recipe.hosts import Host
from zinf_cli.run_folder.folder import locked
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position

MIB = 2**20
Mount = Callable[..., Path]


def run(*command: object) -> str:
    """Its output; the test is skipped where the command fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """mount("mkfs.xfs -q", options, sector bytes): a new file system at a folder whose name has a space."""
    mounted: list[Path] = []
    loops: list[str] = []

    def mounting(make: str, options: str = "defaults", sector: int = 512, num_mib: int = 320) -> Path:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        folder = tmp_path / f"a drive {len(mounted)}"
        folder.mkdir()
        if make == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", options, "none", folder)
        else:
            if shutil.which(make.split()[0]) is None:
                pytest.skip(f"no {make.split()[0]} here")
            image = tmp_path / f"image {len(mounted)}"
            with image.open("wb") as file:
                file.truncate(num_mib * MIB)
            loops.append(run("losetup", "-f", "--show", "--sector-size", sector, image))
            run(*make.split(), loops[-1])
            run("mount", "-o", options, loops[-1], folder)
        mounted.append(folder)
        return folder

    try:
        yield mounting
    finally:
        for folder in reversed(mounted):
            subprocess.run(["umount", folder], check=True)
        for loop in loops:
            subprocess.run(["losetup", "-d", loop], check=True)


def rewrite(folder: Path, num_bytes: int, times: int) -> None:
    """Allocate a file, and write all of it again and again, past the page cache where that is promised."""
    file = open_nameless(folder)
    try:
        os.posix_fallocate(file.descriptor, 0, num_bytes)
        block = memoryview(bytes(MIB)) if not file.direct else _aligned(MIB)
        for position in [*range(0, num_bytes - MIB + 1, MIB)] * times:
            assert os.pwrite(file.descriptor, block, position) == MIB
        os.fsync(file.descriptor)
    finally:
        os.close(file.descriptor)


def _aligned(num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, num_bytes))


@pytest.mark.parametrize(
    ("make", "options", "sector", "direct"),
    [
        ("mkfs.ext4 -qF", "defaults", 512, True),
        ("mkfs.ext4 -qF", "defaults", 4096, True),
        ("mkfs.ext4 -qF", "data=journal", 512, False),
        ("mkfs.xfs -qf", "defaults", 512, True),
        ("mkfs.xfs -qf -s size=16384 -b size=16384", "defaults", 16384, False),
        ("mkfs.btrfs -qf", "defaults", 512, True),
        ("mkfs.btrfs -qf", "compress-force=zstd", 512, True),
        ("tmpfs", "size=16M", 512, False),
    ],
)
def test_direct_is_what_gets_past_the_page_cache(
    make: str, options: str, sector: int, direct: bool, mount: Mount
) -> None:
    folder = mount(make, options, sector)
    file = open_nameless(folder)
    try:
        assert (file.direct, file.in_memory, file.in_place) == (direct, make == "tmpfs", True)
        assert bool(fcntl.fcntl(file.descriptor, fcntl.F_GETFL) & os.O_DIRECT) == direct
    finally:
        os.close(file.descriptor)
    assert list(folder.glob("[!l]*")) == []  # but for lost+found
    rewrite(folder, 8 * MIB, 2)
    space = drive_space(folder / "not" / "made")
    assert (space.direct, space.in_memory) == (direct, make == "tmpfs")
    assert not (folder / "not").exists()
    (drive,) = drives_of(facts([], [str(folder / "not" / "made")]))
    assert replace(drive, free_bytes=space.free_bytes) == space


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        ("mkfs.ext4 -qF", "defaults", []),
        ("mkfs.ext4 -qF", "data=journal", ["no O_DIRECT here, using buffered I/O"]),
        ("mkfs.btrfs -qf", "defaults", ["no O_DIRECT here, using buffered I/O"]),  # whose checksums are worth it
        ("tmpfs", "size=16M", ["this is memory (tmpfs), not a drive"]),
    ],
)
def test_checkpoints_that_are_buffered_are_said_once(make: str, options: str, said: list[str], mount: Mount) -> None:
    run_dir = mount(make, options)
    notes: list[str] = []
    engine = open_engine(random_source("llama"), EngineOptions())
    writer = CheckpointWriter(run_dir, engine, Ranks(), lambda: iter([]), None, notes.append)
    for step in (1, 2):
        writer.write(Position(step, "fp32", 3 * step, "text", None, {}))
    writer.close()
    engine.close()
    assert [note.partition(" (the")[0].partition(": what")[0] for note in notes] == [
        f"{run_dir}/checkpoints: {line}" for line in said
    ]


def test_what_fits_on_btrfs_can_be_written_again_and_again(mount: Mount) -> None:
    folder = mount("mkfs.btrfs -qf")
    num_bytes = room_of([drive_space(folder)]) // MIB * MIB
    assert num_bytes > 128 * MIB
    rewrite(folder, num_bytes, 2)


def test_without_writing_in_place_half_of_what_is_free_is_planned(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mount("mkfs.btrfs -qf")
    free = drive_space(folder).free_bytes
    monkeypatch.setattr(drive_files, "_write_in_place", lambda descriptor: False)
    space = drive_space(folder)
    assert not space.direct  # what is checksummed goes through the page cache
    assert 0.45 * free < space.free_bytes < 0.55 * free


@pytest.mark.parametrize("make", ["mkfs.ext4 -qF", "mkfs.xfs -qf", "mkfs.btrfs -qf"])
def test_what_is_free_can_be_allocated(make: str, mount: Mount) -> None:
    folder = mount(make)
    rewrite(folder, room_of([drive_space(folder)]), 0)


def test_subvolumes_and_bind_mounts_are_one_space(mount: Mount) -> None:
    folder = mount("mkfs.btrfs -qf")
    other = mount("mkfs.btrfs -qf", num_mib=400)
    run("btrfs", "-q", "subvolume", "create", folder / "one")
    run("btrfs", "-q", "subvolume", "create", folder / "two")
    whole, one, two, apart = (drive_space(path) for path in (folder, folder / "one", folder / "two", other))
    assert (folder / "one").stat().st_dev != (folder / "two").stat().st_dev
    assert whole.device == one.device == two.device != apart.device
    assert room_of([one, two]) <= room_of([whole]) <= whole.free_bytes
    assert room_of([one, apart]) <= 2 * one.free_bytes
    best = Best(bytes_per_s=1e9, block_size=MIB, threads=4)
    nvme = Nvme(folders=(folder / "one",), space=MIB, read=best, write=best, both=1e9)
    assert Measured(nvme=nvme).covers([folder / "two" / "not made"])
    assert not Measured(nvme=nvme).covers([other])


def space(device: str, free_bytes: int, *, in_memory: bool = False) -> Space:
    return Space("/x", device, free_bytes, True, in_memory)


def test_a_stripe_set_holds_as_often_the_least_as_it_has_folders() -> None:
    assert room_of([]) == 0
    assert room_of([space("a", 1000)]) == 990
    assert room_of([space("a", 1000), space("b", 100)]) == 198
    assert room_of([space("a", 1000), space("a", 1000)]) == 990
    assert room_of([space("a", 300), space("a", 300), space("b", 1000)]) == 3 * 150 * 99 // 100
    assert share_in_memory([space("a", 1), space("b", 1, in_memory=True)]) == 0.5


def test_a_mount_that_turned_read_only_is_found_by_writing(mount: Mount) -> None:
    """After an error ext4 refuses writes, and mounts and statvfs still say that it takes them."""
    folder = mount("mkfs.ext4 -qF", "errors=continue")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(handle, 0x8004587D, (2).to_bytes(4, "little"))
    finally:
        os.close(handle)
    assert not os.statvfs(folder).f_flag & os.ST_RDONLY
    with pytest.raises(PreflightError, match=r"a drive 0/x: can't create a file: .*choose another offload\.nvme_path"):
        drive_space(folder / "x")
    row = Row(Host("node1", (0,)))
    _judge_drive(row, facts([], [str(folder / "x")])["drives"][str(folder / "x")])
    assert row.problems["nvme"].startswith(f"{folder}/x: can't create a file: ")
    assert row.problems["nvme"].endswith(" (choose another offload.nvme_path)")


def test_an_output_dir_that_is_or_turns_read_only_is_said(mount: Mount) -> None:
    folder = mount("mkfs.ext4 -qF")

    def fail() -> None:
        run("mount", "-o", "remount,ro", folder)
        raise ZeroDivisionError  # the first error, which no cleaning up hides

    with pytest.raises(ZeroDivisionError), locked(folder), _marked(folder / "mark"):
        fail()
    with (
        pytest.raises(
            PreflightError, match=r"can't create a file: Read-only file system \(choose another output_dir\)"
        ),
        locked(folder),
    ):
        pass


def test_without_nameless_files_a_name_is_taken_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FUSE, for all who ask."""
    opening = os.open

    def refusing(path: object, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opening(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    assert facts([], [str(tmp_path)])["drives"][str(tmp_path)]["problem"] is None
    os.close(open_nameless(tmp_path / "made").descriptor)
    assert [path.name for path in tmp_path.rglob("*")] == ["made"]


def test_what_a_file_holds_is_left_as_it_is(tmp_path: Path) -> None:
    """A checkpoint's header stands in its file before it is switched."""
    content = bytes(range(256)) * 32 + b"and more"
    path = tmp_path / "file"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDWR)
    try:
        set_direct(descriptor)
        assert file_system_of(descriptor) == str(path.stat().st_dev) or file_system_of(descriptor)
    finally:
        os.close(descriptor)
    assert path.read_bytes() == content
