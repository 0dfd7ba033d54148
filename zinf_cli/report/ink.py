"""Colours by role, and figures of matplotlib as SVG that takes them from the page: light or dark, as its reader has it.

A role is drawn in a colour that stands for it alone. In the SVG it becomes `var(--role)`, which the page's style sets.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from zinf_cli.amounts import format_bytes

WIDE = 1000
"""Units of an SVG that is as wide as the page."""
_POINTS_PER_INCH = 72
PALETTE = ("blue", "orange", "green", "violet", "pink", "teal", "gold", "brown")
_SHADES = {
    "page": ("#f5f6f8", "#0f1419"),
    "card": ("#ffffff", "#171d25"),
    "ink": ("#18212f", "#e5eaf1"),
    "faint": ("#5f6b7c", "#97a3b4"),
    "grid": ("#e3e7ed", "#2a333f"),
    "bad": ("#c62f3b", "#ff7b80"),
    "good": ("#1b7f4b", "#56d093"),
    "blue": ("#2f6bd8", "#6fa8ff"),
    "orange": ("#d4620a", "#ff9e58"),
    "green": ("#218a51", "#55d08e"),
    "violet": ("#7d4cc9", "#b996ff"),
    "pink": ("#cb3a78", "#ff8ab8"),
    "teal": ("#0d8a8a", "#45d1d1"),
    "gold": ("#a67c00", "#ecc34b"),
    "brown": ("#8a5a3c", "#d3a184"),
    "sky": ("#6ea6e8", "#a9cdff"),
    "lilac": ("#b08ae6", "#dac6ff"),
}
"""Role to its colour on a light page and on a dark one."""
_STAND_INS = {role: f"#fe01{number:02x}" for number, role in enumerate(_SHADES)}
_STYLE = re.compile(r'style="[^"]*"')
_OWN_ID = re.compile(r'<g id="[A-Za-z0-9.]+_\d+">')
"""What matplotlib calls a group without a name: the same in every figure of the page."""

LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zinf",
    "text.parse_math": False,
    "font.size": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.edgecolor": _STAND_INS["grid"],
    "axes.labelcolor": _STAND_INS["faint"],
    "grid.color": _STAND_INS["grid"],
    "text.color": _STAND_INS["ink"],
    "xtick.color": _STAND_INS["grid"],
    "xtick.labelcolor": _STAND_INS["faint"],
    "ytick.color": _STAND_INS["grid"],
    "ytick.labelcolor": _STAND_INS["faint"],
    "ytick.major.size": 0,
    "ytick.major.pad": 8,
    "xtick.major.pad": 5,
    "axes.labelpad": 5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Mark:
    """An entry of a legend, which stands in the page."""

    role: str
    shape: str
    """line, dashes, dots, cross or area."""
    text: str


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    name: str
    title: str
    svg: Markup
    legend: tuple[Mark, ...] = ()
    note: str = ""
    """What stands below."""


def colour(role: str) -> str:
    """The colour that stands for a role in a figure."""
    return _STAND_INS[role]


def style_sheet() -> Markup:
    """The roles as variables of the page, for light and for dark."""
    light, dark = ("".join(f"--{role}:{shades[n]};" for role, shades in _SHADES.items()) for n in (0, 1))
    return Markup(f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}")


@contextmanager
def own_look() -> Iterator[None]:
    """Draw in the page's look, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", LOOK]):
        yield


def canvas(width: int, height: int, *, left: int = 66, right: int = 14, top: int = 10, bottom: int = 46) -> Axes:
    """Axes on a new figure of `width` × `height` units of its SVG, with these margins."""
    figure = Figure(figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH))
    figure.patch.set_visible(False)
    inside = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(inside)
    axes.patch.set_visible(False)
    return axes


def wide_canvas(height: int) -> Axes:
    """Axes of this height, on a figure as wide as the page, with room for words beside and a line of words below."""
    return canvas(WIDE, height + 56, left=110, right=20)


def drawn(axes: Axes) -> Markup:
    """The figure of `axes` as an SVG element, as wide as its place in the page."""
    stream = io.StringIO()
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    text = _OWN_ID.sub("<g>", text[text.index("<svg") :])
    return Markup(_STYLE.sub(lambda style: _by_roles(style[0]), text))


def _by_roles(style: str) -> str:
    for role, stand_in in _STAND_INS.items():
        style = style.replace(stand_in, f"var(--{role})")
    return style


def steps_below(axes: Axes, last: float) -> None:
    """An x-axis of whole steps, from the run's first to `last`."""
    axes.set_xlim(0, max(1.0, last) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")


def numbers_beside(axes: Axes, shown: Callable[[float], str], lines: int = 5) -> None:
    """A y-axis whose numbers are said by `shown`."""
    axes.yaxis.set_major_locator(MaxNLocator(lines))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))


def bytes_beside(axes: Axes, top: float, along: str = "y") -> None:
    """An axis of bytes from 0 to `top`, with round numbers of binary units."""
    step = 1
    while top / step > 5:
        step *= 2
    axis = axes.yaxis if along == "y" else axes.xaxis
    axes.set(**{f"{along}lim": (0, top)})
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
