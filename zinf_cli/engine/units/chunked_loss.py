"""The cross-entropy of a head's logits, computed for a chunk of tokens at a time (loss_chunks.py says where).

Let x be a token's logits, y its label and m the largest of x. Its loss is log Σ exp(x - m) - (x[y] - m), and the
gradient of that is softmax(x), less 1 at y.

A head in one piece gives the loss of a micro-batch. Where its backward follows in the same visit, each chunk's
gradients are taken while its logits are there, for a loss that is scaled as the micro-batch's is. Backward corrects the
scale if the model does more with the loss. So logits are computed once. Elsewhere backward computes them again.

Of a head in tiles, each tile gives three numbers a token: m and log Σ exp(x - m) of its own rows, and x[y] - m if y is
one of them. `joined` makes the loss of these. What it hands back is each token's share of the gradient in each tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from zinf_cli.engine.units.weight_grads import adds_products
from zinf_cli.model_state import DEVICE_LOGITS, MAPPED
from zinf_cli.tiers.streams import streams_of

CHUNK = 1 << 25
"""Logits that are computed at a time. With half as many, of a vocabulary of 128K, products of 128 tokens took a quarter
longer than those of all tokens."""

Operation = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]
"""A function of each logit, and its further arguments."""
Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of a tile, fp32 [tokens]: log Σ exp(x - m), x[y] - m or 0, and m."""


@dataclass(frozen=True)
class _Backward:
    scale: float
    results_wanted: bool


_following: _Backward | None = None


@contextmanager
def backward_follows(scale: float, *, results_wanted: bool = True) -> Iterator[None]:
    """A context for a forward whose backward comes in the same visit, of a loss that is then multiplied by `scale`.

    Without `results_wanted`, only the graph of that forward is used.
    """
    global _following
    _following = _Backward(scale, results_wanted)
    try:
        yield
    finally:
        _following = None


def more_than_a_chunk(num_logits: int) -> bool:
    return num_logits > CHUNK


def after_operations(logits: torch.Tensor, operations: Sequence[Operation]) -> torch.Tensor:
    """`logits` after what the model does to each of them."""
    for func, args in operations:
        logits = func(logits, *args)
    return logits


def loss_in_chunks(
    weight: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    operations: tuple[Operation, ...],
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What a whole head computes of the loss: a scalar of `dtype`, added up in fp32.

    weight [vocabulary, width], hidden [tokens, width], bias [vocabulary], target int64 [tokens]; reduction mean or sum.
    """
    scale = _following.scale if _following is not None and torch.is_grad_enabled() else None
    loss: torch.Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        weight, hidden, bias, target, operations, ignore_index, reduction, dtype, scale
    )
    return loss


def sums_in_chunks(
    weight: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    operations: tuple[Operation, ...],
    first: int,
) -> Sums:
    """What a tile, with rows of the head from `first` on, computes of the loss. Arguments as of `loss_in_chunks`."""
    wanted = _following is None or _following.results_wanted
    sums: Sums = _SumsOfTile.apply(weight, hidden, bias, target, operations, first, wanted)  # type: ignore[no-untyped-call]
    return sums


def joined(
    tiles: Sequence[Sums],
    ranges: Sequence[tuple[int, int]],
    target: torch.Tensor,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The loss, of the sums of all tiles; `ranges` are their rows."""
    learns = target != ignore_index
    known = (target >= 0) & (target < ranges[-1][1])
    torch._assert_async((known | ~learns).all(), "a label is not in the vocabulary")
    own = [highest.detach() for _, _, highest in tiles]
    highest = torch.stack(own).amax(0)
    log_sum = torch.stack([sums[0] + (m - highest) for sums, m in zip(tiles, own, strict=True)]).logsumexp(0)
    labelled = torch.zeros_like(log_sum)
    for sums, m, (first, last) in zip(tiles, own, ranges, strict=True):
        labelled = torch.where((target >= first) & (target < last), sums[1] + (m - highest), labelled)
    loss = torch.where(learns, log_sum - labelled, 0.0).sum()
    return (loss / _divisor(learns, reduction)).to(dtype)


def temporary_bytes(args: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> tuple[int, int]:
    """What a call of a tile with `args` takes at its peak beside its arguments, and how much of that malloc maps by
    itself; 0, 0 if the call is not for the loss.

    The tile's weight has `shape` and `dtype`. It takes logits and their softmax, what operations make of logits, the
    gradient of the input, and, of a 16-bit weight, the gradient that a chunk adds to the sum.
    """
    if not args or args[0] not in (loss_in_chunks, sums_in_chunks):
        return 0, 0
    hidden: torch.Tensor = args[2]
    operations: tuple[Operation, ...] = args[5]
    logits = min(len(hidden), _rows_of_a_chunk(shape[0])) * shape[0]
    each = 8 + (2 * dtype.itemsize + 4 * len(operations) if operations or dtype != torch.float32 else 0)
    more = 0 if dtype == torch.float32 else math.prod(shape) * dtype.itemsize
    mapped = logits * each if logits * dtype.itemsize >= MAPPED else 0
    return logits * each + 2 * hidden.numel() * dtype.itemsize + more, mapped


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        hidden: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        operations: tuple[Operation, ...],
        ignore_index: int,
        reduction: str,
        dtype: torch.dtype,
        scale: float | None,
    ) -> torch.Tensor:
        learns = target != ignore_index
        divisor = _divisor(learns, reduction)
        ctx.operations, ctx.ignore_index, ctx.reduction, ctx.gradients = operations, ignore_index, reduction, None
        if scale is None:
            ctx.save_for_backward(weight, hidden, bias, target)
        else:
            ctx.scale, ctx.weight = scale or 1.0, weight
            ctx.gradients = _Gradients(weight, bias, ctx.needs_input_grad)
        total = _pass(weight, hidden, bias, target, operations, learns, ctx.gradients, (scale or 1.0) / divisor)
        return (total / divisor).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.gradients is not None:
            found = ctx.gradients.times(grad.float() / ctx.scale, adds_products(ctx.weight))
            ctx.gradients = None
            return (*found, *[None] * 6)
        weight, hidden, bias, target = ctx.saved_tensors
        learns = target != ctx.ignore_index
        gradients = _Gradients(weight, bias, ctx.needs_input_grad)
        scale = grad.float() / _divisor(learns, ctx.reduction)
        _pass(weight, hidden, bias, target, ctx.operations, learns, gradients, scale)
        return (*gradients.found(), *[None] * 6)


def _pass(
    weight: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    operations: tuple[Operation, ...],
    learns: torch.Tensor,
    gradients: _Gradients | None,
    scale: torch.Tensor | float,
) -> torch.Tensor:
    """The sum of the losses of all tokens, fp32; `gradients` gets those of `scale` times that sum."""
    total = torch.zeros((), device=hidden.device)
    factors = torch.where(learns, scale, 0.0)
    labels = torch.where(learns, target, 0)
    count = _rows_of_a_chunk(weight.shape[0])
    chunks = (each.split(count) for each in (hidden, labels, learns, factors))
    for rows, label, learn, factor in zip(*chunks, strict=True):
        logits, back = _logits(rows, weight, bias, operations, graph=gradients is not None)
        logs = F.log_softmax(logits, -1)
        del logits
        total -= torch.where(learn, logs.gather(1, label.unsqueeze(1)).squeeze(1), 0.0).sum()
        if gradients is not None:
            gradients.add(rows, weight, back(_of_each(logs.exp_(), factor, label, -factor)))
        del logs  # before the next chunk has its own
    return total


class _SumsOfTile(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        hidden: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        operations: tuple[Operation, ...],
        first: int,
        results_wanted: bool,
    ) -> Sums:
        ctx.save_for_backward(weight, hidden, bias, target)
        ctx.operations, ctx.first = operations, first
        log_sums, labelled, highest = torch.zeros(3, len(hidden), device=hidden.device).unbind()
        label, inside = _labels_of(target, first, len(weight))
        count = _rows_of_a_chunk(weight.shape[0])
        for begin in range(0, len(hidden) if results_wanted else 0, count):
            chunk = slice(begin, begin + count)
            logits, _ = _logits(hidden[chunk], weight, bias, operations, graph=False)
            highest[chunk] = logits.amax(-1)
            logits -= highest[chunk].unsqueeze(1)
            labelled[chunk] = torch.where(inside[chunk], logits.gather(1, label[chunk].unsqueeze(1)).squeeze(1), 0.0)
            log_sums[chunk] = logits.exp_().sum(-1).log()
        ctx.mark_non_differentiable(highest)
        return log_sums, labelled, highest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_sums: torch.Tensor, of_labelled: torch.Tensor, _: Any) -> Any:
        weight, hidden, bias, target = ctx.saved_tensors
        gradients = _Gradients(weight, bias, ctx.needs_input_grad)
        labels, inside = _labels_of(target, ctx.first, len(weight))
        of_labels = torch.where(inside, of_labelled, 0.0)
        count = _rows_of_a_chunk(weight.shape[0])
        chunks = (each.split(count) for each in (hidden, labels, of_log_sums, of_labels))
        for rows, label, of_sum, of_label in zip(*chunks, strict=True):
            logits, back = _logits(rows, weight, bias, ctx.operations, graph=True)
            shares = F.softmax(logits, -1)
            del logits
            gradients.add(rows, weight, back(_of_each(shares, of_sum, label, of_label)))
            del shares  # before the next chunk has its own
        return (*gradients.found(), *[None] * 4)


class _Gradients:
    """The gradients of a head's weight [rows, width] and bias, fp32, and of its input, as chunks add to them.

    To add a product to the weight's gradient moves as many bytes as several weights: on an accelerator that takes
    longer than the product of a chunk. There gradients of DEVICE_LOGITS logits wait for one product. If it is the only
    one, the weight's gradient has the weight's dtype, as in plain PyTorch.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, wanted: Sequence[bool]) -> None:
        self._most = 0 if streams_of(weight.device).on_cpu else DEVICE_LOGITS
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(rows, gradients of their logits) that are not multiplied yet."""
        self._wanted = wanted[0]
        self._weight: torch.Tensor | None = None
        if self._wanted and not self._most:
            self._weight = torch.zeros(weight.shape, device=weight.device)
        self._input: list[torch.Tensor] | None = [] if wanted[1] else None
        self._bias = torch.zeros(bias.shape, device=bias.device) if wanted[2] and bias is not None else None

    def add(self, rows: torch.Tensor, weight: torch.Tensor, of_logits: torch.Tensor) -> None:
        if self._wanted:
            if sum(each.numel() for _, each in self._waiting) + of_logits.numel() > self._most:
                self._multiply()
            self._waiting.append((rows, of_logits))
            if not self._most:
                self._multiply()
        if self._bias is not None:
            self._bias += of_logits.sum(0, dtype=torch.float32)
        if self._input is not None:
            self._input.append(of_logits @ weight)

    def _multiply(self) -> None:
        """Add the product of what waits."""
        if not self._waiting:
            return
        rows, of_logits = self._joined()
        if self._weight is None:
            self._weight = of_logits.T @ rows
        elif self._weight.dtype == of_logits.dtype == torch.float32:
            self._weight.addmm_(of_logits.T, rows)
        else:
            self._weight = self._weight.float().add_(of_logits.T @ rows)

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What waits, which then waits no longer."""
        rows, of_logits = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*self._waiting, strict=True))
        self._waiting.clear()
        return rows, of_logits

    def found(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Of the weight, of the input, and of the bias; None where it was not wanted."""
        self._multiply()
        return self._weight, None if self._input is None else torch.cat(self._input), self._bias

    def times(
        self, factor: torch.Tensor, add: Callable[[torch.Tensor, torch.Tensor], None] | None
    ) -> tuple[torch.Tensor | None, ...]:
        """What `found` gives, times a scalar. If the weight's gradient is one product, that goes to `add`."""
        if add is not None and self._weight is None and self._waiting:
            rows, of_logits = self._joined()
            add(of_logits.T, rows * factor.to(rows.dtype))
        found = self.found()
        if streams_of(factor.device).on_cpu and factor.item() == 1:  # elsewhere it would take longer to ask
            return found
        return tuple(None if each is None else each.mul_(factor.to(each.dtype)) for each in found)


def _logits(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    operations: tuple[Operation, ...],
    *,
    graph: bool,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Logits in fp32 after all operations; and what makes their gradient one of the product, with a `graph`."""
    product = F.linear(rows, weight, bias).detach()
    if not operations and product.dtype == torch.float32:
        return product, lambda grad: grad
    if not graph:
        return after_operations(product, operations).float(), lambda grad: grad
    with torch.enable_grad():
        product.requires_grad_()
        logits = after_operations(product, operations).float()
    edge = torch.autograd.graph.get_gradient_edge(logits)  # holds no logits
    return logits.detach(), lambda grad: torch.autograd.grad(edge, product, grad)[0]


def _of_each(shares: torch.Tensor, of_sum: torch.Tensor, labels: torch.Tensor, of_label: torch.Tensor) -> torch.Tensor:
    """The gradient of logits [tokens, rows] of which `shares` are the softmax, made in its place."""
    return shares.mul_(of_sum.unsqueeze(1)).scatter_add_(1, labels.unsqueeze(1), of_label.unsqueeze(1))


def _labels_of(target: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of a tile's rows is each token's, and whether one is."""
    inside = (target >= first) & (target < first + count)
    return torch.where(inside, target - first, 0), inside


def _divisor(learns: torch.Tensor, reduction: str) -> torch.Tensor | int:
    return learns.sum() if reduction == "mean" else 1


def _rows_of_a_chunk(vocabulary: int) -> int:
    return max(1, CHUNK // vocabulary)
