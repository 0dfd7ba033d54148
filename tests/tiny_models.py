"""Configurations of the architectures zinf is tried on, two layers of width 32 each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from zinf_cli.models.model import ModelSource

_SIZE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_GEMMA = {**_LLAMA, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], **_TOKENS}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama-tied": {**_LLAMA, "model_type": "llama", "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS},
    "qwen3": {**_LLAMA, "head_dim": 8},
    "qwen3_moe": {**_LLAMA, "head_dim": 8, "num_experts": 4, **_EXPERTS},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "mistral": _LLAMA,
    "phi3": {**_LLAMA, **_TOKENS},
    "gpt_neox": {**_SIZE, "intermediate_size": 48, "max_position_embeddings": 64},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {**_SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "t5": {**_T5, "decoder_start_token_id": 0},
    "bert": {**_SIZE, "intermediate_size": 48, "architectures": ["BertForMaskedLM"]},
    "deepseek_v3": {
        **_LLAMA, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, **_EXPERTS,
    },
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip

_MOE = {**_LLAMA, "head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}

KEPT_IN_FP32: dict[str, dict[str, Any]] = {
    "deepseek_v3": CONFIGS["deepseek_v3"],
    "glm4_moe": {**_MOE, **_EXPERTS},
    "deepseek_v4": _LLAMA,
    "ernie4_5_moe": {**_LLAMA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "afmoe": {**_LLAMA, "head_dim": 8, "num_experts": 4, "num_dense_layers": 1, **_EXPERTS},
    "flint": _LLAMA,
    "gpt_oss": {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "rwkv": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}
"""Architectures that keep some parameters in fp32 where the others are bf16 or fp16: routers, sinks, norms."""

OTHER_HEADS: dict[str, dict[str, Any]] = {
    "cohere": {**_LLAMA, **_TOKENS},
    "phi": {**_LLAMA, "num_key_value_heads": 4, **_TOKENS},
}
"""Architectures that scale their logits, or have a bias there."""


def skip_unless_known(model_type: str) -> None:
    """Skip a test about a type that the installed transformers does not have: the oldest one has fewer."""
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {version('transformers')} has no {model_type}")


def random_source(name: str, seed: int = 0, **changes: Any) -> ModelSource:
    """The source of an architecture of these with random weights; `changes` override its settings."""
    config = {"model_type": name, **(CONFIGS | KEPT_IN_FP32 | OTHER_HEADS)[name], **changes}
    return ModelSource(name_or_path=None, config=config, init="random", seed=seed)


def batch() -> dict[str, torch.Tensor]:
    """Two sequences of 12 tokens with labels, for any of CONFIGS."""
    ids = torch.arange(24).reshape(2, 12) % 90 + 3
    return {"input_ids": ids, "labels": ids.clone()}


def save_word_tokenizer(
    folder: Path,
    words: Sequence[str],
    *,
    unk_token: str = "[UNK]",
    template: str | None = None,
    end: str = "",
    **special: str,
) -> None:
    """A tokenizer with a word a token, saved as checkpoints have it; `end` is a token that is put behind each text."""
    numbers = {word: number for number, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(numbers, unk_token=unk_token))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        raw.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, numbers[end])])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=unk_token, **special)
    fast.chat_template = template
    fast.save_pretrained(folder)


def dialog_template(end: str) -> str:
    """A chat template for words: each turn between who speaks and `end`."""
    turns = "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} END {% endfor %}"
    return turns.replace("END", end) + "{% if add_generation_prompt %}<bot> {% endif %}"


WORDS = ["<end>", "<user>", "<bot>", "one", "two", "three", "hello", "yes", "no", "[UNK]"]
"""What the fixture `tokenizer` of unit tests knows."""
WORD_TEMPLATE = dialog_template("<end>")


def dataset_for(name: str, folder: Path) -> dict[str, Any]:
    """A recipe's `dataset` that an architecture of CONFIGS learns from, written into `folder`: some 4000 tokens."""
    words = [f"w{number * 7 % 91}" for number in range(4000)]
    if name not in ("t5", "bert"):
        np.save(folder / "tokens.npy", np.arange(4000) * 7 % 91 + 3)
        return {"path": str(folder / "tokens.npy")}
    special = {"pad_token": "<pad>", "eos_token": "</s>", "mask_token": "[MASK]", "unk_token": "[MASK]"}
    save_word_tokenizer(folder / "tokenizer", ["<pad>", "</s>", "[MASK]", *sorted(set(words))], **special)
    lines = [" ".join(words[start : start + 16]) for start in range(0, 4000, 16)]
    path = folder / ("pairs.jsonl" if name == "t5" else "text.txt")
    path.write_text("\n".join(json.dumps({"source": line, "target": line}) if name == "t5" else line for line in lines))
    return {"path": str(path), "tokenizer": str(folder / "tokenizer")}
