"""What the model writes while it learns: the greedy text of transformers, on any ranks, in parts, and of chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forked_ranks import ForkedRanks
from tiny_models import CONFIGS, dialog_template, save_word_tokenizer
from workshop import Ended, Workshop
from zinf_cli.errors import ZinfError
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures

WORDS = ["<end>", "<user>", "<bot>", "[UNK]", *(f"w{number}" for number in range(92))]
PROMPTS = ["w1", "w5 w12 w19", "w90 w2"]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    save_word_tokenizer(tmp_path / "tokenizer", WORDS, template=dialog_template("<end>"), eos_token="<end>")
    (tmp_path / "text.txt").write_text(" ".join(f"w{number * 7 % 91}" for number in range(4000)))
    workshop = Workshop(tmp_path)
    workshop.content["dataset"] = {"path": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "tokenizer")}
    workshop.content["samples"] = {"prompts": PROMPTS, "max_new_tokens": 9}
    workshop.content["train"] |= {"eval_interval": 2}
    workshop.content["checkpoint"] = {"interval": 4}
    return workshop


def samples_of(ended: Ended) -> dict[int, list[str]]:
    """By step, what was written after each prompt."""
    return {line["step"]: [one["text"] for one in line["samples"]] for line in ended.metrics if "samples" in line}


def greedy(folder: Path, prompts: list[str]) -> list[str]:
    """What transformers writes."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)
        texts.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_samples_are_what_transformers_writes(
    name: str, workshop: Workshop, forked: ForkedRanks, tmp_path: Path
) -> None:
    workshop.content["model"] = {"config": {"model_type": name, **CONFIGS[name], "eos_token_id": 0, "bos_token_id": 0}}
    one = workshop.fork(forked, "one")
    assert list(samples_of(one)) == [0, 2, 4]
    export(one.run_dir, tmp_path / "out", "fp32")
    assert samples_of(one)[4] == greedy(tmp_path / "out", PROMPTS)
    assert all(samples_of(one)[4])
    if name != "gpt2":  # each micro-batch has dropout of its own, and two ranks have others than one
        assert samples_of(workshop.fork(forked, "two", ranks=2)) == samples_of(one)


def test_a_head_in_tiles_writes_the_same(workshop: Workshop, forked: ForkedRanks) -> None:
    workshop.content["model"]["config"] |= {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 16384}
    workshop.content["optimizer"]["lr"] = 1e-4
    workshop.content["train"] |= {"max_steps": 2}
    whole = workshop.fork(forked, "whole")
    plan = json.loads((whole.run_dir / "plan.json").read_text())
    needed = next(limit["needed"] for limit in plan["limits"] if limit["tier"] == "cpu")
    parts = workshop.fork(forked, "parts", f"offload.cpu_memory={needed - (100 << 20)}")
    assert samples_of(parts) == samples_of(whole)


def test_a_chat_is_answered(workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    turns = '{{"messages": [{{"role": "user", "content": "w1"}}, {{"role": "assistant", "content": "w{0} w{1}"}}]}}\n'
    (tmp_path / "chats.jsonl").write_text("".join(turns.format(n % 3, n % 5) for n in range(200)))
    workshop.content["dataset"] |= {"path": str(tmp_path / "chats.jsonl"), "messages_field": "messages"}
    ended = workshop.fork(forked, "chats")
    export(ended.run_dir, tmp_path / "out", "fp32")
    asked = [f"<user> {prompt} <end> <bot> " for prompt in PROMPTS]
    assert samples_of(ended)[4] == greedy(tmp_path / "out", asked)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["samples.prompts=['']"], "the prompt '' has 0 tokens"),
        ([f"samples.prompts=['{' w1' * 16}']"], "has 16 tokens (give one of 1 to 15 tokens (train.seq_len - 1))"),
        (["dataset.tokenizer=null", "dataset.path=TOKENS"], "prompts need a tokenizer (set dataset.tokenizer)"),
    ],
)
def test_prompts_that_can_not_be_gone_on_with(changes: list[str], said: str, workshop: Workshop) -> None:
    tokens = workshop.folder / "tokens.npy"
    workshop.write()
    with pytest.raises(ZinfError) as caught:
        find_figures(load_recipe(workshop.recipe, [change.replace("TOKENS", str(tokens)) for change in changes]), 1)
    assert caught.value.exit_code == 2
    assert said in caught.value.line()
