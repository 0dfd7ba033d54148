"""Runs that learn preferences: the losses of plain PyTorch, on any ranks, and after a resume."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from forked_ranks import ForkedRanks
from tiny_models import dialog_template, save_word_tokenizer
from workshop import Ended, Workshop
from zinf_cli.errors import FileError, ZinfError
from zinf_cli.models.model import build_model
from zinf_cli.models.weights import open_weights
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.figures import find_figures
from zinf_cli.train.setup import model_source, open_text

WORDS = ["<end>", "<user>", "<bot>", "[UNK]", *(f"w{number}" for number in range(60))]
SEQ_LEN, STEPS, PAIRS, BETA = 16, 4, 6, 0.3


def texts_of(row: int) -> tuple[str, str, str]:
    """(prompt, chosen answer, rejected answer) of a row."""
    words = [f"w{(row * 7 + number * 5) % 60}" for number in range(4 + row % 5)]
    return " ".join(words[:2]), " ".join(words[2:]), " ".join(reversed(words[1:]))


def as_text(row: int) -> dict[str, Any]:
    prompt, *answers = texts_of(row)
    return dict(zip(("prompt", "chosen", "rejected"), (prompt, *(f" {answer}" for answer in answers)), strict=True))


def as_chats(row: int) -> dict[str, Any]:
    """The prompt is what both chats begin with."""
    prompt, *answers = texts_of(row)
    chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for answer in answers]
    return dict(zip(("chosen", "rejected"), chats, strict=True))


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    save_word_tokenizer(tmp_path / "tokenizer", WORDS, template=dialog_template("<end>"), eos_token="<end>")
    for name, form in (("text", as_text), ("chats", as_chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(form(row)) + "\n" for row in range(60)))
    workshop = Workshop(tmp_path)
    workshop.content["dataset"] = {
        "path": str(tmp_path / "text.jsonl"), "tokenizer": str(tmp_path / "tokenizer"), "eval_fraction": 0.2
    }  # fmt: skip
    workshop.content["train"] = {
        "objective": "dpo", "dpo_beta": BETA, "seq_len": SEQ_LEN, "micro_batch_size": 2,
        "global_batch_size": PAIRS, "max_steps": STEPS, "eval_interval": 2,
    }  # fmt: skip
    workshop.content["checkpoint"] = {"interval": 2}
    return workshop


def plain(recipe_path: Path, *, chats: bool) -> list[dict[str, float]]:
    """The run by plain PyTorch: each answer is a sequence of its own, without padding."""
    recipe = load_recipe(recipe_path)
    assert recipe.dataset.tokenizer is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(recipe.dataset.tokenizer)
    blank: Any = build_model(model_source(recipe))
    order = open_text(recipe, blank, 1).order
    model = type(blank)._from_config(blank.config, dtype=torch.float32).train()
    values = open_weights(blank, model_source(recipe)).read([name for name, _ in blank.named_parameters()])
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])

    def likelihood(prompt: str, answer: str) -> torch.Tensor:
        begin = f"<user> {prompt} <end> <bot>" if chats else prompt
        ids = tokenizer(f"{begin} {answer} <end>", return_tensors="pt")["input_ids"]
        asked = len(begin.split())
        logits = model(input_ids=ids).logits[0, asked - 1 : -1]
        found: torch.Tensor = torch.log_softmax(logits, -1).gather(1, ids[0, asked:, None]).sum()
        return found

    def ratio(row: int) -> torch.Tensor:
        prompt, chosen, rejected = texts_of(row)
        return likelihood(prompt, chosen) - likelihood(prompt, rejected)

    with torch.no_grad():
        before = [ratio(row) for row in range(60)]
    if recipe.adapter.type is not None:
        model = with_adapter(model, recipe)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optimizer.lr, weight_decay=0.01)
    lines = []
    for step in range(STEPS):
        margins = torch.stack([BETA * (ratio(row) - before[row]) for row in order.windows(step)])
        loss = -F.logsigmoid(margins).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lines.append(
            {
                "loss": loss.item(),
                "reward_margin": margins.mean().item(),
                "reward_accuracy": (margins > 0).float().mean().item(),
            }
        )
        if (step + 1) % 2 == 0:
            with torch.no_grad():
                held_out = torch.stack([BETA * (ratio(row) - before[row]) for row in range(48, 60)])
            lines[-1]["eval_loss"] = -F.logsigmoid(held_out).mean().item()
    return lines


def with_adapter(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The same with an adapter of peft's: what was computed before is its reference."""
    settings = LoraConfig(r=recipe.adapter.r, lora_alpha=recipe.adapter.alpha, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see plain_peft.py
        torch.manual_seed(recipe.seed)
        adapted: nn.Module = get_peft_model(model, settings)
    return adapted.train()


def assert_as(ended: Ended, expected: list[dict[str, float]]) -> None:
    lines = [line for line in ended.metrics if "loss" in line]
    for line, wanted in zip(lines, expected, strict=True):
        assert {key: line[key] for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_a_run_is_that_of_plain_pytorch(kind: str, workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    workshop.content["dataset"]["path"] = str(tmp_path / f"{kind}.jsonl")
    one = workshop.fork(forked, "one")
    expected = plain(workshop.recipe, chats=kind == "chats")
    assert expected[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert expected[-1]["loss"] < 0.65
    assert_as(one, expected)
    assert_as(workshop.fork(forked, "two", ranks=2), expected)
    workshop.fork(forked, "parts", "train.max_steps=2")
    assert_as(workshop.fork(forked, "parts"), expected)


def test_an_adapter_is_compared_with_its_model(workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    """What the model without it thinks is what the run began with: an adapter begins by adding nothing."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**workshop.content["model"]["config"])).save_pretrained(
        tmp_path / "base"
    )
    workshop.content["model"] = {"name_or_path": str(tmp_path / "base")}
    workshop.content["adapter"] = {"type": "lora", "r": 8, "alpha": 16}
    workshop.content["optimizer"]["lr"] = 0.05
    run = workshop.fork(forked, "run", "offload.optimizer=cpu")
    expected = plain(workshop.recipe, chats=False)
    assert expected[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(expected[-1]["loss"] - 0.6931) > 1e-3
    assert_as(run, expected)
    workshop.fork(forked, "parts", "train.max_steps=2", ranks=2)
    assert_as(workshop.fork(forked, "parts"), expected)


def test_a_run_that_goes_on_knows_what_it_began_with(workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    workshop.fork(forked, "run", "train.max_steps=2")
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(as_text(row)) + "\n" for row in range(100, 120)))
    other = [f"dataset.eval_path={tmp_path / 'other.jsonl'}", "dataset.eval_fraction=null"]
    with pytest.raises(ZinfError, match="the text is another one"):
        find_figures(load_recipe(workshop.recipe, [f"output_dir={tmp_path / 'run'}", *other]), 1)
    again = workshop.fork(forked, "run")
    assert [line["step"] for line in again.metrics] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["dataset.path=FOLDER/half.jsonl"], "half.jsonl:2: expected two answers, got ' w1' and None (set dataset.ch"),
        (["dataset.path=FOLDER/tokens.npy"], "dpo needs pairs of answers, and .npy files have none"),
        (["dataset.packing=documents"], "dataset.packing: dpo compares two answers"),
        (["train.seq_len=2"], "the text has nothing to train on"),
        (["model.config.model_type=bert"], "BertForMaskedLM is no causal language model, and dpo compares"),
    ],
)
def test_what_is_no_pair_of_answers(changes: list[str], said: str, workshop: Workshop, tmp_path: Path) -> None:
    rows = [as_text(0), {"prompt": "w1", "chosen": " w1"}]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    workshop.write()
    with pytest.raises(ZinfError) as caught:
        find_figures(load_recipe(workshop.recipe, [change.replace("FOLDER", str(tmp_path)) for change in changes]), 1)
    error = caught.value
    assert error.exit_code == 2
    assert said in (error.problems[0] if isinstance(error, FileError) else error.line())
