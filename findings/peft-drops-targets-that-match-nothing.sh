#!/bin/sh
# Guess: a LoraConfig whose target_modules names a module that the model does not have is refused, or warned of.
# Found: it is refused only where no name matches at all. Where one does, the others are dropped without a word: with a
# misspelt k_proj beside q_proj, an adapter of half the size is trained.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}


def adapted(*names: str) -> set[str] | str:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    try:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(names)))
    except ValueError:
        return "refused"
    return {name.split(".lora_A")[0].rsplit(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}


print(f"peft {peft.__version__}, torch {torch.__version__}")
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    found = adapted("q_proj", "k_prj"), adapted("k_prj")
told = [str(one.message) for one in warned if "k_prj" in str(one.message)]
print("q_proj and k_prj:", found[0], "k_prj alone:", found[1], "warnings of k_prj:", len(told))
sys.exit((*found, told) != ({"q_proj"}, "refused", []))
PY
