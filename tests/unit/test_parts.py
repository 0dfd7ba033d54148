"""Parts: a model whose blocks are taken apart and whose matrices are cut into tiles learns as it does whole."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from checkpoints import params_of, resumed, save
from plain import (
    batches,
    engine_losses,
    every_other_unit_cached,
    everything_on,
    open_engine,
    plain_losses,
    relative_difference,
)
from tiny_models import CONFIGS, random_source
from zinf_cli.engine.compute import joined as joined_backward
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.units.tiles import TiledWeight, cut
from zinf_cli.engine.units.units import discover
from zinf_cli.errors import ModelError
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.models.model import build_model
from zinf_cli.trace import LANES, summarise_trace
from zinf_cli.train.setup import model_loss

STEPS, COUNT = 3, 2
"""A second update has moments; a second micro-batch adds to a gradient."""
MODULES, TILES = 4000, 1000
"""Elements of a part: tiny models then are cut into their own modules, or into tiles."""
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "opt": {"dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
}
PLACED = 9
"""How many placements there are of a cut."""
CLASSES = ("params", "grads", "optimizer", "activations")


@cache
def whole(name: str) -> list[list[float]]:
    return plain_losses(random_source(name, **NO_DROPOUT.get(name, {})), STEPS, count=COUNT)


def in_parts(name: str, options: EngineOptions, most: int | None, **more: Any) -> Engine:
    return open_engine(random_source(name, **NO_DROPOUT.get(name, {})), options, most=most, **more)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "most"), [*((name, TILES) for name in CONFIGS), *((name, MODULES) for name in [*CONFIGS])]
)
def test_every_architecture_learns_as_plain_pytorch_does(name: str, most: int, tmp_path: Path) -> None:
    engine = in_parts(name, everything_on("nvme", tmp_path), most)
    assert len(engine.units) > len(discover(build_model(random_source(name)), 1))
    assert relative_difference(engine_losses(engine, STEPS, count=COUNT), whole(name)) < 1e-6


def one_on_nvme(state: str, nvme: EngineOptions) -> EngineOptions:
    placement: dict[str, Any] = {state: "nvme"}
    return EngineOptions(nvme_folders=nvme.nvme_folders, **placement)


def placed(number: int, nvme: EngineOptions) -> EngineOptions:
    """The placement of this number of PLACED."""
    return [
        nvme,
        EngineOptions("device", "device", "device", "device"),
        *(one_on_nvme(state, nvme) for state in CLASSES),
        replace(nvme, speculate=True),
        every_other_unit_cached(nvme),
        replace(nvme, staying_units=frozenset(range(0, 1000, 2))),
    ][number]


@cache
def in_memory(name: str, count: int) -> list[list[float]]:
    return engine_losses(in_parts(name, EngineOptions(), TILES), STEPS, count=count)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5"])
@pytest.mark.parametrize("number", range(PLACED))
def test_all_placements_of_one_cut_have_the_same_bits(name: str, number: int, tmp_path: Path) -> None:
    options = placed(number, everything_on("nvme", tmp_path))
    count = 3 if name == "llama" else COUNT  # a sum of three has an order
    assert engine_losses(in_parts(name, options, TILES), STEPS, count=count) == in_memory(name, count), options


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5"])
@pytest.mark.parametrize(("per_sweep", "keep"), [(None, True), (1, False)])
def test_sums_in_another_order_are_close(name: str, per_sweep: int | None, *, keep: bool, tmp_path: Path) -> None:
    options = replace(everything_on("nvme", tmp_path), micro_batches_per_sweep=per_sweep)
    losses = engine_losses(in_parts(name, options, TILES, keep=keep), STEPS, count=COUNT)
    assert relative_difference(losses, in_memory(name, COUNT)) < 1e-6


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gemma2"])
def test_ten_steps_end_with_the_weights_of_plain_pytorch(name: str, tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    losses = plain_losses(random_source(name), 10, parameters=expected)
    engine = in_parts(name, everything_on("nvme", tmp_path), TILES)
    assert relative_difference(engine_losses(engine, 10, close=False), losses) < 1e-6
    reader = CheckpointReader(save(engine, tmp_path / "run", 10))
    for parameter, values in expected.items():
        assert (reader.param(parameter) - values).norm() < 1e-5 * values.norm(), parameter
    reader.close()
    engine.close()


@pytest.mark.parametrize(("eps", "all_within"), [(1e-8, None), (1e-3, 1e-6)])
def test_where_a_gradient_is_rounding_its_weight_differs_as_adamw_scales_it(
    eps: float, all_within: float | None, tmp_path: Path
) -> None:
    """A token that takes one expert gives it the weight 1, whatever the router says. The router's gradient is 0 but for
    rounding, and AdamW divides it by its own size. It does not do so with an eps that is far above it.
    """
    source = random_source("mixtral", num_experts_per_tok=1)
    adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01, eps=eps)
    expected: dict[str, torch.Tensor] = {}
    losses = plain_losses(source, 10, count=1, parameters=expected, optimizer_of=adamw)
    engine = open_engine(source, EngineOptions(), most=TILES)
    found = engine_losses(engine, 10, count=1, close=False, kernel=AdamW(1e-3, eps=eps))
    assert relative_difference(found, losses) < 1e-6
    reader = CheckpointReader(save(engine, tmp_path / "run", 10))
    for parameter, values in expected.items():
        within = all_within or (1e-3 if "gate.weight" in parameter else 1e-5)
        assert (reader.param(parameter) - values).norm() < within * values.norm(), parameter
    reader.close()
    engine.close()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_with_eager_updates_and_with_a_clip_that_bites(clip: float | None, tmp_path: Path) -> None:
    expected = plain_losses(random_source("llama"), STEPS, clip=clip)
    engine = in_parts("llama", everything_on("nvme", tmp_path), TILES)
    assert relative_difference(engine_losses(engine, STEPS, clip=clip, eager=clip is None), expected) < 1e-6


def test_a_step_that_clips_after_its_experts_were_updated_has_the_same_bits(tmp_path: Path) -> None:
    """Speculation fails in one step, and holds in others. Experts that no token has reached have no gradient."""
    many = random_source("qwen3_moe", num_experts=12, num_experts_per_tok=1)

    def learned(options: EngineOptions) -> tuple[list[list[Any]], list[bool], dict[str, torch.Tensor]]:
        engine = open_engine(many, options, most=2 * TILES)
        found = []
        for step in range(7):
            work = [MicroBatch(partial(model_loss, engine.model, ids, ids)) for ids in batches(step, 1)]
            found.append(engine.train_step(work, AdamW(1e-3), max_grad_norm=2.14, more=step < 6))
        engine.flush()
        params = params_of(engine)
        engine.close()
        return [[step.losses, step.grad_norm] for step in found], [step.updated for step in found], params

    nvme = everything_on("nvme", tmp_path)
    expected, _, weights = learned(nvme)
    assert [norm > 2.14 for _, norm in expected] == [number == 3 for number in range(7)]
    for options in (replace(nvme, speculate=True), every_other_unit_cached(replace(nvme, speculate=True))):
        found, updated, params = learned(options)
        assert found == expected
        assert all(torch.equal(params[name], values) for name, values in weights.items())
        assert updated == [False, False, True, False, True, True, True]  # the fourth was updated in vain


def test_in_bf16_a_cut_changes_nothing_but_rounding(tmp_path: Path) -> None:
    expected = plain_losses(random_source("llama"), STEPS, dtype=torch.bfloat16)
    engine = in_parts("llama", everything_on("nvme", tmp_path), TILES, dtype=torch.bfloat16)
    assert relative_difference(engine_losses(engine, STEPS), expected) < 1e-2


def test_dropout_draws_the_same_numbers(tmp_path: Path) -> None:
    source = random_source("llama", attention_dropout=0.2)
    engine = open_engine(source, everything_on("nvme", tmp_path), most=TILES)
    assert relative_difference(engine_losses(engine, STEPS), plain_losses(source, STEPS)) < 1e-6


@pytest.mark.sampled
@pytest.mark.parametrize(("before", "after"), [(None, TILES), (TILES, None), (TILES, MODULES), (MODULES, 700)])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3_moe"])
def test_a_checkpoint_goes_on_with_another_cut(
    name: str, before: int | None, after: int | None, tmp_path: Path
) -> None:
    options = everything_on("nvme", tmp_path / "nvme")
    (tmp_path / "nvme").mkdir()
    first = in_parts(name, options, before)
    engine_losses(first, 1, count=COUNT, close=False)
    folder = save(first, tmp_path / "run", 1)
    first.close()
    second = resumed(folder, name, options, most=after)
    losses = engine_losses(second, STEPS, first=1, count=COUNT, close=False)
    again = save(second, tmp_path / "run", STEPS)
    second.close()
    assert relative_difference(losses, whole(name)[1:]) < 1e-6
    one, two = CheckpointReader(folder), CheckpointReader(again)
    assert one.shapes == two.shapes
    assert all(two.updates(parameter, 0) == STEPS for parameter in two.shapes)
    one.close()
    two.close()


def test_a_checkpoint_in_parts_holds_what_the_whole_one_does(tmp_path: Path) -> None:
    readers = []
    for most in (None, TILES, 700):
        engine = in_parts("llama", EngineOptions(), most)
        readers.append(CheckpointReader(save(engine, tmp_path / str(most), 1)))
        engine.close()
    for name in readers[0].shapes:
        values = [reader.param(name) for reader in readers]
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])
    for reader in readers:
        reader.close()


class Counted(torch.autograd.Function):
    """The identity, which counts how often a gradient passes."""

    passed = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        Counted.passed += 1
        return grads[0]


def test_a_gradient_passes_the_code_between_parts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = 8
    source = random_source("gemma2", num_hidden_layers=layers, layer_types=["full_attention"] * layers)
    norm = gemma2.Gemma2RMSNorm
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: Counted.apply(plain(self, x)))  # type: ignore[no-untyped-call]
    engine = open_engine(source, EngineOptions(), most=TILES)
    Counted.passed = 0
    engine_losses(engine, 1, count=1)
    assert Counted.passed == 4 * layers + 1


def test_no_product_is_computed_again() -> None:
    engine = in_parts("llama", EngineOptions(), TILES)
    params = dict(build_model(random_source("llama")).named_parameters())
    weights = sum(param.numel() for name, param in params.items() if param.dim() > 1 and "embed" not in name)
    with FlopCounterMode(display=False) as counter:
        engine_losses(engine, 1, count=1)
    ops = counter.get_flop_counts()["Global"]
    passes, tokens = 3, 2 * 12  # forward, and backward into input and weight
    assert sum(ops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) == passes * 2 * tokens * weights


class Products(TorchDispatchMode):
    """Counts products of two matrices, in all threads of a step."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_micro_batches_of_few_tokens_have_one_backward_of_a_product(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients are added up in another order, which is one order for every placement."""

    def losses_of(options: EngineOptions) -> tuple[list[list[float]], int]:
        engine = in_parts(name, options, MODULES)
        with Products() as products:
            losses = engine_losses(engine, 2, count=6, tokens=2)
        return losses, products.number

    joined, products = losses_of(everything_on("nvme", tmp_path))
    assert losses_of(EngineOptions()) == (joined, products)
    with monkeypatch.context() as patch:
        patch.setattr(joined_backward, "_joinable", lambda tapes, unit: 1)
        alone, products_alone = losses_of(EngineOptions())
    assert products < 0.8 * products_alone
    assert relative_difference(joined, alone) < 1e-6


def test_a_trace_names_parts_and_tells_glue_from_compute(tmp_path: Path) -> None:
    engine = in_parts("llama", EngineOptions(), TILES)
    engine.trace.enabled = True
    engine_losses(engine, 1)
    engine.trace.write(tmp_path / "trace.json")
    spans = [span for span in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if span["ph"] == "X"]
    lanes = {lane: [span for span in spans if span["tid"] == LANES.index(lane)] for lane in ("compute", "glue")}
    for number, place in product((1, 2), ("forward", "backward")):
        assert f"model.layers.1.mlp.gate_proj {number}/2 {place}" in {span["name"] for span in lanes["compute"]}
    assert {"after model.layers.1.mlp.gate_proj 2/2", "loss backward"} <= {span["name"] for span in lanes["glue"]}
    (rank,) = summarise_trace(tmp_path / "trace.json", rows=1000)["ranks"]
    spent = {row["what"]: row["seconds"] for row in rank["most_compute"]}
    assert spent.keys() == {span["name"] for span in lanes["compute"]}
    assert sum(spent.values()) == pytest.approx(sum(span["dur"] for span in lanes["compute"]) / 1e6)
    in_turn = sorted((span for lane in lanes.values() for span in lane), key=lambda span: span["ts"])
    assert all(one["ts"] + one["dur"] <= two["ts"] + 1 for one, two in pairwise(in_turn))  # microseconds


def test_units_of_parts_are_no_larger_than_a_part_may_be() -> None:
    model = build_model(random_source("llama"))
    names = {name: param.shape for name, param in model.named_parameters()}
    cut(model, TILES)
    units = discover(model, 2, most=TILES)
    assert max(sum(param.numel for param in unit.params()) for unit in units) <= TILES
    assert [unit.name for unit in units if "layers.1.mlp.gate" in unit.name] == [
        f"model.layers.1.mlp.gate_proj {number}/2" for number in (1, 2)
    ]
    pieces: dict[str, list[tuple[int, int]]] = {}
    for place in (place for unit in units for place in unit.params()):
        pieces.setdefault(place.origin, []).append((place.first, place.first + place.numel))
    assert pieces.keys() == names.keys()
    for name, shape in names.items():  # without a gap, each element once
        ends = [0, *(last for _, last in sorted(pieces[name]))]
        assert [first for first, _ in sorted(pieces[name])] == ends[:-1]
        assert ends[-1] == shape.numel()


def test_what_cant_be_cut_is_named() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(32, 64, device="meta")})
    cut(model, 512)
    weight: Any = model["proj"].weight
    assert isinstance(weight, TiledWeight)
    assert (weight.shape, weight.dtype, weight.device.type) == (torch.Size((64, 32)), torch.float32, "meta")
    x = torch.zeros(3, 32, device="meta")
    assert F.linear(x, weight).shape == model["proj"](x).shape == (3, 64)
    uses: list[Callable[[], Any]] = [
        lambda: weight.t(),
        lambda: weight + 1,
        lambda: torch.norm(weight),
        lambda: weight[0],
        lambda: x @ weight.T,
    ]
    for use in uses:
        with pytest.raises(ModelError, match=r"proj\.weight is larger than the memory for it, and can't be cut"):
            use()


@pytest.mark.parametrize("most", [None, TILES])
def test_nothing_of_a_step_waits_for_the_garbage_collector(most: int | None) -> None:
    engine = in_parts("llama", EngineOptions(), most)
    engine_losses(engine, 2, close=False)
    gc.collect()
    gc.disable()
    try:
        before = bytes_of_tensors()
        engine_losses(engine, STEPS, first=2, close=False)
        assert bytes_of_tensors() < before + 64 * 1024  # tables of positions; one hidden state more a call is 3 KiB
    finally:
        gc.enable()
    gc.collect()
    assert bytes_of_tensors() == before
    engine.close()


def bytes_of_tensors() -> int:
    """Of all tensors that are alive, each by itself."""
    return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is torch.Tensor)
