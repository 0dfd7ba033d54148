"""SGD with momentum is added by a declaration and a kernel. All else follows: training, plan, checkpoint, export."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from own_processes import as_ranks
from plain import LR, engine_losses, everything_on, open_engine, plain_losses, relative_difference
from tiny_models import dataset_for, random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import MANIFEST, Manifest
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.errors import CheckpointError
from zinf_cli.model_state import ADAMW, Field, OptimizerState
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.plan.checkpoints import checkpoint_bytes
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.train import figures as finding
from zinf_cli.train import loop
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures
from zinf_cli.train.optimizer import KERNELS

SGD = OptimizerState("sgd", (Field("momentum_buffer", "momentum_buffer"),))


@dataclass(frozen=True)
class Momentum(Kernel):
    """torch.optim.SGD with momentum."""

    state: ClassVar[OptimizerState] = SGD
    lr: float
    momentum: float = 0.9

    def update(self, param: torch.Tensor, grad: torch.Tensor, momentum_buffer: torch.Tensor, step: int) -> None:
        if self.clip is not None:
            grad.mul_(self.clip)
        momentum_buffer.mul_(self.momentum).add_(grad)
        param.add_(momentum_buffer, alpha=-self.lr)


MODEL, STEPS, CUT = "llama", 6, 3
FIELDS = ("param", "momentum_buffer")
RATE = 30 * LR
"""At which the clipping is felt."""
torch_sgd = partial(torch.optim.SGD, lr=RATE, momentum=0.9)
losses_of = partial(engine_losses, kernel=Momentum(RATE), close=False)
engine_of = partial(open_engine, random_source(MODEL), optimizer=SGD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["in memory", "deferred", "speculative", "eager"])
def test_it_trains_with_the_bits_of_torch(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    clip = {"eager": None, "speculative": 1.12}.get(how, 1.0)
    expected: dict[str, torch.Tensor] = {}
    losses = plain_losses(
        random_source(MODEL), STEPS, clip=clip, dtype=dtype, parameters=expected, optimizer_of=torch_sgd
    )
    options = everything_on("cpu" if how == "in memory" else "nvme", tmp_path)
    engine = engine_of(replace(options, speculate=how == "speculative"), dtype=dtype)
    assert losses_of(engine, STEPS, clip=clip, eager=how == "eager") == losses
    found = {name: value for number in range(len(engine.units)) for name, value in engine.read_params(number).items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_planned_to_the_byte_checkpointed_and_exported(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(finding, "_flops", lambda *_: 1e13)  # so that the plan follows no measurement
    monkeypatch.setitem(KERNELS, "adamw", lambda _, lr: Momentum(lr))
    recipe = recipe_of(tmp_path, precision)
    figures = find_figures(recipe, 1)
    assert figures.optimizer == SGD
    plan = best_plan(recipe, figures)
    used: list[int] = []
    close = Engine.close

    def note_and_close(engine: Engine) -> None:
        used.append(engine.tiers.params.used)
        close(engine)

    monkeypatch.setattr(Engine, "close", note_and_close)
    run_dir = recipe.output_dir
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    (run_dir / "plan.json").write_text(json.dumps(plan.to_json()))
    assert loop.train(run_dir) == 0

    states = {line.what: line.num_bytes for line in plan.lines}
    assert used == [sum(states.get(name, 0) for name in ("params", "grads", "optimizer", "second"))]
    trained = sum(unit.trainable_numel for unit in figures.model.units)
    assert states["optimizer"] == trained * {"fp32": 4, "bf16": 8}[precision]
    with_adamw = replace(figures, optimizer=ADAMW)
    lines = {line.what: line.num_bytes for line in best_plan(recipe, with_adamw).lines}
    assert (
        lines["optimizer"] - states["optimizer"] == trained * {"fp32": 4, "bf16": 2}[precision]
    )  # its masters are split
    assert checkpoint_bytes(with_adamw) - checkpoint_bytes(figures) == 4 * trained
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in metrics)
    assert moved / len(metrics) == pytest.approx(plan.nvme_traffic, rel=0.08)

    folder = folders.find_checkpoint(run_dir)
    manifest = Manifest.load(folder)
    assert manifest.dump() == (folder / MANIFEST).read_bytes()
    assert manifest.layout.num_bytes - len(manifest.layout.header) == checkpoint_bytes(figures)
    assert {tuple(flat.fields) for unit in manifest.units for flat in unit.flats} == {FIELDS}
    export(run_dir, tmp_path / "out", "fp32")
    reader = CheckpointReader(folder)
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, reader.param(name)), name
        assert reader.read(name, "momentum_buffer", 0, value.numel()).any()
    reader.close()


def recipe_of(folder: Path, precision: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"config": random_source(MODEL).config},
            "dataset": dataset_for(MODEL, folder),
            "train": {
                "seq_len": 16, "micro_batch_size": 2, "global_batch_size": 6, "max_steps": 12,
                "max_grad_norm": 9.0, "precision": precision
            },
            "optimizer": {"lr": RATE},
            "offload": {
                **dict.fromkeys(("params", "grads", "optimizer", "activations"), "nvme"),
                "nvme_path": str(folder / "nvme")
            },
            "checkpoint": {"interval": 12},
            "logging": {"tensorboard": False},
            "output_dir": str(folder / "run"),
        }
    )  # fmt: skip


def test_it_goes_on_in_other_slices(tmp_path: Path) -> None:
    """One rank, two, one again: the bits of a run that nothing interrupted."""
    engine = engine_of(everything_on("nvme", tmp_path / "nvme"))
    losses = losses_of(engine, CUT)
    save(engine, tmp_path / "one", Ranks())
    losses += losses_of(engine, STEPS, first=CUT)
    engine.close()

    by_rank = as_ranks(2, train_and_write, tmp_path)
    of_two = [first + second for first, second in zip(*by_rank, strict=True)]
    alone = plain_losses(random_source(MODEL), STEPS, count=4, optimizer_of=torch_sgd)
    assert relative_difference(of_two, alone) < 1e-5

    one, two = (CheckpointReader(folders.find_checkpoint(tmp_path / name)) for name in ("one", "two"))
    assert (one.manifest.world_size, two.manifest.world_size) == (1, 2)
    for name, shape in one.shapes.items():
        assert one.updates(name, 0) == two.updates(name, 0) == CUT
        for field in FIELDS:
            values = (reader.read(name, field, 0, torch.Size(shape).numel()) for reader in (one, two))
            assert torch.equal(*values), (name, field)
    again = engine_of(EngineOptions())
    again.load_state(two)
    assert losses_of(again, STEPS, first=CUT) == losses[CUT:]
    again.close()
    one.close()
    two.close()


def save(engine: Engine, run_dir: Path, ranks: Ranks) -> None:
    writer = CheckpointWriter(run_dir, engine, ranks, lambda: iter([]), None)
    writer.write(Position(CUT, "fp32", CUT * 3, "text", None, {"seed": 0, "optimizer": {"name": "sgd"}}))
    writer.close()


def train_and_write(ranks: Ranks, folder: Path) -> list[list[float]]:
    """Train from the start; then take the state of the one rank, and write it as it is."""
    engine = engine_of(everything_on("nvme", folder / f"nvme-{ranks.rank}"), ranks)
    losses = losses_of(engine, STEPS, count=4, rank=ranks.rank, world_size=ranks.world_size)
    reader = CheckpointReader(folders.find_checkpoint(folder / "one"))
    engine.load_state(reader)
    reader.close()
    save(engine, folder / "two", ranks)
    engine.close()
    return losses


def test_a_kernel_of_other_state_is_refused() -> None:
    engine = engine_of(EngineOptions())
    with pytest.raises(AssertionError, match="adamw does not update what sgd keeps"):
        engine.train_step([], AdamW(LR))
    engine.close()


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    engine = engine_of(EngineOptions(), freeze="layers.0.mlp")
    losses_of(engine, 1)
    save(engine, tmp_path, Ranks())
    engine.close()
    reader = CheckpointReader(folders.find_checkpoint(tmp_path))
    other = open_engine(random_source(MODEL), EngineOptions(), freeze="layers.0.mlp")
    with pytest.raises(
        CheckpointError, match=r"of another optimizer, sgd: it has no exp_avg of .*, but param, momentum_buffer"
    ):
        other.load_state(reader)
    other.close()
    all_of_it = engine_of(EngineOptions())  # what was frozen has had no update
    all_of_it.load_state(reader)
    all_of_it.close()
    reader.close()


def test_what_adamw_keeps_needs_no_word_in_a_manifest(tmp_path: Path) -> None:
    engine = open_engine(random_source(MODEL), EngineOptions(), freeze="layers.0.mlp")
    save(engine, tmp_path, Ranks())
    engine.close()
    document: Any = json.loads((folders.find_checkpoint(tmp_path) / MANIFEST).read_text())
    assert not any("fields" in flat for unit in document["units"] for flat in unit["flats"])
