"""`zinf init`: a recipe that runs, from a model and a text. Each choice stands beside its reason."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import chain, count
from pathlib import Path
from typing import Any

from rich.console import Console

from zinf_cli.amounts import format_bytes, format_count
from zinf_cli.errors import UsageError
from zinf_cli.machine.hardware import accelerators_here
from zinf_cli.recipe.deepspeed import Taken, from_deepspeed
from zinf_cli.recipe.draft import Choice, draft
from zinf_cli.recipe.recipe_file import load_recipe, plain
from zinf_cli.screen import outside
from zinf_cli.train.first_look import ModelFacts, TextFacts, look_at_model, look_at_text

_TOKENS_A_STEP = {True: 32_768, False: 2_048}
"""With accelerators, and without: enough for a steady gradient, few enough for a step that ends soon."""
_LONGEST = {True: 2048, False: 256}
_ENOUGH_TO_HOLD_OUT = 40
"""Sequences."""
_FEWEST_STEPS = 8
_LARGE_MODEL = 10**9
_COMPARED = 16
"""Rows of a micro-batch, each of whose texts the queries of all are compared with."""
_SHORTEST_ROW = 32
_REASONS = {
    "dataset.labels": "those of the first records: all have to be here, in the order of the outputs",
    "train.num_negatives": "of each row, as the first one has them",
}


@dataclass(frozen=True)
class InitRequest:
    """The command line of `zinf init`."""

    model: Path
    texts: tuple[Path, ...]
    out: Path | None
    deepspeed: Path | None
    num_ranks: int | None
    """Slots of a hostfile, where one is given."""
    adapter: bool = False
    """Whether an adapter is trained in the model's place."""


def init(request: InitRequest, console: Console) -> None:
    """Write the recipe; say where it is, what it means and what comes next."""
    path = request.out or Path(f"{request.model.absolute().name}.yaml")
    model = look_at_model(request.model)
    text = look_at_text(request.texts, model.reads)
    taken = Taken() if request.deepspeed is None else _deepspeed(request.deepspeed, request.num_ranks)
    given = {choice.key: choice.value for choice in taken.choices}
    choices = [*_what(request, path, text), *_how(model, text, given, adapter=request.adapter)]
    _write(path, draft([*choices, *taken.choices], _heading(request, taken)))
    for line in _told(path, model, text, taken):
        console.print(outside(line.replace("\n", "\\n")), soft_wrap=True)


def _write(path: Path, recipe: str) -> None:
    """A new file, which is one of a recipe that launch takes, or none."""
    try:
        with path.open("x") as file:
            file.write(recipe)
    except FileExistsError as error:
        raise UsageError(
            "is there already", where=str(path), hint="give --out another name, or move it away"
        ) from error
    except OSError as error:
        raise UsageError(f"can't be written: {error.strerror or error}", where=str(path)) from error
    try:
        load_recipe(path)
    except BaseException:
        path.unlink()
        raise


def _what(request: InitRequest, path: Path, text: TextFacts) -> Iterator[Choice]:
    """Model, text, and where the run lies."""
    yield Choice("model.name_or_path", _as_written(request.model))
    paths = list(map(_as_written, request.texts))
    yield Choice("dataset.path", paths if len(paths) > 1 else paths[0])
    for key, name in text.found.fields.items():
        yield Choice(f"dataset.{key}", name, f"found in the first record: {text.found.kind}")
    for key, value in text.found.more.items():
        yield Choice(key, value, _REASONS.get(key, f"for {text.found.kind}"))
    if request.adapter:
        yield Choice("adapter.type", "lora", "an adapter is trained, and the model stays as it is")
    yield Choice("output_dir", plain(_new_run(path.stem)), "state that does not fit into memory lies there as well")


def _new_run(name: str) -> Path:
    """A folder that is not there: a run goes on with what it finds in its own."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(folder for folder in (Path("runs") / name for name in names) if not os.path.lexists(folder))


def _as_written(path: Path) -> Any:
    """A path for a recipe, where a ~ at its start would be a home directory."""
    return plain(path.absolute() if str(path).startswith("~") else path)


def _how(model: ModelFacts, text: TextFacts, given: Mapping[str, Any], *, adapter: bool) -> Iterator[Choice]:
    """How it is trained. What is `given` counts where another choice follows from it."""
    accelerated = accelerators_here() > 0
    longest = min(_LONGEST[accelerated], model.context or _LONGEST[accelerated])
    seq_len, why_so_long = _length(model, text, longest, accelerated=accelerated)
    sequences = text.num_tokens // seq_len if text.num_rows is None else text.num_rows
    objective = text.found.more.get("train.objective")
    micro = given.get("train.micro_batch_size", max(2, min(_COMPARED, sequences)) if objective == "embedding" else 1)
    most = max(1, min(_TOKENS_A_STEP[accelerated] // seq_len, sequences // _FEWEST_STEPS) // micro)
    accumulated = given.get("train.gradient_accumulation_steps")
    batch = given.get("train.global_batch_size", micro * (accumulated or most))
    steps = given.get("train.max_steps", max(1, sequences // batch))

    held_out = sequences >= _ENOUGH_TO_HOLD_OUT
    if held_out:
        share = 0.01 if sequences >= 100 * _ENOUGH_TO_HOLD_OUT else 0.05
        held = max(1, round(sequences * share))
        yield Choice("dataset.eval_fraction", share, f"the end of the text, about {held} sequences")
    yield Choice("train.seq_len", seq_len, why_so_long)
    why = "the least memory; a step's micro-batches pass the model together"
    why = why if micro == 1 else "rows whose texts are compared; more are harder to tell apart"
    yield Choice("train.micro_batch_size", micro, why)
    if accumulated is None:
        whole = micro * most
        yield Choice("train.global_batch_size", whole, f"sequences a step on all ranks, with {whole * seq_len} tokens")
    if "train.max_steps" not in given:
        tokens = f"{'' if text.found.kind == 'tokens' else 'about '}{format_count(text.num_tokens)} tokens"
        yield Choice("train.epochs", 1, f"{tokens}, so about {steps} steps")
    if held_out:
        yield Choice("train.eval_interval", every := max(1, steps // 10), f"about {steps // every} times in the run")
    yield Choice("train.precision", "auto", "bf16 on an accelerator, fp32 on a CPU")
    yield Choice("optimizer.lr", *_rate(model, objective, adapter=adapter))
    yield Choice("lr_scheduler.name", "cosine")
    yield Choice("lr_scheduler.warmup_steps", max(1, steps * 3 // 100), "3 % of the steps")
    yield Choice("checkpoint.interval", min(max(1, steps // 5), 500), "steps; a crash costs no more than these")
    yield Choice("checkpoint.keep_latest_k", 2, "older ones are removed")


def _length(model: ModelFacts, text: TextFacts, longest: int, *, accelerated: bool) -> tuple[int, str]:
    """(train.seq_len, why)."""
    why = f"the model's longest is {model.context}" if model.context else "the model names no longest sequence"
    why = why if accelerated else f"short, for a CPU; {why}"
    if "images_field" in text.found.fields or text.found.kind == "pairs":
        return longest, why
    if text.num_rows is not None:
        enough = max(_SHORTEST_ROW, 2 ** (2 * text.row_tokens).bit_length())
        return (longest, why) if enough >= longest else (enough, "some times as long as the first text; others are cut")
    seq_len = max(2, min(longest, 2 ** (text.num_tokens.bit_length() - 2)))
    return seq_len, why if seq_len == longest else "short, as the text is"


def _rate(model: ModelFacts, objective: str | None, *, adapter: bool) -> tuple[float, str]:
    """(optimizer.lr, why)."""
    small = model.num_parameters < _LARGE_MODEL
    size = f"a model of {'less than 1B' if small else '1B'} parameters{'' if small else ' or more'}"
    if objective == "dpo":
        return (5e-6 if adapter else 5e-7), "usual for preferences: they are learned in small steps"
    if adapter:
        return 2e-4, "usual for an adapter, which begins at nothing"
    if objective is not None:
        return 2e-5, f"usual for {objective}"
    return (5e-5 if small else 2e-5), f"usual for fine-tuning {size}"


def _heading(request: InitRequest, taken: Taken) -> Iterator[str]:
    yield f"Written by zinf init on {date.today().isoformat()}. `zinf recipe keys` lists every key and its default."
    if request.deepspeed is not None:
        yield f"Values of {request.deepspeed.name} are taken over where they have a counterpart. Those without one:"
        yield from (f"    {key}" for key in taken.without or ["none"])


def _told(path: Path, model: ModelFacts, text: TextFacts, taken: Taken) -> Iterator[str]:
    size = f"{format_count(model.num_parameters)} parameters"
    files = "1 file" if text.num_files == 1 else f"{text.num_files} files"
    yield f"{path}: {size}, {files} of {text.found.kind} ({format_bytes(text.num_bytes)})"
    if taken.choices:
        yield f"taken over: {', '.join(dict.fromkeys(choice.key for choice in taken.choices))}"
    for key, why in taken.needless.items():
        yield f"not needed: {key} ({why})"
    for key in taken.without:
        yield f"no counterpart: {key}"
    word = shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
    yield f"next: zinf launch {word} --dry-run    the plan, and nothing else"
    yield f"      zinf launch {word}"


def _deepspeed(path: Path, num_ranks: int | None) -> Taken:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"can't be read: {error.strerror or error}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"is no JSON: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise UsageError("is no DeepSpeed configuration", where=str(path))
    try:
        return from_deepspeed(config, num_ranks)
    except UsageError as error:
        raise UsageError(error.message, where=str(path), hint=error.hint) from error
