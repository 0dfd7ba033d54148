"""A recipe as `zinf init` writes it: some keys, each with the reason for its value beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

_WIDTH = 120


@dataclass(frozen=True)
class Choice:
    """A value for a key, and why."""

    key: str
    """Dotted: train.seq_len."""
    value: Any
    why: str = ""


def draft(choices: Sequence[Choice], heading: Iterable[str]) -> str:
    """YAML, a section after another in the order of their first keys. Of a key's choices the last one counts."""
    chosen = {choice.key: choice for choice in choices}
    sections: dict[str, list[Choice]] = {}
    for choice in chosen.values():
        sections.setdefault(choice.key.rpartition(".")[0], []).append(choice)
    lines = [_comment(line) for line in heading]
    for section, of_section in sorted(sections.items(), key=lambda item: not item[0]):
        lines += ["", f"{section}:"] if section else [""]
        indent = "  " if section else ""
        for choice in of_section:
            lines += _lines(f"{indent}{choice.key.rpartition('.')[2]}: {_scalar(choice.value)}", choice.why, indent)
    return "\n".join(lines) + "\n"


def _lines(entry: str, why: str, indent: str) -> list[str]:
    """The reason stands behind the value where the line is short enough, else above it."""
    if not why:
        return [entry]
    beside = f"{entry:<38}  {_comment(why)}"
    return [beside] if len(beside) <= _WIDTH else [f"{indent}{_comment(why)}", entry]


def _comment(text: str) -> str:
    """One line that YAML takes, also where a text from outside has line ends and control characters."""
    shown = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return f"# {''.join(shown)}".rstrip()


def _scalar(value: Any) -> str:
    """A value on one line of YAML; 5e-05 with the point without which YAML 1.1 takes it for text."""
    if isinstance(value, float):
        return repr(value).replace("e", ".0e") if "e" in repr(value) and "." not in repr(value) else repr(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return str(text).removesuffix("\n").removesuffix("\n...")
