"""Tiny models of classes that the configurations in tiny_models.py do not reach: named by class, with weights."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig

from tiny_models import CONFIGS, random_source
from zinf_cli.models.model import build_model

SIZE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
PAIR = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
PAIR |= {
    f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("attention_heads", 4), ("ffn_dim", 48))
}
PAIR |= {"max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 2}
PROPHET = {"vocab_size": 96, "hidden_size": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2}
PROPHET |= {
    f"num_{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))
}
PROPHET |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}
XLM = {"vocab_size": 96, "emb_dim": 32, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BartForConditionalGeneration": ("bart", PAIR),
    "BartForCausalLM": ("bart", PAIR),
    "MBartForConditionalGeneration": ("mbart", PAIR),
    "BlenderbotForConditionalGeneration": ("blenderbot", PAIR),
    "BlenderbotForCausalLM": ("blenderbot", PAIR),
    "ProphetNetForConditionalGeneration": ("prophetnet", PROPHET),
    "ProphetNetForCausalLM": ("prophetnet", PROPHET),
    "XLMWithLMHeadModel": ("xlm", XLM),
    "FlaubertWithLMHeadModel": ("flaubert", {**XLM, "causal": True}),
    "ModernBertForMaskedLM": ("modernbert", {**SIZE, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}),
    "RobertaForMaskedLM": ("roberta", SIZE),
    "RobertaForCausalLM": ("roberta", {**SIZE, "is_decoder": True}),
    "RwkvForCausalLM": ("rwkv", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}),
    "FSMTForConditionalGeneration": (
        "fsmt",
        {**PAIR, "src_vocab_size": 96, "tgt_vocab_size": 96, "langs": ["en", "de"], "forced_eos_token_id": None},
    ),
}


def real(name: str) -> Any:
    """A tiny model with weights, in evaluation mode."""
    if name in CONFIGS:
        blank: Any = build_model(random_source(name))
        built = type(blank)._from_config(blank.config)
    else:
        model_type, config = OTHERS[name]
        built = getattr(transformers, name)._from_config(AutoConfig.for_model(model_type, **config))
    return built.eval()
