"""Eight bits with a scale for each block: what comes back, wherever blocks are cut and whoever reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import resumed, resumed_from, save
from own_processes import as_ranks
from plain import CPU, LR, engine_losses, everything_on, open_engine
from tiny_models import random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.checkpoint.verify import verify
from zinf_cli.engine.eight_bits import Blocks, blocks_in, decoded, encode, set_signs
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.lion import Lion
from zinf_cli.engine.traffic.sgd import Sgd
from zinf_cli.model_state import ADAMW, CHUNK_NUMEL, LION, SCALED, SGD, bytes_of
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position

STEPS, CUT = 6, 3
INT8 = ADAMW.stored_as(SCALED)
FIELDS = ("param", "exp_avg", "exp_avg_sq")
OPENED: dict[str, Any] = {"optimizer": INT8, "chunk_numel": CHUNK_NUMEL}


def there_and_back(values: torch.Tensor) -> torch.Tensor:
    blocks = Blocks.empty(values.numel())
    encode(values, blocks)
    return decoded(blocks)[: values.numel()]


def test_values_come_back_close_with_their_signs_and_again_as_they_are() -> None:
    values = torch.randn(256 * 40 + 17, generator=torch.Generator().manual_seed(0)) ** 3
    back = there_and_back(values)
    largest = torch.stack([block.abs().max() for block in values.split(256)]).repeat_interleave(256)[: len(values)]
    share = values.abs() / largest
    relative = (back / values - 1).abs()
    assert relative[share > 0.1].max() < 0.03
    assert relative[share > 1e-3].max() < 0.1
    assert torch.equal(back.sign(), values.sign())
    again = there_and_back(back)
    assert torch.allclose(again, back, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30])
def test_a_value_is_zero_only_if_it_was(scale: float) -> None:
    """A mean of squares that became zero would divide an update by eps alone."""
    values = torch.zeros(512)
    values[::3] = scale
    values[1] = 1e30 * scale if scale < 1 else scale
    blocks = Blocks.empty(512)
    encode(values, blocks)
    assert torch.equal(blocks.codes > 0, values > 0)
    assert decoded(blocks).isfinite().all()


def test_infinity_comes_back_and_nan_spoils_its_own_block() -> None:
    values = torch.ones(768)
    values[3], values[300] = torch.inf, torch.nan
    back = there_and_back(values)
    assert back[:256].isinf().nonzero().tolist() == [[3]]
    assert not back[:256].isnan().any()
    assert back[256:512].isnan().all()
    assert torch.equal(back[512:], values[512:])


def test_zeros_carry_signs() -> None:
    blocks = Blocks(torch.zeros(256, dtype=torch.uint8), torch.zeros(1))
    signs = torch.where(torch.arange(256) % 3 == 0, -1.0, 1.0)
    set_signs(blocks.codes, signs)
    assert torch.equal(decoded(blocks).signbit(), signs < 0)
    assert not decoded(blocks).any()


def test_blocks_of_several_chunks_are_found_wherever_a_range_begins() -> None:
    numel = 2 * CHUNK_NUMEL + 2048
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    data = torch.zeros(bytes_of(SCALED, numel), dtype=torch.uint8)
    for first, blocks in blocks_in(data, numel, 0, numel):
        encode(values[first:][: blocks.codes.numel()], blocks)
    expected = there_and_back(values)
    for begin, end in (
        (0, numel),
        (256, CHUNK_NUMEL + 5),
        (CHUNK_NUMEL - 512, 2 * CHUNK_NUMEL + 300),
        (numel - 256, numel),
    ):
        found = torch.cat([decoded(blocks) for _, blocks in blocks_in(data, numel, begin, end)])
        assert torch.equal(found[: end - begin], expected[begin:end]), (begin, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_hand_it_on_with_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    one = open_engine(random_source("llama"), everything_on("nvme", tmp_path / "one"), dtype=dtype, **OPENED)
    engine_losses(one, CUT, close=False)
    folder = save(one, tmp_path / "run", CUT)
    expected = engine_losses(one, STEPS, first=CUT, close=False)
    ends = state_in(save(one, tmp_path / "run", STEPS))
    one.close()
    begins = state_in(folder)
    for world_size in (2, 3):
        as_ranks(world_size, take_over, folder, dtype, tmp_path / str(world_size))
        folder = folders.find_checkpoint(tmp_path / str(world_size))
        assert Manifest.load(folder).world_size == world_size
        assert not [verdict for verdict in verify(folder) if verdict.problem]
        assert same(state_in(folder), begins)
    again = resumed(folder, "llama", EngineOptions(), dtype=dtype, **OPENED)
    assert engine_losses(again, STEPS, first=CUT, close=False) == expected
    assert same(state_in(save(again, tmp_path / "again", STEPS)), ends)
    again.close()


def take_over(ranks: Ranks, folder: Path, dtype: torch.dtype, run_dir: Path) -> None:
    """A step, which the state of `folder` then takes the place of; a checkpoint of that."""
    tiers = everything_on("nvme", run_dir / f"nvme-{ranks.rank}")
    engine = open_engine(random_source("llama", seed=1), tiers, ranks, dtype=dtype, **OPENED)
    engine_losses(engine, 1, count=6, rank=ranks.rank, world_size=ranks.world_size, close=False)
    reader = CheckpointReader(folder)
    engine.load_state(reader)
    reader.close()
    writer = CheckpointWriter(run_dir, engine, ranks, lambda: iter([]), None)
    writer.write(Position(CUT, "bf16", CUT * 3, "text", None, {"seed": 0}))
    writer.close()
    engine.close()


@pytest.mark.sampled
@pytest.mark.parametrize(("before", "after"), [(ADAMW, INT8), (INT8, ADAMW), (INT8, ADAMW.stored_as("BF16"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_with_another_state_dtype(before: Any, after: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Masters keep their bits, moments are what the new dtype makes of them."""
    first = open_engine(random_source("llama"), EngineOptions(), dtype=dtype, optimizer=before, chunk_numel=CHUNK_NUMEL)
    engine_losses(first, CUT, close=False)
    folder = save(first, tmp_path / "run", CUT)
    first.close()
    other = resumed(folder, "llama", EngineOptions(), dtype=dtype, optimizer=after, chunk_numel=CHUNK_NUMEL)
    new, old = state_in(save(other, tmp_path / "other", CUT)), state_in(folder)
    assert engine_losses(other, CUT + 1, first=CUT)
    for name, values in old.items():
        if name.endswith(" param"):
            assert torch.equal(new[name].view(torch.int32), values.view(torch.int32)), name
        elif after is INT8:
            assert torch.equal(new[name], there_and_back(values)), name
        elif after is ADAMW:
            assert torch.equal(new[name], values), name


def test_parts_of_a_cut_model_find_their_own(tmp_path: Path) -> None:
    """Tiles of rows begin within blocks of the whole parameter: their values are rounded once more, and no further."""
    first = open_engine(random_source("llama"), EngineOptions(), **OPENED)
    engine_losses(first, CUT, close=False)
    folder = save(first, tmp_path / "run", CUT)
    first.close()
    cut = resumed_from(folder, random_source("llama", seed=1), EngineOptions(), most=1000, **OPENED)
    new, old = state_in(save(cut, tmp_path / "cut", CUT)), state_in(folder)
    cut.close()
    for name, values in old.items():
        assert torch.allclose(new[name], values, rtol=0.1, atol=values.abs().max().item() * 1e-6), name
        assert torch.equal(new[name] == 0, values == 0), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "no_decay", [frozenset(), frozenset(["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])]
)
def test_frozen_parameters_and_those_without_decay_change_no_neighbour(
    dtype: torch.dtype, no_decay: frozenset[str], tmp_path: Path
) -> None:
    kernel = AdamW(LR, no_decay=no_decay)
    losses = []
    for tier, folder in (("nvme", tmp_path / "a"), ("device", tmp_path / "b")):
        engine = open_engine(
            random_source("llama"), everything_on(tier, folder), freeze="q_proj", dtype=dtype, **OPENED
        )
        losses.append(engine_losses(engine, STEPS, kernel=kernel))
    assert losses[0] == losses[1]


@pytest.mark.sampled
@pytest.mark.parametrize(("state", "kernel"), [(SGD, Sgd(0.1)), (LION, Lion(1e-3)), (ADAMW, AdamW(0.0))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_has_them(state: Any, kernel: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    for tier in ("nvme", "cpu"):
        options = everything_on(tier, tmp_path)
        engine = open_engine(
            random_source("llama"), options, dtype=dtype, optimizer=state.stored_as(SCALED), chunk_numel=CHUNK_NUMEL
        )
        found.append(engine_losses(engine, STEPS, kernel=kernel))
    assert found[0] == found[1]
    if kernel.lr:
        assert found[0][-1] != found[0][0]


def state_in(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint gives to a run that goes on: fp32, 1-D, by "name field"."""
    reader = CheckpointReader(folder)
    values = {
        f"{name} {field}": reader.read(name, field, 0, torch.Size(shape).numel()).to(CPU, torch.float32)
        for name, shape in reader.shapes.items()
        for field in FIELDS
    }
    reader.close()
    return values


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)) for name in expected)
