"""Finds where the code of a model may keep what it changes: spaces, whose variables moving_state.py compares.

The search begins with the modules of the model and goes on to what their code can name: their classes and hooks, the
functions of a class, the closure and the defaults of a function, the variables that it names, and the functions,
classes, objects and modules (of Python) that are found there. It ends at libraries, which are what is installed beside
Python and holds no class of the model. Names that the code puts together when it runs are not followed.
"""

from __future__ import annotations

import enum
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from zinf_cli.engine.compute.carriers import is_filled

ABSENT = object()
"""In the place of a variable that is not there."""
PLAIN: frozenset[type] = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
"""Types of values that can't change and lead nowhere."""

_ASIDE = frozenset({*vars(nn.Module()), "forward"})
"""Attributes of a module that are no state of its own."""
_CODE = frozenset({*(name for name in vars(nn.Module()) if name.endswith("_hooks")), "forward"})
"""Those of them that hold functions which a call runs."""
_VARIABLES: tuple[type, ...] = (
    *PLAIN, tuple, list, dict, set, deque, MethodType, partial, torch.Tensor, np.ndarray, torch.Generator,
    random.Random, np.random.RandomState, np.random.Generator,
)  # fmt: skip
"""Types of values that count as state where a class or a variable of a function holds them. So do objects of classes
that belong to no library."""
_NO_VARIABLES = (type, enum.Enum)
_LIBRARIES = frozenset({"torch", "transformers", "peft", "zinf_cli", *sys.stdlib_module_names})
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Space:
    """The variables of a module, a class, a function or a module of Python, by name."""

    owner: Any
    values: Callable[[], Mapping[str, Any]]
    put: Callable[[str, Any], None]


class Search:
    """The spaces that the code of `model` leads to."""

    def __init__(self, model: nn.Module) -> None:
        self.spaces: dict[str, Space] = {}
        """By name. They are only ever added to."""
        self.hides = False
        """Whether the code names a context variable. While a forward runs, its values are those of another thread."""
        self._model = model
        self._own = {_room(type(module).__module__) for module in model.modules()} - _LIBRARIES
        """Top-level packages that classes of the model come from."""
        self._libraries: dict[str, bool] = {}
        self._labels: dict[int, str] = {}
        """The names of spaces, by the ids of their owners."""
        self._named: dict[int, dict[str, None]] = {}
        """What code names of a module of Python, by the id of the module's variables."""
        self._counted: dict[type, bool] = {}
        self._seen: dict[int, Any] = {}
        self._ahead: deque[tuple[str, Any]] = deque()

    def look(self) -> None:
        """Find all spaces, also those that are new since the last look."""
        self._seen.clear()
        modules = list(self._model.named_modules())
        for path, module in modules:
            self._add(module, path, partial(_both, module), partial(_set, module))
        self._ahead.extend(modules)
        while self._ahead:
            self._open(*self._ahead.popleft())
        self._seen.clear()
        drawn = {"random": random.getstate.__self__, "numpy.random": np.random.get_state.__self__}  # type: ignore[attr-defined]
        self._add(random, "global", lambda: drawn, lambda name, value: None)

    def modules_beside(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that the code leads to and that are none of the model's, by name."""
        own = {id(module) for module in self._model.modules()}
        for label, space in self.spaces.items():
            if isinstance(space.owner, nn.Module) and id(space.owner) not in own:
                yield label, space.owner

    def _open(self, label: str, value: Any) -> None:
        """Go on to what `value` leads to."""
        kind = type(value)
        if kind in PLAIN or isinstance(value, torch.Tensor) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, FunctionType):
            self._open_function(value)
        elif isinstance(value, type):
            self._open_class(value)
        elif isinstance(value, nn.Module):
            self._open_module(label, value)
        elif isinstance(value, dict):
            self._ahead.extend((f"{label}[{key!r}]", part) for key, part in value.items() if type(part) not in PLAIN)
        elif isinstance(value, list | tuple | set | deque):
            self._ahead.extend((f"{label}[{n}]", part) for n, part in enumerate(value) if type(part) not in PLAIN)
        else:
            if kind is ContextVar:
                self.hides = True
                self._add(
                    value, f"context variable {value.name}", partial(_of_variable, value), partial(_put_variable, value)
                )
            self._ahead.extend((label, part) for part in _inside(value))
            if not self._in_library(kind.__module__):
                self._ahead.append((label, kind))
                self._ahead.extend((f"{label}.{name}", part) for name, part in getattr(value, "__dict__", {}).items())

    def _open_module(self, label: str, module: nn.Module) -> None:
        self._add(module, label, partial(_both, module), partial(_set, module))
        self._ahead.append((label, type(module)))
        parts = ((name, part) for name, part in module.__dict__.items() if name not in _ASIDE or name in _CODE)
        for name, part in (*module._modules.items(), *parts):
            if type(part) not in PLAIN:
                self._ahead.append((f"{label}.{name}" if label else name, part))

    def _open_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not self._in_library(base.__module__):
                space = vars(base)
                values = partial(self._variables, space, space)
                self._add(base, f"class {base.__qualname__}", values, partial(_set_in_class, base))
                self._ahead.extend((f"{base.__qualname__}.{name}", part) for name, part in list(space.items()))

    def _open_function(self, function: FunctionType) -> None:
        label, room = function.__qualname__, function.__globals__.get("__name__", "")
        if _room(room) != "zinf_cli":
            self._add(function, label, partial(_of_function, function), partial(_fill, function))
        self._ahead.extend((f"{label}.{name}", part) for name, part in _of_function(function).items())
        if not self._in_library(room):
            self._use(function.__globals__, room, set(_names(function.__code__)), set())

    def _use(self, variables: dict[str, Any], module: str, names: set[str], used: set[int]) -> None:
        """Go on to those `variables` of a module of Python that code `names`. The modules among them come next."""
        used.add(id(variables))
        known = self._named.setdefault(id(variables), {})
        self._add(known, module, partial(self._variables, variables, known), partial(_put, variables))
        known.update(dict.fromkeys(sorted(names)))
        for name in names:
            value = variables.get(name)
            if value is None:  # imported by the function itself
                package = variables.get("__package__")
                value = sys.modules.get(f"{package}.{name}" if package else name, sys.modules.get(name))
            if not isinstance(value, ModuleType):
                self._ahead.append((f"{module}.{name}", value))
            elif id(vars(value)) not in used and not self._in_library(value.__name__):
                self._use(vars(value), value.__name__, names, used)

    def _add(
        self, owner: Any, label: str, values: Callable[[], Mapping[str, Any]], put: Callable[[str, Any], None]
    ) -> None:
        if id(owner) not in self._labels:
            names = (label if number == 1 else f"{label} ({number})" for number in range(1, len(self.spaces) + 2))
            self._labels[id(owner)] = free = next(name for name in names if name not in self.spaces)
            self.spaces[free] = Space(owner, values, put)

    def _variables(self, space: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
        """The variables among `names` that hold state (see _VARIABLES)."""
        return {
            name: space[name]
            for name in names
            if name in space and self._counts(type(space[name])) and not name.startswith("__")
        }

    def _counts(self, kind: type) -> bool:
        if kind not in self._counted:
            own = not self._in_library(kind.__module__) and not issubclass(kind, _NO_VARIABLES)
            self._counted[kind] = own or issubclass(kind, _VARIABLES)
        return self._counted[kind]

    def _in_library(self, module: str) -> bool:
        room = _room(module)
        if room not in self._libraries:
            self._libraries[room] = room not in self._own and (room in _LIBRARIES or _is_installed(room))
        return self._libraries[room]


def _room(module: str) -> str:
    """The top-level package of a module of Python."""
    return module.partition(".")[0]


def _is_installed(package: str) -> bool:
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
    return any(_INSTALLED & set(Path(place).parts) for place in places)


def _inside(value: Any) -> Iterator[Any]:
    """What a callable object of Python's own kinds calls."""
    if isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, cached_property):
        yield value.func
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    else:  # functools.cache
        yield getattr(value, "__wrapped__", None)


def _names(code: CodeType) -> Iterator[str]:
    """All names in a function's code and in the functions that it makes; strings that may be names, too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _both(module: nn.Module) -> Mapping[str, Any]:
    own = {name: value for name, value in module.__dict__.items() if name not in _ASIDE}
    own.update(module._buffers)
    return own


def _set(module: nn.Module, name: str, value: Any) -> None:
    _put(module._buffers if name in module._buffers else module.__dict__, name, value)


def _put(space: dict[str, Any], name: str, value: Any) -> None:
    if value is ABSENT:
        space.pop(name, None)
    elif space.get(name, ABSENT) is not value:
        space[name] = value


def _of_variable(variable: ContextVar[Any]) -> Mapping[str, Any]:
    value = variable.get(ABSENT)
    return {} if value is ABSENT else {"value": value}


def _put_variable(variable: ContextVar[Any], _: str, value: Any) -> None:
    if value is not ABSENT:
        variable.set(value)


def _set_in_class(kind: type, name: str, value: Any) -> None:
    before = vars(kind).get(name, ABSENT)
    if value is ABSENT and before is not ABSENT:
        delattr(kind, name)
    elif before is not value:
        setattr(kind, name, value)


def _of_function(function: FunctionType) -> Mapping[str, Any]:
    """What a function keeps: its closure by name, the values of its defaults, its attributes."""
    found: dict[str, Any] = {}
    if function.__defaults__ or function.__kwdefaults__:
        found["defaults"] = (function.__defaults__, function.__kwdefaults__)
    if function.__dict__:
        found["attributes"] = function.__dict__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and is_filled(cell):
            found[name] = cell.cell_contents
    return found


def _fill(function: FunctionType, name: str, value: Any) -> None:
    """Put a variable of the closure, or all attributes. Defaults change in place."""
    if name in function.__code__.co_freevars and value is not ABSENT:
        assert function.__closure__ is not None
        function.__closure__[function.__code__.co_freevars.index(name)].cell_contents = value
    elif name == "attributes" and value is not function.__dict__:
        function.__dict__.clear()
        function.__dict__.update({} if value is ABSENT else value)
