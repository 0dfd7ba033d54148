"""Dialogs with tools: what of a row reaches the chat template, and in which form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zinf_cli.errors import DatasetError
from zinf_cli.recipe.recipe import Model
from zinf_cli.text.data import TextSource, open_token_stream

CALLS = (
    "{% if tools %}T{{ tools | tojson }};{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}C{{ m.tool_calls | tojson }}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPLIT = CALLS.replace("m.content }}", "m.content.split('|')[-1] }}")  # fails where there is no content
WORDS_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"


def tokenizer(folder: Path, template: str) -> Path:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw)
    fast.chat_template = template
    fast.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def read(
    folder: Path,
    rows: list[dict[str, Any]],
    template: str = CALLS,
    suffix: str = "jsonl",
    roles: tuple[str, ...] = ("assistant",),
) -> tuple[str, str]:
    """The text of a chat file, and what of it has a loss."""
    path = folder / f"chats.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    home = tokenizer(folder, template)
    source = TextSource((path,), messages_field="messages", roles=roles, tokenizer=home)
    stream = open_token_stream(source, folder / "cache")
    decode = PreTrainedTokenizerFast.from_pretrained(home).decode
    assert stream.loss_mask is not None
    return decode(stream.tokens), decode(stream.tokens[stream.loss_mask])


def ask(*calls: tuple[str, dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    tool_calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": tool_calls, **more}]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"zone": {"type": "string"}}}}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_tools_of_a_row_are_seen_and_no_padding_of_arrow(suffix: str, as_text: bool, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": ask(("weather", {"city": "Ulm"})), "tools": [WEATHER]},
        {"messages": ask(("clock", {"zone": "UTC", "day": {"year": 1}}), content="see"), "tools": [CLOCK]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": None},
    ]
    for row in rows if as_text else ():
        row["tools"] = row["tools"] and json.dumps(row["tools"])
    text, said = read(tmp_path, rows, suffix=suffix)
    assert "null" not in text
    assert "None" not in text
    first = json.dumps(rows[0]["messages"][1]["tool_calls"])
    assert text.count(f"T{json.dumps([WEATHER])};<user>q;<assistant>C{first};") == 1
    assert text.endswith("<user>q;<assistant>a;")
    assert said.startswith(f"C{first};seeC")


@pytest.mark.parametrize("more", [{}, {"content": None}])
def test_a_turn_of_calls_has_the_content_its_template_knows(more: dict[str, Any], tmp_path: Path) -> None:
    messages = ask(("clock", {"zone": "UTC"}), **more)
    calls = json.dumps(messages[1]["tool_calls"])
    for number, template in enumerate((CALLS, SPLIT)):
        (tmp_path / str(number)).mkdir()
        text, said = read(tmp_path / str(number), [{"messages": messages}], template)
        assert (text, said) == (f"<user>q;<assistant>C{calls};", f"C{calls};")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": ask()}, "expected a message {role, content}"),
        ({"messages": [{"role": "user", "content": None}]}, "expected a message {role, content}"),
        ({"messages": ask(("f", {})), "tools": "[{"}, "'tools' is not valid JSON"),
        ({"messages": ask(("f", {})), "tools": {"name": "f"}}, "expected a list of JSON schemas in 'tools'"),
        ({"messages": ask(("f", {})), "tools": ["f"]}, "expected a list of JSON schemas in 'tools'"),
    ],
)
def test_what_is_no_dialog_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, [row])
    assert said in caught.value.line()
    assert "chats.jsonl:1" in caught.value.line()


def test_a_turn_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="writes no tool calls"):
        read(tmp_path, [{"messages": ask(("clock", {}))}], WORDS_ONLY)


def turns(*said: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in said]


TALK = turns(("system", "S1"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (("assistant",), "A1;A2;"),
        (("user",), "<user>U1;<user>U2;"),
        (("assistant", "user"), "<user>U1;A1;<user>U2;A2;"),
        (("system", "assistant"), "<system>S1;A1;A2;"),
    ],
)
def test_the_turns_of_chosen_roles_are_learned(roles: tuple[str, ...], said: str, tmp_path: Path) -> None:
    text = "<system>S1;<user>U1;<assistant>A1;<user>U2;<assistant>A2;"
    assert read(tmp_path, [{"messages": TALK}], roles=roles) == (text, said)


def test_a_role_that_nobody_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"no message in 'messages' has the role 'bot' or 'tool'.* user \(2\)"
    ) as caught:
        read(tmp_path, [{"messages": TALK}], roles=("bot", "tool"))
    assert "dataset.roles_to_train" in str(caught.value.hint)


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{%- generation -%}"
    "{{ m.content if loop.last else m.content | lower }}{%- endgeneration -%};{% else %}{{ m.content }};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_marks_answers_decides_what_is_learned(tmp_path: Path) -> None:
    """Not the end of a turn, here; and it may rewrite earlier turns."""
    text = "<system>S1;<user>U1;<assistant>a1;<user>U2;<assistant>A2;"
    assert read(tmp_path, [{"messages": TALK}], MARKED) == (text, "a1A2")
    with pytest.raises(DatasetError, match="rewrites earlier turns"):
        read(tmp_path, [{"messages": TALK}], MARKED, roles=("assistant", "user"))


OF_PARTS = CALLS.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")


@pytest.mark.parametrize("template", [CALLS, MARKED, OF_PARTS], ids=["strings", "marked", "parts"])
def test_content_may_be_a_list_of_texts(template: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "1"}]
    messages = turns(("user", parts), ("assistant", [{"type": "text", "text": "A1"}]))
    text, said = read(tmp_path, [{"messages": messages}], template)
    assert text == "<user>Q1;<assistant>A1;"
    assert said.rstrip(";") == "A1"


@pytest.mark.parametrize(
    ("part", "template", "said"),
    [
        ({"type": "image", "url": "a.png"}, CALLS, "a turn has a part that is no text (image)"),
        (3, CALLS, "a turn has a part that is no text (int)"),
        (
            {"type": "text", "text": "lost"},
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            "writes nothing of 'lost'",
        ),
    ],
)
def test_parts_that_would_be_lost_are_refused(part: Any, template: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, [{"messages": turns(("user", [part]), ("assistant", "A1"))}], template)
    assert said in caught.value.line()
    assert "chats.jsonl:1" in caught.value.line()


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_not_ignored(with_config: bool, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter.*merge it into its model first"):
        Model(name_or_path=tmp_path)
