"""Recipes as text: YAML with line numbers, key=value overrides, and errors that say where and what to do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from zinf_cli.errors import RecipeError
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_yaml import Key, NotYamlError, Tree, parse
from zinf_cli.recipe.values import Section

SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "per_device_train_batch_size": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "batch_size": "train.micro_batch_size",
    "num_train_epochs": "train.epochs",
    "max_length": "train.seq_len",
    "max_seq_len": "train.seq_len",
    "gradient_clipping": "train.max_grad_norm",
    "lr_scheduler_type": "lr_scheduler.name",
    "warmup_steps": "lr_scheduler.warmup_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
}
"""What users of transformers, torchtune and DeepSpeed type."""
INSTEAD_OF: dict[Key, Key] = {("train", "max_steps"): ("train", "epochs"), ("train", "epochs"): ("train", "max_steps")}
"""Given on the command line, the first takes the place of the second in the file: a recipe has one of them."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; RecipeError with every problem, each with its line or override."""
    tree, places, problems = _read(path)
    for override in overrides:
        problems += _apply(override, tree, places)
    tree.setdefault("output_dir", plain(Path("runs") / path.stem))
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        told = {problem.partition(": ")[0] for problem in problems}  # a value that is none is not told twice
        problems += [
            line
            for line in (_line_of(entry, places, path) for entry in error.errors())
            if line.partition(": ")[0] not in told or "unknown key" in line
        ]
        recipe = None
    if problems or recipe is None:
        raise RecipeError(list(dict.fromkeys(problems)))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every default written out; reading it gives an equal recipe."""
    return str(yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True))


def values_by_key(recipe: Recipe) -> dict[str, Any]:
    """Every value by its dotted key, as "train.seq_len"."""
    return {".".join(key): value for key, value in _leaves(plain(recipe))}


def filled_in(path: Path, overrides: Sequence[str]) -> list[str]:
    """The keys of a recipe that were not given, with the defaults they got, as key=value."""
    tree, places, _ = _read(path)
    for override in overrides:
        _apply(override, tree, places)
    recipe = load_recipe(path, overrides)
    return [
        f"{'.'.join(key)}={json.dumps(value) if not isinstance(value, str) else value}"
        for key, value in _leaves(plain(recipe))
        if not any(given == key[: len(given)] for given in places if _is_leaf(given, tree)) and value is not None
    ]


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, str], list[str]]:
    """The YAML tree, where each key stands ("recipe.yaml:12"), and problems of the text itself."""
    try:
        node = parse(path.read_bytes().decode("utf-8-sig"))  # once: it may be a pipe
    except OSError as error:
        hint = "; zinf init MODEL TEXT writes a recipe" if isinstance(error, FileNotFoundError) else ""
        raise RecipeError([f"{path}: {error.strerror or error}{hint}"]) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError([f"{path}:{line}: not UTF-8 text"]) from error
    except NotYamlError as error:
        raise RecipeError([f"{path}:{error.line}: not valid YAML: {error}"]) from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError([f"{path}:1: a recipe is a mapping of sections such as model: and train:"])
    tree = Tree(node, lambda node: f"{path}:{node.start_mark.line + 1}")
    return tree.value or {}, tree.places, tree.problems


def _apply(override: str, tree: dict[str, Any], places: dict[Key, str]) -> list[str]:
    """Put key=value into the tree; the value is a YAML scalar or list."""
    name, equals, text = override.partition("=")
    key = tuple(name.split("."))
    if not equals or not all(key):
        return [f"command line: {override}: expected KEY=VALUE, such as train.max_steps=20"]
    try:
        node = parse(text)
    except NotYamlError as error:
        return [f"command line: {override}: the value is not valid YAML: {error}"]
    value = None
    if node is not None:
        given = Tree(node, lambda node: f"command line: {override}")
        if given.problems:
            return given.problems
        value = given.value
    branch = tree
    for part in key[:-1]:
        below = branch.get(part)
        if below is None:
            below = branch[part] = {}
        if not isinstance(below, dict):
            return [f"command line: {override}: {part} is a value, it has no keys of its own"]
        branch = below
    branch[key[-1]] = value
    places[key] = f"command line: {override}"
    if value is not None and key in INSTEAD_OF and not places.get(INSTEAD_OF[key], "").startswith("command line"):
        branch.pop(INSTEAD_OF[key][-1], None)
        places.pop(INSTEAD_OF[key], None)
    return []


def _line_of(entry: Any, places: dict[Key, str], path: Path) -> str:
    """One line for one pydantic error, in plain words."""
    key = _schema_key(entry["loc"])
    name = ".".join(key)
    kind = entry["type"]
    place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), f"{path}:1")
    if kind == "extra_forbidden":
        return f"{place}: {name}: unknown key{_did_you_mean(key)}"
    if kind == "missing":
        return f"{place}: {name} is missing{_purpose(key)}"
    if kind == "value_error":
        message = str(entry["ctx"]["error"])
    else:
        message = f"expected {_expected(entry)}, got {_shown(entry['input'])}"
    return f"{place}: {name}: {message}" if name else f"{place}: {message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _schema_key(loc: tuple[str | int, ...]) -> Key:
    """The part of an error's location that names a key; branches of unions and list indices are pydantic's own."""
    key: list[str] = []
    section: type[BaseModel] | None = Recipe
    for part in loc:
        if section is None or not isinstance(part, str):
            break
        key.append(part)
        field = section.model_fields.get(part)
        annotation = field.annotation if field is not None else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
    return tuple(key)


def _expected(entry: Any) -> str:
    """What a field takes, in words, from the type of error."""
    kind, context = entry["type"], entry.get("ctx", {})
    words = {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a string",
        "dict_type": "a mapping",
        "model_type": "a section with keys",
        "tuple_type": "a list",
        "is_instance_of": "a path",
        "path_type": "a path",
        "too_short": "more entries",
        "too_long": "fewer entries",
        "greater_than": f"more than {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "literal_error": str(context.get("expected")),
    }
    return words.get(kind) or str(entry["msg"])


def _did_you_mean(key: Key) -> str:
    section: Any = Recipe
    for part in key[:-1]:
        section = section.model_fields[part].annotation
    near = difflib.get_close_matches(key[-1], section.model_fields, n=1)
    if near:
        return f", did you mean {near[0]}?"
    if key[-1] in SYNONYMS:
        return f", did you mean {SYNONYMS[key[-1]]}?"
    elsewhere = [
        f"{name}.{key[-1]}"
        for name, field in Recipe.model_fields.items()
        if key[-1] in getattr(field.annotation, "model_fields", {})
    ]
    return f", did you mean {elsewhere[0]}?" if elsewhere else f" (known: {', '.join(section.model_fields)})"


def _purpose(key: Key) -> str:
    section: Any = Recipe
    for part in key[:-1]:
        section = section.model_fields[part].annotation
    text = section.model_fields[key[-1]].description
    return f": {text}" if text else ""


def plain(value: Any) -> Any:
    """A section as YAML has it: paths and tuples as strings and lists, sizes with their unit."""
    if isinstance(value, BaseModel):
        return {
            name: _with_unit(getattr(value, name)) if _is_size(name) else plain(getattr(value, name))
            for name in type(value).model_fields
        }
    if isinstance(value, Path):
        return str(value).replace("$", "$$")  # $NAME is a variable
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value


def _is_size(name: str) -> bool:
    return name in ("cpu_memory", "device_memory", "nvme_space")


def _with_unit(num_bytes: int | None) -> str | int | None:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes is not None and num_bytes % factor == 0:
            return f"{num_bytes // factor}{unit}"
    return num_bytes


def _leaves(tree: dict[str, Any], prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and (*prefix, name) != ("model", "config"):
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _is_leaf(key: Key, tree: dict[str, Any]) -> bool:
    branch: Any = tree
    for part in key:
        branch = branch.get(part) if isinstance(branch, dict) else None
    return not isinstance(branch, dict) or key == ("model", "config")
