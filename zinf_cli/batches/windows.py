"""Makes windows of the tokens of a recipe's texts: rows that are each a sequence, packed documents, or consecutive
tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from zinf_cli.batches.apart import why_not_apart
from zinf_cli.batches.collator import Stream
from zinf_cli.batches.compared import ComparedStream
from zinf_cli.batches.labelled import LabelledStream
from zinf_cli.batches.mixture import MixedStream, Part
from zinf_cli.batches.packing import pack, split_packed
from zinf_cli.batches.pairs import PairStream
from zinf_cli.batches.pictured import PicturedStream
from zinf_cli.batches.preferences import PreferenceStream
from zinf_cli.errors import DatasetError, ModelError
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.text.pictures import Processor
from zinf_cli.text.token_stream import TokenStream, split_held_out

R = TypeVar("R", PairStream, PreferenceStream, LabelledStream, PicturedStream, ComparedStream)
Windows = tuple[Stream, dict[str, Stream], tuple[str, ...]]
"""A text for training, what is held out by name, and lines about how windows are made of it."""


def pairs_of(
    recipe: Recipe,
    model: nn.Module,
    tokens: Sequence[TokenStream],
    held_out: Mapping[str, TokenStream],
    *,
    pad: int,
    tails: tuple[int, int],
) -> Windows:
    """Pairs of a source and its target. `tokens` are those of each text that has a weight, or of all.

    The tokenizer puts `tails` tokens behind a source and behind a target.
    """

    def paired(part: TokenStream) -> PairStream:
        return PairStream(part, pad, tails)

    return _rows_of(recipe, f"{type(model).__name__} reads pairs", tokens, held_out, paired)


def preferences_of(
    recipe: Recipe, model: nn.Module, tokens: Sequence[TokenStream], held_out: Mapping[str, TokenStream]
) -> Windows:
    """Pairs of answers."""
    dataset, seq_len = recipe.dataset, recipe.train.seq_len
    if any(part.ends is None for part in (*tokens, *held_out.values())):
        raise DatasetError(
            "dpo needs pairs of answers, and .npy files have none",
            where=", ".join(map(str, dataset.all_paths)),
            hint=f"give .jsonl or .parquet rows with {dataset.chosen_field!r} and {dataset.rejected_field!r}",
        )
    return _rows_of(recipe, "dpo compares two answers", tokens, held_out, lambda part: PreferenceStream(part, seq_len))


def labelled_of(
    recipe: Recipe,
    model: nn.Module,
    tokens: Sequence[TokenStream],
    held_out: Mapping[str, TokenStream],
    *,
    pad: int,
    tail: int,
) -> Windows:
    """Texts with a label, padded with `pad`. The tokenizer puts `tail` tokens behind each."""
    config: Any = model.config
    number = config.problem_type == "regression"

    def labelled(part: TokenStream) -> LabelledStream:
        return LabelledStream(part, pad, tail, number)

    return _rows_of(recipe, f"{type(model).__name__} tells the label of a text", tokens, held_out, labelled)


def compared_of(
    recipe: Recipe,
    model: nn.Module,
    tokens: Sequence[TokenStream],
    held_out: Mapping[str, TokenStream],
    *,
    texts_of_a_row: int,
    pad: int,
    tail: int,
    pooled_by: str,
) -> Windows:
    """Rows of texts that are compared. The tokenizer puts `tail` tokens behind each; `pooled_by` is for the plan."""

    def compared(part: TokenStream) -> ComparedStream:
        return ComparedStream(part, texts_of_a_row, pad, tail)

    reason = "embedding compares the texts of rows"
    stream, other, lines = _rows_of(recipe, reason, tokens, held_out, compared)
    own, others = texts_of_a_row - 2, (recipe.train.micro_batch_size - 1) * (texts_of_a_row - 1)
    what = f"a query is compared with {own} negatives of its own and {others} texts of its micro-batch's other rows"
    return stream, other, (f"embeddings are {pooled_by}; {what}", *lines)


def pictured_of(
    recipe: Recipe,
    model: nn.Module,
    tokens: Sequence[TokenStream],
    held_out: Mapping[str, TokenStream],
    *,
    processor: Processor,
    pad: int,
) -> Windows:
    """Texts with pictures."""

    def pictured(part: TokenStream) -> PicturedStream:
        return PicturedStream(part, processor, recipe.train.seq_len, pad)

    return _rows_of(recipe, "a text may have pictures", tokens, held_out, pictured)


def _rows_of(
    recipe: Recipe,
    reason: str,
    tokens: Sequence[TokenStream],
    held_out: Mapping[str, TokenStream],
    of: Callable[[TokenStream], R],
) -> Windows:
    """Rows that are each a sequence of their own, for a `reason`."""
    if recipe.dataset.packing != "auto":
        raise DatasetError(
            f"{reason}, and each is a sequence of its own: nothing is packed",
            where="dataset.packing",
            hint="leave dataset.packing out",
        )
    train = [of(part) for part in tokens]
    other: dict[str, Stream] = {name: of(part) for name, part in held_out.items()}
    if recipe.dataset.eval_fraction is not None:
        train, last = map(list, zip(*(part.split(recipe.dataset.eval_fraction) for part in train), strict=True))
        other = {"": _joined(recipe, last)}
    return _joined(recipe, train), other, tuple(line for part in train for line in part.lines(recipe.train.seq_len))


def windows_of(
    recipe: Recipe, model: nn.Module, tokens: Sequence[TokenStream], held_out: Mapping[str, TokenStream]
) -> Windows:
    """Documents packed into windows, or windows that cross them. An error if the recipe asks for what can't be."""
    dataset, seq_len = recipe.dataset, recipe.train.seq_len
    ends = [part.ends for part in (*tokens, *held_out.values())]
    known, why = all(found is not None for found in ends), why_not_apart(model)
    if dataset.packing == "documents" and why is not None:
        raise ModelError(
            f"documents can't be kept apart: {why}",
            where="dataset.packing",
            hint="set dataset.packing to stream, or train a model that attends by positions, such as llama",
        )
    if dataset.packing == "documents" and not known:
        raise DatasetError(
            "documents can't be kept apart: .npy files do not say where they end",
            where="dataset.packing",
            hint="give the text as .jsonl, .parquet or .txt, or set dataset.packing to stream",
        )
    several = known and any(part.ends is not None and len(part.ends) > 1 for part in tokens)
    apart = dataset.packing == "documents" or (dataset.packing == "auto" and several and why is None)
    train, other = list(tokens), {name: [part] for name, part in held_out.items()}
    if dataset.eval_fraction is not None:
        split = split_packed if apart else split_held_out
        train, last = map(list, zip(*(split(part, dataset.eval_fraction) for part in tokens), strict=True))
        other = {"": last}
    if not apart:
        said = dataset.packing == "auto" and several
        crossed = (f"windows cross documents: {why}",) if said else ()
        return _joined(recipe, train), {name: _joined(recipe, parts) for name, parts in other.items()}, crossed
    packed = [pack(part, seq_len) for part in train]
    packed_other = {name: _joined(recipe, [pack(part, seq_len) for part in parts]) for name, parts in other.items()}
    lines = tuple(line for part in packed for line in part.lines())
    return _joined(recipe, packed), packed_other, lines


def _joined(recipe: Recipe, parts: Sequence[Part]) -> Stream:
    """The parts as one stream: a mixture, if they are those of texts with weights."""
    weights = recipe.dataset.weights
    return MixedStream(tuple(parts), weights) if weights and len(parts) == len(weights) else parts[0]
