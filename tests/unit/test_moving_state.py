"""What a forward changes in the model itself: every call, and every recompute, finds what plain PyTorch's finds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from accelerator_on_cpu import checking
from blocks import MODES, WIDTH, Block, Blocks, Mode, assert_exact, engine, open_blocks
from happens_before import Checker
from own_processes import as_ranks
from zinf_cli.engine.compute.moving_state import MovingState
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.errors import ModelError
from zinf_cli.models.model import _parameters_on_meta
from zinf_cli.tiers import streams


class WithBuffer(Block):
    """An average that its own updates read, the way `how` names."""

    how = "in place"

    def begin(self) -> None:
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.mean: torch.Tensor

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.linear(x)
        result = x + torch.tanh(hidden * (1 + self.mean))
        if self.how == "bound anew":
            self.mean = self.mean * 0.9 + hidden.detach().mean(0) * 0.1
        else:
            kept = self.mean.data if self.how == "past autograd" else self.mean.detach()
            kept.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return result


class WithBatchNorm(Block):
    def begin(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.tanh(self.norm(self.linear(x)))


class WithWeightNorm(Block):
    def begin(self) -> None:
        self.linear = nn.utils.parametrizations.weight_norm(self.linear)


class Balanced(Block):
    """A router's bias, which the model moves by what the layers have seen."""

    def begin(self) -> None:
        self.register_buffer("bias", torch.zeros(WIDTH))
        self.bias: torch.Tensor
        self.load = torch.zeros(WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.linear(x) + self.bias
        self.load = hidden.detach().sign().mean(0)
        return x + torch.tanh(hidden)


class Balancing(Blocks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x)
        for layer in self.layers:
            assert isinstance(layer, Balanced)
            layer.bias -= 0.1 * layer.load
        return loss


class Counting(Block):
    calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return x + torch.tanh(self.linear(x)) * (1 + 0.1 * (self.calls % 3))


class CountingForAll(Block):
    """In the class, and in a list of it."""

    calls = 0
    seen: list[float] = []  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> Any:
        CountingForAll.calls += 1
        self.seen.append(self.calls % 3)
        return x + torch.tanh(self.linear(x)) * (1 + 0.1 * self.seen[-1] * (len(self.seen) % 2))


class CountsOutside(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[float]] = {"first": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x * (1 + sum(self.seen["first"][-2:])))
        self.seen["first"].append(loss.item() % 1)
        return loss


class Told(Block):
    """Computes as a number tells that all layers and the model share."""

    told: list[int]
    counts = False

    def forward(self, x: torch.Tensor) -> Any:
        self.told[0] += self.counts
        return x + torch.tanh(self.linear(x)) * (1 + 0.1 * self.told[0])


class TellsAndTakesBack(Blocks):
    """At its end the number is what it was at its beginning."""

    def __init__(self, *, counts: bool) -> None:
        super().__init__(Told)
        self.told, self.counts = [0], counts
        for layer in self.layers:
            layer.told, layer.counts = self.told, counts  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if not self.counts:
                self.told[0] = int(number < 2)
            x = layer(x)
        self.told[0] = 0
        return x.square().mean()


LAST: dict[str, torch.Tensor] = {}


class InGlobal(Block):
    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.linear(x)
        result = x + torch.tanh(hidden) * (1 + 0.3 * LAST.get("hidden", torch.zeros(())).to(x.device))
        LAST["hidden"] = hidden.detach()
        return result


class TellsTheNext(Block):
    def begin(self) -> None:
        self.scale = torch.ones(())
        self.next: list[TellsTheNext] = []

    def forward(self, x: torch.Tensor) -> Any:
        result = x + self.scale.to(x.device) * torch.tanh(self.linear(x))
        self.next[0].scale = result.detach().mean()
        return result


class RingOfBlocks(Blocks):
    def __init__(self) -> None:
        super().__init__(TellsTheNext)
        for number, layer in enumerate(self.layers):
            layer.next = [self.layers[(number + 1) % len(self.layers)]]  # type: ignore[assignment]


class Draws(Block):
    """Random numbers that torch's default generator has no part in."""

    source = "python"

    def begin(self) -> None:
        self.own = {
            "python": random,
            "numpy": np.random,
            "own": random.Random(self.number),
            "own of numpy": np.random.default_rng(self.number),
        }.get(self.source)
        self.generator = torch.Generator().manual_seed(self.number)

    def forward(self, x: torch.Tensor) -> Any:
        drawn = torch.rand(WIDTH, generator=self.generator) if self.own is None else self.own.random()  # type: ignore[attr-defined]
        return x + torch.tanh(self.linear(x)) * (0.5 + torch.as_tensor(drawn, dtype=x.dtype).to(x.device))


def _with(kind: type[Block], **settings: Any) -> Callable[[], Blocks]:
    return lambda: Blocks(type(kind.__name__, (kind,), settings))


def _counted_for_all() -> Blocks:
    CountingForAll.calls = 0
    CountingForAll.seen.clear()
    return Blocks(CountingForAll)


def _with_global() -> Blocks:
    LAST.clear()
    return Blocks(InGlobal)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: Blocks(WithBatchNorm),
    "weight norm": lambda: Blocks(WithWeightNorm),
    "buffer": lambda: Blocks(WithBuffer),
    "buffer, past autograd": _with(WithBuffer, how="past autograd"),
    "buffer, bound anew": _with(WithBuffer, how="bound anew"),
    "buffer that the model changes": lambda: Balancing(Balanced),
    "counter": lambda: Blocks(Counting),
    "counter of the class": _counted_for_all,
    "counter between layers": CountsOutside,
    "global": _with_global,
    "attribute of another layer": RingOfBlocks,
    "counter that is set back": lambda: TellsAndTakesBack(counts=True),
    "flag for the first half": lambda: TellsAndTakesBack(counts=False),
    **{
        f"random: {source}": _with(Draws, source=source)
        for source in ("python", "numpy", "own", "own of numpy", "torch")
    },
}


@pytest.mark.sampled
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_forward_changes_is_what_plain_pytorch_has(kind: str, mode: Mode, tmp_path: Path) -> None:
    assert_exact(KINDS[kind], mode, tmp_path)


class MadeOnce(Block):
    """What is made when it is first needed, as tables of rotations are."""

    def begin(self) -> None:
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, WIDTH, device=x.device)
        return x + torch.tanh(self.linear(x)) * self.table


def test_what_moves_once_shares_sweeps_again(tmp_path: Path) -> None:
    with _parameters_on_meta():
        model = Blocks(MadeOnce)
    opened = open_blocks(model, Mode(), tmp_path)
    reads = []
    for step in range(4):
        work = [MicroBatch(lambda: model(torch.ones(3, WIDTH)), 0.5, number) for number in range(2)]
        opened.train_step(work, AdamW(1e-3), more=step < 3)
        reads.append(len(opened._dealer.deal(work)))
    opened.close()
    assert reads == [2, 1, 1, 1]


def test_what_has_not_moved_is_compared_and_not_copied_again() -> None:
    model = Blocks(WithBuffer)
    state = MovingState(model)
    state.begin()
    before = dict(state._states)
    assert not state.notices()
    state.begin()
    assert all(
        state._states[key][1] is copy for key, (owner, copy) in before.items() if isinstance(owner, torch.Tensor)
    )
    next(model.buffers()).data[0] = -0.0
    assert state.notices()
    assert state.moving == {("layers.0", "mean")}


CHANGES: dict[str, Callable[[Any], object]] = {
    "another value": lambda kept: kept["a dict"].update(b=3),
    "another key": lambda kept: kept["a dict"].update(c=kept["a dict"].pop("b")),
    "another order": lambda kept: kept["a dict"].update(a=kept["a dict"].pop("a")),
    "an item more": lambda kept: kept["a list"].append(None),
    "another item": lambda kept: kept["a list"].__setitem__(0, True),
    "of a set": lambda kept: (kept["a set"].discard(1), kept["a set"].add(3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_list_dict_or_set_is_seen(change: str) -> None:
    kept: dict[str, Any] = {"a dict": {"a": 1, "b": 2}, "a list": [1, 2], "a set": {1, 2}}
    model = Blocks()
    vars(model).update(kept)
    state = MovingState(model)
    for _ in range(2):
        state.begin()
        state.look()
        assert not state.moved
    CHANGES[change](kept)
    state.look()
    assert len(state.moved) == 1
    state.put_back()
    assert kept == {"a dict": {"a": 1, "b": 2}, "a list": [1, 2], "a set": {1, 2}}
    assert list(kept["a dict"]) == ["a", "b"]


class Answers(TorchDispatchMode):
    """Counts what a CPU would wait for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_on_an_accelerator_one_answer_tells_whether_anything_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(streams.implementations, "cpu", Checker())
    model = Blocks(WithBuffer)
    state = MovingState(model)
    buffers = list(model.buffers())
    with Answers() as answers:
        state.begin()
        state.look()
        assert answers.count == 0
        assert not state.notices()
        assert answers.count == 1
        state.begin()
        buffers[0].data[0] = -0.0  # which no count of changes shows
        buffers[1].data[0] = float("nan")
        state.look()
        buffers[0].data.zero_()
    assert state.notices()
    assert state.moving == {("layers.0", "mean"), ("layers.1", "mean")}
    state.put_back()
    assert not any(buffer.any() for buffer in buffers)


@pytest.mark.parametrize("kind", ["buffer, past autograd", "buffer, bound anew", "batch norm"])
def test_on_an_accelerator_it_is_what_plain_pytorch_has(kind: str, tmp_path: Path) -> None:
    with checking(Checker()):
        assert_exact(KINDS[kind], Mode(), tmp_path)


def test_the_dry_forward_moves_nothing(tmp_path: Path) -> None:
    with _parameters_on_meta():
        model = Blocks(Counting)
    open_blocks(model, Mode(), tmp_path).close()
    assert [layer.calls for layer in model.layers] == [0] * 4
    assert (
        engine(KINDS["random: torch"], Mode(), tmp_path).losses
        == engine(KINDS["random: torch"], Mode(keep=True), tmp_path).losses
    )


def trained(ranks: Ranks, folder: Path, kind: type[Block]) -> tuple[int, str]:
    """Train four steps: how many are done, and why no more."""
    with _parameters_on_meta():
        model = Blocks(kind)
    opened = open_blocks(model, Mode(), folder / str(ranks.rank), ranks)
    done, why = 0, ""
    try:
        for step in range(4):
            batch = torch.full((3, WIDTH), float(1 + ranks.rank + step))
            work = [MicroBatch(lambda batch=batch: model(batch), 0.25, number) for number in range(2)]  # type: ignore[misc]
            opened.train_step(work, AdamW(1e-3), more=step < 3)
            done += 1
    except ModelError as error:
        why = error.line()
    opened.close()
    return done, why


@pytest.mark.parametrize("kind", [WithBuffer, MadeOnce])
def test_of_several_ranks_what_moves_in_every_step_is_refused(kind: type[Block], tmp_path: Path) -> None:
    """Plain PyTorch's order is one after the other; ranks have none. What moves once may."""
    why = "the model's forward changes layers.0.mean in every step, on each rank in its own way (train it on one rank)"
    assert as_ranks(2, trained, tmp_path, kind) == [(4, "") if kind is MadeOnce else (1, why)] * 2
