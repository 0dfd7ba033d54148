#!/bin/sh
# Guess: a causal model of transformers that takes position_ids keeps packed documents apart, if positions begin anew with
# each document and there is no attention mask: the mask is made from them. What can't do so refuses them.
# Found: so do LlamaForCausalLM and Qwen3ForCausalLM. GptOssForCausalLM, AfmoeForCausalLM, OPTForCausalLM and
# XGLMForCausalLM take the same positions without a word, and a document sees the one before it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}
OLDER = {"vocab_size": 64, "max_position_embeddings": 64, "ffn_dim": 48}
KINDS = {
    "llama": SIZES,
    "qwen3": SIZES,
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "afmoe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1, "moe_intermediate_size": 16},
    "opt": {**OLDER, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "xglm": {**OLDER, "d_model": 32, "num_layers": 2, "attention_heads": 4},
}
first, second = torch.arange(3, 11)[None], torch.arange(20, 28)[None]
positions = torch.arange(8)[None]
apart = {}
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("largest difference between the logits of a document alone and behind another one")
for kind, sizes in KINDS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for param in model.parameters():
        if param.dim() > 1:  # so that attention matters
            torch.nn.init.normal_(param, std=0.3)
    with torch.no_grad():
        alone = model(input_ids=second, position_ids=positions, use_cache=False).logits
        both = torch.cat([first, second], 1), torch.cat([positions, positions], 1)
        packed = model(input_ids=both[0], position_ids=both[1], use_cache=False).logits[:, 8:]
    difference = float((alone - packed).abs().max())
    apart[kind] = difference < 1e-4
    print(f"{type(model).__name__} ({model.config._attn_implementation}): {difference:.2g}")
sys.exit(apart != {kind: kind in ("llama", "qwen3") for kind in KINDS})
PY
