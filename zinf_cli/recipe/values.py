"""What may be written for a value of a recipe, and what it becomes: paths, numbers, sizes, texts with weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from zinf_cli.amounts import parse_bytes

_VARIABLE = re.compile(r"\$(?:\$|(\w+)|\{([^}]*)\}|(\{))")


def _absolute(value: Any) -> Any:
    """Paths are relative to the directory the command runs in; `~`, $NAME and ${NAME} are expanded; stored absolute."""
    if not isinstance(value, str | Path):
        return value
    text = _VARIABLE.sub(_variable, str(value))
    if not text.strip() or "\0" in text:
        raise ValueError(f"{str(value)!r} is no path")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~name of nobody
        raise ValueError(f"{value}: {str(error).lower()}") from error


def _variable(match: re.Match[str]) -> str:
    if match[0] == "$$":
        return "$"
    name = match[1] or match[2] or ""
    if not os.environ.get(name):
        raise ValueError(f"{match[0]} is not set in the environment (a $ that is part of the name is written $$)")
    return os.environ[name]


def _paths(value: Any) -> Any:
    if isinstance(value, str | Path):
        value = [value]
    return tuple(_absolute(item) for item in value) if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Any:
    """A text or a list of them; one with a weight is a mapping of both."""
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_weighted(item) if isinstance(item, dict) else _absolute(item) for item in items)


def _weighted(item: dict[str, Any]) -> WeightedText:
    if item.keys() != {"path", "weight"} or not isinstance(item["path"], str | Path):
        raise ValueError(f"a text with a weight is {{path: PATH, weight: NUMBER}}, got {item}")
    weight = _number(item["weight"])
    if not isinstance(weight, float) or not 0 < weight < math.inf:
        raise ValueError(f"the weight of {item['path']} has to be a number above 0, got {item['weight']!r}")
    return WeightedText(path=_absolute(item["path"]), weight=weight)


def _number(value: Any) -> Any:
    """YAML reads 5e-5 as a string; everybody means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _size(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


@contextmanager
def reachable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ValueError(f"{path}: {error.strerror}") from error


# What a JSON Schema says of a value is what may be written, not what it becomes.
_OneOrMorePaths = Path | Annotated[list[Path], Field(min_length=1)]
_WrittenSize = Annotated[int, Field(gt=0)] | Annotated[str, Field(pattern=r"^\s*[0-9]*\.?[0-9]+\s*[A-Za-z]*\s*$")]
_WRITTEN_SWITCH = {"enum": ["auto", "on", "off", True, False]}  # an editor's YAML 1.2 takes on and off for text

AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]
_WrittenWeighted = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "path": {"type": "string", "format": "path"},
                "weight": {"type": "number", "exclusiveMinimum": 0},
            },
            "required": ["path", "weight"],
            "additionalProperties": False,
        }
    ),
]
_OneOrMoreTexts = Path | Annotated[list[Path | _WrittenWeighted], Field(min_length=1)]
Paths = Annotated[
    tuple[Path, ...], BeforeValidator(_paths, json_schema_input_type=_OneOrMorePaths), Field(min_length=1)
]
NamedPaths = Annotated[dict[str, Paths], Field(min_length=1)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Size = Annotated[int, BeforeValidator(_size, json_schema_input_type=_WrittenSize), Field(gt=0)]
Switch = Annotated[Literal["auto"] | bool, WithJsonSchema(_WRITTEN_SWITCH)]


class Section(BaseModel):
    """Frozen, and closed to unknown keys; an int is not a string and a string not an int."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class WeightedText(Section):
    """A text with its share of the sequences that are trained on."""

    path: Path
    weight: float


Texts = Annotated[
    tuple[Path | WeightedText, ...],
    BeforeValidator(_texts, json_schema_input_type=_OneOrMoreTexts),
    Field(min_length=1),
]
