"""What a recipe stands for: the model on the meta device, its units, the text. Used by the plan and by every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from zinf_cli.engine.survey import Survey, survey
from zinf_cli.errors import DatasetError
from zinf_cli.recipe import Recipe, Train
from zinf_cli.train.batches import BatchOrder
from zinf_cli.train.cache import cache_folder
from zinf_cli.train.data import TextSource, open_token_stream
from zinf_cli.train.model import ModelSource, build_model
from zinf_cli.train.token_stream import TokenStream, split_held_out

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Text:
    """Training text and held-out text as token streams, and the order of the training windows."""

    train: TokenStream
    held_out: TokenStream | None
    order: BatchOrder

    def max_steps(self, train: Train) -> int:
        """The step at which a run ends."""
        return train.max_steps if train.max_steps is not None else self.order.steps_for(train.epochs or 1.0)


def resolve_precision(recipe: Recipe, device: torch.device) -> str:
    """auto is bf16 on CUDA, fp32 on a CPU (which has no fast 16-bit arithmetic)."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "bf16" if device.type == "cuda" else "fp32"


def model_source(recipe: Recipe) -> ModelSource:
    return ModelSource(recipe.model.name_or_path, recipe.model.config, recipe.model.init or "random", recipe.seed)


def open_model(recipe: Recipe, precision: str) -> nn.Module:
    """The model with its parameters on the meta device, in training mode."""
    return build_model(model_source(recipe), DTYPES[precision])


def survey_model(model: nn.Module, recipe: Recipe, world_size: int) -> Survey:
    """Its units, and what one micro-batch moves through them."""
    shape = (recipe.train.micro_batch_size, recipe.train.seq_len)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    return survey(model, lambda: model_loss(model, ids, ids), world_size)


def model_loss(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The model's own mean loss over `labels` that are not -100; both int64 [sequences, seq_len]."""
    loss: torch.Tensor = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    return loss


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers, which are small and belong to no unit, to the compute device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def open_text(recipe: Recipe, vocabulary: int, notice: Callable[[str], None] = lambda line: None) -> Text:
    """Tokenise (or find in the cache) the recipe's text; DatasetError where it does not suit the model.

    `notice` is called with what the user should know of it.
    """
    dataset, train = recipe.dataset, recipe.train
    tokenizer = dataset.tokenizer or recipe.model.name_or_path
    cache = cache_folder("tokens")

    def source(paths: tuple[Path, ...]) -> TextSource:
        return TextSource(paths, dataset.text_field, dataset.messages_field, tokenizer)

    stream = open_token_stream(source(dataset.path), cache, notice)
    held_out = None
    if dataset.eval_path is not None:
        held_out = open_token_stream(source(dataset.eval_path), cache, notice)
    elif dataset.eval_fraction is not None:
        stream, held_out = split_held_out(stream, dataset.eval_fraction)
    for part in (stream, held_out):
        if part is not None and part.max_token >= vocabulary:
            raise DatasetError(
                f"token {part.max_token} is outside the model's embedding of {vocabulary} rows",
                hint="set dataset.tokenizer to the tokenizer of this model",
            )
    if held_out is not None and held_out.num_windows(train.seq_len) == 0:
        raise DatasetError(
            f"the held-out text has {len(held_out)} tokens, less than one window of {train.seq_len}",
            hint="give more held-out text, or lower train.seq_len",
        )
    sequences = train.micro_batch_size * train.gradient_accumulation_steps
    order = BatchOrder(stream.num_windows(train.seq_len), sequences, recipe.seed, dataset.shuffle)
    return Text(stream, held_out, order)


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the input embedding."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])
