"""Split masters in training: to the bit those of torch.optim.AdamW in fp32, wherever they lie and whenever they move.

Every weight begins in the middle between two bf16, where rounding alone does not tell which master it came from.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from xxhash import xxh3_64_hexdigest

from checkpoints import resumed_from, save
from own_processes import as_ranks
from plain import ADAMW, engine_losses, every_other_unit_cached, everything_on, open_engine, plain_losses
from tiny_models import random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import MANIFEST, Manifest, StoredFile, StoredUnit, rank_file
from zinf_cli.checkpoint.verify import verify
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position

STEPS, CUT = 6, 3
BF16 = torch.bfloat16
FIELDS = ("param", "exp_avg", "exp_avg_sq")
State = dict[str, torch.Tensor]
"""The bits of a field of a parameter, by "name field": int32, 1-D."""


@pytest.fixture(scope="module")
def ties(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A llama with fp32 weights whose lower half is 0x8000."""
    folder = tmp_path_factory.mktemp("ties")
    blank: Any = build_model(random_source("llama"))
    model = type(blank)._from_config(blank.config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.view(torch.int32).bitwise_and_(-(2**16)).bitwise_or_(0x8000)
    model.save_pretrained(folder)
    return ModelSource(folder, None, "pretrained", 0)


@cache
def reference(source: ModelSource, steps: int, clip: float | None) -> tuple[list[list[float]], State]:
    """The losses of plain PyTorch, and the fp32 parameters and moments of its optimizer after the last step."""
    made: list[torch.optim.Optimizer] = []

    def noted(params: Any) -> torch.optim.Optimizer:
        made.append(ADAMW(params))
        return made[0]

    losses = plain_losses(source, steps, clip=clip, dtype=BF16, optimizer_of=noted)
    names = [name for name, _ in build_model(source).named_parameters()]
    masters = made[0].param_groups[0]["params"]
    values: State = {}
    for name, master in zip(names, masters, strict=True):
        state = made[0].state.get(master, dict.fromkeys(FIELDS[1:], torch.zeros_like(master)))
        values |= {f"{name} {field}": bits({"param": master, **state}[field]) for field in FIELDS}
    return losses, values


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().reshape(-1).view(torch.int32)


def state_in(folder: Path) -> State:
    """What a checkpoint gives to a run that goes on."""
    reader = CheckpointReader(folder)
    values = {
        f"{name} {field}": bits(reader.read(name, field, 0, torch.Size(shape).numel()))
        for name, shape in reader.shapes.items()
        for field in FIELDS
    }
    reader.close()
    return values


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


class How(NamedTuple):
    tier: str = "nvme"
    clip: float | None = 1.0
    changes: dict[str, Any] = {}  # noqa: RUF012
    cached: bool = False


MIXED = {"params": "cpu", "grads": "nvme", "optimizer": "nvme"}
HOW = {
    "device": How("device"),
    "cpu": How("cpu"),
    "nvme": How(),
    "nvme, nothing clipped": How(clip=50.0),
    "eager": How(clip=None),
    "eager, cpu": How("cpu", clip=None),
    "speculative": How(clip=1.12, changes={"speculate": True}),
    "cached": How(clip=1.12, changes={"speculate": True}, cached=True),
    "sweeps of one": How(changes={"micro_batches_per_sweep": 1}),
    "parameters in memory": How(changes=MIXED),
    "moments in memory": How(changes={"optimizer": "cpu"}),
}


def options_of(how: How, folder: Path) -> EngineOptions:
    options = replace(everything_on(how.tier, folder), **how.changes)
    return every_other_unit_cached(options) if how.cached else options


@pytest.mark.parametrize("how", HOW)
def test_masters_are_those_of_torch(how: str, ties: ModelSource, tmp_path: Path) -> None:
    way = HOW[how]
    losses, masters = reference(ties, STEPS, way.clip)
    engine = open_engine(ties, options_of(way, tmp_path / "nvme"), dtype=BF16)
    assert_equal(state_in(save(engine, tmp_path / "begins", 0)), reference(ties, 0, way.clip)[1])
    assert engine_losses(engine, STEPS, clip=way.clip, eager=way.clip is None, close=False) == losses
    assert_equal(state_in(save(engine, tmp_path / "ends", STEPS)), masters)
    engine.close()


@pytest.mark.parametrize(("before", "after"), [("nvme", "cpu"), ("cpu", "nvme"), ("device", "speculative")])
def test_a_run_goes_on_in_another_place(before: str, after: str, ties: ModelSource, tmp_path: Path) -> None:
    clip = HOW[after].clip
    losses, masters = reference(ties, STEPS, clip)
    first = open_engine(ties, options_of(HOW[before], tmp_path / "first"), dtype=BF16)
    found = engine_losses(first, CUT, clip=clip, close=False)
    folder = save(first, tmp_path / "run", CUT)
    first.close()
    second = resumed_from(folder, ties, options_of(HOW[after], tmp_path / "second"), dtype=BF16)
    found += engine_losses(second, STEPS, first=CUT, clip=clip, close=False)
    assert found == losses
    assert_equal(state_in(save(second, tmp_path / "run", STEPS)), masters)
    second.close()


def test_two_ranks_take_it_over_and_give_it_back(ties: ModelSource, tmp_path: Path) -> None:
    losses, masters = reference(ties, STEPS, 1.0)
    one = open_engine(ties, everything_on("nvme", tmp_path / "one"), dtype=BF16)
    engine_losses(one, CUT, close=False)
    folder = save(one, tmp_path / "run", CUT)
    one.close()
    as_ranks(2, take_over, folder, ties, tmp_path)
    of_two = folders.find_checkpoint(tmp_path / "of two")
    assert Manifest.load(of_two).world_size == 2
    assert_equal(state_in(of_two), state_in(folder))
    again = resumed_from(of_two, ties, EngineOptions(), dtype=BF16)
    assert engine_losses(again, STEPS, first=CUT, close=False) == losses[CUT:]
    assert_equal(state_in(save(again, tmp_path / "again", STEPS)), masters)
    again.close()


def take_over(ranks: Ranks, folder: Path, source: ModelSource, tmp_path: Path) -> None:
    """Two steps, which the state of `folder` then takes the place of; a checkpoint of that."""
    engine = open_engine(source, everything_on("nvme", tmp_path / f"nvme-{ranks.rank}"), ranks, dtype=BF16)
    engine_losses(engine, 2, count=2, rank=ranks.rank, world_size=ranks.world_size, close=False)
    reader = CheckpointReader(folder)
    engine.load_state(reader)
    reader.close()
    writer = CheckpointWriter(tmp_path / "of two", engine, ranks, lambda: iter([]), None)
    writer.write(Position(CUT, "bf16", CUT * 3, "text", None, {"seed": 0}))
    writer.close()
    engine.close()


def test_a_checkpoint_of_whole_masters_goes_on(ties: ModelSource, tmp_path: Path) -> None:
    """As earlier commits wrote it: version 1, with fp32 masters."""
    losses, masters = reference(ties, STEPS, 1.0)
    engine = open_engine(ties, EngineOptions(), dtype=BF16)
    engine_losses(engine, CUT, close=False)
    folder = save(engine, tmp_path / "run", CUT)
    engine.close()
    as_version_1(folder)
    assert not [verdict for verdict in verify(folder) if verdict.problem]
    again = resumed_from(folder, ties, everything_on("nvme", tmp_path / "nvme"), dtype=BF16)
    assert engine_losses(again, STEPS, first=CUT, close=False) == losses[CUT:]
    assert_equal(state_in(save(again, tmp_path / "run", STEPS)), masters)
    again.close()


def as_version_1(folder: Path) -> None:
    """Write a checkpoint of one rank anew, with "param", "exp_avg" and "exp_avg_sq" in fp32."""
    new, reader = Manifest.load(folder), CheckpointReader(folder)
    fields = dict.fromkeys(FIELDS, "F32")
    units = tuple(
        StoredUnit(unit.name, tuple(replace(flat, dtype="F32", fields=fields, carrier=None) for flat in unit.flats))
        for unit in new.units
    )
    old = replace(new, units=units, version=1)
    content = bytearray(old.layout.num_bytes)
    content[: len(old.layout.header)] = old.layout.header
    flats = {(unit.name, number): flat for unit in units for number, flat in enumerate(unit.flats)}
    for region in old.layout.regions:
        for param in flats[region.unit, region.flat].params:
            start = len(old.layout.header) + region.start + 4 * param.offset
            values = reader.read(param.name, region.field, 0, param.numel)
            content[start : start + 4 * param.numel] = values.numpy().tobytes()
    reader.close()
    (folder / rank_file(0)).write_bytes(content)
    checksums = tuple(xxh3_64_hexdigest(content[start : start + length]) for start, length in old.layout.pieces)
    files = {**new.files, rank_file(0): StoredFile(len(content), checksums)}
    (folder / MANIFEST).write_bytes(replace(old, files=files).dump())
