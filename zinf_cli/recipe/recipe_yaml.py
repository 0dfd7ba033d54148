"""YAML as recipes use it: plain values, each key with its line; whatever the text is, there are problems or a tree.

Tags, keys that are no words, a value that contains itself and numbers beyond 64 bits are problems with their line.
Dates are words: a folder may be named 2024-05-01.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import yaml

Key = tuple[str, ...]

_MOST_VALUES = 300_000
_DEEPEST = 64
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null")}
_MERGE = f"{_TAG}merge"
_FREE = ("model", "config")
"""What lies below this key is transformers' business, and may have numbers for keys, and large ones."""


class _Loader(yaml.SafeLoader):
    """Without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class NotYamlError(Exception):
    """A text that is no YAML at all: what is wrong, and in which line (from 1)."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


def parse(text: str) -> yaml.Node | None:
    """The one document of a text; None where it is empty. NotYamlError."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = str(error.problem or error.context)
        if "'\\t'" in problem:
            problem = "a tab, where YAML wants spaces"
        elif isinstance(error, yaml.composer.ComposerError) and "single document" in str(error.context):
            problem = "a second document (---)"
        raise NotYamlError(" ".join(problem.split()), line) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise NotYamlError(f"a character that is not text, #x{int(error.character):04x}", line) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = "brackets in brackets" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise NotYamlError(what, 1) from error


class Tree:
    """A document as plain values (`value`), where its keys stand (`places`), and what is wrong with it (`problems`)."""

    def __init__(self, node: yaml.Node, place: Callable[[yaml.Node], str]) -> None:
        self.places: dict[Key, str] = {}
        self.problems: list[str] = []
        self._place = place
        self._count = 0
        self._scalars = _Loader("")
        self.value = self._value(node, (), ())

    def _value(self, node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> Any:
        self._count += 1
        if node in above:
            return self._problem(node, key, "contains itself (an alias to what is around it)")
        if len(above) > _DEEPEST or self._count > _MOST_VALUES:
            if self._count <= _MOST_VALUES + 1:
                return self._problem(node, key, "more than a recipe has, maybe by aliases in aliases")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"{_TAG}{kind}":
            return self._tag(node, key)
        if isinstance(node, yaml.MappingNode):
            return dict(self._entries(node, key, (*above, node)))
        return [self._value(item, key, (*above, node)) for item in node.value]

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        if node.tag not in _SCALARS:
            return self._tag(node, key)
        try:
            value = self._scalars.construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError):  # as in !!int word, or of too many digits
            return self._problem(node, key, f"{node.value[:40]!r} is no {node.tag.removeprefix(_TAG)}")
        if isinstance(value, int) and abs(value) >= 2**63 and key[:2] != _FREE:
            return self._problem(node, key, f"{node.value[:40]} is too large a number")
        return value

    def _entries(self, node: yaml.MappingNode, prefix: Key, above: tuple[yaml.Node, ...]) -> Iterator[tuple[Any, Any]]:
        """Of a mapping; what it merges (<<) first, so that its own win."""
        merged = [value for key, value in node.value if key.tag == _MERGE]
        for value in merged:
            for part in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:  # the first wins
                if isinstance(part, yaml.MappingNode) and part not in above:
                    yield from self._entries(part, prefix, (*above, part))
                else:
                    self._problem(part, (*prefix, "<<"), "expected an alias to another section")
        own: dict[Key, str] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            name = self._name(key_node, prefix)
            if name is None:
                continue
            key = (*prefix, str(name))
            if key in own:
                self.problems.append(f"{self._place(key_node)}: {'.'.join(key)} stands twice (first at {own[key]})")
            own[key] = self.places[key] = self._place(key_node)
            yield name, self._value(value_node, key, above)

    def _name(self, node: yaml.Node, prefix: Key) -> Any:
        if isinstance(node, yaml.ScalarNode):
            name = self._scalar(node, prefix)
            if isinstance(name, str) or (prefix[:2] == _FREE and type(name) is int):
                return name
        shown = repr(node.value[:40]) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
        return self._problem(node, prefix, f"a key is a word, and {shown} is none (quotes make it one)")

    def _tag(self, node: yaml.Node, key: Key) -> None:
        tag = node.tag.replace(_TAG, "!!")[:40]
        self._problem(node, key, f"tags such as {tag} are not read (environment variables: ${{NAME}} in a path)")

    def _problem(self, node: yaml.Node, key: Key, what: str) -> None:
        name = f"{'.'.join(key)}: " if key else ""
        self.problems.append(f"{self._place(node)}: {name}{what}")
