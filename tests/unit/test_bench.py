"""zinf bench nvme on a real drive, small: what it finds, what it leaves (nothing), what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from zinf_cli.bench import links
from zinf_cli.bench.nvme import steps_of
from zinf_cli.commands.bench import NvmeRequest, run_bench_nvme
from zinf_cli.errors import CapacityError, PreflightError, UsageError, ZinfError
from zinf_cli.machine.profile_file import load_measured

MIB = 2**20


def request(*paths: Path, out: Path, size: str = "16MiB") -> NvmeRequest:
    return NvmeRequest(paths, size, "1MiB,2MiB", "1,3", out, as_json=True)


def test_a_bench_finds_rates_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    run_bench_nvme(request(*folders, out=tmp_path / "hardware.yaml"), Console(stderr=True))
    found = json.loads(capsys.readouterr().out)
    assert len(found["sweep"]) == 2 * 2 * 2
    for direction in ("read", "write"):
        best = found[direction]
        assert set(best) == {"bytes_per_s", "block_size", "threads"}
        assert best["bytes_per_s"] > 1e6
        assert (best["block_size"], best["threads"]) in {(size * MIB, count) for size in (1, 2) for count in (1, 3)}
    assert set(found["beside"]) == {"drives", "compute"}
    assert all(0 < share <= 1 for share in found["beside"].values())
    measured = load_measured(tmp_path / "hardware.yaml")
    assert measured.nvme is not None
    assert measured.nvme.folders == tuple(folders)
    assert measured.nvme.beside.compute == pytest.approx(found["beside"]["compute"])
    assert measured.nvme.read.bytes_per_s == pytest.approx(found["read"]["bytes_per_s"])
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_fast_first_call_promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the mean may be 200 times the first call: what is timed for 0.3 s is not timed for 60."""
    calls = count(1)
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 1e-4 if next(calls) == 1 else 0.02

    monkeypatch.setattr(links, "time", SimpleNamespace(perf_counter=lambda: now))
    assert links._seconds(work, torch.device("cpu")) == pytest.approx(0.02)
    assert now < 3 * links.SECONDS


@pytest.mark.parametrize("first", [0.01, 5.0])
def test_a_first_call_is_not_the_rate(first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator loads its kernels then: with a minute of that, a plan would be off by far."""
    calls = count(1)
    now = 0.0

    def work() -> None:
        nonlocal now
        now += first if next(calls) == 1 else 0.004

    monkeypatch.setattr(links, "time", SimpleNamespace(perf_counter=lambda: now))
    assert links._seconds(work, torch.device("cpu")) == pytest.approx(0.004)


def test_progress_is_told_to_the_last_byte(tmp_path: Path) -> None:
    from zinf_cli.bench.nvme import bench_nvme

    told: list[int] = []
    bench_nvme([tmp_path], 8 * MIB, [MIB], [2], lambda doing, moved: told.append(moved))
    assert sum(told) == steps_of(8 * MIB, [MIB], [2])


def test_ctrl_c_in_the_middle_leaves_nothing_on_the_drive(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zinf_cli.cli", "bench", "nvme", str(tmp_path), "--size", "512MiB"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "h.yaml")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as bench:
        while not _open_files(bench.pid, tmp_path):
            assert bench.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        bench.send_signal(signal.SIGINT)
        assert bench.wait(20) == 130
    assert list(tmp_path.iterdir()) == []


def _open_files(pid: int, folder: Path) -> list[str]:
    """Files of `folder` that a process has open, nameless ones included."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(entry))  # noqa: PTH115
        except OSError:
            continue
    return [link for link in links if link.startswith(str(folder))]


@pytest.mark.parametrize(
    ("path", "error", "code", "message"),
    [
        ("/etc/passwd", UsageError, 2, "not a directory"),
        ("/no/such/place", UsageError, 2, "no such directory"),
        ("/dev/shm", PreflightError, 3, "this is memory"),
        ("/proc", PreflightError, 3, "can't create files here"),
    ],
)
def test_what_is_no_drive_is_refused(
    path: str, error: type[ZinfError], code: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        run_bench_nvme(request(Path(path), out=tmp_path / "h.yaml"), Console(stderr=True))
    assert caught.value.exit_code == code
    assert path in str(caught.value)


def test_a_file_that_does_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="do not fit") as caught:
        run_bench_nvme(request(tmp_path, out=tmp_path / "h.yaml", size="1PiB"), Console(stderr=True))
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "plenty"}, "--size: expected a size"),
        ({"size": "4095B"}, "--size: expected a multiple of 4096"),
        ({"size": "1MiB"}, "too little for blocks"),
        ({"threads": "0"}, "--threads: expected numbers from 1"),
        ({"block_sizes": "1MiB,x"}, "--block-sizes: expected a size"),
    ],
)
def test_flags_that_make_no_sense_are_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    asked = NvmeRequest(**{"paths": (tmp_path,), "out": tmp_path / "h.yaml", **changes})  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        run_bench_nvme(asked, Console(stderr=True))
    assert message in str(caught.value)
