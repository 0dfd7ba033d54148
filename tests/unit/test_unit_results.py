"""What a unit returns, and what the model does with it: aliases, complex numbers, changes in place, hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from blocks import MODES, WIDTH, Block, Blocks, Mode, assert_exact, engine, on_meta, open_blocks
from zinf_cli.errors import ModelError


class ReturnsItsInput(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return x if self.number == 1 else x.view(-1).view(x.shape) if self.number == 2 else super().forward(x)


class ReturnsItsInputToo(Block):
    """As layers do that collect hidden states."""

    def forward(self, x: torch.Tensor) -> Any:
        return BaseModelOutput(super().forward(x), hidden_states=(x,))


class OfOutput(Blocks):
    def between(self, before: torch.Tensor, result: Any) -> torch.Tensor:
        return result.last_hidden_state + 0.1 * result.hidden_states[0]  # type: ignore[no-any-return]


class ReturnsComplex(Block):
    def forward(self, x: torch.Tensor) -> Any:
        result = super().forward(x.real if x.is_complex() else x)
        return torch.complex(result, result * 0.5)


class OfComplex(Blocks):
    def between(self, before: torch.Tensor, result: Any) -> torch.Tensor:
        return result * (1 + 0.5j) if result.is_complex() else result  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.between(x, layer(x))
        return x.abs().square().mean()


class ReturnsPlaces(Block):
    def forward(self, x: torch.Tensor) -> Any:
        result = super().forward(x)
        return result, result.argmax(-1), None


class OfPlaces(Blocks):
    def between(self, before: torch.Tensor, result: Any) -> torch.Tensor:
        x, places, _ = result
        return x + 0.1 * x.gather(-1, places[:, None])  # type: ignore[no-any-return]


class TakesHalves(Block):
    """Views of one tensor, and one tensor twice."""

    def forward(self, first: torch.Tensor, second: torch.Tensor, again: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(torch.cat([first, second], -1)) + again.sum()


class OfHalves(Blocks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            first, second = x.split(WIDTH // 2, -1)
            x = layer(first, second, second)
        return x.square().mean()


class ChangedInPlace(Blocks):
    def between(self, before: torch.Tensor, result: Any) -> torch.Tensor:
        return result.mul_(1.1).add_(0.1)  # type: ignore[no-any-return]


class HooksGradients(Blocks):
    def between(self, before: torch.Tensor, result: Any) -> torch.Tensor:
        if result.requires_grad:
            result.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
        return result  # type: ignore[no-any-return]


class Switches(Block):
    def forward(self, x: torch.Tensor) -> Any:
        self.linear.weight.requires_grad_(self.number % 2 == 0)
        return super().forward(x)


EXACT: dict[str, Callable[[], Blocks]] = {
    "input": lambda: Blocks(ReturnsItsInput),
    "input beside": lambda: OfOutput(ReturnsItsInputToo),
    "complex": lambda: OfComplex(ReturnsComplex),
    "integers": lambda: OfPlaces(ReturnsPlaces),
    "views": lambda: OfHalves(TakesHalves),
    "changed in place": ChangedInPlace,
}
REFUSED: dict[str, tuple[Callable[[], Blocks], str]] = {
    "an input that is changed": (lambda: ChangedInPlace(ReturnsItsInput), "changes a layer's result in place"),
    "a hook between layers": (HooksGradients, "hooks a gradient between its layers"),
    "requires_grad": (lambda: Blocks(Switches), "switches which of its parameters are trained"),
}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", EXACT)
def test_results_of_a_unit(kind: str, mode: Mode, tmp_path: Path) -> None:
    assert_exact(EXACT[kind], mode, tmp_path)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_train_to_other_numbers_is_refused(kind: str, mode: Mode, tmp_path: Path) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(ModelError, match=reason):
        engine(make, mode, tmp_path)


def test_a_hook_on_a_parameter_is_refused(tmp_path: Path) -> None:
    model = on_meta(Blocks())
    model.get_parameter("layers.0.linear.bias").register_hook(lambda grad: grad * 0.5)
    with pytest.raises(ModelError, match=r"layers\.0\.linear\.bias has a hook"):
        open_blocks(model, Mode(), tmp_path)
