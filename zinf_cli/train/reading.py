"""How the texts of a recipe are read for what its model learns: which fields, and how windows are made of them.

An objective (models/objective.py) is another `Reading` here: the fields of a record that it needs, and what makes
windows of their tokens. The model's own loss does the rest (`model_loss` in setup.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import nn

from zinf_cli.batches.windows import (
    Windows,
    compared_of,
    labelled_of,
    pairs_of,
    pictured_of,
    preferences_of,
    windows_of,
)
from zinf_cli.errors import DatasetError, ModelError
from zinf_cli.models.objective import Objective
from zinf_cli.models.pooling import Pooling, pooling_files, pooling_of
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.text.compared import Compared
from zinf_cli.text.documents import read_documents
from zinf_cli.text.labels import Labels, shown
from zinf_cli.text.pictures import Processor
from zinf_cli.text.text_files import RECORDS, find_files, kind_of
from zinf_cli.text.token_stream import TokenStream
from zinf_cli.text.tokens import Tokenizer

_LOOKED_AT = 1000
"""Records in which labels are looked for, to name them in an error."""


@dataclass(frozen=True)
class Reading:
    """How texts are read."""

    make: Callable[[Recipe, nn.Module, Sequence[TokenStream], Mapping[str, TokenStream]], Windows]
    """Windows of the tokens of texts and of what is held out."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What a TextSource has for them."""
    records: str = ""
    """What a record has to have, in words, if there have to be records."""

    def check(self, recipe: Recipe, paths: tuple[Path, ...], model: nn.Module) -> None:
        """DatasetError if a text has no such records."""
        if not self.records:
            return
        messages = recipe.dataset.messages_field
        other = next((file for file in find_files(paths) if kind_of(file) not in RECORDS), None)
        if other is not None or (messages is not None and "pictures" not in self.fields):
            what = f"{other.suffix} has" if other is not None else f"chats ({messages}) have"
            raise DatasetError(
                f"{type(model).__name__} {self.records}, and {what} none",
                where=str(other or paths[0]),
                hint=_hint(recipe, self),
            )


def reading_of(recipe: Recipe, model: nn.Module, objective: Objective) -> Reading:
    """How the recipe's texts are read. DatasetError if a classifier's labels are not known."""
    dataset = recipe.dataset
    if dataset.images_field is not None:
        return _of_pictures(recipe, model, objective)
    if objective is Objective.TARGET_OF_SOURCE:
        return Reading(
            _pairs_of(recipe, model),
            {"pair_fields": (dataset.source_field, dataset.target_field)},
            "is an encoder-decoder: it learns to write a target from a source",
        )
    if objective is Objective.PREFERENCE:
        return Reading(
            preferences_of, {"answer_fields": (dataset.chosen_field, dataset.rejected_field, dataset.prompt_field)}
        )
    if objective is Objective.LABEL_OF_TEXT:
        return _of_labels(recipe, model)
    if objective is Objective.SIMILARITY:
        return _of_rows(recipe, model)
    return Reading(windows_of)


def _pairs_of(recipe: Recipe, model: nn.Module) -> Callable[..., Windows]:
    """What makes windows of pairs. Without a tokenizer there will be no tokens of which to make them."""
    directory = recipe.dataset.tokenizer or recipe.model.name_or_path
    if directory is None:
        return partial(pairs_of, pad=0, tails=(0, 0))
    tokenizer = Tokenizer(directory)
    return partial(pairs_of, pad=pad_of(model, tokenizer), tails=(tokenizer.tail(), tokenizer.tail("text_target")))


def _of_pictures(recipe: Recipe, model: nn.Module, objective: Objective) -> Reading:
    """How texts with pictures are read."""
    dataset = recipe.dataset
    if objective is not Objective.NEXT_TOKEN:
        raise ModelError(
            f"{type(model).__name__} does not learn the next token of a text with pictures",
            where="dataset.images_field",
            hint="leave dataset.images_field out",
        )
    directory = dataset.tokenizer or recipe.model.name_or_path
    if directory is None:
        raise DatasetError("pictures need a processor", hint="set dataset.tokenizer to a directory with one")
    processor = Processor(directory)
    make = partial(pictured_of, processor=processor, pad=pad_of(model, processor))
    return Reading(make, {"pictures": dataset.images_field}, "reads texts with pictures")


def _of_labels(recipe: Recipe, model: nn.Module) -> Reading:
    """How texts with labels are read. A model that does not know which token pads a text is told the tokenizer's."""
    dataset = recipe.dataset
    config: Any = model.config
    if getattr(getattr(model, "sequence_summary", None), "summary_type", None) in ("last", "cls_index"):
        raise ModelError(
            f"{type(model).__name__} sums a text up in the last token of its row, which pads it here",
            where="train.objective",
            hint="train a classifier of another type, such as bert",
        )
    names = tuple(config.id2label[number] for number in range(config.num_labels))
    number = config.problem_type == "regression"
    if recipe.train.objective == "classification" and not dataset.labels and _are_made_up(names):
        raise DatasetError(
            "which labels are there? The model's configuration names none",
            where="dataset.labels",
            hint=f"the first texts have {_labels_in(recipe)}: dataset.labels=[...] names all, in the order of outputs",
        )
    directory = dataset.tokenizer or recipe.model.name_or_path
    if directory is None:
        raise DatasetError("texts with a label need a tokenizer", hint="set dataset.tokenizer")
    tokenizer = Tokenizer(directory)
    pad = pad_of(model, tokenizer)
    for part in (config, config.get_text_config()):  # a classifier may look for a text's last token by it
        if hasattr(part, "pad_token_id"):
            part.pad_token_id = pad
    return Reading(
        partial(labelled_of, pad=pad, tail=tokenizer.tail()),
        {"labels": Labels(dataset.label_field, () if number else names)},
        "tells the label of a text",
    )


def _of_rows(recipe: Recipe, model: nn.Module) -> Reading:
    """How texts that are compared are read."""
    dataset = recipe.dataset
    directory = dataset.tokenizer or recipe.model.name_or_path
    if directory is None:
        raise DatasetError("texts that are compared need a tokenizer", hint="set dataset.tokenizer")
    tokenizer = Tokenizer(directory)
    compared = Compared(dataset.query_field, dataset.positive_field, dataset.negative_field, recipe.train.num_negatives)
    pooling, why = pooling_in(recipe, model)
    make = partial(
        compared_of,
        texts_of_a_row=compared.texts_of_a_row,
        pad=pad_of(model, tokenizer),
        tail=tokenizer.tail(),
        pooled_by=f"{_POOLED[pooling]} ({why})",
    )
    return Reading(make, {"compared": compared}, "compares the texts of a row")


_POOLED = {"mean": "the mean of a text's tokens", "cls": "a text's first token", "lasttoken": "a text's last token"}


def pooling_in(recipe: Recipe, model: nn.Module) -> tuple[Pooling, str]:
    """(how a recipe pools what its model gives, why). Errors are those of pooling_of()."""
    config: Any = model.config
    named = next(iter(config.architectures or ()), "")
    return pooling_of(recipe.model.name_or_path, recipe.train.pooling, named)


def pooling_files_of(recipe: Recipe, model: nn.Module) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a checkpoint that say so; none where nothing is pooled."""
    config: Any = model.config
    if recipe.train.objective == "embedding":
        yield from pooling_files(recipe.model.name_or_path, pooling_in(recipe, model)[0], config.hidden_size)


def pad_of(model: nn.Module, tokenizer: Tokenizer | Processor) -> int:
    """The token that fills a sequence up: the model's, or else the tokenizer's, of those that the model knows."""
    config: Any = model.config
    configs = (config.get_text_config(), config)  # of a model of several parts, only that of its text may have one
    found = (*(getattr(one, "pad_token_id", None) for one in configs), tokenizer.pad, tokenizer.end, 0)
    return next(int(token) for token in found if token is not None and 0 <= token < vocabulary_of(model))


def vocabulary_of(model: nn.Module) -> int:
    """The number of rows of the input embedding."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def _are_made_up(names: Sequence[str]) -> bool:
    """Whether these are the names that transformers gives to labels of which it knows nothing, and there are two."""
    return list(names) == ["LABEL_0", "LABEL_1"]


def _labels_in(recipe: Recipe) -> str:
    """The labels of the first texts, as an error lists them."""
    dataset = recipe.dataset
    files = [file for file in find_files(dataset.paths) if kind_of(file) in RECORDS]
    documents = chain.from_iterable(read_documents(file, dataset.text_field, (dataset.label_field,)) for file in files)
    found = {str(document.beside.get(dataset.label_field)) for document in islice(documents, _LOOKED_AT)}
    return shown(sorted(found))


def _hint(recipe: Recipe, reading: Reading) -> str:
    dataset = recipe.dataset
    if "pictures" in reading.fields:
        field = dataset.messages_field or dataset.text_field
        return f"give .jsonl or .parquet rows with the fields {field!r} and {dataset.images_field!r}"
    if "labels" in reading.fields:
        return (
            f"give .jsonl or .parquet rows with the fields {dataset.text_field!r} and {dataset.label_field!r} "
            "(dataset.text_field, dataset.label_field)"
        )
    if "compared" in reading.fields:
        return f"give .jsonl or .parquet rows with the fields {dataset.query_field!r} and {dataset.positive_field!r}"
    return (
        f"give .jsonl or .parquet rows with the fields {dataset.source_field!r} and {dataset.target_field!r} "
        "(dataset.source_field, dataset.target_field), or train a causal model"
    )
