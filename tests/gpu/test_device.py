"""The engine on an accelerator: the same bits from every tier, within its memory.

Without an accelerator the same tests run on `cpu:0`. That is another device than `cpu`, so CPU memory counts as away:
bytes are copied to the compute device and back, as they are for an accelerator.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plain import engine_losses, every_other_unit_cached, everything_on, open_engine, plain_losses, relative_difference
from tiny_models import random_source
from zinf_cli.train.same_bits import keep_order

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: see `deterministic`
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu:0")
STEPS = 4
ROUNDS = 8 if DEVICE.type == "cuda" else 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# On hardware that a library meets for the first time, a warning of its own is no failure.
pytestmark = pytest.mark.filterwarnings("default", r"error:::zinf_cli\b")


def losses(name: str, tier: str, folder: Path, dtype: torch.dtype, **changes: Any) -> list[list[float]]:
    options = replace(everything_on(tier, folder), device=DEVICE)
    return engine_losses(open_engine(random_source(name, **changes), options, dtype=dtype), STEPS, device=DEVICE)


@contextmanager
def deterministic() -> Iterator[None]:
    """As with train.deterministic: kernels that give the same bits in each call."""
    keep_order()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_every_tier_gives_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    on_device = losses(name, "device", tmp_path, dtype)
    assert losses(name, "cpu", tmp_path, dtype) == on_device
    assert losses(name, "nvme", tmp_path, dtype) == on_device
    assert all(torch.tensor(step).isfinite().all() for step in on_device)


@pytest.mark.parametrize("how", ["deferred", "eager", "speculative"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_units_whose_state_stays_on_the_device_change_no_bit(name: str, how: str, tmp_path: Path) -> None:
    streamed = replace(everything_on("cpu", tmp_path), device=DEVICE, speculate=how == "speculative")
    clip = None if how == "eager" else 1e3 if how == "speculative" else 1.0
    found = []
    for options in (streamed, every_other_unit_cached(replace(streamed, cache_tier="device"))):
        engine = open_engine(random_source(name), options, dtype=torch.bfloat16)
        found.append(engine_losses(engine, STEPS, clip=clip, eager=how == "eager", device=DEVICE))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tier_gives_the_same_bits_at_the_length_of_real_text(dtype: torch.dtype, tmp_path: Path) -> None:
    """Backward of attention over 2048 tokens adds up blocks of them: on CUDA in any order, unless told otherwise."""
    source = random_source("llama", hidden_size=64, max_position_embeddings=2048)

    def found(tier: str) -> list[list[float]]:
        engine = open_engine(source, replace(everything_on(tier, tmp_path), device=DEVICE), dtype=dtype)
        return engine_losses(engine, 2, count=1, tokens=2048, device=DEVICE)

    with deterministic():
        expected = found("device")
        assert [found(tier) for tier in ("device", "cpu", "nvme")] == [expected] * 3


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
    for _ in range(ROUNDS):
        for tier in ("cpu", "nvme"):
            assert losses("llama", tier, tmp_path, torch.bfloat16) == reference


def test_memory_of_the_device_follows_the_unit(tmp_path: Path) -> None:
    """Two layers more, with 65 MiB of state each, take less than one of them would."""
    few, many = (peak_of_device(layers, tmp_path) for layers in (1, 3))
    assert few > 8 << 20  # a layer's gradient, say
    assert many - few < 64 << 20


def peak_of_device(layers: int, folder: Path) -> int:
    """Bytes of the device at the peak of a step; on the CPU, those of the engine's own buffers there."""
    gc.collect()  # an engine before it may be in a circle
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": layers}
    options = replace(everything_on("nvme", folder), device=DEVICE)
    # A layer's parameters and gradient are 22 MiB.
    engine = open_engine(random_source("llama", **size), options, dtype=torch.bfloat16, room=4, slot_bytes=32 << 20)
    engine_losses(engine, 1, device=DEVICE)
    return torch.cuda.max_memory_allocated(DEVICE) if DEVICE.type == "cuda" else engine.device_bytes()
