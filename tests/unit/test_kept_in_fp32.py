"""What a class keeps in fp32 is fp32 in a 16-bit model: as from_pretrained has it, on every tier, in every file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3PreTrainedModel, Glm4MoePreTrainedModel, GPT2LMHeadModel

from checkpoints import RECIPE, params_of, resumed, save
from plain import engine_losses, every_other_unit_cached, everything_on, open_engine, plain_losses
from tiny_models import CONFIGS, KEPT_IN_FP32, random_source, skip_unless_known
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.ranks import Ranks
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.model_files import model_files
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position
from zinf_cli.train.export import export

STEPS = 5
BF16 = torch.bfloat16
TRAINED = ["deepseek_v3", "glm4_moe", "gpt2"]
_ROUTERS = ["e_score_correction_bias", "gate.weight"]
_KEPT = {GPT2LMHeadModel: {"ln_"}, DeepseekV3PreTrainedModel: _ROUTERS, Glm4MoePreTrainedModel: _ROUTERS}
"""Here, all layer norms of gpt2 stay fp32, in the blocks and after them, and routers do in every transformers."""


@pytest.fixture(autouse=True)
def more_is_kept_in_fp32() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for model_class, kept in _KEPT.items():
            patch.setattr(model_class, "_keep_in_fp32_modules_strict", kept)
        yield


@cache
def whole(name: str, clip: float | None) -> list[list[float]]:
    return plain_losses(random_source(name), STEPS, clip=clip, dtype=BF16)


def dtypes_of(model: torch.nn.Module) -> dict[str, torch.dtype]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.dtype for name, tensor in named}


@pytest.mark.parametrize("name", sorted(CONFIGS | KEPT_IN_FP32))
def test_every_dtype_is_that_of_from_pretrained(name: str, tmp_path: Path) -> None:
    skip_unless_known(name)
    blank: Any = build_model(random_source(name))
    type(blank)._from_config(blank.config, dtype=torch.float32).save_pretrained(tmp_path)
    kept = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = dtypes_of(build_model(ModelSource(tmp_path, None, "pretrained", 0), dtype))
        assert found == dtypes_of(type(blank).from_pretrained(tmp_path, dtype=dtype))
        kept |= {name for name, _ in blank.named_parameters() if found[name] != dtype}
    assert bool(kept) == (name in {*KEPT_IN_FP32, "t5", "gpt2"})


def test_buffers_are_those_of_from_pretrained_too(tmp_path: Path) -> None:
    """gptj's angles come out wrong where they are computed in bf16, and only then rounded."""
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
    source = ModelSource(None, {"model_type": "gptj", **sizes}, "random", 0)
    blank: Any = build_model(source)
    type(blank)._from_config(blank.config, dtype=torch.float32).save_pretrained(tmp_path)
    expected = dict(type(blank).from_pretrained(tmp_path, dtype=BF16).named_buffers())
    found = dict(build_model(ModelSource(tmp_path, None, "pretrained", 0), BF16).named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.sampled
@pytest.mark.parametrize("how", ["cpu", "nvme", "eager", "speculative", "cached", "sweeps of one"])
@pytest.mark.parametrize("name", TRAINED)
def test_losses_are_those_of_plain_pytorch(name: str, how: str, tmp_path: Path) -> None:
    options = everything_on("cpu" if how == "cpu" else "nvme", tmp_path)
    if how == "cached":
        options = every_other_unit_cached(options)
    options = replace(
        options,
        speculate=how == "speculative",
        micro_batches_per_sweep=1 if how == "sweeps of one" else None,
    )
    clip = {"eager": None, "speculative": 9.0}.get(how, 1.0)
    engine = open_engine(random_source(name), options, dtype=BF16)
    found = engine_losses(engine, STEPS, clip=clip, eager=how == "eager")
    assert found == whole(name, clip)


def state_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of each field over all units."""
    sizes: dict[str, int] = {}
    for flat in (flat for unit in engine.units for flat in unit.flats):
        for field, extent in flat.at.items():
            sizes[field] = sizes.get(field, 0) + extent.num_bytes
    return sizes


@pytest.mark.parametrize("name", TRAINED)
def test_an_fp32_parameter_has_no_master(name: str) -> None:
    engine = open_engine(random_source(name), everything_on("cpu", Path()), dtype=BF16)
    narrow, wide = (
        sum(flat.numel for unit in engine.units for flat in unit.layout.flats if flat.dtype == dtype)
        for dtype in (BF16, torch.float32)
    )
    assert wide
    sizes = state_bytes(engine)
    assert sizes["params"] == 2 * narrow + 4 * wide
    assert sizes["remainder"] == 2 * narrow
    assert sizes["exp_avg"] == sizes["exp_avg_sq"] == 4 * (narrow + wide)
    dtypes = {name: param.dtype for name, param in engine.model.named_parameters()}
    assert {name: value.dtype for name, value in params_of(engine).items()} == dtypes
    engine.close()


@pytest.mark.parametrize("freeze", ["", "layers.1.mlp.gate"])
def test_a_checkpoint_goes_on_in_any_precision_and_is_exported(freeze: str, tmp_path: Path) -> None:
    nvme = everything_on("nvme", tmp_path / "nvme")
    opened: dict[str, Any] = {"dtype": BF16, "freeze": freeze}
    whole = engine_losses(open_engine(random_source("deepseek_v3"), nvme, **opened), STEPS)
    first = open_engine(random_source("deepseek_v3"), nvme, **opened)
    engine_losses(first, 2, close=False)
    trained = params_of(first)
    folder = save(first, tmp_path / "run", 2)
    first.close()
    layout = Manifest.load(folder).layout
    block = [region for region in layout.regions if region.unit == "model.layers.1"]
    split = {"param": "BF16", "remainder": "I16", "exp_avg": "F32", "exp_avg_sq": "F32"}
    more = {"frozen": "F32"} if freeze else {f"{field}.1": "F32" for field in split if field != "remainder"}
    assert {region.name: region.dtype for region in block} == {
        f"model.layers.1/{field}": dtype for field, dtype in {**split, **more}.items()
    }

    second = resumed(folder, "deepseek_v3", everything_on("cpu", tmp_path), **opened)
    assert engine_losses(second, STEPS, first=2) == whole[2:]
    wide = resumed(folder, "deepseek_v3", nvme, freeze=freeze)  # all of it fp32, and back
    states = {name: value.to(trained[name].dtype) for name, value in params_of(wide).items()}
    assert all(torch.equal(value, trained[name]) for name, value in states.items())
    again = save(wide, tmp_path / "fp32", 2)
    wide.close()
    third = resumed(again, "deepseek_v3", nvme, **opened)
    assert engine_losses(third, STEPS, first=2) == whole[2:]


def test_an_export_in_bf16_keeps_fp32_what_the_class_does(tmp_path: Path) -> None:
    source = random_source("deepseek_v3")
    engine = open_engine(source, everything_on("cpu", tmp_path), dtype=BF16)
    engine_losses(engine, 2, close=False)
    trained = params_of(engine)
    files = model_files(source, engine.model, None, print)
    CheckpointWriter(tmp_path / "run", engine, Ranks(), lambda: files, None).write(
        Position(2, "bf16", 6, "text", None, RECIPE)
    )
    engine.close()
    export(tmp_path / "run", tmp_path / "out", "bf16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert written["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    loaded: Any = type(engine.model).from_pretrained(tmp_path / "out", dtype=BF16)  # type: ignore[attr-defined]
    for name, param in loaded.named_parameters():
        assert torch.equal(param, trained[name]), name
