"""Writes chats in a model's chat template: the text of a dialog, and the parts that the assistant says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from zinf_cli.errors import DatasetError
from zinf_cli.train.documents import Document

ANSWERS = "assistant"
"""The role whose turns are trained on."""
TOOLS = "tools"
"""The field of a row with the tools that its dialog may call: a list of JSON schemas, or that list as a string."""
_WORDLESS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys that a turn may have instead of content."""

Template = Callable[..., str]
"""apply_chat_template of a tokenizer."""


def render_chat(document: Document, template: Template) -> tuple[str, list[tuple[int, int]]]:
    """The dialog as `template` writes it, and the spans (first, behind the last character) that the assistant says.

    A span is found from two renderings: of the dialog up to the prompt for the turn, and of the dialog with the turn.
    The span is what the second adds. So every template works whose text only grows with each turn.
    """
    tools = _tools(document)

    def render(messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        try:
            return template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template may raise anything
            line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise DatasetError(f"the chat template refuses this dialog: {line}", where=document.where) from error

    messages = _with_content(messages_of(document), render, document.where)
    whole = render(messages)
    said = []
    for number, message in enumerate(messages):
        if message["role"] == ANSWERS:
            before, after = render(messages[:number], prompt=True), render(messages[: number + 1])
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
