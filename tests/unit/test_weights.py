from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from programs import command, environment
from programs.digest_of_weights import digest
from tiny_models import CONFIGS, batch, random_source, skip_unless_known
from zinf_cli.errors import CheckpointError
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.safetensors_files import SafetensorsFiles
from zinf_cli.models.weights import WeightSource, load_buffers, open_weights
from zoo.shrink import configs


def saved(
    name: str, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any
) -> PreTrainedModel:
    """An ordinary model of CONFIGS, its parameters and persistent buffers random, saved to `directory`."""
    blank: Any = build_model(random_source(name, **changes))
    model: PreTrainedModel = type(blank)._from_config(blank.config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    stored = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # a tied one once
    for tensor in stored.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def pretrained(directory: Path) -> ModelSource:
    return ModelSource(name_or_path=directory, config=None, init="pretrained", seed=0)


def groups(model: torch.nn.Module) -> list[list[str]]:
    """The parameter names: a list for each transformer block and for each module outside of the blocks."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        block = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        found.setdefault(".".join(parts[:block]), []).append(name)
    return list(found.values())


def read_all(weights: WeightSource, grouping: Iterable[list[str]]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for names in grouping for name, value in weights.read(names).items()}


def fill(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Put `values` in the place of the meta parameters, tied ones included."""
    filled = {id(p): torch.nn.Parameter(values[name]) for name, p in model.named_parameters()}
    for module in list(model.modules()):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, filled[id(parameter)])


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_read_group_by_group_is_the_one_from_pretrained_loads(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path, shard="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model: Any = build_model(pretrained(tmp_path))
    reference = type(model).from_pretrained(tmp_path, dtype=torch.float32)

    weights = open_weights(model, pretrained(tmp_path))
    assert all(parameter.is_meta for parameter in model.parameters())
    values = read_all(weights, groups(model))
    assert_equal(values, dict(reference.named_parameters()))

    load_buffers(model, pretrained(tmp_path))
    assert_equal(dict(model.named_buffers()), dict(reference.named_buffers()))

    fill(model, values)
    expected, found = reference(**batch()), model.eval()(**batch())
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtypes_are_kept(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    saved("mixtral", tmp_path, dtype=dtype, tie_word_embeddings=tied)
    model: Any = build_model(pretrained(tmp_path))
    reference = type(model).from_pretrained(tmp_path, dtype=dtype)
    values = read_all(open_weights(model, pretrained(tmp_path)), groups(model))
    assert {value.dtype for value in values.values()} == {dtype}
    assert_equal(values, dict(reference.named_parameters()))


def test_a_mixtral_as_it_is_published(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored
    model = build_model(pretrained(tmp_path))
    values = open_weights(model, pretrained(tmp_path)).read(["model.layers.0.mlp.experts.gate_up_proj"])
    gate_up = values["model.layers.0.mlp.experts.gate_up_proj"]
    prefix = "model.layers.0.block_sparse_moe.experts"
    for expert in range(4):
        halves = [stored[f"{prefix}.{expert}.{half}.weight"] for half in ("w1", "w3")]
        assert torch.equal(gate_up[expert], torch.cat(halves))


def test_tied_weights_may_be_stored_under_either_name_or_both(tmp_path: Path) -> None:
    saved("llama-tied", tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    model, embedding = build_model(pretrained(tmp_path)), stored["model.embed_tokens.weight"]

    def read() -> torch.Tensor:
        name = "model.embed_tokens.weight"
        return open_weights(model, pretrained(tmp_path)).read([name])[name]

    save_file(stored | {"lm_head.weight": embedding.clone()}, file)
    assert torch.equal(read(), embedding)
    del stored["model.embed_tokens.weight"]
    save_file(stored | {"lm_head.weight": embedding}, file)
    assert torch.equal(read(), embedding)
    save_file(stored | {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding + 1}, file)
    with pytest.raises(CheckpointError, match="values differ"):
        read()


def test_a_base_models_prefix_is_added(tmp_path: Path) -> None:
    gpt2 = saved("gpt2", tmp_path)
    gpt2.transformer.save_pretrained(tmp_path)  # without "transformer."; the head is tied, so nothing is missing
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "model.safetensors")
    model = build_model(random_source("gpt2"))
    values = read_all(open_weights(model, pretrained(tmp_path)), groups(model))
    assert_equal(values, dict(gpt2.named_parameters()))


def test_missing_extra_and_misshaped_tensors_are_told_at_once(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    del stored["model.norm.weight"]
    del stored["lm_head.weight"]
    stored["model.layers.0.input_layernorm.weight"] = torch.zeros(31)
    del stored["model.layers.1.block_sparse_moe.experts.3.w1.weight"]  # 3 gates do not go with 4 ups
    stored |= {f"adapter.{index}": torch.zeros(1) for index in range(12)}
    save_file(stored, file)
    model = build_model(pretrained(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_weights(model, pretrained(tmp_path))
    told = caught.value.line()
    assert str(tmp_path) in told
    assert "2 missing: lm_head.weight, model.norm.weight\n" in told
    assert "12 extra: adapter.0, adapter.1, " in told
    assert "adapter.9, ..." in told
    assert "adapter.10" not in told
    assert "2 misshaped: model.layers.0.input_layernorm.weight should be (32,) but is (31,), " in told
    assert "model.layers.1.mlp.experts.gate_up_proj can't be made of" in told


def test_a_model_without_its_head_is_missing_the_head(tmp_path: Path) -> None:
    saved("bert", tmp_path).bert.save_pretrained(tmp_path)
    model = build_model(random_source("bert"))
    with pytest.raises(CheckpointError, match=r"missing: cls\.predictions\.bias, "):
        open_weights(model, pretrained(tmp_path))


VALUE_HEAD = {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}
OLD_MASKS = {f"h.{n}.attn.masked_bias": torch.zeros(()) for n in range(2)}
NEXT_TOKENS = {f"model.mtp.layers.0.{part}.weight": torch.zeros(32) for part in ("norm", "proj")}


@pytest.mark.parametrize(("name", "extra"), [("llama", VALUE_HEAD), ("gpt2", OLD_MASKS), ("qwen3", NEXT_TOKENS)])
def test_tensors_without_a_place_are_named_and_left_out(
    name: str, extra: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    reference = saved(name, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | extra, file)
    model, notes = build_model(pretrained(tmp_path)), list[str]()
    values = read_all(open_weights(model, pretrained(tmp_path), notes.append), groups(model))
    assert_equal(values, dict(reference.named_parameters()))
    (told,) = notes
    assert told == f"{tmp_path}: left out, as {type(model).__name__} has no place for it: {', '.join(sorted(extra))}"


def test_tensors_that_tell_of_another_configuration_are_an_error(tmp_path: Path) -> None:
    """transformers would train the first half of the layers, or weights without their scales."""
    saved("mixtral", tmp_path, num_hidden_layers=4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"more of a list than the configuration says: model.layers.2, model.lay"):
        open_weights(build_model(pretrained(tmp_path)), pretrained(tmp_path))
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"scales of a quantized checkpoint: .*weight_scale_inv"):
        open_weights(build_model(pretrained(tmp_path)), pretrained(tmp_path))


def test_what_a_model_class_ignores_is_not_told(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    old_buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(load_file(file) | old_buffer, file)
    notes: list[str] = []
    open_weights(build_model(pretrained(tmp_path)), pretrained(tmp_path), notes.append)
    assert notes == []


def test_broken_files_are_named(tmp_path: Path) -> None:
    saved("llama", tmp_path, shard="20KB")
    model = build_model(pretrained(tmp_path))
    shards = sorted(tmp_path.glob("*.safetensors"))

    def told() -> str:
        with pytest.raises(CheckpointError) as caught:
            open_weights(model, pretrained(tmp_path))
        return caught.value.line()

    os.truncate(shards[1], shards[1].stat().st_size - 1)
    assert told().startswith(f"{shards[1]}: not a whole safetensors file")
    shards[2].unlink()
    assert f"1 of {len(shards)} shards are missing: {shards[2].name}" in told()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    assert "model.safetensors.index.json: not a safetensors index" in told()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "no model.safetensors and no model.safetensors.index.json" in told()
    (tmp_path / "pytorch_model.bin").touch()
    assert "save_pretrained" in told()


def test_memory_follows_the_group(tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
    source = ModelSource(None, {"model_type": "llama", **config}, "random", 0)
    model = build_model(source)
    directory = tmp_path / "big"
    directory.mkdir()
    save_file({name: torch.zeros(p.shape) for name, p in model.named_parameters()}, directory / "model.safetensors")
    weights = open_weights(model, pretrained(directory))
    num_bytes = (directory / "model.safetensors").stat().st_size
    before, peak = psutil.Process().memory_info().rss, 0
    for names in groups(model):
        values = [value + 1 for value in weights.read(names).values()]
        peak = max(peak, psutil.Process().memory_info().rss)
        del values
    assert peak - before < num_bytes / 4


@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights_do_not_depend_on_the_grouping(name: str) -> None:
    model = build_model(random_source(name))
    names = [name for name, _ in model.named_parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = read_all(open_weights(model, random_source(name)), [names])
    by_group = read_all(open_weights(model, random_source(name)), groups(model)[::-1])
    one_by_one = read_all(open_weights(model, random_source(name)), [[name] for name in names])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_equal({name: by_group[name] for name in names}, whole)
    assert_equal(one_by_one, whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights_have_the_models_own_distributions(name: str) -> None:
    model: Any = build_model(random_source(name))
    torch.manual_seed(0)
    ordinary = type(model)._from_config(model.config, dtype=torch.float32)
    values = read_all(open_weights(model, random_source(name)), groups(model))
    for parameter_name, expected in ordinary.named_parameters():
        found = values[parameter_name]
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        if parameter_name.endswith("A_log") or expected.std(correction=0) == 0:
            assert torch.equal(found, expected), parameter_name
            continue
        spread = expected.std()
        within = 6 * spread / expected.numel() ** 0.5
        assert abs(found.mean() - expected.mean()) < 1.5 * within, parameter_name
        assert abs(found.std() - spread) < within, parameter_name
        assert not torch.equal(found, expected)


def test_a_model_may_initialise_modules_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of a t5 for question answering draws its head with 1 / sqrt(d_model), a Linear with 1."""
    monkeypatch.setattr("zinf_cli.models.model.check_trainable", lambda *_: None)  # it is none, and draws no less
    source = random_source("t5", architectures=["T5ForQuestionAnswering"], d_model=64)
    drawn = open_weights(build_model(source), source).read(["qa_outputs.weight"])
    assert abs(drawn["qa_outputs.weight"].std() - 0.125) < 0.04


def test_blocks_and_seeds_draw_different_values() -> None:
    name = "model.layers.{}.mlp.up_proj.weight"
    model = build_model(random_source("llama"))
    first, second = open_weights(model, random_source("llama")).read([name.format(0), name.format(1)]).values()
    other_seed = open_weights(model, random_source("llama", seed=1)).read([name.format(0)])[name.format(0)]
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_seed)


def test_parameters_that_no_init_touches_are_as_the_model_builds_them() -> None:
    """openai-gpt draws its projections in `__init__`; data2vec zeroes a tied bias there."""
    gpt = {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    source = ModelSource(None, gpt, "random", 0)
    model = build_model(source)
    name = "transformer.h.1.attn.c_attn.weight"
    value = open_weights(model, source).read([name])[name]
    assert abs(value.std() - 0.02) < 0.002
    assert torch.equal(read_all(open_weights(model, source), groups(model))[name], value)

    source = ModelSource(None, {"model_type": "data2vec-text", **CONFIGS["llama"], "is_decoder": True}, "random", 0)
    model = build_model(source)
    assert not read_all(open_weights(model, source), groups(model))["lm_head.bias"].any()


def test_parametrized_weights_are_as_the_model_builds_them() -> None:
    """weight_norm, in the audio part of Apertus 1.5, makes a length and a direction of the weight that it replaces."""
    skip_unless_known("apertus1p5")
    source = ModelSource(None, next(configs("apertus1p5")), "random", 0)
    model = build_model(source)
    names = [name for name, _ in model.named_parameters() if "parametrizations" in name]
    values = open_weights(model, source).read(names)
    assert names
    for name in names:
        if name.endswith("original0"):
            direction = values[name.removesuffix("0") + "1"]
            assert torch.equal(values[name], torch.norm_except_dim(direction, 2, 0))
            assert values[name].min() > 0


def test_every_process_draws_the_same_values() -> None:
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not that of this process
    words, variables = command("digest_of_weights"), environment(PYTHONHASHSEED=seed)
    other = subprocess.run(words, env=variables, check=True, capture_output=True, text=True).stdout
    assert other.strip() == digest()


def test_a_pointer_in_place_of_weights_is_named_and_so_is_a_nan(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.tensor([1.0, float("nan")])}, tmp_path / "model.safetensors")
    assert SafetensorsFiles(tmp_path).not_finite() == "b"
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a pointer of Git LFS.*git lfs pull"):
        SafetensorsFiles(tmp_path)
