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

DOTS3_NOTE = {
    "num_key_value_heads": 4, "head_dim": 16, "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"], "index_topk": 4, "index_n_heads": 4, "index_head_dim": 16,
    "per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8}},
}  # fmt: skip
GLM5_NEXT = {
    "num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0,
    "layer_types": ["linear_attention", "indexed_attention"],
    "mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full", "full"], "index_topk": 4, "index_kpool": 2,
    "index_n_heads": 4, "linear_num_heads": 4,
}  # fmt: skip
MISTRAL_LARGE4 = {
    "num_hidden_layers": 4, "num_key_value_heads": 4, "layer_types": ["indexed_attention"] * 4, "head_dim": 8,
    "kv_source_layers": [0, 1, 0, 1], "indexer_types": ["full", "full", "full", "shared"],
    "no_rope_layers": [1, 0, 1, 0],
    "mlp_layer_types": ["dense", "sparse"] * 2, "index_topk": 4, "index_n_heads": 4,
}  # fmt: skip
QWEN4_EXP = {
    "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 4, "indexer_kv_heads": 1,
    "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_layer_ids": [1],
    "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2, "eos_token_id": 2,
}  # fmt: skip

SPECIAL: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config.codebook_size": 16, "image_token_offset": 96, "audio_token_offset": 112,
        "audio_config.codebook_size": 16,
    },
    "blt": {
        "encoder_config.hidden_size_global": 32, "decoder_config.hidden_size_global": 32,
        "encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 64,
        "patcher_config.head_dim": 8, "decoder_config.head_dim": 8, "global_config.head_dim": 8,
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 120, "IMGIMGAZ": 121, "IMGIMGBZ": 122}, "vq_config.base_channels": 32,
        "vq_config.resolution": 32, "vq_config.num_embeddings": 8,
    },
    "cohere_compass": _of_text(COMPASS),
    "cohere_compass_text": COMPASS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_ocr2": {
        "text_config.num_experts_per_tok": 2, "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.moe_intermediate_size": 48,
    },
    "dory": {
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        **_of_text(DOTS3_NOTE), "vision_config.per_layer_config": {"1": {"num_local_experts": 2}},
        "vision_config.mlp_layer_types": ["dense", "sparse"], "vision_config.adapter_in_dim": 32,
        "vision_config.adapter_out_dim": 32,
        "audio_config.adapter_input_size": 32, "audio_config.adapter_out_dim": 32,
    },
    "dots3_note_text": DOTS3_NOTE,
    "emu3": {
        "vocabulary_map": {"<image>": 120, "<|extra_200|>": 121, "<|visual token 000000|>": 122},
        "vq_config.base_channels": 32, "vq_config.codebook_size": 1,
    },
    "encoder-decoder": {"pad_token_id": 0},
    "ernie4_5_vl_moe": {**_sections(1, 1, 2), "text_config.moe_intermediate_size": [48, 48]},
    "esm": {"vocab_size": 128, "mask_token_id": 5, "pad_token_id": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "funnel": {"initializer_std": 0.02},
    "gemma3n": _of_text(GEMMA3N),
    "gemma3n_text": GEMMA3N,
    "gemma4": _of_text(GEMMA4),
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "num_hidden_layers": 2, "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0, "layer_types": FULL,
        },
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified": _of_text(GEMMA4),
    "gemma4_unified_text": GEMMA4,
    "glm46v": _sections(2, 1, 1),
    "glm4v": _sections(2, 1, 1),
    "glm4v_moe": _sections(1, 1, 0, partial_rotary_factor=0.5),
    "glm5_next": _of_text(GLM5_NEXT),
    "glm_ocr": _sections(2, 1, 1),
    "glmga": _sections(2, 1, 1),
    "granite4_vision": {
        "downsample_rate": "1/2", "vision_config.hidden_size": 64, "qformer_config.encoder_hidden_size": 64,
        "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1],
    },
    "hunyuan_vl": {
        "text_config.head_dim": 8, "text_config.rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 16, "num_key_value_heads": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "mamba2": {"head_dim": 16, "num_heads": 4, "n_groups": 1, "time_step_rank": 4},
    "mistral4": {
        "num_key_value_heads": 4,
        "rope_parameters": {
            **ROPE, "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64
        },
    },
    "mistral_large4": _of_text(MISTRAL_LARGE4),
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "molmo2": {
        "adapter_config.vision_feature_layer": [1, 0], "adapter_config.text_hidden_size": 32,
        "vision_config.image_size": [28, 28], "vision_config.num_position_embeddings": 4,
    },
    "nemo_speechlm": {"text_config.n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "nemotron_h_omni": {"text_config.n_groups": 1},
    "neomme": {
        "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "embedding_rank": 16,
        "per_layer_config": {"1": {"sliding_window": None}},
    },
    "paddleocr_vl": _sections(2, 1, 1),
    "paligemma": {"text_config.use_bidirectional_attention": False},
    "perceiver": {"max_position_embeddings": 12, "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2},
    "qwen2_5_omni_thinker": _sections(2, 1, 1),
    "qwen2_5_vl": _sections(2, 1, 1),
    "qwen2_vl": _sections(2, 1, 1),
    "qwen4_exp": _of_text(QWEN4_EXP),
    "qwen4_exp_text": QWEN4_EXP,
    "reformer": {"axial_pos_shape": [4, 3], "axial_pos_embds_dim": [16, 16]},
    "step3p7": {"text_config.sliding_window": 8, "text_config.layer_types": FULL},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 5,
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_expand": 2, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4, "num_query_groups": 4, "adapter_rank": 8,
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""By model type: (dotted) fields and their values, after everything else."""

REFUSED = {
    "blip": "'pixel_values'",
    "blip-2": "'pixel_values'",
    "diffusion_gemma": "takes no labels",
    "fast_vlm": "timm library",
    "gemma3n": "timm library",
    "gemma4_assistant": "takes no labels",
    "gemma4_unified_assistant": "takes no labels",
    "git": "follows the tokens of an image",
    "ibert": "buffer ibert.embeddings.word_embeddings.weight_integer is made of a parameter",
    "idefics": "pixel_values",
    "inkling_mm_model": "No module named 'scipy'",
    "instructblip": "'pixel_values'",
    "instructblipvideo": "'pixel_values'",
    "kosmos-2": "`pixel_values`",
    "molmo2": "`mm_token_type_ids`",
    "musicgen": "predicts sound",
    "musicgen_melody": "predicts sound",
    "perception_lm": "timm library",
    "pi0": "takes no labels",
    "pix2struct": "takes no input_ids",
    "pp_formulanet": "pixel_values",
    "udop": "Bbox",
    "vision-encoder-decoder": "takes no input_ids",
    "voxtral_realtime": "input_features",
    "xlnet": "permuted orders",
}
"""By model type: why zinf does not train it, as it says; of a library that is not installed only where it is not."""
