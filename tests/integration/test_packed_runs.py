"""Packed runs: the losses of plain PyTorch on each document alone, on any ranks, and after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forked_ranks import ForkedRanks
from tiny_models import CONFIGS, dialog_template, save_word_tokenizer
from workshop import Workshop
from zinf_cli.batches.packing import PackedStream
from zinf_cli.models.model import build_model
from zinf_cli.models.weights import open_weights
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.text.token_stream import MASKED
from zinf_cli.train.setup import model_loss, model_source, open_text

WORDS = ["<end>", "<user>", "<bot>", "[UNK]", *(f"w{number}" for number in range(60))]
SEQ_LEN, STEPS, SEQUENCES = 32, 4, 6


def written(folder: Path, model: str) -> Workshop:
    """Chats of 7 to 30 tokens."""
    save_word_tokenizer(folder / "tokenizer", WORDS, template=dialog_template("<end>"))
    chats = []
    for seed in range(120):
        words = [f"w{(seed * 7 + number * 5) % 60}" for number in range(3 + seed * 11 % 23)]
        said = [("user", words[:2]), ("assistant", words[2:])]
        chats.append({"messages": [{"role": role, "content": " ".join(part)} for role, part in said]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    workshop = Workshop(folder)
    workshop.content["model"] = {"config": {"model_type": model, **CONFIGS[model]}}
    workshop.content["dataset"] = {
        "path": str(folder / "chats.jsonl"),
        "messages_field": "messages",
        "tokenizer": str(folder / "tokenizer"),
        "eval_fraction": 0.1,
    }
    workshop.content["train"] |= {"seq_len": SEQ_LEN, "max_steps": STEPS, "eval_interval": 2}
    workshop.content["checkpoint"] = {"interval": 2}
    return workshop


def plain(recipe_path: Path) -> list[dict[str, float]]:
    """The run by plain PyTorch: a step takes the documents of its windows, each in a forward of its own."""
    recipe = load_recipe(recipe_path)
    blank: Any = build_model(model_source(recipe))
    text = open_text(recipe, blank, 1)
    model = type(blank)._from_config(blank.config, dtype=torch.float32).train()
    values = open_weights(blank, model_source(recipe)).read([name for name, _ in blank.named_parameters()])
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, weight_decay=0.01)
    lines = []
    for step in range(STEPS):
        documents = [part for window in text.order.windows(step) for part in documents_of(text.train, window)]
        loss = mean_loss(model, documents)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"loss": loss.item()})
        if (step + 1) % 2 == 0:
            held = text.held_out[""]
            assert isinstance(held, PackedStream)
            windows = range(held.num_windows(SEQ_LEN))
            with torch.no_grad():
                held_out = mean_loss(model, [part for w in windows for part in documents_of(held, w)])
            lines[-1]["eval_loss"] = held_out.item()
    return lines


def documents_of(packed: Any, window: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels) of each document of a window, from the text itself."""
    found = []
    for piece in range(packed.bounds[window], packed.bounds[window + 1]):
        part = slice(packed.starts[piece], packed.starts[piece] + packed.lengths[piece])
        ids = torch.from_numpy(packed.stream.tokens[part].astype("int64"))
        learned = torch.from_numpy(packed.stream.loss_mask[part].copy())
        found.append((ids[None], torch.where(learned, ids, MASKED)[None]))
    return found


def mean_loss(model: nn.Module, documents: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    counts = [int((labels[:, 1:] != MASKED).sum()) for _, labels in documents]
    losses = [model_loss(model, ids, labels) * count for (ids, labels), count in zip(documents, counts, strict=True)]
    return torch.stack(losses).sum() / sum(counts)


@pytest.mark.parametrize("model", ["llama", "gemma3_text"])
def test_a_packed_run_is_that_of_documents_alone(model: str, forked: ForkedRanks, tmp_path: Path) -> None:
    workshop = written(tmp_path, model)
    run = workshop.fork(forked, "run")
    expected = plain(workshop.recipe)
    for found, line in zip(run.metrics[1:], expected, strict=True):
        assert {key: found[key] for key in line} == pytest.approx(line, rel=1e-5)
    assert all(SEQUENCES * SEQ_LEN * 0.9 < line["tokens"] <= SEQUENCES * SEQ_LEN for line in run.metrics[1:])


def test_ranks_and_a_resume_change_no_packed_run(forked: ForkedRanks, tmp_path: Path) -> None:
    """It stops after two steps, and goes on with its state in memory."""
    workshop = written(tmp_path, "llama")
    run = workshop.fork(forked, "run")
    assert workshop.fork(forked, "dealt", ranks=3).losses == pytest.approx(run.losses, rel=1e-6)
    workshop.fork(forked, "broken", "train.max_steps=2")
    placed = [f"offload.{state}=cpu" for state in ("params", "grads", "optimizer", "activations")]
    assert workshop.fork(forked, "broken", *placed).losses == run.losses


def test_a_run_of_several_texts_counts_what_each_gave(forked: ForkedRanks, tmp_path: Path) -> None:
    """In the summary; on two ranks, and after a resume, the sequences are the same."""
    workshop = written(tmp_path, "llama")
    shutil.copy(tmp_path / "chats.jsonl", tmp_path / "other.jsonl")
    paths = [str(tmp_path / "chats.jsonl"), str(tmp_path / "other.jsonl")]
    workshop.content["dataset"]["path"] = [{"path": paths[0], "weight": 0.25}, {"path": paths[1], "weight": 0.75}]
    run = workshop.launch()
    assert run.code == 0, run.err
    sources = run.summary["sources"]
    assert list(sources) == paths
    assert sum(sources.values()) == STEPS * SEQUENCES
    assert sources[paths[0]] == pytest.approx(STEPS * SEQUENCES / 4, abs=2)
    workshop.fork(forked, "broken", "train.max_steps=2")
    resumed = workshop.fork(forked, "broken", ranks=2)
    assert resumed.losses == pytest.approx(run.losses, rel=1e-6)
    assert [line["sequences_of_0"] for line in resumed.metrics[1:]] == [
        line["sequences_of_0"] for line in run.metrics[1:]
    ]


def test_a_run_does_not_go_on_with_other_windows(forked: ForkedRanks, tmp_path: Path) -> None:
    workshop = written(tmp_path, "llama")
    workshop.fork(forked, "run", "train.max_steps=2", "dataset.packing=stream")
    changes = [f"output_dir={tmp_path / 'run'}"]
    assert forked.run(workshop.recipe, 1, changes) == [1]
    log = (tmp_path / "run" / "logs" / "forked.log").read_text()
    assert "dataset.packing: the text is another one" in log
