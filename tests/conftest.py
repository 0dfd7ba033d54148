"""The machine that tests see: no file of the user's, and, where ZINF_TEST_SPEED says so, other speeds than it has."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from forked_ranks import ForkedRanks
from small_drives import mounted_small_drive

SPEED = float(os.environ.get("ZINF_TEST_SPEED", "1"))
"""How many times as fast as this one a machine seems whose speeds are measured. No outcome may follow from it."""


gc.disable()


def pytest_collection_finish() -> None:
    """What tests import stays. The garbage collector need not look through half a million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def no_files_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What zinf keeps in the user's folders and finds there again: caches, and what `zinf bench` measured."""
    config = tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(config))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield config


@pytest.fixture(autouse=True, scope="session")
def speeds(no_files_of_the_users: Path) -> Iterator[None]:
    """The speed that a plan follows is stated: to measure it takes half a second, and launches do so.

    As on another machine, everything that measures a speed does so by the clock of bench/, and launches of their own
    read a hardware.yaml.
    """
    from zinf_cli.bench import links, nvme
    from zinf_cli.machine.profile_file import Links, save_measured
    from zinf_cli.train import figures

    flops = 2e10 * SPEED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_flops", lambda *_: flops)
        if SPEED != 1:
            clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() / SPEED, sleep=time.sleep)
            rates = {"fp32": {16: flops}}
            found = Links(accelerators=0, cpu_memory=16 << 30, matmul=rates, block=rates, adamw=4e8 * SPEED)
            save_measured(no_files_of_the_users / "zinf" / "hardware.yaml", "links", found, "another machine")
            patch.setattr(links, "time", clock)
            patch.setattr(nvme, "time", clock)
        yield


@pytest.fixture(scope="session")
def forked(speeds: None) -> Iterator[ForkedRanks]:
    with ForkedRanks() as ranks:
        yield ranks


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of 64 MiB, in the folder `drive` of the test's own."""
    with mounted_small_drive(tmp_path) as drive:
        yield drive
