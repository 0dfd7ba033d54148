"""The labels of texts, which a classifier learns to tell."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from zinf_cli.errors import DatasetError
from zinf_cli.text.documents import Document

_LARGEST = 3.4e38
"""Of a number in fp32."""


@dataclass(frozen=True)
class Labels:
    """Where the label of a text stands, and which there are."""

    field: str
    names: tuple[str, ...]
    """In the order of the model's outputs. None: a label is a number (regression)."""

    def of(self, document: Document) -> float:
        """The number of a document's label among the names, or the number that it is. DatasetError if it is neither.

        Where no name is a number, a number is a place among the names, from 0.
        """
        value = document.beside.get(self.field)
        if not self.names and (isinstance(value, float) or type(value) is int) and abs(value) <= _LARGEST:
            return float(value)
        if self.names and (isinstance(value, str) or type(value) is int):
            if str(value) in self.names:
                return float(self.names.index(str(value)))
            if type(value) is int and 0 <= value < len(self.names) and not any(map(_is_number, self.names)):
                return float(value)
        wanted = f"one of {shown(self.names)}" if self.names else "a finite number"
        raise DatasetError(
            f"expected {wanted} in {self.field!r}, got {value!r:.40}",
            where=document.where,
            hint="set dataset.label_field to the field that holds it, or dataset.labels to all that there are",
        )


def _is_number(name: str) -> bool:
    """Whether a label is a number itself: then another number in a text is no place among the labels."""
    return re.fullmatch(r"-?\d+", name) is not None


def shown(names: Iterable[Any]) -> str:
    """Labels as an error lists them."""
    known = [str(name)[:40] for name in names]
    return ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
