"""What building and loading a model frees leaves no holes in the heap."""

from __future__ import annotations

import subprocess

from programs import command, environment


def test_large_blocks_lie_apart_while_a_model_is_loaded() -> None:
    fixed = {**environment(), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    said = subprocess.run(command("heap_of_blocks"), env=fixed, capture_output=True, text=True, check=True).stdout
    meanwhile, afterwards = map(int, said.split())
    assert meanwhile < 1 << 20
    assert afterwards >= 64 * (4 << 20)
