"""Writes chats in a model's chat template: the text of a dialog, and the parts of it that are learned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from zinf_cli.errors import DatasetError
from zinf_cli.text.documents import Document, refuse_halves

ANSWERS = "assistant"
"""The role whose turns are trained on, where a recipe names no others."""
TOOLS = "tools"
"""The field of a row with the tools that its dialog may call: a list of JSON schemas, or that list as a string."""
PICTURES = "pictures"
"""Beside a document: the paths of its pictures, whatever the field that they are from."""
_WORDLESS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys that a turn may have instead of content."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template writes before the parts that the assistant says, if it marks them."""

Template = Callable[..., Any]
"""apply_chat_template of a tokenizer."""


def marked_tokens(document: Document, template: Template) -> tuple[list[int], list[bool]]:
    """(tokens, mask) of a dialog in a template that `marks_answers`: the mask is the template's own."""
    text, messages = _rendered(document, template)
    refuse_halves(text, document.where)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = template(messages, tools=_tools(document), **options)
    return list(encoded["input_ids"]), [bool(said) for said in encoded["assistant_masks"]]


def marked_spans(
    document: Document, template: Template, spans: Callable[..., list[tuple[int, int]]]
) -> tuple[str, list[tuple[int, int]]]:
    """A dialog as a template writes it that `marks_answers`, and what it marks: `spans(messages, tools)` finds that."""
    text, messages = _rendered(document, template)
    return text, spans(messages, _tools(document))


def marks_answers(source: str) -> bool:
    """Whether a template, as it is written, marks what the assistant says: `{% generation %}`."""
    return bool(_MARKED.search(source))


def render_chat(document: Document, template: Template, roles: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The dialog as `template` writes it, and the spans (first, behind the last character) that `roles` say.

    A span is found from two renderings: of the dialog up to the turn, with the prompt for it if the assistant answers,
    and of the dialog with the turn. The span is what the second adds. So every template works whose text only grows
    with each turn.
    """
    whole, messages = _rendered(document, template)
    render = _renderer(document, template)
    said = []
    for number, message in enumerate(messages):
        if message["role"] in roles:
            prompt = message["role"] == ANSWERS
            before = render(messages[:number], prompt=prompt) if number or prompt else ""
            after = render(messages[: number + 1])
            if whole.startswith(after) and not after.startswith(before):
                pairs = zip(before, after, strict=False)
                same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(after))
                raise DatasetError(
                    f"the chat template's prompt for a turn ends with {before[same:]!r:.60}, but this turn goes on "
                    f"with {after[same:]!r:.60}, so the assistant's part can't be told",
                    where=document.where,
                    hint="use a template whose prompt is how turns begin, or dataset.text_field with rendered dialogs",
                )
            if not whole.startswith(after):
                raise DatasetError(
                    "the chat template rewrites earlier turns, so the assistant's part can't be told",
                    where=document.where,
                    hint="use a template that only appends, or dataset.text_field with rendered dialogs",
                )
            said.append((len(before), len(after)))
    return whole, said


def render_prompt(document: Document, template: Template) -> str:
    """A dialog that the assistant is to answer, as `template` writes it, with the prompt for the answer."""
    return _renderer(document, template)(messages_of(document), prompt=True)


def render_whole(document: Document, template: Template) -> str:
    """A dialog as `template` writes it."""
    return _rendered(document, template)[0]


def _renderer(document: Document, template: Template) -> Callable[..., str]:
    """A function that writes turns of the dialog: `render(messages, prompt=False)`."""
    tools = _tools(document)

    def render(messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        try:
            text: str = template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template may raise anything
            line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise DatasetError(f"the chat template refuses this dialog: {line}", where=document.where) from error
        return text

    return render


def _rendered(document: Document, template: Template) -> tuple[str, list[dict[str, Any]]]:
    """The dialog as the template writes it, and its turns in the form that the template knows.

    Content may be a list of parts. A template gets it as one string, or as it is if it then writes no word of it.
    """
    render = _renderer(document, template)
    given = messages_of(document)
    texts = [_text_of(message, document) for message in given]
    joined = [
        message if text is None else {**message, "content": text} for message, text in zip(given, texts, strict=True)
    ]
    messages = _with_content(joined, render, document.where)
    whole = render(messages)
    if joined == given or all(_written(text, whole) for text in texts if text):
        return whole, messages
    whole = render(given)
    if missing := [text for text in texts if text and not _written(text, whole)]:
        raise DatasetError(
            f"the chat template writes nothing of {missing[0]!r:.60}",
            where=document.where,
            hint="give content as one string, or use dataset.text_field with rendered dialogs",
        )
    return whole, given


def _written(text: str, whole: str) -> bool:
    """Whether a template has written a turn: its last word is there. What stands before may be left out (thoughts)."""
    return next(reversed(text.split()), "") in whole


def _text_of(message: dict[str, Any], document: Document) -> str | None:
    """The text of a turn whose content is a list of parts. None if it is one string, or none, or has pictures."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return None
    if document.beside.get(PICTURES) and any(isinstance(part, dict) and part.get("type") == "image" for part in parts):
        return None
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
            raise DatasetError(
                f"a turn has a part that is no text ({kind}), and text alone is trained on",
                where=document.where,
                hint="set dataset.images_field for chats with pictures" if kind in ("image", "image_url") else None,
            )
        texts.append(text)
    return "".join(texts)


def messages_of(document: Document) -> list[dict[str, Any]]:
    """The turns of a dialog. DatasetError if it is none."""
    messages = document.content
    if not isinstance(messages, list) or not messages:
        raise DatasetError("expected a list of messages {role, content}", where=document.where)
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") is None
            or (message.get("content") is None and not any(message.get(key) for key in _WORDLESS))
        ):
            raise DatasetError(f"expected a message {{role, content}}, got {message!r:.80}", where=document.where)
    return [without_nulls(message) for message in messages]


def _tools(document: Document) -> list[Any] | None:
    tools = document.beside.get(TOOLS)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DatasetError(f"{TOOLS!r} is not valid JSON: {error}", where=document.where) from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DatasetError(f"expected a list of JSON schemas in {TOOLS!r}, got {tools!r:.80}", where=document.where)
    return [without_nulls(tool) for tool in tools]


def without_nulls(value: Any) -> Any:
    """`value` without keys that are null, at any depth: Arrow gives a row all keys that any row of its column has."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def _with_content(
    messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str], where: str
) -> list[dict[str, Any]]:
    """The turns, with an empty content for those that only call tools, if the template needs one."""
    if all("content" in message for message in messages):
        return messages
    empty = [{"content": "", **message} for message in messages]
    bare = [{key: value for key, value in message.items() if key not in _WORDLESS} for message in empty]
    problem = None
    for candidate in (messages, empty):
        try:
            if render(candidate) != render(bare):
                return candidate
        except DatasetError as error:
            problem = problem or error
    raise problem or DatasetError(
        "the chat template writes no tool calls, and a turn has nothing else",
        where=where,
        hint="use the tokenizer of a model that calls tools, or dataset.text_field with rendered dialogs",
    )
