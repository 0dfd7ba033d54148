"""The keys and the JSON Schema of a recipe say what zinf reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from zinf_cli.errors import RecipeError
from zinf_cli.recipe.keys import json_schema, markdown, sections
from zinf_cli.recipe.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "recipes" / "recipe.schema.json"


def test_the_page_and_the_schema_are_those_of_the_docstrings() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text() == markdown(), "zinf recipe keys --markdown > docs/recipe.md"
    assert json.loads(SCHEMA.read_text()) == json_schema(), f"zinf recipe schema > {SCHEMA.relative_to(ROOT)}"


def test_every_key_has_a_meaning() -> None:
    keys = [key for _, of_section in sections().values() for key in of_section]
    assert len({key.name for key in keys}) == len(keys) > 40
    assert all(key.meaning and key.takes for key in keys)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_editor_takes_the_recipes_of_the_house(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    jsonschema.validate(yaml.safe_load(text), json_schema())


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("dataset.path", ["."], True),
        ("dataset.path", [], False),
        ("dataset.eval_fraction", 0.5, True),
        ("dataset.eval_fraction", 1.0, False),
        ("train.seq_len", 1, False),
        ("train.seq_length", 1024, False),
        ("train.precision", "bf17", False),
        ("train.micro_batches_per_sweep", "auto", True),
        ("train.micro_batches_per_sweep", 0, False),
        ("train.max_grad_norm", None, True),
        ("train.max_grad_norm", 0, False),
        ("optimizer.betas", [0.9, 0.95], True),
        ("optimizer.betas", [0.9], False),
        ("optimizer.betas", [0.9, 1], False),
        ("offload.cpu_memory", "48GiB", True),
        ("offload.cpu_memory", 0, False),
        ("offload.cpu_memory", "48 pounds", None),
        ("offload.nvme_path", "drive", True),
        ("offload.nvme_path", ["one", "two"], True),
        ("offload.verify", True, True),
        ("offload.verify", "always", False),
        ("checkpoint.resume", "a/path", True),
        ("seed", -1, False),
    ],
)
def test_schema_and_recipe_agree(tmp_path: Path, key: str, value: Any, taken: bool | None) -> None:
    """None: the schema does not know which sizes there are; the recipe does."""
    tree: dict[str, Any] = {"model": {"config": {"model_type": "llama"}}, "dataset": {"path": str(tmp_path)}}
    *section, name = key.split(".")
    (tree.setdefault(section[0], {}) if section else tree)[name] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    editor = jsonschema.Draft202012Validator(json_schema()).is_valid(tree)
    try:
        load_recipe(path)
        launch = True
    except RecipeError:
        launch = False
    assert (editor, launch) == ((taken, taken) if taken is not None else (True, False))
