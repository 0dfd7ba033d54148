"""Finds the pictures of a record: in a field beside its text, and in the parts of its chat messages.

People write a part as transformers' chat templates, as OpenAI's API, or without a path of its own:

    {type: image, image: PATH}      {type: image, path: PATH}      {type: image_url, image_url: {url: PATH}}
    {type: image}                   the next path of the field beside

A template gets {type: image} for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from zinf_cli.errors import DatasetError
from zinf_cli.text.chats import PICTURES
from zinf_cli.text.documents import Document

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_KINDS = ("image", "image_url")
_PATHS = ("image", "path", "url", "image_url")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def with_pictures(document: Document, file: Path) -> tuple[Document, list[Path]]:
    """(the document as a chat template gets it, the paths of its pictures in their order).

    `file` is the one it stands in; paths are relative to it. DatasetError if what stands for a picture is no path of
    one, or the field beside has more or fewer than parts without a path take.
    """
    beside = document.beside.get(PICTURES) or []
    beside = [beside] if isinstance(beside, str) else beside
    if not isinstance(beside, list) or not all(isinstance(name, str) for name in beside):
        raise DatasetError(f"expected a list of paths of pictures, got {beside!r:.60}", where=document.where)
    if not isinstance(document.content, list):
        return document, [_path(name, file, document.where) for name in beside]
    rest, names = iter(beside), []
    messages = []
    for message in document.content:
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, list):
            own = [_own(part, document.where) if _is_picture(part) else None for part in parts]
            names += [name or next(rest, None) for part, name in zip(parts, own, strict=True) if _is_picture(part)]
            parts = [{"type": "image"} if _is_picture(part) else part for part in parts]
            message = {**message, "content": parts}
        messages.append(message)
    if None in names or (names and next(rest, None) is not None):
        raise DatasetError(
            f"{sum(map(_takes_a_path, _parts(document.content)))} parts {{type: image}} have no path of their own, and "
            f"{len(beside)} paths are beside the chat",
            where=document.where,
            hint="give a path for each part {type: image}, in it or in dataset.images_field",
        )
    found = [name for name in names if name is not None] if names else list(beside)
    shown = replace(document, content=messages, beside={**document.beside, PICTURES: found})
    return shown, [_path(name, file, document.where) for name in found]


def _parts(messages: list[Any]) -> Iterator[Any]:
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        yield from parts if isinstance(parts, list) else ()


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _KINDS


def _takes_a_path(part: Any) -> bool:
    return _is_picture(part) and not any(part.get(key) for key in _PATHS)


def _own(part: dict[str, Any], where: str) -> str | None:
    """The path that a part names itself, if it does."""
    value = next((part[key] for key in _PATHS if part.get(key)), None)
    if isinstance(value, dict):
        value = value.get("url")
    elif value is None and part["type"] == "image":
        return None
    if not isinstance(value, str) or not value:
        raise DatasetError(f"expected the path of a picture, got {part!r:.60}", where=where)
    return value


def _path(name: str, file: Path, where: str) -> Path:
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    if name.startswith("data:"):
        raise DatasetError(
            f"a picture stands in the text itself ({name[:20]}...), and is read from a file",
            where=where,
            hint="write it to a file beside the text, and give its path",
        )
    if _ADDRESS.match(name):
        raise DatasetError(
            f"a picture is somewhere else, and nothing is downloaded: {name[:80]}",
            where=where,
            hint="download it beside the text, and give its path",
        )
    return file.parent / name
