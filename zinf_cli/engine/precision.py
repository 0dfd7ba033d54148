"""Precisions by their names."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names that recipes, profiles and export use."""
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16}
"""By the names that safetensors and model_state.py use."""
STORED_NAMES = {dtype: name for name, dtype in STORED.items()}
