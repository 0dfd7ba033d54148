"""What is freed goes back to the kernel, or leaves no holes in the heap."""

from __future__ import annotations

import subprocess
import time

import torch

from programs import command, environment
from zinf_cli.commands.launch import MALLOC
from zinf_cli.train.process_memory import process_memory, returning_free_memory


def test_large_blocks_lie_apart_while_a_model_is_loaded() -> None:
    fixed = {**environment(), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    said = subprocess.run(command("heap_of_blocks"), env=fixed, capture_output=True, text=True, check=True).stdout
    meanwhile, afterwards = map(int, said.split())
    assert meanwhile < 1 << 20
    assert afterwards >= 64 * (4 << 20)


def test_aligned_blocks_that_come_and_go_take_each_others_places() -> None:
    ranks = {**environment(), **MALLOC}
    said = subprocess.run(command("heap_of_aligned_blocks"), env=ranks, capture_output=True, text=True, check=True)
    assert int(said.stdout) < 96 << 20  # without MALLOC's tunables glibc 2.36 takes 370 MB


def test_threads_that_compute_have_heaps_and_all_others_share_them() -> None:
    plain = {name: value for name, value in environment().items() if name != "MALLOC_ARENA_MAX"}
    said = subprocess.run(command("heaps_of_threads"), env=plain, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["2", "2"]


def test_free_memory_goes_back_while_a_process_takes_more_than_it_should() -> None:
    before = process_memory()["VmRSS"]
    with returning_free_memory(above=before + (32 << 20)):
        blocks = [(torch.ones(25_000), torch.ones(8)) for _ in range(1_000)]  # below the least that malloc maps
        assert process_memory()["VmRSS"] > before + (64 << 20)
        between = [small for _, small in blocks]
        del blocks
        deadline = time.monotonic() + 10
        while process_memory()["VmRSS"] > before + (32 << 20) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process_memory()["VmRSS"] <= before + (32 << 20)
    assert len(between) == 1_000
