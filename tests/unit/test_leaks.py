"""What layers leave where no argument and no result is: refused where a gradient would have to pass, or exact."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blocks import MODES, WIDTH, Block, Blocks, Mode, assert_exact, engine, make_batch
from zinf_cli.engine.compute.survey import survey
from zinf_cli.errors import ModelError
from zinf_cli.models.model import _parameters_on_meta

GLOBAL: list[torch.Tensor] = []
CONTEXT: ContextVar[list[torch.Tensor]] = ContextVar("parts")
Give = Callable[[torch.Tensor], torch.Tensor]
Use = Callable[[list[torch.Tensor]], Any]


class Leaving(Block):
    """Gives `given` of what it has made to `put`, by the number of the layer."""

    given: Give
    put: Callable[[int, torch.Tensor], None]

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.linear(x)
        self.put(self.number, self.given(hidden.square().mean()))
        return x + torch.tanh(hidden)


class Shelf(nn.Module):
    """Beside the layers; no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, torch.Tensor] = {}


class Collecting(Blocks):
    """Its loss depends on `use` of what the layers have left at `place`."""

    def __init__(self, place: str, given: Give, use: Use) -> None:
        super().__init__(Leaving)
        self.place, self.use = place, use
        self.parts: list[torch.Tensor] = []
        self.shelf = Shelf()
        enclosed: list[torch.Tensor] = []
        self.read: Callable[[], list[torch.Tensor]] = {
            "list of the root": lambda: self.parts,
            "global list": lambda: GLOBAL,
            "dict of another module": lambda: list(self.shelf.parts.values()),
            "context variable": lambda: CONTEXT.get(),
            "closure": lambda: enclosed,
        }[place]
        shelf = self.shelf.parts

        def put(number: int, part: torch.Tensor) -> None:
            if place == "dict of another module":
                shelf[number] = part
            elif place == "closure":
                enclosed.append(part)
            elif place == "context variable":
                CONTEXT.set([*CONTEXT.get(), part])
            elif place == "list of the root":
                self.parts.append(part)
            else:
                self.leave_in_global(part)

        for layer in self.layers:
            layer.given, layer.put = given, put  # type: ignore[assignment]

    def leave_in_global(self, part: torch.Tensor) -> None:
        GLOBAL.append(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CONTEXT.set([])
        self.read().clear()
        self.shelf.parts.clear()
        loss = super().forward(x)
        summed: torch.Tensor = loss + 0.1 * self.use(self.read())
        return summed


PLACES = ["list of the root", "global list", "dict of another module", "context variable", "closure"]
USES: dict[str, Use] = {
    "sum": sum,
    "stack": lambda parts: torch.stack(parts).mean(),
    "cat": lambda parts: torch.cat([part.reshape(1) for part in parts]).max(),
    "arithmetic": lambda parts: parts[0] * parts[1] - parts[2],
}


def detached(part: torch.Tensor) -> torch.Tensor:
    return part.detach()


def without_grad(part: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return part * 2


def whole(part: torch.Tensor) -> torch.Tensor:
    return part


def surveyed(model: nn.Module) -> None:
    survey(model, partial(model, torch.zeros((3, WIDTH), device="meta")), 1)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with _parameters_on_meta():
        return make()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("place", PLACES)
def test_a_gradient_that_would_have_to_pass_is_refused(place: str, use: str) -> None:
    with pytest.raises(ModelError, match=r"layers\.\d leaves the result of mean .*, and the model goes on with it"):
        surveyed(on_meta(partial(Collecting, place, whole, USES[use])))


class AsksForData(Collecting):
    """No dry forward comes to its end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert float(x.sum()) < 1e9
        return super().forward(x)


@pytest.mark.sampled
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_where_no_survey_sees_it_the_first_step_does(place: str, mode: Mode, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a layer leaves a tensor somewhere else"):
        assert_exact(partial(AsksForData, place, whole, USES["sum"]), mode, tmp_path)
    assert_exact(partial(AsksForData, place, detached, USES["sum"]), mode, tmp_path)


class TakesFromTheSide(Block):
    """What the layer before, or the model between, has left in `side`; and may leave its own there."""

    side: list[torch.Tensor]
    leaves = True
    given: Give

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.linear(x)
        result = x + torch.tanh(hidden + self.side[-1])
        if self.leaves:
            self.side[-1] = self.given(hidden.sin())
        return result


class Siding(Blocks):
    def __init__(self, *, leaves: bool, given: Give) -> None:
        super().__init__(TakesFromTheSide)
        self.given = given
        self.first = nn.Linear(WIDTH, WIDTH)
        self.side = [torch.zeros(())]
        for layer in self.layers:
            layer.side, layer.leaves, layer.given = self.side, leaves, whole  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.side[0] = self.given(self.first(x).cos())
        return super().forward(x)


def is_late(x: torch.Tensor) -> bool:
    """Whether it is one certain micro-batch of the third step. No dry forward sees it."""
    return not x.is_meta and torch.equal(x, make_batch(2, 1))


class UsesLate(Collecting):
    """Its layers always leave what they make; its loss depends on it once. Then, it takes it away (for some places)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CONTEXT.set([])
        loss = Blocks.forward(self, x)
        if is_late(x):
            loss = loss + 0.1 * self.use(self.read())
        self.read().clear()
        self.shelf.parts.clear()
        return loss


class LeavesLate(Siding):
    """Its layers take from the side what has a gradient once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = whole if is_late(x) else detached
        for layer in self.layers:
            layer.given = self.given  # type: ignore[assignment]
        return super().forward(x)


@pytest.mark.sampled
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_a_leak_on_a_way_that_the_survey_did_not_take_ends_the_run(place: str, mode: Mode, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a layer leaves a tensor somewhere else"):
        engine(partial(UsesLate, place, whole, sum), mode, tmp_path)
    assert_exact(partial(UsesLate, place, detached, sum), mode, tmp_path)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("leaves", [True, False])
def test_a_layer_that_once_takes_a_gradient_past_its_arguments(*, leaves: bool, mode: Mode, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes from somewhere else than its arguments"):
        engine(partial(LeavesLate, leaves=leaves, given=detached), mode, tmp_path)


@pytest.mark.sampled
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("given", [detached, without_grad])
@pytest.mark.parametrize("place", PLACES)
def test_a_statistic_without_a_gradient_is_exact(place: str, given: Give, mode: Mode, tmp_path: Path) -> None:
    assert_exact(partial(Collecting, place, given, USES["stack"]), mode, tmp_path)


@pytest.mark.sampled
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_what_the_loss_does_not_depend_on_is_exact(place: str, mode: Mode, tmp_path: Path) -> None:
    """A graph that is made of it, and a look at it, are no gradient."""

    def looked_at(parts: list[torch.Tensor]) -> Any:
        torch.stack(parts).sum()
        return sum(part.detach() for part in parts)

    assert_exact(partial(Collecting, place, whole, looked_at), mode, tmp_path)


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        (True, r"layers\.2 leaves the result of sin .*, and layers\.3 goes on with it there in add"),
        (False, r"layers\.3 takes the result of cos between the layers from somewhere else than its arguments"),
    ],
)
def test_a_layer_that_takes_a_gradient_past_its_arguments_is_refused(leaves: bool, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        surveyed(on_meta(partial(Siding, leaves=leaves, given=whole)))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_layer_may_take_what_has_no_gradient_from_anywhere(mode: Mode, tmp_path: Path) -> None:
    assert_exact(partial(Siding, leaves=False, given=detached), mode, tmp_path)
