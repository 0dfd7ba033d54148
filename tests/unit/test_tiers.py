"""Arenas, memory and NVMe: real files, real faults."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.errors import CapacityError, PreflightError, TierError
from zinf_cli.machine.drive_files import GROWTH
from zinf_cli.model_state import PAGE
from zinf_cli.tiers.arena import Arena, Buffer
from zinf_cli.tiers.memory import MemoryTier
from zinf_cli.tiers.nvme import STRIPE, NvmeTier
from zinf_cli.tiers.tier import Extent, Tier
from zinf_cli.trace import Trace

CPU = torch.device("cpu")
MIB = 2**20


def buffer(num_bytes: int, fill: int | None = None) -> torch.Tensor:
    taken = Arena(num_bytes, CPU).allocate(num_bytes)
    assert taken is not None
    return taken.data if fill is None else taken.data.fill_(fill)


@contextmanager
def nvme(*folders: Path, **how: int) -> Iterator[NvmeTier]:
    tier = NvmeTier(folders, Trace(), **how)  # type: ignore[arg-type]
    try:
        yield tier
    finally:
        tier.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9 * PAGE)), max_size=60))
def test_an_arena_never_hands_out_a_byte_twice(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(16 * PAGE, CPU)
    held: list[tuple[Buffer, int]] = []
    for number, (take, num_bytes) in enumerate(steps, 1):
        if take:
            taken = arena.allocate(num_bytes)
            if taken is not None:
                assert taken.data.data_ptr() % PAGE == 0
                assert taken.num_bytes == num_bytes
                taken.data.fill_(number % 251)
                held.append((taken, number % 251))
        elif held:
            held.pop(num_bytes % len(held))[0].free()
        assert all(bool((taken.data == fill).all()) for taken, fill in held)
        assert arena.used == sum(-(-taken.num_bytes // PAGE) * PAGE for taken, _ in held) <= arena.peak
    for taken, _ in held:
        taken.free()
    assert arena.allocate(16 * PAGE) is not None


@pytest.mark.parametrize("half", [False, True], ids=["another buffer", "the other half"])
def test_what_fills_a_buffer_is_no_change_of_another(half: bool) -> None:
    """Autograd refuses a saved tensor if any view of its memory was changed in place."""
    arena = Arena(2 * PAGE, CPU)
    first, second = arena.allocate(PAGE * (1 + half)), arena.allocate(PAGE)
    assert first is not None
    if half:
        first, second = first.split(PAGE)
    assert second is not None
    x = first.data.view(torch.float32).requires_grad_()
    y = (x * x).sum()
    second.data.fill_(1)
    y.backward()


def test_pages_of_an_arena_that_were_never_used_cost_nothing() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    before = resident()
    arena = Arena(1 << 34, CPU)
    taken = arena.allocate(MIB)
    assert taken is not None
    taken.data.fill_(1)
    assert resident() - before < 3 * MIB


@pytest.mark.parametrize("num_bytes", [PAGE, 4 * MIB])
def test_an_arena_stays_out_of_forks(num_bytes: int) -> None:
    """The kernel says so of the mapping: "dc" among its flags is "do not copy on fork"."""
    taken = buffer(num_bytes, 1)
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= taken.data_ptr() < end
        elif inside and first == "VmFlags:":
            flags = line.split()[1:]
    assert "dc" in flags


def round_trip(tier: Tier, num_bytes: int) -> None:
    """Write two extents, read pieces of them back."""
    extents: list[Extent] = [tier.allocate(num_bytes, f"extent {n}") for n in range(2)]
    generator = torch.Generator().manual_seed(0)
    for extent in extents:
        zeros = buffer(num_bytes, 1)
        extent.read(0, zeros).wait()
        assert not zeros.any()
    sent = [torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator) for _ in extents]
    writes = []
    for extent, data in zip(extents, sent, strict=True):
        source = buffer(num_bytes)
        source.copy_(data)
        writes.append((extent.write(0, source), source))
    for extent, data in zip(extents, sent, strict=True):  # behind the writes, without waiting for them
        for offset, length in ((0, num_bytes), (PAGE, PAGE), (num_bytes - 2 * PAGE, 2 * PAGE)):
            into = buffer(length)
            extent.read(offset, into).wait()
            assert torch.equal(into, data[offset : offset + length])
    for write, _ in writes:
        write.wait()
    for extent in extents:
        tier.free(extent)
    assert tier.used == 0


@pytest.mark.parametrize("num_bytes", [3 * PAGE, STRIPE, 3 * STRIPE + 5 * PAGE])
def test_what_is_written_is_read(num_bytes: int, tmp_path: Path) -> None:
    round_trip(MemoryTier("cpu", CPU, CPU, Trace()), num_bytes)
    for count, how in (
        (1, {}),
        (3, {}),
        (1, {"block_bytes": MIB}),
        (3, {"block_bytes": MIB, "readers": 1, "writers": 3}),
    ):
        with nvme(*(tmp_path / str(number) for number in range(count)), **how) as tier:
            round_trip(tier, num_bytes)
            assert tier.read_bytes > tier.write_bytes == 2 * num_bytes


def test_files_have_no_name_and_their_space_comes_back(tmp_path: Path) -> None:
    with nvme(tmp_path) as tier:
        tier.reserve(64 * MIB)
        assert list(tmp_path.iterdir()) == []
        assert os.fstat(tier._files[0]).st_blocks * 512 >= 64 * MIB
        assert os.fstat(tier._files[0]).st_mode & 0o777 == 0o600
        extent = tier.allocate(PAGE, "a")
        start = extent.start
        tier.free(extent)
        assert tier.allocate(PAGE, "b").start == start


@pytest.mark.parametrize("num_bytes", [PAGE, STRIPE, 4 * STRIPE + 3 * PAGE, 6 * STRIPE])
def test_what_is_reserved_is_what_is_asked_for(num_bytes: int, tmp_path: Path) -> None:
    with nvme(*(tmp_path / name for name in "abc")) as tier:
        tier.reserve(num_bytes)
        assert sum(os.fstat(file).st_size for file in tier._files) == num_bytes
        extent = tier.allocate(num_bytes, "all of it")
        extent.write(0, buffer(num_bytes, 7)).wait()
        assert sum(os.fstat(file).st_size for file in tier._files) == num_bytes


def test_what_takes_more_than_was_reserved_gets_the_margin_of_the_plan(tmp_path: Path) -> None:
    with nvme(tmp_path) as tier:
        tier.reserve(3 * PAGE)
        tier.allocate(4 * PAGE, "more")
        assert os.fstat(tier._files[0]).st_size == 3 * PAGE + GROWTH
        tier.allocate(2 * GROWTH, "far more")
        assert os.fstat(tier._files[0]).st_size == 4 * PAGE + 2 * GROWTH


def test_a_quota_is_called_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with nvme(tmp_path) as tier:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(CapacityError, match=r"needs 8\.00 MiB on this drive, more than the quota there allows"):
            tier.reserve(8 * MIB)


def test_the_page_cache_is_not_used(tmp_path: Path) -> None:
    import fcntl

    with nvme(tmp_path) as tier:
        assert fcntl.fcntl(tier._files[0], fcntl.F_GETFL) & os.O_DIRECT


def test_a_full_drive_is_found_at_the_start(small_drive: Path) -> None:
    with nvme(small_drive) as tier:
        tier.reserve(16 * MIB)
        with pytest.raises(CapacityError, match=r"rank 0 needs 200 MiB on this drive, .* MiB are left"):
            tier.reserve(200 * MIB)
    assert os.statvfs(small_drive).f_bavail * os.statvfs(small_drive).f_frsize > 40 * MIB


def test_a_read_only_drive_is_named(small_drive: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_drive)], check=True)
    with pytest.raises(PreflightError, match=r"drive: can't create a file: .*offload\.nvme_path"), nvme(small_drive):
        pass


def test_a_drive_that_fails_is_named_with_rank_path_and_offset(small_drive: Path) -> None:
    """The file system under the file is shut down while it is in use."""
    import fcntl

    with nvme(small_drive) as tier:
        tier.reserve(MIB)
        extent = tier.allocate(8 * PAGE, "model.layers.3 exp_avg")
        extent.write(0, buffer(8 * PAGE, 1)).wait()
        handle = os.open(small_drive, os.O_RDONLY)
        fcntl.ioctl(handle, 0x8004587D, (2).to_bytes(4, "little"))
        os.close(handle)
        with pytest.raises(TierError) as caught:
            extent.write(PAGE, buffer(PAGE, 2)).wait()
    told = caught.value.line()
    assert str(small_drive) in told
    assert f"rank 0: write of {PAGE} bytes at offset {PAGE} failed: {os.strerror(errno.EIO)}" in told
    assert "model.layers.3 exp_avg" in told


def test_a_short_transfer_is_an_error(tmp_path: Path) -> None:
    with nvme(tmp_path) as tier:
        extent = tier.allocate(4 * PAGE, "weights")
        os.ftruncate(tier._files[0], PAGE)
        with pytest.raises(TierError, match="short transfer: 4096 of 16384 bytes"):
            extent.read(0, buffer(4 * PAGE)).wait()


def test_a_transfer_past_the_extent_is_refused(tmp_path: Path) -> None:
    with nvme(tmp_path) as tier, pytest.raises(ValueError, match="past its"):
        tier.allocate(PAGE, "a").read(PAGE, buffer(PAGE))


def test_tmpfs_is_buffered_and_told() -> None:
    notes: list[str] = []
    folder = Path("/dev/shm") / f"zinf-test-{os.getpid()}"
    tier = NvmeTier([folder], Trace(), notice=notes.append)
    try:
        round_trip(tier, 3 * PAGE)
    finally:
        tier.close()
        folder.rmdir()
    assert len(notes) == 1
    assert "this is memory (tmpfs), not a drive" in notes[0]


def test_a_folder_that_can_not_be_is_named() -> None:
    with pytest.raises(PreflightError, match=r"/proc/zinf: can't create a file"):
        NvmeTier([Path("/proc/zinf")], Trace())
