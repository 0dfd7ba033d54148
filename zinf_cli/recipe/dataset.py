"""The section of a recipe about texts: what is trained on, and what is held out."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from zinf_cli.recipe.values import (
    AbsolutePath,
    NamedPaths,
    Number,
    Paths,
    Section,
    Texts,
    WeightedText,
    reachable,
)


class Dataset(Section):
    """What it is trained on."""

    path: Texts
    """A file, a folder or a list of them: .txt .jsonl (these also .gz) .parquet, or .npy (integers: tokens already).
    With {path: PATH, weight: 0.3} for each, weights are shares of the sequences, and add up to 1."""
    text_field: str = "text"
    """The field of .jsonl and .parquet records that holds the text."""
    messages_field: str | None = None
    """Instead of text: a field with chat messages; loss on the turns of dataset.roles_to_train only."""
    images_field: str | None = None
    """A field with a list of paths of pictures, relative to the file: a text has the processor's image token for each,
    a chat a part {type: image}, which may have its path itself (image: PATH, or image_url: {url: PATH}); then the field
    may be missing. The model's processor reads them (the extra `pictures`)."""
    roles_to_train: Annotated[tuple[str, ...], Field(min_length=1)] = ("assistant",)
    """Whose turns in chats are learned. A template that marks what the assistant says decides that itself."""
    source_field: str = "source"
    """For an encoder-decoder: the field that holds what the encoder reads."""
    target_field: str = "target"
    """And the one that holds what the decoder is to write; both are cut at train.seq_len tokens."""
    prompt_field: str = "prompt"
    """For train.objective dpo: the field with what is answered, text or chat messages; or answers are whole chats.
    A text is followed by the answer at once, so a space between them has to be in one of both."""
    chosen_field: str = "chosen"
    """The field with the answer that is to be preferred."""
    rejected_field: str = "rejected"
    """And the one with the other answer."""
    label_field: str = "label"
    """For a classifier: the field with what a text is, one of dataset.labels; or a number, if the model has one
    output."""
    labels: tuple[str, ...] = ()
    """The labels, in the order of the outputs; by default those that the model's configuration names."""
    query_field: str = "query"
    """For train.objective embedding: the field with a text that asks."""
    positive_field: str = "positive"
    """The field with the text that it belongs with."""
    negative_field: str = "negative"
    """The field with a text that it does not belong with, or a list of them, of which train.num_negatives count."""
    packing: Literal["auto", "documents", "stream"] = "auto"
    """documents: attention stays inside a document, chats are whole; stream: windows of consecutive tokens, which cross
    documents; auto: documents, where the text has several and the model can keep them apart."""
    tokenizer: AbsolutePath | None = None
    """A directory with a tokenizer, where it is not the model's."""
    eval_path: Paths | NamedPaths | None = None
    """Held-out text, or several: {name: path}, each with a loss of its own beside that of all."""
    eval_fraction: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Instead of eval_path: hold out this share at the end of the text."""
    shuffle: bool = True
    """false: consecutive windows in order, starting over at the end."""

    @field_validator("roles_to_train", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("labels", mode="before")
    @classmethod
    def _as_names(cls, value: Any) -> Any:
        """A label that YAML takes for a number is its name all the same."""
        names = tuple(str(name) if type(name) is int else name for name in value) if isinstance(value, list) else value
        if isinstance(names, tuple) and len(set(names)) < len(names):
            raise ValueError(f"a label is given twice: {', '.join(map(str, names))}")
        return names

    @property
    def paths(self) -> tuple[Path, ...]:
        """Those of `path`, without weights."""
        return tuple(text.path if isinstance(text, WeightedText) else text for text in self.path)

    @property
    def weights(self) -> tuple[float, ...]:
        """Those of `path`; none, if it is one text after another."""
        return tuple(text.weight for text in self.path if isinstance(text, WeightedText))

    @field_validator("path")
    @classmethod
    def _adds_up(cls, texts: tuple[Path | WeightedText, ...]) -> tuple[Path | WeightedText, ...]:
        weights = [text.weight for text in texts if isinstance(text, WeightedText)]
        if weights and len(weights) < len(texts):
            bare = next(text for text in texts if not isinstance(text, WeightedText))
            raise ValueError(f"give every text a weight, or none: {bare} has none")
        if weights and not math.isclose(sum(weights), 1, abs_tol=1e-3):
            raise ValueError(f"weights are shares: {' + '.join(f'{w:g}' for w in weights)} is {sum(weights):g}, not 1")
        return texts

    @property
    def held_out(self) -> dict[str, tuple[Path, ...]]:
        """Paths of eval_path by the name of the text; a single text has none, ""."""
        if self.eval_path is None:
            return {}
        return self.eval_path if isinstance(self.eval_path, dict) else {"": self.eval_path}

    @property
    def all_paths(self) -> tuple[Path, ...]:
        """Those of all texts that a run reads."""
        return (*self.paths, *chain(*self.held_out.values()))

    @field_validator("path", "eval_path")
    @classmethod
    def _exists(cls, texts: Any) -> Any:
        for text in chain(*texts.values()) if isinstance(texts, dict) else texts or ():
            path = text.path if isinstance(text, WeightedText) else text
            with reachable(path):
                there = path.exists()
            if not there:
                raise ValueError(f"no such file or folder: {path}")
        return texts

    @model_validator(mode="after")
    def _one_held_out(self) -> Dataset:
        if self.eval_path is not None and self.eval_fraction is not None:
            raise ValueError("give either eval_path or eval_fraction")
        return self
