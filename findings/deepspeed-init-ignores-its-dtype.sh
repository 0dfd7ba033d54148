#!/bin/sh
# Guess: deepspeed.zero.Init(dtype=torch.float32) makes fp32 parameters on every CPU.
# Found: on a CPU for which oneDNN has no fp16 they are bf16, whatever dtype is asked for. Without dtype, and with a
# configuration that enables neither fp16 nor bf16, they are fp32 on both. DeepSpeed converts an ordinary model this way,
# with its dtype, when parameters are offloaded: so an fp32 model whose parameters lie on NVMe stops at the first Linear,
# which gets inputs in fp32 and weights in bf16.
# ONEDNN_MAX_CPU_ISA=AVX2 makes oneDNN leave out what a newer x86 CPU has. Needs g++ and Python's headers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools wheel numpy
DS_BUILD_OPS=0 "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
cat > "$folder/init.py" <<'PY'
import sys

import deepspeed
import torch

rendezvous = f"file://{sys.argv[1]}"
torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(dtype=torch.float32, config_dict_or_path=config):
    asked = torch.nn.Linear(4, 4)
with deepspeed.zero.Init(config_dict_or_path=config):
    left = torch.nn.Linear(4, 4)
fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
print(f"fp16 in oneDNN: {fp16}; dtype=torch.float32: {asked.weight.dtype}; no dtype: {left.weight.dtype}", file=sys.stderr)
sys.exit((asked.weight.dtype, left.weight.dtype) != (torch.float32 if fp16 else torch.bfloat16, torch.float32))
PY
export DS_ACCELERATOR=cpu LOCAL_RANK=0 LOCAL_SIZE=1 TORCH_EXTENSIONS_DIR="$folder/operators" PATH="$folder/venv/bin:$PATH"
"$folder/venv/bin/python" -c 'import deepspeed, torch; print("deepspeed", deepspeed.__version__, "torch", torch.__version__)' | tail -1
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/init.py" "$folder/one" > /dev/null
"$folder/venv/bin/python" "$folder/init.py" "$folder/two" > /dev/null
