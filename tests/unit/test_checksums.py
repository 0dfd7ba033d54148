"""What a drive gives is what was written to it, or an error that names the drive."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plain import engine_losses, everything_on, open_engine
from tiny_models import random_source
from zinf_cli.errors import TierError
from zinf_cli.model_state import PAGE
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.checksums import Checksums
from zinf_cli.tiers.nvme import STRIPE, NvmeTier
from zinf_cli.trace import Trace

STEPS = 5


def buffer(num_bytes: int) -> torch.Tensor:
    taken = Arena(num_bytes, torch.device("cpu")).allocate(num_bytes)
    assert taken is not None
    return taken.data


def flip_a_bit(tier: NvmeTier, position: int, file: int = 0) -> None:
    page = buffer(PAGE)
    os.preadv(tier._files[file], [page.numpy().data], position // PAGE * PAGE)
    page[position % PAGE] ^= 4
    os.pwritev(tier._files[file], [page.numpy().data], position // PAGE * PAGE)


def flipping(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int], bool]) -> list[int]:
    """Reads whose number is `wrong` come with a bit flipped; the list is of what was flipped."""
    read, flipped, number = os.preadv, [], iter(range(10**9))

    def preadv(file: int, buffers: Sequence[Any], position: int) -> int:
        count = read(file, buffers, position)
        if wrong(this := next(number)):
            buffers[0][count // 2] ^= 1
            flipped.append(this)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return flipped


def test_a_flipped_bit_on_a_drive_is_an_error_that_names_it(tmp_path: Path) -> None:
    notes: list[str] = []
    tier = NvmeTier([tmp_path / "a", tmp_path / "b"], Trace(), rank=3, notice=notes.append)
    extent = tier.allocate(3 * STRIPE, "model.layers.3 exp_avg")
    data = buffer(3 * STRIPE).random_(0, 255)
    extent.write(0, data).wait()
    flip_a_bit(tier, STRIPE // 2, file=1)
    with pytest.raises(TierError) as caught:
        extent.read(0, buffer(3 * STRIPE)).wait()
    said = caught.value.line()
    assert said.startswith(
        f"{tmp_path / 'b'}: rank 3: 4.00 MiB at offset 0 (of model.layers.3 exp_avg) are not what was"
    )
    assert "offload.nvme_path" in said
    into = buffer(STRIPE)
    extent.read(2 * STRIPE, into).wait()
    assert torch.equal(into, data[2 * STRIPE :])
    assert not [note for note in notes if "read" in note]
    tier.close()


def test_what_is_read_wrong_once_is_read_again_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    tier = NvmeTier([tmp_path], Trace(), notice=notes.append)
    extent = tier.allocate(STRIPE, "head params")
    data = buffer(STRIPE).random_(0, 255)
    extent.write(0, data).wait()
    assert flipping(monkeypatch, lambda number: number == 0) == []
    into = buffer(STRIPE)
    extent.read(0, into).wait()
    assert torch.equal(into, data)
    assert f"{tmp_path}: 4.00 MiB at offset 0 (of head params) were read wrong, and right when read again" in notes[-1]
    tier.close()


def test_spans_that_lie_whole_in_what_is_read_are_compared() -> None:
    sums, data = Checksums(), bytearray(range(200)) * 4
    for begin, end in ((0, 400), (400, 800), (200, 300), (300, 500)):  # the last two are written over the first two
        sums.note(begin, memoryview(data)[begin:end])
    assert sums._spans.keys() == {200, 300}

    def agree(begin: int, end: int) -> bool:
        return sums.agree(begin, memoryview(data)[begin:end])

    assert agree(0, 800)
    data[250] ^= 1
    assert [agree(0, 800), agree(200, 300), agree(300, 800), agree(300, 500)] == [False, False, True, True]
    assert agree(220, 300)  # a part of a span is not known
    data[499] ^= 1
    assert not agree(300, 500)


def train(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[list[list[float]], list[str]]:
    """Losses, and what was said."""
    notes: list[str] = []
    engine = open_engine(
        random_source("llama"),
        replace(everything_on("nvme", folder), **options),
        dtype=dtype,
        chunk_numel=2**20,
        notice=notes.append,
    )
    return engine_losses(engine, STEPS, clip=1.12), notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_that_err_once_change_no_bit(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = train(tmp_path, dtype, speculate=True, nvme_verify=False, nvme_readers=1)
    assert train(tmp_path, dtype, speculate=True) == (expected, [])
    probes = 1  # of O_DIRECT, when the file is opened
    flipped = flipping(monkeypatch, lambda number: number >= probes and number % 3 == 0)
    found, notes = train(tmp_path, dtype, speculate=True, nvme_readers=1)
    assert found == expected
    assert len(flipped) > 50
    assert len(notes) > 0.5 * len(flipped)  # the others are moments that were never written, or read again


@pytest.mark.parametrize("folders", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_was_written_is_compared(
    folders: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read cuts a span that was written, wherever stripes, chunks and slices end."""
    agree = Checksums.agree
    partly: list[tuple[tuple[int, int], int, int]] = []

    def noted(self: Checksums, begin: int, content: memoryview) -> bool:
        end = begin + len(content)
        spans = [(first, last) for first, (last, _) in self._spans.items()]
        partly.extend((span, begin, end) for span in spans if span[0] < end and begin < span[1])
        partly[:] = [(span, begin, end) for span, begin, end in partly if span[0] < begin or span[1] > end]
        return agree(self, begin, content)

    monkeypatch.setattr(Checksums, "agree", noted)
    paths = tuple(tmp_path / str(number) for number in range(folders))
    engine = open_engine(
        random_source("llama", hidden_size=64, vocab_size=20000),
        replace(everything_on("nvme", tmp_path), nvme_folders=paths, speculate=True),
        dtype=dtype,
        chunk_numel=2**20,
        room=4,
    )
    engine_losses(engine, 4, clip=1.12)
    assert partly == []
