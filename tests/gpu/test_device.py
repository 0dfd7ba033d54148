"""The engine on an accelerator: the same bits from every tier, within its memory. Without one, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plain import engine_losses, everything_on, open_engine, plain_losses, relative_difference
from tiny_models import random_source

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def losses(name: str, tier: str, folder: Path, dtype: torch.dtype, **changes: Any) -> list[list[float]]:
    options = replace(everything_on(tier, folder), device=DEVICE)
    return engine_losses(open_engine(random_source(name, **changes), options, dtype=dtype), STEPS, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_every_tier_gives_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    on_device = losses(name, "device", tmp_path, dtype)
    assert losses(name, "cpu", tmp_path, dtype) == on_device
    assert losses(name, "nvme", tmp_path, dtype) == on_device
    assert all(torch.tensor(step).isfinite().all() for step in on_device)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fp32_is_plain_pytorch_on_the_device(name: str, tmp_path: Path) -> None:
    expected = plain_losses(random_source(name), STEPS, device=DEVICE)
    assert relative_difference(losses(name, "nvme", tmp_path, torch.float32), expected) < 1e-5


def test_dropout_is_the_same_in_the_recompute(tmp_path: Path) -> None:
    on_device = losses("llama", "device", tmp_path, torch.float32, attention_dropout=0.2)
    assert losses("llama", "nvme", tmp_path, torch.float32, attention_dropout=0.2) == on_device
    assert on_device != losses("llama", "device", tmp_path, torch.float32)


def test_copies_and_compute_do_not_race(tmp_path: Path) -> None:
    """Many short steps with little room: buffers are reused at once, on several streams."""
    reference = losses("llama", "device", tmp_path, torch.bfloat16)
    for _ in range(8):
        for tier in ("cpu", "nvme"):
            assert losses("llama", tier, tmp_path, torch.bfloat16) == reference


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_device_memory_follows_the_unit(tmp_path: Path) -> None:
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    peaks = []
    for layers in (4, 16):
        torch.cuda.reset_peak_memory_stats()
        losses("llama", "nvme", tmp_path, torch.bfloat16, num_hidden_layers=layers, **size)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.1 * peaks[0]
