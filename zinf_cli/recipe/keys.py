"""Every key of a recipe, as its schema and docstrings say: for a terminal, a page of docs, and editors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.values import Section

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


@dataclass(frozen=True)
class RecipeKey:
    """A key that takes a value; sections are not among them."""

    name: str
    """Dotted, as on the command line: train.seq_len."""
    takes: str
    """What may be written, in words: auto | integer ≥ 1."""
    default: str | None
    """As YAML on a line; None where a value has to be given."""
    meaning: str
    """Its docstring."""


class _Schema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        """A key's own name says as much."""
        return False


def json_schema() -> dict[str, Any]:
    """Of what may be written in a recipe, JSON Schema 2020-12."""
    schema = _in_its_words(Recipe.model_json_schema(schema_generator=_Schema))
    return {"$schema": _Schema.schema_dialect, **schema, "title": "A recipe of zinf"}


def _in_its_words(schema: Any) -> Any:
    """pydantic leaves a bound under a name of its own where another validator comes before it."""
    if isinstance(schema, list):
        return [_in_its_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {_BOUNDS.get(name, name): _in_its_words(value) for name, value in schema.items()}


def sections() -> dict[str, tuple[str, tuple[RecipeKey, ...]]]:
    """Of every section its docstring and its keys; what belongs to none comes last, as ""."""
    schema = json_schema()
    found: dict[str, tuple[str, tuple[RecipeKey, ...]]] = {}
    for name, field in Recipe.model_fields.items():
        if (section := _section(field)) is not None:
            keys = _keys(section, schema["$defs"][section.__name__]["properties"], f"{name}.")
            found[name] = (section.__doc__ or "", tuple(keys))
    found[""] = ("", tuple(_keys(Recipe, schema["properties"])))
    return found


def _keys(section: type[Section], properties: dict[str, Any], prefix: str = "") -> Iterator[RecipeKey]:
    for name, field in section.model_fields.items():
        if _section(field) is None:
            default = None if field.is_required() else json.dumps(properties[name]["default"])
            meaning = " ".join((field.description or "").split())
            yield RecipeKey(prefix + name, _in_words(properties[name]), default and default.strip('"'), meaning)


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _in_words(schema: dict[str, Any]) -> str:
    """A JSON Schema of one value, as a reader of a manual wants it. That null is taken goes without saying."""
    if "anyOf" in schema:
        words = [_in_words(choice) for choice in schema["anyOf"] if choice.get("type") != "null"]
        return "size" if "size" in words else " | ".join(words)
    if "enum" in schema or "const" in schema:
        return " | ".join(
            str(value) for value in schema.get("enum", [schema.get("const")]) if value not in (True, False)
        )
    kind = schema["type"]
    if kind == "array":
        items = schema.get("prefixItems")
        if items:
            return f"[{', '.join(map(_in_words, items))}]"
        choices = schema["items"].get("anyOf", [schema["items"]])
        return f"list of {' or '.join(f'{_in_words(item)}s' for item in choices)}"
    if kind == "string":
        return schema.get("format") or ("size" if "pattern" in schema else "text")
    words_of = {"boolean": "true | false", "object": "mapping"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = (f"{sign} {schema[name]:g}" for name, sign in bounds.items() if name in schema)
    return " ".join([words_of.get(kind, kind), " and ".join(limits)]).strip()


def markdown() -> str:
    """docs/recipe.md."""
    lines = [
        "# The keys of a recipe",
        "",
        "Made by `zinf recipe keys --markdown` from the docstrings of zinf_cli/recipe. Every key can be",
        "given on the command line as well: `zinf launch my.yaml train.max_steps=20`. A size has a unit: 48GiB, 500MB.",
    ]
    for name, (what, keys) in sections().items():
        lines += ["", f"## {name or 'Beside the sections'}", ""] + ([what, ""] if what else [])
        lines += ["| key | takes | default | |", "|---|---|---|---|"]
        for key in keys:
            takes, meaning = (text.replace("|", "\\|") for text in (key.takes, key.meaning))
            default = "has to be given" if key.default is None else f"`{key.default}`"
            lines.append(f"| `{key.name}` | {takes} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"
