"""`zinf estimate RECIPE`, or a config.json: the plan that launch would make, here or elsewhere, and its time."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from zinf_cli.commands.estimate import FLAG_OF_KEY, Flags, save_timeline
from zinf_cli.errors import RecipeError, UsageError
from zinf_cli.launch.connection import Lifelines, transport_to
from zinf_cli.launch.question import figures_from
from zinf_cli.machine.hardware import Room
from zinf_cli.machine.profile_file import find_measured, load_measured, load_profile
from zinf_cli.machine.profiles import BUILT_IN, Profile
from zinf_cli.plan.alternatives import alternatives
from zinf_cli.plan.exact import plan_document, reasons_of
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.parts import plan_in_parts
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.predict import predict, profile_here
from zinf_cli.plan.refusal import refusal
from zinf_cli.plan.search import nvme_folders, room_for
from zinf_cli.recipe.hosts import Host, this_machine
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.screen import Screen
from zinf_cli.screens.progress import progress


def estimate_recipe(path: Path, overrides: Sequence[str], flags: Flags, console: Console) -> None:
    """Print the answer to stdout; CapacityError with the numbers where nothing fits."""
    if flags.max_model or flags.strategy != "infinity":
        raise UsageError("--max-model and --strategy go with --params, not with a recipe")
    elsewhere = _elsewhere(flags.hardware)
    ranks = flags.gpus_per_node or (max(1, elsewhere.accelerators) if elsewhere is not None else None)
    if flags.nodes > 1 and ranks is None:
        raise UsageError("--nodes needs to know the ranks of a host", hint="give --gpus-per-node or --hardware")
    hosts = [Host(f"node-{n}", tuple(range(ranks or 1))) for n in range(flags.nodes)] if flags.nodes > 1 else []
    with _opened(path, [*_flagged(flags), *overrides]) as recipe:
        if elsewhere is not None and elsewhere.accelerators and recipe.train.precision == "auto":
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "bf16"})})
        with (
            progress(Screen(stderr=True), "reading the model and the text"),
            Lifelines(transport_to(())) as lifelines,
        ):
            connection = lifelines.connect(this_machine(1))

            def found(recipe: Recipe, changed: Callable[[Figures], Figures], most: int | None) -> Figures:
                figures = changed(figures_from(connection, recipe, ranks, hosts, in_part=True)(most))
                return figures if elsewhere is None else _there(elsewhere, figures, recipe)

            def planned(asked: Recipe, changed: Callable[[Figures], Figures], profile: Profile, room: Room) -> Plan:
                same_model = asked.train.precision == recipe.train.precision
                figures_of = partial(found, recipe if same_model else asked, changed)
                return plan_in_parts(asked, figures_of(None), figures_of, profile, hosts, room)

            figures_of = partial(found, recipe, lambda figures: figures)
            figures = figures_of(None)
            if elsewhere is not None:
                profile = _with_ranks(elsewhere, figures)
            else:
                measured = load_measured(Path(flags.hardware)) if flags.hardware else find_measured(path)
                profile = profile_here(figures, nvme_folders(recipe), measured)
            room = room_for(recipe, figures)
            plan = planned(recipe, lambda figures: figures, profile, room)
            refused = None if plan.fits else refusal(plan, recipe, figures_of, hosts)
            others = list(alternatives(recipe, plan, profile, room, planned)) if flags.explain else []
    tokens = recipe.train.seq_len * recipe.train.sequences_at_once
    each = tokens // recipe.train.micro_batch_size  # of a pair, or of a row of texts, where these are compared
    played = predict(plan, tokens, profile)
    if flags.timeline is not None:
        save_timeline(played, flags.timeline)
    if flags.as_json:
        document = plan_document(plan, tokens, profile)
        if flags.explain:
            document["alternatives"] = [other.to_json(each) for other in others]
        print(json.dumps(document, indent=2))
    else:
        from zinf_cli.screens.estimate import alternatives_screen, time_screen
        from zinf_cli.screens.plan import plan_screen

        console.print(plan_screen(plan, path.stem))
        known = elsewhere is not None or (profile.measured and profile.drives.measured)
        console.print(time_screen(plan, played, reasons_of(plan, recipe), known=known))
        if flags.explain:
            console.print(alternatives_screen(plan, others, each))
    if refused is not None:
        raise refused


def _elsewhere(hardware: str | None) -> Profile | None:
    """The profile of a machine that is not this one, if one is named."""
    if hardware is None:
        return None
    if hardware in BUILT_IN:
        return BUILT_IN[hardware]
    there = load_measured(Path(hardware)).name != socket.gethostname()
    return load_profile(hardware) if there else None


def _flagged(flags: Flags) -> list[str]:
    """The flags that were given and are keys of a recipe as well."""
    return [f"{key}={value}" for key, flag in FLAG_OF_KEY.items() if (value := getattr(flags, flag)) is not None]


@contextmanager
def _opened(path: Path, overrides: Sequence[str]) -> Iterator[Recipe]:
    """The recipe; for a config.json (or a directory with nothing but one to read), a recipe around it."""
    config = path / "config.json" if path.is_dir() else path
    if config.suffix != ".json":
        yield load_recipe(path, overrides)
        return
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else "not valid JSON"
        raise RecipeError([f"{config}: {what}"]) from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise RecipeError([f"{config}: no model_type, so not the config.json of a Hugging Face model"])
    with tempfile.TemporaryDirectory(prefix="zinf-") as folder:
        yield load_recipe(_around(values, Path(folder), config.parent.name), overrides)


def _around(config: dict[str, Any], folder: Path, name: str) -> Path:
    """A recipe file with `config` and a text of no meaning."""
    import numpy as np

    tokens, recipe = folder / "tokens.npy", folder / f"{name or 'config'}.yaml"
    np.save(tokens, np.zeros(1 << 22, dtype=np.uint8))
    tree = {"model": {"config": config}, "dataset": {"path": str(tokens)}, "train": {"max_steps": 1}}
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


def _with_ranks(elsewhere: Profile, figures: Figures) -> Profile:
    return elsewhere.with_accelerators(figures.ranks_per_host) if elsewhere.accelerators else elsewhere


def _there(elsewhere: Profile, figures: Figures, recipe: Recipe) -> Figures:
    """The figures, with the machine of a profile in the words of the plan."""
    profile = _with_ranks(elsewhere, figures)
    tokens = recipe.train.seq_len * recipe.train.sequences_at_once
    machine = replace(
        figures.machine,
        name=profile.name,
        accelerators=profile.accelerators,
        device_bytes=profile.device_memory,
        flops=profile.flops(figures.precision, tokens),
        cpu_bytes=profile.cpu_memory,
        nvme_bytes=profile.drives.may_use,
        one_pool=profile.one_pool,
    )
    return replace(figures, machine=machine)
