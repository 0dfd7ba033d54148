"""`zinf estimate` without a recipe: flags → scenario → answer → screen or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from zinf_cli.amounts import format_bytes, format_count, parse_count
from zinf_cli.errors import CapacityError, UsageError
from zinf_cli.machine.profiles import BUILT_IN, Profile
from zinf_cli.plan.estimate import Estimate, estimate, hosts_needed, largest_model
from zinf_cli.plan.memory import CLASSES
from zinf_cli.plan.needs import OWN, STRATEGIES, Scenario
from zinf_cli.plan.placement import TIERS
from zinf_cli.plan.simulate import Simulation, write_timeline
from zinf_cli.plan.sizes import Transformer, shape_of
from zinf_cli.recipe.batch import sequences_per_step

DEFAULT_PROFILE = "dgx2"
DEFAULT_SEQ_LEN = 1024
FEWEST_PARAMS = 100_000
FLAG_OF_KEY = {
    "train.seq_len": "seq_len",
    "train.micro_batch_size": "micro_batch_size",
    "train.gradient_accumulation_steps": "accumulation",
    "train.global_batch_size": "global_batch",
}
"""The flags that are keys of a recipe as well."""


@dataclass(frozen=True)
class Flags:
    """What was asked on the command line."""

    params: str | None = None
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    vocab: int = 0
    seq_len: int | None = None
    micro_batch_size: int | None = None
    accumulation: int | None = None
    global_batch: int | None = None
    nodes: int = 1
    gpus_per_node: int | None = None
    hardware: str | None = None
    strategy: str = "infinity"
    max_model: bool = False
    explain: bool = False
    timeline: Path | None = None
    as_json: bool = False
    overrides: Sequence[str] = ()


def estimate_by_flags(flags: Flags, console: Console) -> None:
    """Print the answer to stdout; CapacityError, with what would make it fit, where nothing does."""
    scenario = scenario_of(flags)
    if flags.max_model:
        largest = largest_model(scenario)
        if largest is None:
            raise CapacityError("not even the smallest model fits", hint="name other --hardware")
        scenario = replace(scenario, model=largest)
    answer = estimate(scenario)
    if flags.timeline is not None:
        save_timeline(answer.simulation, flags.timeline)
    if flags.as_json:
        print(json.dumps(answer.to_json(), indent=2))
    else:
        from zinf_cli.screens.estimate import estimate_screen

        console.print(estimate_screen(answer, explain=flags.explain))
    if not answer.fits:
        raise CapacityError(f"does not fit: {_shortage(answer)}", hint=what_would_fit(answer))


def save_timeline(played: Simulation, path: Path) -> None:
    """Write it; UsageError where that is impossible."""
    try:
        write_timeline(played, path)
    except OSError as error:
        raise UsageError(f"can't write the timeline: {error.strerror}", where=str(path)) from error


def scenario_of(flags: Flags) -> Scenario:
    """The flags as a scenario; UsageError for what makes no sense."""
    values = _overridden(flags)
    micro = values.micro_batch_size or 1
    profile = _profile(flags.hardware)
    if flags.gpus_per_node is not None and profile.accelerators:
        profile = profile.with_accelerators(flags.gpus_per_node)
    ranks = flags.gpus_per_node or profile.accelerators or 1
    world = flags.nodes * ranks
    sequences = sequences_per_step(micro, values.accumulation, values.global_batch, world)
    if flags.strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {flags.strategy}", hint=f"known: {', '.join(STRATEGIES)}")
    return Scenario(
        model=_model(values),
        profile=profile,
        hosts=flags.nodes,
        ranks=ranks,
        micro_batch_size=micro,
        micro_batches=-(-sequences // (world * micro)),
        per_sweep=_per_sweep(flags.overrides),
        strategy=flags.strategy,
        pinned=_pinned(flags.overrides, profile),
        as_in_paper=flags.strategy not in OWN,
    )


def _model(flags: Flags) -> Transformer:
    seq_len = flags.seq_len or DEFAULT_SEQ_LEN
    if flags.params is not None:
        if flags.layers or flags.hidden or flags.heads:
            raise UsageError("give either --params or --layers and --hidden", hint="--params picks a usual shape")
        try:
            params = parse_count(flags.params)
        except ValueError as error:
            raise UsageError(f"--params: {error}") from error
        if params < FEWEST_PARAMS:
            raise UsageError(f"--params: {format_count(params)} is no transformer", hint="for example --params 7B")
        return shape_of(params, flags.vocab, seq_len)
    if flags.layers is None or flags.hidden is None:
        if flags.max_model:
            return shape_of(1e9, flags.vocab, seq_len)
        raise UsageError("no model", hint="give a RECIPE, --params 1T, or --layers and --hidden")
    heads = flags.heads or max(1, flags.hidden // 128)
    if flags.hidden % heads:
        raise UsageError(f"--hidden {flags.hidden} can't be divided among {heads} heads", hint="set --heads")
    return Transformer(flags.layers, flags.hidden, heads, flags.vocab, seq_len)


def _profile(name: str | None) -> Profile:
    """The one that was named; else this machine's, if it was measured whole; else DEFAULT_PROFILE."""
    if name is not None and name in BUILT_IN:
        return BUILT_IN[name]
    from zinf_cli.machine.profile_file import find_measured, load_profile, to_profile

    if name is not None:
        return load_profile(name)
    measured = find_measured(None)
    return to_profile(measured) if measured and measured.nvme and measured.links else BUILT_IN[DEFAULT_PROFILE]


def _overridden(flags: Flags) -> Flags:
    """The flags, with the recipe keys that stand for some of them."""
    pairs = _pairs(flags.overrides)
    changes: dict[str, Any] = {flag: _whole(key, pairs[key]) for key, flag in FLAG_OF_KEY.items() if key in pairs}
    return replace(flags, **changes)


def _per_sweep(overrides: Sequence[str]) -> int | None:
    key = "train.micro_batches_per_sweep"
    text = _pairs(overrides).get(key, "auto")
    return None if text == "auto" else _whole(key, text)


def _pinned(overrides: Sequence[str], profile: Profile) -> Mapping[str, str]:
    pinned = {}
    for key, tier in _pairs(overrides).items():
        if key.startswith("offload.") and tier != "auto":
            if tier not in TIERS:
                raise UsageError(f"{key}: expected auto, device, cpu or nvme, got {tier!r}", where="command line")
            pinned[key.removeprefix("offload.")] = "cpu" if tier == "device" and not profile.accelerators else tier
    return pinned


KEYS = (
    *(f"offload.{state}" for state in CLASSES),
    *FLAG_OF_KEY,
    "train.micro_batches_per_sweep",
)
"""Of a recipe, those that matter to an estimate without one."""


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    pairs = dict(item.partition("=")[::2] for item in overrides)
    for key in pairs:
        if key not in KEYS:
            raise UsageError(f"{key}: not a key of an estimate without a recipe", hint=f"known: {', '.join(KEYS)}")
    return pairs


def _whole(key: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{key}: expected a whole number of at least 1, got {text!r}", where="command line")
    return int(text)


def _shortage(answer: Estimate) -> str:
    return "; ".join(
        f"{tier} of a host needs {format_bytes(answer.needs.total(tier))}, may use "
        f"{format_bytes(answer.needs.may_use[tier])}"
        for tier in answer.needs.missing
    )


def what_would_fit(answer: Estimate) -> str:
    """The nearest thing that fits: pinned classes set free, or more hosts, or a smaller model."""
    scenario = answer.scenario
    if scenario.pinned and estimate(replace(scenario, pinned={})).fits:
        return "it fits with offload.* left to auto"
    hosts = hosts_needed(scenario)
    if hosts is not None:
        return f"it fits on {hosts} of these hosts (--nodes {hosts})"
    largest = largest_model(scenario)
    if largest is None:
        return "lower --seq-len or --micro-batch-size, or name other --hardware"
    return f"the largest model that fits has {format_count(largest.params)} parameters"
