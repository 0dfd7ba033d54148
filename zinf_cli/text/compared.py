"""Queries, each with the text that it belongs with and others that it does not belong with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from zinf_cli.errors import DatasetError
from zinf_cli.text.documents import Document


@dataclass(frozen=True)
class Compared:
    """Where a row has its texts."""

    query: str
    positive: str
    negative: str
    num_negatives: int
    """How many of a row's negatives count, the first ones."""

    @property
    def texts_of_a_row(self) -> int:
        """Each is a sequence of its own."""
        return 2 + self.num_negatives

    def texts(self, row: Document) -> Iterator[Document]:
        """The query, its positive, then its negatives. DatasetError if one is missing."""
        positive, negatives = row.beside.get(self.positive), row.beside.get(self.negative)
        negatives = [negatives] if isinstance(negatives, str) else negatives or []
        yield replace(row, content=self._text(row, self.query, row.content))
        yield replace(row, content=self._text(row, self.positive, positive))
        if not isinstance(negatives, list) or len(negatives) < self.num_negatives:
            count = len(negatives) if isinstance(negatives, list) else "none"
            raise DatasetError(
                f"expected {self.num_negatives} negatives in {self.negative!r}, a text or a list of texts, got {count}",
                where=row.where,
                hint="set dataset.negative_field to the field that holds them, or lower train.num_negatives",
            )
        for negative in negatives[: self.num_negatives]:
            yield replace(row, content=self._text(row, self.negative, negative))

    def _text(self, row: Document, field: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise DatasetError(
                f"expected a text in {field!r}, got {value!r:.40}",
                where=row.where,
                hint="set dataset.query_field, .positive_field and .negative_field to fields that hold texts",
            )
        return value
