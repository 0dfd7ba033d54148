"""train.deterministic reaches torch before the device is used, for the forward and for autograd's threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from in_process import run
from tiny_recipes import recipe_of
from zinf_cli.plan.search import best_plan
from zinf_cli.train import loop, rank_batches
from zinf_cli.train.figures import find_figures
from zinf_cli.train.setup import model_loss

pytestmark = pytest.mark.usefixtures("own_folders", "stated_speed")


@pytest.fixture
def torch_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = filled
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("asked", [True, False])
def test_the_request_is_there_wherever_the_model_computes(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_as_before: None
) -> None:
    seen: list[tuple[str, bool]] = []
    opened, really = loop._device, model_loss

    def noted(where: str) -> None:
        seen.append((where, torch.are_deterministic_algorithms_enabled()))

    def device(plan: Any) -> torch.device:
        noted("device")
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == asked
        return opened(plan)

    def loss(*given: Any, **named: Any) -> torch.Tensor:
        noted("forward")
        found = really(*given, **named)
        if found.requires_grad:
            found.register_hook(lambda _: noted("backward"))
        return found

    monkeypatch.setattr(loop, "_device", device)
    monkeypatch.setattr(rank_batches, "loss_of", lambda recipe, model: loss)
    recipe = recipe_of(tmp_path, "llama")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"deterministic": asked})})
    run(recipe, best_plan(recipe, find_figures(recipe, 1)))
    assert set(seen) == {("device", asked), ("forward", asked), ("backward", asked)}
