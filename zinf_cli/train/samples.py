"""What a model writes while it learns: prompts of the recipe, each gone on with by the likeliest token every time.

A token takes a forward pass of all prompts together, which goes through the engine as an evaluation does: unit by unit,
so no more memory is needed than for training. Earlier tokens are computed again. A cache of their keys and values would
save compute, but not the parameters' way through the device, which is what a pass takes where they do not fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from zinf_cli.batches.batches import in_turn
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import DatasetError, ModelError
from zinf_cli.models.objective import Objective, objective_of
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.text.tokens import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """The prompts of a recipe as tokens."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    tokenizer: Tokenizer
    most: int
    """Tokens that are written at most."""
    seq_len: int


def open_prompts(recipe: Recipe, model: nn.Module, vocabulary: int) -> Prompts | None:
    """The prompts of a recipe. None if it has none.

    ModelError if the model does not write from left to right. DatasetError if there is no tokenizer, or a prompt has no
    token, tokens that the model does not know, or as many as a sequence.
    """
    samples, seq_len = recipe.samples, recipe.train.seq_len
    if not samples.prompts:
        return None
    if objective_of(model) not in (Objective.NEXT_TOKEN, Objective.NEXT_TOKEN_GIVEN):
        raise ModelError(
            f"{type(model).__name__} does not go on with a text", where="samples.prompts", hint="leave samples out"
        )
    directory = recipe.dataset.tokenizer or recipe.model.name_or_path
    if directory is None:
        raise DatasetError("prompts need a tokenizer", where="samples.prompts", hint="set dataset.tokenizer")
    tokenizer = Tokenizer(directory)
    chats = recipe.dataset.messages_field is not None
    tokens = tuple(tuple(tokenizer.encode_prompt(text, chat=chats)) for text in samples.prompts)
    for text, ids in zip(samples.prompts, tokens, strict=True):
        if not 0 < len(ids) < seq_len or max(ids) >= vocabulary:
            known = "" if not ids or max(ids) < vocabulary else f", of which {max(ids)} is not known to the model"
            raise DatasetError(
                f"the prompt {text!r:.60} has {len(ids)} tokens{known}",
                where="samples.prompts",
                hint=f"give one of 1 to {seq_len - 1} tokens (train.seq_len - 1)",
            )
    return Prompts(samples.prompts, tokens, tokenizer, samples.max_new_tokens, seq_len)


@dataclass(frozen=True)
class Writer:
    """Goes on with prompts, on all ranks together."""

    engine: Engine
    model: nn.Module
    ranks: Ranks
    device: torch.device

    def write(self, prompts: Prompts) -> list[str]:
        """What the model writes after each prompt, up to its end-of-text token. The same on every rank."""
        count, ranks = len(prompts.tokens), self.ranks
        texts = [list(ids) for ids in prompts.tokens]
        at_work = set(range(count))
        self.model.eval()
        for _ in range(prompts.most):
            at_work = {number for number in at_work if len(texts[number]) < prompts.seq_len}
            if not at_work:
                break
            mine, padded = in_turn(sorted(at_work), ranks)
            found = self._next([texts[number] for number in padded])
            written = [0.0] * count
            for number, token in zip(mine, found, strict=False):
                written[number] = token
            for number, token in enumerate(map(int, ranks.totals(written))):
                if number in at_work:
                    texts[number].append(token)
                    if token == prompts.tokenizer.end:
                        at_work.discard(number)
        self.model.train()
        starts = map(len, prompts.tokens)
        return [prompts.tokenizer.decode(text[start:]) for text, start in zip(texts, starts, strict=True)]

    def _next(self, texts: Sequence[list[int]]) -> list[float]:
        """The likeliest next token of each text, as the number that an evaluation gives (exact below 2**24)."""
        inputs = [torch.tensor([ids], device=self.device) for ids in texts]
        return self.engine.evaluate([MicroBatch(partial(_likeliest, self.model, ids), 0.0) for ids in inputs])


def _likeliest(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The likeliest token behind `input_ids` (int64 [1, length]), as an fp32 scalar."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    logits: torch.Tensor = model(input_ids=input_ids, **options).logits
    return logits[0, -1].argmax().float()
