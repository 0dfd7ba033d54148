"""Says whether a model keeps the documents of a sequence apart, if it is given positions that begin anew with each.

transformers makes a mask of such positions (`position_ids` without an attention mask), which lets a token attend to its
own document only. Some classes make it. Others leave the positions out of their mask, or carry state from token to
token: then a document would see the one before it, and nothing would say so.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

KEEP_APART = {
    "AXK1ForCausalLM", "AXK2ForCausalLM", "Apertus1p5TextForCausalLM", "ApertusForCausalLM", "ArceeForCausalLM",
    "AriaTextForCausalLM", "BeamForCausalLM", "BitNetForCausalLM", "CTRLLMHeadModel", "CodeGenForCausalLM",
    "Cohere2ForCausalLM", "Cohere2MoeForCausalLM", "CohereCompassForCausalLM", "CohereForCausalLM",
    "CwmForCausalLM", "DbrxForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM",
    "DiffLlamaForCausalLM", "DoryForCausalLM", "Dots1ForCausalLM", "Dots3NoteForCausalLM", "Emu3ForCausalLM",
    "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM", "FlintForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM",
    "GPTNeoForCausalLM", "GPTNeoXForCausalLM", "GPTNeoXJapaneseForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3nForCausalLM", "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration", "Gemma4UnifiedForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM",
    "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "GlmForCausalLM", "GlmMoeDsaForCausalLM", "GraniteForCausalLM",
    "GraniteMoeForCausalLM", "GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteSWAForCausalLM",
    "HYV3ForCausalLM", "HYV4ForCausalLM", "HeliumForCausalLM", "HunYuanDenseV1ForCausalLM",
    "HunYuanMoEV1ForCausalLM", "HyperCLOVAXForCausalLM", "Jais2ForCausalLM", "JetMoeForCausalLM",
    "Kolibri1ForCausalLM", "LagunaForCausalLM", "Lfm2ForCausalLM", "LlamaForCausalLM", "LongcatFlashForCausalLM",
    "MellumForCausalLM", "MiMoV2FlashForCausalLM", "MiniCPM3ForCausalLM", "MiniMaxM2ForCausalLM",
    "Ministral3ForCausalLM", "MinistralForCausalLM", "Mistral4ForCausalLM", "MistralForCausalLM",
    "MixtralForCausalLM", "ModernBertDecoderForCausalLM", "NanoChatForCausalLM", "NemotronForCausalLM",
    "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM", "PersimmonForCausalLM",
    "Phi3ForCausalLM", "PhiForCausalLM", "PhimoeForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "SolarOpenForCausalLM",
    "StableLmForCausalLM", "Starcoder2ForCausalLM", "VaultGemmaForCausalLM", "YoutuForCausalLM",
}  # fmt: skip
"""Classes in which the loss of a document was found to be what it is alone, whatever its neighbours are: tests/zoo
compares each, and it was so with transformers 5.17 and 5.24. Models that join parts of any type are left out."""

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers whose mask follows from positions."""
_MASKS = ("sdpa", "eager")
"""Implementations of attention that take such a mask."""


def why_not_apart(model: nn.Module) -> str | None:
    """Why `model` does not keep documents apart. None if it does."""
    config: Any = model.config
    text = config.get_text_config()
    name = type(model).__name__
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION)
    if getattr(model, "_is_stateful", False) or others:
        return f"{name} carries state from token to token" + (f" ({', '.join(others)})" if others else "")
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(text, "alibi", False):
        return f"{name} takes no positions"
    if name not in KEEP_APART:
        return f"{name} attends across documents whatever positions it is given, or has not been tried"
    if text._attn_implementation not in _MASKS:
        return f"attention is {text._attn_implementation}, of which this has not been tried"
    return None
