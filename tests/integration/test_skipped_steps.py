"""A step in which no token has a loss leaves everything as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_launch import Ended, Workshop
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import CONFIGS

WORDS = ["<end>", "<user>", "<bot>", "[UNK]", *(f"w{number}" for number in range(60))]
SEQ_LEN = 16


def chat(seed: int, *, answered: bool) -> str:
    """A line of .jsonl whose dialog is SEQ_LEN tokens long."""
    words = [f"w{(seed * 7 + number * 5) % 60}" for number in range(14)]
    said = [("user", words[:5]), ("assistant", words[5:12])] if answered else [("user", words)]
    return json.dumps({"messages": [{"role": role, "content": " ".join(part)} for role, part in said]}) + "\n"


def run(folder: Path, chats: list[str], *arguments: str) -> Ended:
    folder.mkdir()
    raw = RawTokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    fast.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<bot> {% endif %}"
    )
    fast.save_pretrained(folder / "tokenizer")
    workshop = Workshop(folder)
    (folder / "chats.jsonl").write_text("".join(chats))
    workshop.content["model"] = {"config": {"model_type": "llama", **CONFIGS["llama"]}}
    workshop.content["dataset"] = {
        "path": str(folder / "chats.jsonl"),
        "messages_field": "messages",
        "tokenizer": str(folder / "tokenizer"),
        "shuffle": False,
    }
    steps = len(chats) // 2
    workshop.content["train"] = {"seq_len": SEQ_LEN, "gradient_accumulation_steps": 2, "max_steps": steps}
    workshop.content["optimizer"] = {"lr": 1e-2, "weight_decay": 0.1}
    workshop.content["checkpoint"] = {"interval": 1}
    ended = workshop.launch(*arguments)
    assert ended.code == 0, ended.err
    assert workshop.left_behind() == []
    return ended


@pytest.mark.parametrize("slots", ["1", "2"])
def test_a_step_without_a_target_changes_nothing(slots: str, tmp_path: Path) -> None:
    """As a run without these windows; and a micro-batch without a target does nothing to the others of its step."""
    asked = [chat(number, answered=number not in (1, 7)) for number in range(10)]
    unanswered = [chat(number, answered=False) for number in range(20, 22)]
    plain = run(tmp_path / "plain", asked, "--slots", slots)
    skipping = run(tmp_path / "skipping", [*asked[:8], *unanswered, *asked[8:]], "--slots", slots)
    assert all(loss > 0 for loss in plain.losses)
    assert skipping.losses == [*plain.losses[:4], None, plain.losses[4]]
    assert [line["step"] for line in skipping.metrics if line.get("skipped")] == [5]
    assert (skipping.summary["steps"], skipping.summary["skipped_steps"]) == (6, 1)
    assert skipping.summary["last_loss"] == plain.losses[-1]
    assert "skipped step 5: no token has a loss (windows 8, 9)" in skipping.err

    def state(ended: Ended, step: int) -> list[bytes]:
        files = sorted((ended.run_dir / "checkpoints" / f"step-{step:08}").glob("rank-*.safetensors"))
        assert len(files) == int(slots)
        return [file.read_bytes() for file in files]

    assert state(skipping, 5) == state(skipping, 4)
    assert state(skipping, 6) == state(plain, 5)
