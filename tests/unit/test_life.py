"""A unit's life: every transition leads from every state where the diagram says, or is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zinf_cli.engine.units import life
from zinf_cli.engine.units.life import FlatLife, Life, State
from zinf_cli.tiers.memory import MemoryTier
from zinf_cli.tiers.tier import Extent
from zinf_cli.trace import Trace

ENGINE = Path(life.__file__).parent
CPU = torch.device("cpu")

TRANSITIONS: dict[str, Callable[[Life], None]] = {
    "begin_step": Life.begin_step,
    "clear_gradient": Life.clear_gradient,
    "leave_zeros": Life.leave_zeros,
    "accumulate": Life.accumulate,
    "count_backward": Life.count_backward,
    "complete": Life.complete,
    "gradient_reduced": lambda unit: unit.gradient_reduced([True, False, True]),
    "start_update": lambda unit: unit.start_update(places()),
    "speculate": lambda unit: unit.speculate(places()),
    "count_update": Life.count_update,
    "update_nothing": Life.update_nothing,
    "finish_update": Life.finish_update,
    "commit": Life.commit,
    "roll_back": Life.roll_back,
    "resume": lambda unit: unit.resume([5, 6, 7]),
}

WAYS: dict[State, list[str]] = {
    State.CLEAN: [],
    State.ACCUMULATING: ["clear_gradient", "accumulate"],
    State.REDUCING: ["clear_gradient", "complete"],
    State.DUE: ["clear_gradient", "complete", "gradient_reduced"],
    State.UPDATING: ["clear_gradient", "complete", "gradient_reduced", "start_update"],
    State.SPECULATING: ["clear_gradient", "complete", "gradient_reduced", "speculate"],
    State.UNDECIDED: ["clear_gradient", "complete", "gradient_reduced", "speculate", "finish_update"],
}
"""How a new unit comes to each state."""


def place() -> dict[str, Extent]:
    return {"params": MemoryTier("cpu", CPU, CPU, Trace()).allocate(4096, "params")}


def places() -> list[dict[str, Extent]]:
    """Of two flats."""
    return [place(), place()]


def unit_in(state: State) -> tuple[Life, list[FlatLife]]:
    """A unit of two flats, with one parameter and two."""
    flats = [FlatLife(place(), 1), FlatLife(place(), 2)]
    unit = Life("layers.0", flats)
    for transition in WAYS[state]:
        TRANSITIONS[transition](unit)
    assert unit.state is state
    return unit, flats


def drawn() -> dict[str, dict[State, State]]:
    """The table at the top of life.py."""
    assert life.__doc__ is not None
    rows = re.findall(r"^    ([a-z_]+) +(\w+ → .*)$", life.__doc__, re.MULTILINE)
    pairs = {name: [pair.split(" → ") for pair in row.split(", ")] for name, row in rows}
    return {name: {State[before]: State[after] for before, after in steps} for name, steps in pairs.items()}


def test_the_table_has_every_transition() -> None:
    methods = {name for name, value in vars(Life).items() if callable(value) and not name.startswith("_")}
    assert set(drawn()) == set(TRANSITIONS) == methods - {"readable"}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_a_transition_leads_where_it_says_or_is_refused(transition: str, state: State) -> None:
    unit, _ = unit_in(state)
    leads = drawn()[transition]
    if state in leads:
        TRANSITIONS[transition](unit)
        assert unit.state is leads[state]
        return
    named = " or ".join(dict.fromkeys(after.name for after in leads.values()))
    with pytest.raises(AssertionError, match=rf"^layers\.0 can't go from {state.name} to {named}$"):
        TRANSITIONS[transition](unit)
    assert unit.state is state


@pytest.mark.parametrize("state", State)
def test_what_a_visit_reads_is_settled(state: State) -> None:
    """Parameters are read where they are new, or where the visit carries the update that makes them so."""
    unit, _ = unit_in(state)
    assert unit.readable(0) == (state in (State.CLEAN, State.ACCUMULATING, State.DUE))
    assert unit.update_due == (state is State.DUE)
    assert unit.undecided == (state in (State.SPECULATING, State.UNDECIDED))


def test_a_visit_that_adds_to_a_gradient_waits_for_the_visits_before() -> None:
    unit, _ = unit_in(State.ACCUMULATING)
    assert not unit.readable(1)
    unit.count_backward()
    assert unit.readable(1)
    assert not unit.readable(2)
    unit.begin_step()  # the step was abandoned
    assert not unit.readable(1)


def test_an_update_counts_what_got_a_gradient_and_moves_the_unit() -> None:
    unit, flats = unit_in(State.DUE)
    into = places()
    unit.start_update(into)
    unit.count_update()
    assert [flat.at for flat in flats] == into
    assert [flat.steps for flat in flats] == [[1], [0, 1]]


def test_an_update_of_nothing_counts_nothing() -> None:
    unit, flats = unit_in(State.UPDATING)
    unit.update_nothing()
    unit.finish_update()
    assert [flat.steps for flat in flats] == [[0], [0, 0]]
    assert unit.touched == [False, False, False]


@pytest.mark.parametrize("finished", [False, True])
def test_a_speculative_update_that_holds_moves_the_unit(finished: bool) -> None:
    unit, flats = unit_in(State.DUE)
    before, into = [flat.at for flat in flats], places()
    unit.speculate(into)
    if finished:
        unit.finish_update()
    assert [flat.at for flat in flats] == before
    unit.commit()
    assert [flat.at for flat in flats] == into
    assert [flat.steps for flat in flats] == [[1], [0, 1]]
    assert unit.state is (State.CLEAN if finished else State.UPDATING)


def test_one_that_does_not_hold_leaves_nothing_behind() -> None:
    unit, flats = unit_in(State.UNDECIDED)
    before = [flat.at for flat in flats]
    unit.roll_back()
    assert unit.update_due
    assert [flat.at for flat in flats] == before
    assert [flat.proposed for flat in flats] == [None, None]
    assert [flat.steps for flat in flats] == [[0], [0, 0]]
    assert unit.touched == [True, False, True]


def test_what_is_resumed_goes_on_counting() -> None:
    unit, flats = unit_in(State.CLEAN)
    unit.resume([5, 6, 7])
    assert [flat.steps for flat in flats] == [[5], [6, 7]]


def test_no_other_file_sets_a_field() -> None:
    fields = {name for made in (FlatLife(place(), 1), Life("layers.0", [])) for name in vars(made)}
    for path in ENGINE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "life.py" else ():
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in fields:
                assert ast.unparse(node.value) == "self", f"{path.name}:{node.lineno} sets {ast.unparse(node)}"
