"""Whether a model computes a document of a packed sequence as it does alone: the oracle of batches/apart.py."""

from __future__ import annotations

from typing import Any

import torch

from zinf_cli.models.model import ModelSource, build_model

LENGTHS = (5, 13, 10)
"""Of documents side by side; sliding windows and chunks of tests are 8 tokens long."""
SAME = 1e-5
"""Of logits, relative to the largest one: rounding in another order."""


def with_weights(source: ModelSource) -> Any:
    """A tiny model in evaluation mode, with weights that make attention sharp, so that every leak shows."""
    blank: Any = build_model(source)
    model = type(blank)._from_config(blank.config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1 and param.is_floating_point():
                param.copy_(0.3 * torch.randn(param.shape, generator=generator))
    return model


def difference(model: Any) -> float:
    """The largest difference of a logit between documents side by side and each by itself, relative to the largest."""
    ids = torch.randint(3, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = _logits(model, input_ids=ids, position_ids=positions).split(LENGTHS, dim=1)
    alone = [_logits(model, input_ids=part) for part in ids.split(LENGTHS, dim=1)]
    return max(float((one - two).abs().max() / two.abs().max()) for one, two in zip(packed, alone, strict=True))


@torch.no_grad()
def _logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(use_cache=False, **inputs).logits
    return logits.float().clamp(-1e4, 1e4)  # some mask tokens of images with the least number there is
