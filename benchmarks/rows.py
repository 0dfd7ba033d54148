"""Tables out of rows, and how the end of a row's key tells the unit of its figure.

A row maps keys to figures. A key such as `peak_memory_bytes` is a column's heading and a unit:

- `_s`: seconds. `_bytes`: bytes. `_bytes_per_s`: bytes per second. `_share`: 1 is all of it.
- No such end: text, a count, or a ratio.

A figure of two numbers is what was predicted and what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zinf_cli.amounts import format_bytes

Row = Mapping[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """A table with a line a row. The columns are the keys of all rows, in the order in which they come first."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = [[_heading(key) for key in keys], *([_cell(key, row.get(key)) for key in keys] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join("-" * width for width in widths), *lines[1:]))


def _heading(key: str) -> str:
    return key.removesuffix(_unit(key)).replace("_", " ")


def _cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    form = _FORMS[_unit(key)]
    if isinstance(value, Sequence):
        predicted, measured = value
        off = round(100 * (predicted / measured - 1))
        return f"{form(predicted)} → {form(measured)}" + (f" ({off:+d} %)" if off else "")
    return form(value)


def _unit(key: str) -> str:
    return next(unit for unit in _FORMS if key.endswith(unit))


def _seconds(value: float) -> str:
    return f"{_digits(value)} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _digits(value: float) -> str:
    """Three digits and more; counts as they are."""
    if isinstance(value, int):
        return str(value)
    if 0 < abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"


_FORMS: dict[str, Callable[[float], str]] = {
    "_bytes_per_s": lambda value: f"{value / 1e9:.2f} GB/s",
    "_bytes": format_bytes,
    "_share": lambda value: f"{100 * value:.0f} %",
    "_s": _seconds,
    "": _digits,
}
"""Of each unit, the longest names first."""
