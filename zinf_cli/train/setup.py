"""Opens what a recipe names: the model on the meta device, and the text. The plan and every rank use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zinf_cli.batches.batches import BatchOrder
from zinf_cli.batches.collator import Collator, Stream, kind_of_stream
from zinf_cli.batches.compared import comparison_loss
from zinf_cli.batches.mixture import MixedOrder, MixedStream
from zinf_cli.batches.packing import PackedStream
from zinf_cli.batches.preferences import preference_loss
from zinf_cli.engine.precision import DTYPES
from zinf_cli.errors import DatasetError, ModelError
from zinf_cli.models.adapters import AdaptedWeights, adapt
from zinf_cli.models.base_packing import pack_base
from zinf_cli.models.model import ModelSource, build_model, head_for
from zinf_cli.models.objective import Objective, objective_of, wants_more_than_text
from zinf_cli.models.weights import RangedWeights, open_weights
from zinf_cli.recipe.recipe import Recipe, Train
from zinf_cli.text.cache import cache_folder
from zinf_cli.text.data import TextSource, open_token_stream, part_of_tokens
from zinf_cli.text.token_stream import TokenStream
from zinf_cli.text.tokens import Tokenizer
from zinf_cli.told import Tell, nobody
from zinf_cli.train.optimizer import mark_whole
from zinf_cli.train.reading import pooling_in, reading_of, vocabulary_of
from zinf_cli.train.samples import Prompts, open_prompts

_PART_TOKENS, _PART_WINDOWS = 1 << 20, 16
"""The least that a part of a text has, if it stands for all of it."""


@dataclass(frozen=True)
class Text:
    """Training text and held-out texts as token streams, and the order of the training windows."""

    train: Stream
    held_out: Mapping[str, Stream]
    """By name; a single one has none, ""."""
    order: BatchOrder
    collator: Collator
    lines: tuple[str, ...] = ()
    """How windows are made of it, for the plan."""
    prompts: Prompts | None = None
    """What the model goes on with, to show what it writes."""
    share: float = 1.0
    """Of the whole text: less than 1 if a part stands for it, and then windows of the order may be missing."""

    @property
    def is_packed(self) -> bool:
        """Whether a sequence has several documents, which are kept apart."""
        return isinstance(kind_of_stream(self.train), PackedStream)

    def max_steps(self, train: Train) -> int:
        """The step at which a run ends."""
        return train.max_steps if train.max_steps is not None else self.order.steps_for(train.epochs or 1.0)


def resolve_precision(recipe: Recipe, device: torch.device) -> str:
    """The recipe's precision. auto is bf16 on CUDA, and fp32 on a CPU, which has no fast 16-bit arithmetic."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "bf16" if device.type == "cuda" else "fp32"


def model_source(recipe: Recipe) -> ModelSource:
    """The source of the recipe's model: of a classifier, with its labels; of embeddings, without a head."""
    model = recipe.model
    return ModelSource(
        model.name_or_path,
        model.config,
        model.init or "random",
        recipe.seed,
        head_for(recipe.train.objective),
        recipe.dataset.labels,
    )


def open_model(recipe: Recipe, precision: str) -> nn.Module:
    """The model with its parameters on the meta device, in training mode; with the recipe's adapter in it."""
    model: Any = build_model(model_source(recipe), DTYPES[precision])
    if recipe.adapter.type is not None:
        pack_base(model, recipe.model.base_dtype)
        adapt(model, recipe.adapter, recipe.model.folder)
    mark_whole(model, recipe.optimizer.name)
    opened: nn.Module = model
    return opened


def first_weights(
    recipe: Recipe, precision: str, model: nn.Module, notice: Callable[[str], None] = lambda line: None
) -> RangedWeights:
    """Where a model from `open_model` has its weights from, when a run begins.

    Errors are those of open_weights() and, of an adapter, of AdaptedWeights.
    """
    source = model_source(recipe)
    if recipe.adapter.type is None:
        return open_weights(model, source, notice)
    return AdaptedWeights(model, source, recipe.adapter, DTYPES[precision], notice)


def model_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **beside: torch.Tensor,
) -> torch.Tensor:
    """The model's own mean loss over `labels` that are not -100. All tensors are int64 [sequences, seq_len], but for
    the labels of a classifier, [sequences]. Errors are those of model_output()."""
    loss: torch.Tensor = model_output(model, input_ids, labels, attention_mask, position_ids, **beside).loss
    return loss


def model_output(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **beside: torch.Tensor,
) -> Any:
    """What the model gives, with its loss and logits.

    With an `attention_mask` the inputs of an encoder-decoder are a source, and the labels are its target. The decoder
    sees the target moved by one, as in transformers' DataCollatorForSeq2Seq. With `position_ids` a token attends to its
    own document, which begins where they are 0 (apart.py). `beside` goes to the model as it is: what it takes of
    pictures. ModelError if it needs more.
    """
    more = dict(beside)
    if position_ids is not None:
        more["position_ids"] = position_ids
    if attention_mask is not None:
        more["attention_mask"] = attention_mask
        if (moved := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
            more["decoder_input_ids"] = moved(labels=labels.clone())
    try:
        return model(input_ids=input_ids, labels=labels, use_cache=False, **more)
    except (TypeError, ValueError) as error:
        if (refusal := wants_more_than_text(model, error)) is not None:
            raise refusal from error
        raise


def loss_of(recipe: Recipe, model: nn.Module) -> Callable[..., torch.Tensor]:
    """The loss that a run learns by: a function of the model and a batch's inputs, by name. A scalar."""
    if (chooses := choice_of(recipe, model)) is not None:
        return lambda model, **inputs: chooses(model, **inputs)[0]
    if recipe.train.objective != "dpo":
        return model_loss
    beta = recipe.train.dpo_beta
    return lambda model, **inputs: preference_loss(model, **inputs, beta=beta)[0]


def choice_of(recipe: Recipe, model: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Of a loss that is right or wrong about each of a batch's labels (int64 [n]): that loss, and scores [n, choices].

    None for other losses.
    """
    objective = objective_of(model)
    if objective is Objective.SIMILARITY:
        pooling, _ = pooling_in(recipe, model)
        return partial(comparison_loss, pooling=pooling, temperature=recipe.train.temperature)
    config: Any = model.config
    if objective is Objective.LABEL_OF_TEXT and config.problem_type != "regression":
        return _label_loss
    return None


def _label_loss(model: nn.Module, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = model_output(model, **inputs)
    return found.loss, found.logits


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers, which are small and belong to no unit, to the compute device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def open_text(
    recipe: Recipe,
    model: nn.Module,
    world_size: int,
    notice: Callable[[str], None] = lambda line: None,
    tell: Tell = nobody,
    *,
    in_part: bool = False,
) -> Text:
    """The tokens of the recipe's text, from the cache or tokenised now. DatasetError if the model can't take it.

    `notice` gets lines for the user about the text, `tell` the share of it that is tokenised. `in_part`: of a long text
    that would have to be tokenised, a part stands for all of it.
    """
    dataset, train = recipe.dataset, recipe.train
    collator = _collator(recipe, model)
    reading = reading_of(recipe, model, collator.objective)
    tokenizer = dataset.tokenizer or recipe.model.name_or_path
    cache = cache_folder("tokens")

    def opened(paths: tuple[Path, ...]) -> tuple[TokenStream, float]:
        reading.check(recipe, paths, model)
        source = TextSource(
            paths, dataset.text_field, dataset.messages_field, dataset.roles_to_train, tokenizer, **reading.fields
        )
        most = max(_PART_TOKENS, _PART_WINDOWS * train.seq_len)
        part = part_of_tokens(source, cache, most) if in_part else None
        return part or (open_token_stream(source, cache, notice, tell), 1.0)

    texts = [(path,) for path in dataset.paths] if dataset.weights else [dataset.paths]
    tokens, shares = zip(*map(opened, texts), strict=True)
    apart = {name: opened(paths) for name, paths in dataset.held_out.items()}
    held_out_tokens = {name: found for name, (found, _) in apart.items()}
    stream, held_out, lines = reading.make(recipe, model, tokens, held_out_tokens)
    share_of = {name: apart[name][1] if name in apart else min(shares) for name in held_out}
    _check_text(recipe, model, collator, stream, held_out, share_of)
    parts = stream.parts if isinstance(stream, MixedStream) else (stream,)
    counts = [round(part.num_windows(train.seq_len) / share) for part, share in zip(parts, shares, strict=True)]
    if min(shares) < 1:
        lines = tuple(f"in the part that was looked at: {line}" for line in lines)
    order, prompts = _order_of(recipe, counts, world_size), open_prompts(recipe, model, vocabulary_of(model))
    return Text(stream, held_out, order, collator, lines, prompts, min(*shares, *share_of.values(), 1.0))


def _check_text(
    recipe: Recipe,
    model: nn.Module,
    collator: Collator,
    stream: Stream,
    held_out: Mapping[str, Stream],
    share_of: Mapping[str, float],
) -> None:
    """DatasetError if the model does not know a token, has nothing to learn, or nothing is held out.

    `share_of` says which share of the text each of `held_out` stands for.
    """
    dataset, seq_len = recipe.dataset, recipe.train.seq_len
    for part in (stream, *held_out.values()):
        if part.max_token >= vocabulary_of(model):
            raise DatasetError(
                f"token {part.max_token} is outside the model's embedding of {vocabulary_of(model)} rows",
                hint="set dataset.tokenizer to the tokenizer of this model",
            )
    named = [("text", dataset.paths, stream, 1.0)]
    named += [
        ("held-out text", dataset.held_out.get(name, dataset.paths), part, share_of[name])
        for name, part in held_out.items()
    ]
    for what, paths, part, share in named:
        where = ", ".join(map(str, paths))
        if not collator.has_targets(part):
            raise DatasetError(
                f"the {what} has nothing to train on: in its windows of {seq_len} tokens, no token has a loss",
                where=where,
                hint=f"see what {dataset.messages_field or dataset.text_field!r} holds there, or give more text",
            )
        if part is not stream and round(part.num_windows(seq_len) / share) == 0:
            raise DatasetError(
                f"the held-out text has {round(len(part) / share)} tokens, less than one window of {seq_len}",
                where=where,
                hint="give more held-out text, or lower train.seq_len",
            )


def _order_of(recipe: Recipe, counts: Sequence[int], world_size: int) -> BatchOrder:
    """The order of windows, of which each text has one of `counts`."""
    dataset, sequences = recipe.dataset, recipe.train.sequences_per_step(world_size)
    if not dataset.weights:
        return BatchOrder(sum(counts), sequences, recipe.seed, dataset.shuffle)
    if sum(counts) >= sequences and 0 in counts:
        raise DatasetError(
            f"a text with a weight has no whole window of {recipe.train.seq_len} tokens",
            where=str(dataset.paths[counts.index(0)]),
            hint="give more of it, lower train.seq_len, or leave it out",
        )
    return MixedOrder(counts, dataset.weights, sequences, recipe.seed, dataset.shuffle)


def _collator(recipe: Recipe, model: nn.Module) -> Collator:
    """The collator for what the model is trained on."""
    objective = objective_of(model)
    if recipe.train.objective == "dpo":
        if objective is not Objective.NEXT_TOKEN:
            raise ModelError(
                f"{type(model).__name__} is no causal language model, and dpo compares what one writes",
                where="train.objective",
                hint="leave train.objective out, or train a causal model",
            )
        objective = Objective.PREFERENCE
    masking = None
    if objective is Objective.MASKED_TOKENS:
        directory = recipe.dataset.tokenizer or recipe.model.name_or_path
        if directory is None:
            raise DatasetError(
                f"{type(model).__name__} is trained on masked tokens, and nothing says which token masks",
                hint="set dataset.tokenizer to a directory with the tokenizer of this model",
            )
        masking = Tokenizer(directory).masking(vocabulary_of(model), recipe.seed)
    return Collator(objective, recipe.train.seq_len, masking)
