"""Which fields of a text's records hold what a model learns, by their names and by what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from zinf_cli.errors import DatasetError
from zinf_cli.text.documents import read_documents

_CHATS = ("messages", "conversations", "conversation", "chat")
_TEXTS = ("text", "content", "document", "body", "sentence")
_PAIRS = (("source", "target"), ("input", "output"), ("document", "summary"), ("article", "highlights"))
_PROMPTS = ("prompt", "instruction", "question")
_QUERIES, _POSITIVES = ("query", "anchor", "question"), ("positive", "pos", "positive_text")
_NEGATIVES = ("negative", "negatives", "neg", "hard_negatives", "negative_text")
_LABELS, _BESIDE = ("label", "labels", "category", "class"), ("id", "idx", "label_text")
_PICTURES = ("images", "image", "picture", "pictures")
_LOOKED_AT = 10_000
"""Records in which labels are looked for."""


@dataclass(frozen=True)
class Reader:
    """What decides how records are read: of a model, what it reads."""

    pairs: bool = False
    """A source and its target."""
    classifies: bool = False
    """Texts with a label, and nothing else."""
    labels: tuple[str, ...] = ()
    """Those that its configuration names."""
    both_ways: bool = False
    """Texts of which it sees all at once."""
    pictures: bool = False


@dataclass(frozen=True)
class Found:
    """What records hold."""

    kind: str
    """In words."""
    fields: Mapping[str, str]
    """Keys of the recipe's dataset section, and the fields that they name."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the recipe, dotted, and their values."""
    rows: bool = True
    """Whether each record is a sequence, or a few."""


def find_fields(record: Mapping[str, Any], file: Path, reads: Reader) -> Found:
    """What is learned of records like the first one of `file`. DatasetError if it can't be told."""
    if reads.pairs:
        for source, target in _PAIRS:
            if isinstance(record.get(source), str) and isinstance(record.get(target), str):
                return Found("pairs", {"source_field": source, "target_field": target})
        raise _unclear(record, file, "dataset.source_field and dataset.target_field")
    found = next(filter(None, (_preferences(record), _compared(record))), None)
    return found or _chats(record, reads) or _labelled(record, file, reads) or _text(record, file, reads)


def _preferences(record: Mapping[str, Any]) -> Found | None:
    if not all(isinstance(record.get(name), str | list) for name in ("chosen", "rejected")):
        return None
    fields = {"chosen_field": "chosen", "rejected_field": "rejected"}
    if (prompt := _first(record, _PROMPTS, str | list)) is not None:
        fields["prompt_field"] = prompt
    return Found("pairs of answers", fields, {"train.objective": "dpo"})


def _compared(record: Mapping[str, Any]) -> Found | None:
    query, positive = (_first(record, names, str) for names in (_QUERIES, _POSITIVES))
    if query is None or positive is None:
        return None
    fields = {"query_field": query, "positive_field": positive}
    more: dict[str, Any] = {"train.objective": "embedding"}
    if (negative := _first(record, _NEGATIVES, str | list)) is not None:
        fields["negative_field"] = negative
        value = record[negative]
        more["train.num_negatives"] = len(value) if isinstance(value, list) else 1
    return Found("queries, each with its text", fields, more)


def _chats(record: Mapping[str, Any], reads: Reader) -> Found | None:
    if (name := _first(record, _CHATS, list)) is None or reads.classifies:
        return None
    beside = _first(record, _PICTURES, str | list)
    parts = any(part.get("type") in ("image", "image_url") for part in _parts(record[name]))
    if reads.pictures and (beside is not None or parts):
        return Found("chats with pictures", {"messages_field": name, "images_field": beside or "images"})
    return Found("chats", {"messages_field": name}, rows=False)


def _parts(messages: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        yield from (part for part in (content if isinstance(content, list) else ()) if isinstance(part, dict))


def _labelled(record: Mapping[str, Any], file: Path, reads: Reader) -> Found | None:
    """Texts with a label: of a classifier, of a model that sees both ways, or of records that hold nothing else."""
    name, label = _first(record, _TEXTS, str), _first(record, _LABELS, str | int | float)
    alone = label is not None and not set(record) - {name, label, *_BESIDE}
    if name is None or label is None or not (reads.classifies or reads.both_ways or alone):
        return None
    more: dict[str, Any] = {} if reads.classifies else {"train.objective": "classification"}
    if not reads.labels:
        more["dataset.labels"] = labels = _labels(file, name, label)
        if len(labels) == 1 and not isinstance(record[label], float):
            return None  # nothing to tell apart
    return Found("texts with a label", {"text_field": name, "label_field": label}, more)


def _labels(file: Path, name: str, label: str) -> list[str]:
    """The labels of the first records; a single one, the field's name, if they are numbers to come close to."""
    documents = islice(read_documents(file, name, (label,)), _LOOKED_AT)
    values = (document.beside.get(label) for document in documents)
    found = {value for value in values if isinstance(value, str | int | float)}
    if any(isinstance(value, float) for value in found):
        return [label]
    numbers = {value for value in found if isinstance(value, int)}
    return list(map(str, sorted(numbers))) if numbers == found else sorted(map(str, found))


def _text(record: Mapping[str, Any], file: Path, reads: Reader) -> Found:
    strings = [name for name, value in record.items() if isinstance(value, str)]
    beside = _first(record, _PICTURES, str | list) if reads.pictures else None
    others = [name for name in strings if name != beside]
    for name in (*_TEXTS, *(others if len(others) == 1 else ())):
        if name in others and not reads.classifies:
            if beside is not None:
                return Found("texts with pictures", {"text_field": name, "images_field": beside})
            return Found("text", {"text_field": name}, rows=False)
    wanted = "dataset.text_field and dataset.label_field" if reads.classifies else None
    raise _unclear(record, file, wanted or "dataset.text_field or dataset.messages_field")


def _first(record: Mapping[str, Any], names: Sequence[str], kind: Any) -> str | None:
    """The first of `names` whose value is of a `kind`, and not empty or a truth value."""
    there = (name for name in names if isinstance(value := record.get(name), kind) and not isinstance(value, bool))
    return next((name for name in there if record[name] not in ("", [])), None)


def _unclear(record: Mapping[str, Any], file: Path, keys: str) -> DatasetError:
    names = ", ".join(list(map(str, record))[:12]) or "nothing"
    return DatasetError(
        f"which field is to be learned? There is: {names}",
        where=str(file),
        hint=f"put one field with the whole text, or chat messages, into each record, or write a recipe with {keys}",
    )
