"""The learning rate over the steps."""

from __future__ import annotations

import pytest
import torch

from zinf_cli.recipe.recipe import LrScheduler, Optimizer, Recipe
from zinf_cli.train.schedule import learning_rate


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    ("name", "least"),
    [("constant", 0), ("linear", 0), ("cosine", 0), ("cosine", 0.1), ("wsd", 0), ("wsd", 0.1), ("inverse_sqrt", 0)],
)
def test_the_learning_rate_is_transformers(name: str, least: float, warmup: int) -> None:
    from transformers import get_scheduler

    given = {"name": name, "warmup_steps": warmup, "decay_steps": 6, "min_lr_ratio": least}
    recipe = Recipe.model_construct(  # type: ignore[call-arg]
        optimizer=Optimizer(lr=3e-4), lr_scheduler=LrScheduler.model_validate(given)
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    kind = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}.get(name, name)
    more = {"num_decay_steps": 6, "min_lr_ratio": least} if name == "wsd" else {}
    if name == "cosine" and least:
        kind, more = "cosine_with_min_lr", {"min_lr_rate": least}
    scheduler = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=20, scheduler_specific_kwargs=more
    )
    for step in range(20):
        assert learning_rate(recipe, step, 20) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
