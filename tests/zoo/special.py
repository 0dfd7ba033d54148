"""What the names of fields don't tell: settings of model types whose numbers depend on each other."""

from __future__ import annotations

from typing import Any

FULL = ["full_attention", "full_attention"]
SLIDING = ["sliding_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _of_text(settings: dict[str, Any]) -> dict[str, Any]:
    """The same for a model that has this one as its text part."""
    return {f"text_config.{name}": value for name, value in settings.items()}


def _sections(*sections: int, **more: float) -> dict[str, Any]:
    """Rotary positions of three dimensions: how many frequencies each has."""
    return {"text_config.rope_parameters": {**ROPE, **more, "mrope_section": list(sections)}}


COMPASS = {"layer_types": FULL, "rope_parameters": {"full_attention": ROPE}}
GEMMA3N = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48, "layer_types": SLIDING,
    "laurel_rank": 8, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
GEMMA4 = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "layer_types": SLIDING,
    "per_layer_config": {"1": {"head_dim": 8}, "3": {"head_dim": 8}},
}  # fmt: skip

SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass": _of_text(COMPASS),
    "cohere_compass_text": COMPASS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "encoder-decoder": {"pad_token_id": 0},
    "ernie4_5_vl_moe": {**_sections(1, 1, 2), "text_config.moe_intermediate_size": [48, 48]},
    "esm": {"vocab_size": 128, "mask_token_id": 5, "pad_token_id": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gemma3n": _of_text(GEMMA3N),
    "gemma3n_text": GEMMA3N,
    "gemma4": _of_text(GEMMA4),
    "gemma4_text": GEMMA4,
    "gemma4_unified": _of_text(GEMMA4),
    "gemma4_unified_text": GEMMA4,
    "glm46v": _sections(2, 1, 1),
    "glm4v": _sections(2, 1, 1),
    "glm4v_moe": _sections(1, 1, 0, partial_rotary_factor=0.5),
    "glm_ocr": _sections(2, 1, 1),
    "glmga": _sections(2, 1, 1),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 16, "num_key_value_heads": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "mamba2": {"head_dim": 16, "num_heads": 4, "n_groups": 1, "time_step_rank": 4},
    "mistral4": {
        "num_key_value_heads": 4,
        "rope_parameters": {
            **ROPE, "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64
        },
    },
    "nemo_speechlm": {"text_config.n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "nemotron_h_omni": {"text_config.n_groups": 1},
    "paddleocr_vl": _sections(2, 1, 1),
    "qwen2_5_omni_thinker": _sections(2, 1, 1),
    "qwen2_5_vl": _sections(2, 1, 1),
    "qwen2_vl": _sections(2, 1, 1),
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 3], "axial_pos_embds_dim": [16, 16]},
    "step3p7": {"text_config.sliding_window": 8, "text_config.layer_types": FULL},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 5,
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""By model type: (dotted) fields and their values, after everything else."""
