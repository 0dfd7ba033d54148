"""Every model type of the installed transformers agrees with plain PyTorch, or is refused before training."""

from __future__ import annotations

import pytest

from zoo.compare import verdict
from zoo.shrink import model_types
from zoo.special import REFUSED


@pytest.mark.parametrize("model_type", model_types())
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_agrees_with_plain_pytorch(model_type: str) -> None:
    found = verdict(model_type)
    print(found.row(model_type))
    if model_type in REFUSED and found.kind == "refused":
        assert REFUSED[model_type] in found.why
    else:
        assert found.kind == "agrees", found.why
