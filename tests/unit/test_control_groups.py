"""Cores and memory that control groups allow: trees of files as the kernel shows them, and a real group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zinf_cli.machine.control_groups import cores_here, memory_left, oom_kills

MANY = set(range(64))
CACHED = "inactive_file 30\nactive_file 20\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def on_64_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: MANY)


@pytest.mark.usefixtures("on_64_cores")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/job/step\n"}, 64),
        ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/cpu.max": "max 100000\n"}, 64),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/job/cpu.max": "250000 100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/as/the/host/names/it\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n0::/\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "1600000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
    ],
)
def test_cores_are_those_of_the_tightest_group(files: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert cores_here(tree(tmp_path, files)) == cores


def test_memory_is_that_of_each_group_without_its_cached_files(tmp_path: Path) -> None:
    above = {"memory.max": "1000\n", "memory.current": "300\n", "memory.stat": CACHED}
    own = {"memory.max": "max\n", "memory.current": "200\n", "memory.stat": CACHED}
    files = {f"sys/fs/cgroup/job/{name}": text for name, text in above.items()}
    files |= {f"sys/fs/cgroup/job/step/{name}": text for name, text in own.items()}
    files |= {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/memory.events": "oom 3\noom_kill 2\n"}
    assert memory_left(tree(tmp_path, files)) == [750]
    assert oom_kills(tmp_path) == 2
    assert memory_left(tmp_path / "nothing") == []
    assert oom_kills(tmp_path / "nothing") is None


@pytest.fixture
def one_core() -> Iterator[Path]:
    """A real control group (v1) with the time of one core."""
    group = Path(f"/sys/fs/cgroup/cpu/zinf-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError:
        pytest.skip("no control group for cpu (v1) can be made here")
    yield group
    group.rmdir()


def test_a_process_in_a_group_has_its_cores(one_core: Path) -> None:
    asked = "from zinf_cli.machine.control_groups import cores_here; print(cores_here())"
    words = ["sh", "-c", f'echo $$ > {one_core}/cgroup.procs && exec "$0" -c "$1"', sys.executable, asked]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
