"""Every language model type of the installed transformers, made tiny: by the names of its configuration's fields.

A configuration says by name what its numbers are: `hidden_size`, `d_model` and `n_embd` are widths, `num_experts`
counts experts. So one table of patterns shrinks them all, parts of a composite model (text, vision) like the whole.
Where the result does not train in plain PyTorch, the next of a few ways is tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from zoo.special import SPECIAL

VOCABULARY = 128
LAYERS = r"(encoder_|decoder_|num_)?(n_)?(hidden_|encoder_|decoder_|language_|text_)?n?_?layers?|n_layers?|depth"
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"pad_token_id", 0),
    (r"(bos|decoder_start|cls)_token_id", 1),
    (r"(eos|sep)_token_id", 2),
    (r"(bos_)?\w*(token_id|token_index)", VOCABULARY - 2),
    (r"(num_)?(local_|routed_|moe_)?n?_?(routed_)?experts?|n_experts|moe_num_experts|num_local_experts", 4),
    (r".*experts_per_tok(en)?|moe_top_?k|num_selected_experts|top_k_experts|moe_k|expert_top_k|router_top_k", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|num_expert_groups?", 1),
    (LAYERS, 2),
    (r"mamba_(n|num)_heads", 4),
    (r"mamba_(d_head|head_dim)", 16),
    (r"rotary_dim", 4),
    (r".*(key_value_heads|kv_heads|num_kv_heads|n_head_kv|query_groups)", 2),
    (r".*(attention_heads|num_heads|n_heads?|_heads|nhead)", 4),
    (r".*(kv_lora_rank|q_lora_rank|o_lora_rank|lora_rank)", 16),
    (r"qk_(nope|rope)_head_dim|v_head_dim|head_dim|d_kv|attention_head_size|.*_head_dim|global_head_dim", 8),
    (r".*(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|n_inner|mlp_dim|ffn_size|inner_dim)", 48),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|embed_proj_dim|emb_dim|dim|width)", 32),
    (r".*(max_position_embeddings|n_positions|max_seq_len|seq_length|n_ctx|max_source_positions|"
     r"max_target_positions|max_sequence_length)", 64),
    (r".*(sliding_window|attention_window|window_size|local_attention_size)", 8),
    (r".*(state_size|ssm_state_size|mamba_d_state|d_state)", 8),
    (r".*chunk_size", 8),
    (r"image_size|input_resolution", 28),
    (r"patch_size", 14),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", 0),
)  # fmt: skip
"""Patterns of whole field names, the first that matches counts; the numbers give heads of 8."""

AUTO = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
"""The kinds with a loss over tokens."""

LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers")
ROTARY = ("rope_scaling", "rope_parameters")
DROPPED = (
    *LAYER_KINDS, *ROTARY, "id2label", "label2id", "transformers_version", "dtype", "attn_layer_indices",
    "_attn_implementation",
)  # fmt: skip
"""Fields that follow from others: a configuration fills them in again."""


def model_types() -> list[str]:
    return sorted({name for names in AUTO for name in names})


def class_names(model_type: str) -> list[str]:
    """Of the classes that transformers trains this type with, one of a kind."""
    found = (names[model_type] for names in AUTO if model_type in names)
    return list(dict.fromkeys(names if isinstance(names, str) else names[0] for names in found))


def shrunk(entries: dict[str, Any], changes: dict[str, Any], keep: tuple[str, ...] = ()) -> dict[str, Any]:
    """`entries` of a configuration with every size that has a name of SIZES made small, in its parts too."""
    small: dict[str, Any] = {}
    layers = {value for name, value in entries.items() if re.fullmatch(LAYERS, name) and isinstance(value, int)}
    for name, value in entries.items():
        if name == "per_layer_config":
            small[name] = {"1": {"head_dim": 8}}
        elif isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
            small[name] = shrunk(value, changes, keep)
        elif name in changes:
            small[name] = changes[name]
        elif name in keep and isinstance(value, dict):
            small[name] = _small_rotation(value)
        elif isinstance(value, list) and len(value) in layers and len(value) > 2:
            small[name] = _two_of(value)
        elif name in keep or name not in DROPPED:
            small[name] = _shrunk_value(name, value)
    return small


def _small_rotation(rotation: dict[str, Any]) -> dict[str, Any]:
    """The settings of rotary positions, for heads of 8, as they are or by kind of layer."""
    small = {name: _small_rotation(value) if isinstance(value, dict) else value for name, value in rotation.items()}
    return {**small, **{name: [2, 1, 1] for name in ("mrope_section",) if name in small}}


def _two_of(per_layer: list[Any]) -> list[Any]:
    """The first two kinds there are, or two of the one kind."""
    kinds = list(dict.fromkeys(per_layer)) if all(isinstance(kind, str) for kind in per_layer) else per_layer
    return [_shrunk_value("intermediate_size", kind) if isinstance(kind, int) else kind for kind in (kinds * 2)[:2]]


def _shrunk_value(name: str, value: Any) -> Any:
    if isinstance(value, float) and re.search("drop", name):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return size if value or "token" in name or "dim" in name else value
    return value


WAYS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({}, ()),
    ({}, ROTARY),
    ({"num_key_value_heads": 4, "num_kv_heads": 4}, ()),
    ({}, (*LAYER_KINDS, *ROTARY)),
    ({"head_dim": 8, "num_key_value_heads": 2}, ROTARY),
    ({"head_dim": 16}, ()),
    ({"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "num_key_value_heads": 4}, ROTARY),
    ({"head_dim": 8, "num_key_value_heads": 4}, (*LAYER_KINDS, *ROTARY)),
    ({"num_hidden_layers": 4, "n_layer": 4, "num_layers": 4}, ()),
)
"""(changes to sizes, fields that are kept): tried in this order until plain PyTorch trains the model."""


def configs(model_type: str, name: str = "") -> Iterator[dict[str, Any]]:
    """Small configurations of a type for its class `name`, or the first: with `model_type` and `architectures`."""
    name = name or class_names(model_type)[0]
    for changes, keep in WAYS:
        try:
            entries = AutoConfig.for_model(model_type).to_dict()
        except Exception:  # its checks refuse its own default
            entries = {}
        small = shrunk(entries, changes, keep)
        if entries.get("is_encoder_decoder"):
            small["decoder_start_token_id"] = 1
        elif "is_decoder" in entries:
            small["is_decoder"] = name == AUTO[0].get(model_type)  # a causal class sees nothing of what comes
        for path, value in SPECIAL.get(model_type, {}).items():
            *parts, field = path.split(".")
            inner = small
            for part in parts:
                inner = inner[part]
            inner[field] = value
        yield {**small, "model_type": model_type, "architectures": [name]}
