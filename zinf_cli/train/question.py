"""`python -m zinf_cli.train.question`: the launcher asks for the figures of a recipe, this process answers.

The launcher imports no torch that way. torchrun's agent answers the same question (agent.py). A question is a line of
JSON, {"recipe": ..., "slots": N, "world_size": N, "most": N, "in_part": false}. So is the answer: the figures, or
{"error": ...} with the error's fields (errors.py). Before it there may be lines {"tokenised": SHARE}.

A look at a model takes torch and transformers, whose import is most of the time between Enter and the plan. So answers
are cached. An answer is used again for the same recipe, as long as zinf, torch, transformers, this machine's cores and
every file that was looked at are what they were. Where the kernel or torch sees an accelerator, nothing is cached: how
much of its memory is free is part of the answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from xxhash import xxh3_128_hexdigest

from zinf_cli.checkpoint.folder import checkpoints_to_resume
from zinf_cli.durable import write_durably
from zinf_cli.errors import RankError, ZinfError
from zinf_cli.machine.control_groups import cores_here
from zinf_cli.machine.hardware import accelerators_here
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe, load_recipe
from zinf_cli.text.cache import cache_folder, identity, private_folder
from zinf_cli.text.text_files import find_texts
from zinf_cli.told import Tell, nobody
from zinf_cli.version import code_digest, version_of

MOST_ANSWERS = 64
"""Answers in the cache; the oldest go first."""
OLDEST_S = 24 * 3600.0
"""How old an answer may be. The machine's speed is part of it, and may have been measured in a bad moment."""
LIBRARIES = ("torch", "transformers", "tokenizers")
"""What an answer follows from, beside zinf."""
DEVICE_CHOICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables that choose which accelerators a process sees."""


def answer(
    recipe: Recipe,
    slots: int | None,
    world_size: int | None,
    most: int | None = None,
    tell: Tell = nobody,
    *,
    in_part: bool = False,
) -> dict[str, Any]:
    """The figures of `find_figures`. Those of a part of a text are not cached."""
    entry = _entry(recipe, slots, world_size, most)
    cached = _cached(entry)
    if cached is not None:
        return cached
    from zinf_cli.train.figures import find_figures

    figures = find_figures(recipe, slots, world_size, most, tell, in_part=in_part)
    text = json.dumps(dataclasses.asdict(figures))
    lasting = figures.data.share == 1 and not figures.data.notes  # notes are said once
    if entry is not None and not figures.machine.accelerators and lasting:
        with contextlib.suppress(OSError):
            _cache(entry, text)
    document: dict[str, Any] = json.loads(text)
    return document


def _cached(entry: Path | None) -> dict[str, Any] | None:
    """The answer in a file of the cache; None where there is none, or it is too old or damaged."""
    if entry is not None:
        with contextlib.suppress(OSError, ValueError):
            if time.time() - entry.stat().st_mtime < OLDEST_S:
                checksum, _, text = entry.read_text(encoding="utf-8").partition("\n")
                if checksum == xxh3_128_hexdigest(text.encode()):
                    cached: dict[str, Any] = json.loads(text)
                    return cached
    return None


def _entry(recipe: Recipe, slots: int | None, world_size: int | None, most: int | None) -> Path | None:
    """The file of the cache for this answer; None where it is not to be cached."""
    if accelerators_here() or None in map(version_of, LIBRARIES):
        return None
    try:
        return cache_folder("figures") / f"{_key(recipe, slots, world_size, most)}.json"
    except (ZinfError, OSError):  # there is something wrong, which `find_figures` will say
        return None


def _cache(entry: Path, text: str) -> None:
    private_folder(entry.parent)
    write_durably(entry, f"{xxh3_128_hexdigest(text.encode())}\n{text}", mode=0o600)
    for old in sorted(entry.parent.glob("*.json"), key=lambda path: -path.stat().st_mtime)[MOST_ANSWERS:]:
        old.unlink()


def _key(recipe: Recipe, slots: int | None, world_size: int | None, most: int | None) -> str:
    """A hash of all that the answer follows from."""
    software = [sys.version, *map(version_of, (*LIBRARIES, "peft"))]
    machine = [socket.gethostname(), cores_here(), *map(os.environ.get, DEVICE_CHOICES)]
    texts = find_texts(recipe.dataset.all_paths)
    seen = [*_seen(recipe), *(file for text in texts for file in text.files)]
    files = [(str(file), *identity(file)) for file in seen]
    said = [text.line() for text in texts]
    parts = [code_digest(), software, machine, dump_recipe(recipe), slots, world_size, most, files, said]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _seen(recipe: Recipe) -> Iterator[Path]:
    """The files that are looked at, beside the text."""
    dataset = recipe.dataset
    folders = [folder for folder in (recipe.model.name_or_path, dataset.tokenizer) if folder is not None]
    checkpoints = checkpoints_to_resume(recipe.output_dir, recipe.checkpoint.resume)
    for folder in (*folders, *checkpoints):
        yield from sorted(folder.iterdir()) if folder.is_dir() else ()


class Question:
    """A question of the launcher's: the line that asks it, and the stream that the answer goes to."""

    def __init__(self, line: str, out: IO[str]) -> None:
        self._asked = json.loads(line)
        self._out = out
        self._told = time.monotonic()

    def answered_at_once(self) -> bool:
        """Answer from the cache. False where the model has to be looked at: then nothing has been said."""
        known: dict[str, Any] | None
        try:
            known = _cached(_entry(*self._parts))
        except ZinfError as error:
            known = _reported(error)
        if known is not None:
            self._say(known)
        return known is not None

    def answer(self) -> None:
        """Look at the recipe in a fork, which takes the memory that a rank will. This process stays as it is."""
        from zinf_cli.train import figures, loop  # noqa: F401

        child = os.fork()
        if child == 0:
            self._say(self._looked_at())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            self._say(_failed(f"its process ended with {os.waitstatus_to_exitcode(status)}"))

    def _looked_at(self) -> dict[str, Any]:
        try:
            return answer(*self._parts, self._tell, in_part=self._asked["in_part"])
        except ZinfError as error:
            return _reported(error)
        except BaseException as error:
            return _failed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")

    @cached_property
    def _parts(self) -> tuple[Recipe, int | None, int | None, int | None]:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(self._asked["recipe"])
            file.flush()
            asked = self._asked
            return load_recipe(Path(file.name)), asked["slots"], asked["world_size"], asked["most"]

    def _tell(self, share: float) -> None:
        """Say how much of the text is tokenised, not more often than twice a second."""
        if time.monotonic() >= self._told + 0.5:
            self._told = time.monotonic()
            self._say({"tokenised": share})

    def _say(self, document: Mapping[str, Any]) -> None:
        print(json.dumps(document), file=self._out, flush=True)


def _reported(error: ZinfError) -> dict[str, Any]:
    return {"error": error.to_json()}


def _failed(why: str) -> dict[str, Any]:
    return _reported(RankError(f"the model could not be read: {why}"))


def answers_to() -> IO[str]:
    """The real stdout. From now on, whatever else is printed goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def main() -> None:
    question = Question(sys.stdin.readline(), answers_to())
    if not question.answered_at_once():
        question.answer()


if __name__ == "__main__":
    main()
