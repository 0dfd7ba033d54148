"""What the plan needs to know is looked for once, and again when anything it follows from has changed."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from programs import command
from tiny_recipes import recipe_of
from zinf_cli.errors import DatasetError
from zinf_cli.launch.facts import facts
from zinf_cli.launch.question import question
from zinf_cli.recipe.hosts import Host
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train import figures
from zinf_cli.train import question as program


@pytest.fixture
def looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that were really looked at; the machine's speed is stated, which takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(figures, "_flops", lambda *_: 1e13)
    seen: list[Recipe] = []
    really = figures.find_figures

    def counted(recipe: Recipe, *arguments: Any, **named: Any) -> Any:
        seen.append(recipe)
        return really(recipe, *arguments, **named)

    monkeypatch.setattr(figures, "find_figures", counted)
    return seen


def test_the_same_question_is_answered_from_the_cache(tmp_path: Path, looked: list[Recipe]) -> None:
    recipe = recipe_of(tmp_path, "llama")
    first = program.answer(recipe, 1, None)
    assert program.answer(recipe, 1, None) == first
    assert len(looked) == 1


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", None])
def test_a_damaged_answer_is_none(tmp_path: Path, looked: list[Recipe], damage: bytes | None) -> None:
    recipe = recipe_of(tmp_path, "llama")
    first = program.answer(recipe, 1, None)
    (entry,) = (tmp_path / "cache" / "zinf" / "figures").iterdir()
    assert (entry.stat().st_mode & 0o777, entry.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    if damage is None:  # a digit of a number flips
        digits = entry.read_bytes()
        damage = digits.replace(b'"num_params": ', b'"num_params": 9')
        assert damage != digits
    entry.write_bytes(damage)
    assert program.answer(recipe, 1, None)["model"] == first["model"]
    assert len(looked) == 2


def test_what_changed_is_looked_at_again(tmp_path: Path, looked: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, "llama")
    first = program.answer(recipe, 1, None)
    assert program.answer(recipe, 2, None)["world_size"] == 2
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seq_len": 2 * recipe.train.seq_len})})
    assert program.answer(longer, 1, None)["model"] != first["model"]
    os.utime(recipe.dataset.paths[0], (1, 1))
    assert program.answer(recipe, 1, None)["model"] == first["model"]
    monkeypatch.setattr(program, "code_digest", lambda: "another zinf")
    program.answer(recipe, 1, None)
    monkeypatch.setattr(program, "OLDEST_S", 0.0)
    program.answer(recipe, 1, None)
    assert len(looked) == 6


def test_what_a_process_sees_of_devices_is_part_of_the_question(
    tmp_path: Path, looked: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, "llama")
    for seen in ("", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        program.answer(recipe, 1, None)
    assert len(looked) == 2


def test_an_accelerator_that_only_torch_sees_is_looked_at_each_time(
    tmp_path: Path, looked: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = figures._machine
    monkeypatch.setattr(figures, "_machine", lambda *given: replace(measured(*given), accelerators=1))
    recipe = recipe_of(tmp_path, "llama")
    for _ in range(2):
        assert program.answer(recipe, 1, None)["machine"]["accelerators"] == 1
    assert len(looked) == 2


def test_a_library_without_metadata_ends_nothing(
    tmp_path: Path, looked: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another one the next time: nothing would tell."""
    really = metadata.version

    def version(name: str) -> str:
        if name in ("torch", "tokenizers", "zinf"):
            raise metadata.PackageNotFoundError(name)
        return really(name)

    monkeypatch.setattr(metadata, "version", version)
    recipe = recipe_of(tmp_path, "llama")
    for _ in range(2):
        program.answer(recipe, 1, None)
    assert len(looked) == 2
    assert facts([], [])["torch"] == "of unknown version"


def test_to_look_changes_nothing_for_what_computes_then(tmp_path: Path, looked: list[Recipe]) -> None:
    """Beside tests that run in turns, two threads of each for two cores take many times as long as one."""
    before, count = torch.get_num_threads(), len(os.sched_getaffinity(0)) + 1
    torch.set_num_threads(count)
    program.answer(recipe_of(tmp_path, "llama"), 1, None)
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (found, len(looked)) == (count, 1)


def test_an_error_is_found_each_time(tmp_path: Path, looked: list[Recipe]) -> None:
    recipe = recipe_of(tmp_path, "llama")
    recipe.dataset.paths[0].unlink()
    for _ in range(2):
        with pytest.raises(DatasetError, match="no such file"):
            program.answer(recipe, 1, None)
    assert len(looked) == 2


def test_old_answers_make_room(tmp_path: Path, looked: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "MOST_ANSWERS", 1)
    recipe = recipe_of(tmp_path, "llama")
    program.answer(recipe, 1, None)
    program.answer(recipe, 2, None)
    assert len(list((tmp_path / "cache" / "zinf" / "figures").iterdir())) == 1
    assert len(looked) == 2


def test_a_question_is_answered_in_a_fork_and_then_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = recipe_of(tmp_path, "llama")
    first, had_to_look = answers(recipe)
    assert (first["world_size"], first["ranks_per_host"], had_to_look) == (2, 1, True)
    assert answers(recipe) == (first, False)


def answers(recipe: Recipe) -> tuple[dict[str, Any], bool]:
    """To a question in a process of its own; and whether that had to import torch."""
    asked = question(recipe, None, [Host("a", (0,)), Host("b", (0,))])
    words = command("imported", "zinf_cli.train.question:main")
    done = subprocess.run(words, input=asked, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), "torch" in done.stderr.splitlines()[-1].split()
