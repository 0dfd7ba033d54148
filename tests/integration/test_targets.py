"""Losses are means over targets, however they are dealt; a step without any leaves everything as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forked_ranks import ForkedRanks
from tiny_models import CONFIGS, dialog_template, save_word_tokenizer
from workshop import Ended, Workshop

WORDS = ["<end>", "<user>", "<bot>", "[UNK]", "[MASK]", *(f"w{number}" for number in range(60))]
SEQ_LEN = 16


def chat(seed: int, *, answered: bool) -> str:
    """A line of .jsonl whose dialog is SEQ_LEN tokens long."""
    words = [f"w{(seed * 7 + number * 5) % 60}" for number in range(14)]
    said = [("user", words[:5]), ("assistant", words[5:12])] if answered else [("user", words)]
    return json.dumps({"messages": [{"role": role, "content": " ".join(part)} for role, part in said]}) + "\n"


def workshop_of(folder: Path, chats: list[str]) -> Workshop:
    folder.mkdir()
    save_word_tokenizer(folder / "tokenizer", WORDS, mask_token="[MASK]", template=dialog_template("<end>"))
    workshop = Workshop(folder)
    (folder / "chats.jsonl").write_text("".join(chats))
    workshop.content["model"] = {"config": {"model_type": "llama", **CONFIGS["llama"]}}
    workshop.content["dataset"] = {
        "path": str(folder / "chats.jsonl"),
        "messages_field": "messages",
        "tokenizer": str(folder / "tokenizer"),
        "packing": "stream",
        "shuffle": False,
    }
    steps = len(chats) // 2
    workshop.content["train"] = {"seq_len": SEQ_LEN, "global_batch_size": 2, "max_steps": steps}
    workshop.content["optimizer"] = {"lr": 1e-2, "weight_decay": 0.1}
    workshop.content["checkpoint"] = {"interval": 1}
    return workshop


def test_a_step_without_a_target_changes_nothing(tmp_path: Path, forked: ForkedRanks) -> None:
    """As a run without these windows; and a micro-batch without a target does nothing to the others of its step."""
    asked = [chat(number, answered=number not in (1, 7)) for number in range(10)]
    unanswered = [chat(number, answered=False) for number in range(20, 22)]
    plain = workshop_of(tmp_path / "plain", asked).fork(forked, "run", ranks=2)
    workshop = workshop_of(tmp_path / "skipping", [*asked[:8], *unanswered, *asked[8:]])
    skipping = workshop.launch("--slots", "2")
    assert skipping.code == 0, skipping.err
    assert workshop.left_behind() == []
    assert all(loss > 0 for loss in plain.losses)
    assert skipping.losses == [*plain.losses[:4], None, plain.losses[4]]
    assert [line["step"] for line in skipping.metrics if line.get("skipped")] == [5]
    assert (skipping.summary["steps"], skipping.summary["skipped_steps"]) == (6, 1)
    assert skipping.summary["last_loss"] == plain.losses[-1]
    assert "skipped step 5: no token has a loss (windows 8, 9)" in skipping.err

    def state(ended: Ended, step: int) -> list[bytes]:
        files = sorted((ended.run_dir / "checkpoints" / f"step-{step:08}").glob("rank-*.safetensors"))
        assert len(files) == 2
        return [file.read_bytes() for file in files]

    assert state(skipping, 5) == state(skipping, 4)
    assert state(skipping, 6) == state(plain, 5)


BERT = {**CONFIGS["bert"], "model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BART = {"model_type": "bart", "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 2, "architectures": None}


@pytest.mark.parametrize("config", [BERT, BART], ids=["bert", "bart"])
def test_a_step_is_the_same_however_it_is_dealt(config: dict[str, Any], tmp_path: Path, forked: ForkedRanks) -> None:
    """Rows have unlike numbers of targets; held-out text as well."""
    workshop = Workshop(tmp_path)
    save_word_tokenizer(tmp_path / "tokenizer", WORDS, mask_token="[MASK]", template=dialog_template("<end>"))
    rows = [
        {"source": "w1 w2 w3", "target": " ".join(f"w{(n * i) % 60}" for i in range(1 + n * 3 % 14))} for n in range(11)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.txt").write_text(" ".join(f"w{n * n % 60}" for n in range(16 * 11)))
    text = {"path": str(tmp_path / ("rows.jsonl" if config is BART else "words.txt")), "eval_fraction": 0.28}
    workshop.content["model"] = {"config": config}
    workshop.content["dataset"] = {**text, "tokenizer": str(tmp_path / "tokenizer")}
    workshop.content["train"] = {"seq_len": 16, "micro_batch_size": 1, "global_batch_size": 4, "max_steps": 2}
    one = workshop.fork(forked, "one")
    changes = ("train.micro_batch_size=4",)
    four = workshop.fork(forked, "four", *changes, ranks=2)
    for before, after in zip(one.metrics, four.metrics, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & before.keys():
            assert after[key] == pytest.approx(before[key], rel=1e-5), key
