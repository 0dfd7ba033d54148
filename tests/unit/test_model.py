from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiny_models import CONFIGS, random_source, skip_unless_known
from zinf_cli.errors import ModelError
from zinf_cli.models.model import (
    ModelSource,
    _config_from_dict,
    _parameters_on_meta,
    build_model,
    refuse_made_of_weights,
)
from zinf_cli.models.model_files import config_of


def ordinary(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The same class and configuration, built by transformers alone with all its weights."""
    config = AutoConfig.for_model(**model.config.to_dict())
    built: PreTrainedModel = type(model)._from_config(config, dtype=dtype)
    return built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_buffers_are_real(name: str, dtype: torch.dtype) -> None:
    model = build_model(random_source(name), dtype)
    reference = ordinary(model, dtype)

    assert model.training
    shapes = {key: (p.shape, p.dtype, p.requires_grad) for key, p in reference.named_parameters()}
    assert {key: (p.shape, p.dtype, p.requires_grad) for key, p in model.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in model.parameters())

    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(reference.named_buffers()).keys()
    for key, buffer in reference.named_buffers():
        assert torch.equal(buffers[key], buffer.to(buffers[key].dtype)), key  # for dtypes, see test_kept_in_fp32.py


def test_tied_parameters_are_one_object() -> None:
    tied: Any = build_model(random_source("llama", tie_word_embeddings=True))
    untied: Any = build_model(random_source("llama", tie_word_embeddings=False))
    t5: Any = build_model(random_source("t5"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert t5.encoder.embed_tokens.weight is t5.shared.weight is t5.lm_head.weight


def test_caches_are_off_in_every_submodel() -> None:
    for name in ("llama", "t5", "mamba"):
        model = build_model(random_source(name))
        assert not any(getattr(m.config, "use_cache", False) for m in model.modules() if hasattr(m, "config"))


def test_building_leaves_torch_as_it_was() -> None:
    torch.manual_seed(1)
    state, register = torch.get_rng_state(), torch.nn.Module.register_parameter
    build_model(random_source("llama"), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.nn.Module.register_parameter is register
    assert torch.get_default_dtype() == torch.float32
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_the_class_comes_from_the_architectures_of_a_directory(tmp_path: Path) -> None:
    def class_of(**entries: object) -> str:
        config = {"model_type": "bert", **CONFIGS["bert"], **entries}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return type(build_model(ModelSource(tmp_path, None, "pretrained", 0))).__name__

    assert class_of(architectures=["BertForMaskedLM"]) == "BertForMaskedLM"
    # neither a bare backbone, which has no loss, nor a class transformers does not know
    assert class_of(architectures=["BertModel"], is_decoder=True) == "BertLMHeadModel"
    assert class_of(architectures=["SomeoneElsesBert"], is_decoder=True) == "BertLMHeadModel"
    assert type(build_model(random_source("t5"))).__name__ == "T5ForConditionalGeneration"


_TEXT = {**CONFIGS["llama"], "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_PARTS: dict[str, dict[str, Any]] = {
    "qwen3_5": {**_TEXT, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    "llama4": {**_TEXT, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "emu3": _TEXT,
}


@pytest.mark.parametrize("name", _PARTS)
def test_of_several_parts_the_language_model_is_trained_where_no_class_is_named(name: str, tmp_path: Path) -> None:
    config = {"model_type": name, "text_config": _PARTS[name]}
    source = ModelSource(None, config, "random", 0)
    model: Any = build_model(source)
    ordinary = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert type(model) is type(ordinary)
    assert {key: p.shape for key, p in model.named_parameters()} == {
        key: p.shape for key, p in ordinary.named_parameters()
    }
    ordinary.save_pretrained(tmp_path)
    for text in (config_of(source, model), json.dumps(ordinary.config.to_dict() | {"architectures": None})):
        (tmp_path / "config.json").write_text(text)
        assert type(build_model(ModelSource(tmp_path, None, "pretrained", 0))) is type(model)


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid", "mgp-str", "t5gemma2", "modernbert"])
def test_a_configuration_knows_its_own_keys_by_every_name(name: str) -> None:
    skip_unless_known(name)
    config = AutoConfig.for_model(name)
    settings = config.to_dict()
    renamed = {type(config).attribute_map.get(key, key): value for key, value in settings.items()}
    for known in (settings, renamed):
        assert type(_config_from_dict(known)) is type(config)
    with pytest.raises(ModelError, match="did you mean"):
        _config_from_dict({**settings, "initializer_rang": 1})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 32}, "model_type is missing"),
        ({"model_type": "lama"}, "lama"),
        ({"model_type": "llama", "hiden_size": 32}, "did you mean hidden_size?"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "hidden size"),
        ({"model_type": "llama", "hidden_act": "tanhh"}, "tanhh"),
        ({"model_type": "vit"}, "vit"),
    ],
)
def test_a_bad_config_is_named(config: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(ModelSource(None, config, "random", 0))
    assert said in caught.value.line()
    assert "\n" not in caught.value.line()


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    source = ModelSource(tmp_path, None, "pretrained", 0)
    with pytest.raises(ModelError, match=r"no config\.json"):
        build_model(source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not usable"):
        build_model(source)
    quantized = {"model_type": "llama", **CONFIGS["llama"], "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ModelError, match="quantized"):
        build_model(source)


@pytest.mark.parametrize("model_type", ["mine", "llama"])
def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, model_type: str) -> None:
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = {**CONFIGS["llama"], "model_type": model_type, "architectures": ["MineForCausalLM"], "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    source = ModelSource(tmp_path, None, "random", 0)
    if model_type == "llama":  # which transformers has itself
        assert type(build_model(source)).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(ModelError, match=r"config\.json names code of its own \(auto_map\)"):
            build_model(source)
    assert not (tmp_path / "ran").exists()


class KeepsAView(torch.nn.Module):
    """Of its own weight, in the way that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        view = self.linear.weight[:2]
        if how == "attribute":
            self.view = view
        elif how == "list":
            self.views = [view]
        elif how == "buffer":
            self.register_buffer("view", view.detach())
        else:
            self.same = [self.linear.weight]  # the parameter itself follows


@pytest.mark.parametrize(
    ("how", "said"), [("attribute", "attribute view"), ("list", "attribute views"), ("buffer", "buffer view")]
)
def test_what_is_made_of_a_weight_is_refused(how: str, said: str) -> None:
    with _parameters_on_meta():
        model = KeepsAView(how)
    with pytest.raises(ModelError, match=f"^{said} is made of a parameter"):
        refuse_made_of_weights(model)


def test_a_weight_in_a_list_is_none_of_it() -> None:
    with _parameters_on_meta():
        model = KeepsAView("itself")
    refuse_made_of_weights(model)
