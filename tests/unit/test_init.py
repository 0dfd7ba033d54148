"""`zinf init` writes a recipe that launch takes, for every kind of text, and reads DeepSpeed's configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tiny_models import CONFIGS
from zinf_cli.commands.init import InitRequest, init
from zinf_cli.errors import UsageError, ZinfError
from zinf_cli.recipe.deepspeed import from_deepspeed
from zinf_cli.recipe.draft import Choice, draft
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.screen import Screen


def saved(name: str, folder: Path) -> Path:
    config = AutoConfig.for_model(name, **CONFIGS[name])
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("t5", tmp_path_factory.mktemp("models") / "t5")


def written(model: Path, *texts: Path, deepspeed: Path | None = None, num_ranks: int | None = None) -> Recipe:
    out = texts[0].parent / "new.yaml"
    init(InitRequest(model, texts, out, deepspeed, num_ranks), Screen(stderr=True))
    return load_recipe(out)


def records(path: Path, *values: Any) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(values)), path)
    else:
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"text": "a b c", "id": "1"}, {"text_field": "text"}),
        ({"number": 1, "words": "a b c"}, {"text_field": "words"}),
        ({"text": "what was said", "messages": TURNS}, {"messages_field": "messages"}),
        ({"conversation": TURNS}, {"messages_field": "conversation"}),
    ],
)
def test_fields_of_a_causal_models_text(
    tmp_path: Path, llama: Path, suffix: str, record: dict[str, Any], found: dict[str, str]
) -> None:
    recipe = written(llama, records(tmp_path / f"text{suffix}", *[record] * 3))
    assert {key: getattr(recipe.dataset, key) for key in found} == found


def test_pairs(tmp_path: Path, t5: Path) -> None:
    recipe = written(t5, records(tmp_path / "pairs.jsonl", {"document": "a b", "summary": "a"}))
    assert (recipe.dataset.source_field, recipe.dataset.target_field) == ("document", "summary")


def test_tokens_are_counted(tmp_path: Path, llama: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(64_000) % 90)
    recipe = written(llama, tmp_path / "tokens.npy")
    assert recipe.train.seq_len == 64, "the model's longest"
    assert "64.0K tokens" in (tmp_path / "new.yaml").read_text()
    assert recipe.dataset.eval_fraction == 0.05


def test_a_short_text_has_a_recipe_too(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    recipe = written(llama, tmp_path / "a.txt")
    assert (recipe.train.gradient_accumulation_steps, recipe.dataset.eval_fraction) == (1, None)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: records(folder / "a.jsonl", {"question": "a", "answer": "b"}), "question, answer"),
        (lambda folder: records(folder / "a.jsonl", ["a"]), "expected a record, got a list"),
        (lambda folder: records(folder / "a.jsonl"), "no record here"),
        (lambda folder: folder / "nothing.txt", "no such file or folder"),
    ],
)
def test_a_text_that_says_too_little(tmp_path: Path, llama: Path, prepare: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(ZinfError, match=said):
        written(llama, prepare(tmp_path))
    assert not (tmp_path / "new.yaml").exists()


def test_nothing_is_overwritten(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    (tmp_path / "new.yaml").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        written(llama, tmp_path / "a.txt")
    assert (tmp_path / "new.yaml").read_text() == "mine"


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    with pytest.raises(ZinfError, match="hf download"):
        written(tmp_path, tmp_path / "a.txt")


def test_values_stay_what_they_are() -> None:
    values = {"lr": 5e-5, "tiny": 1e-300, "half": 0.5, "pair": [0.9, 1e-8], "none": None, "is_on": True, "text": "on"}
    read = yaml.safe_load(draft([Choice(f"section.{key}", value, "why") for key, value in values.items()], ["heading"]))
    assert read == {"section": values}


DEEPSPEED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.9, 0.95]}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}},
    "fp16": {"enabled": False},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}},
    "curriculum_learning": {"enabled": True},
}


def test_a_deepspeed_configuration(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    recipe = written(llama, tmp_path / "a.txt", deepspeed=tmp_path / "ds.json")
    train, optimizer = recipe.train, recipe.optimizer
    assert (train.micro_batch_size, train.gradient_accumulation_steps, train.max_steps) == (2, 16, 100)
    assert (train.precision, train.max_grad_norm) == ("bf16", None), "DeepSpeed clips nothing unless told"
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (3e-5, (0.9, 0.95), 0.0), "its default decay"
    assert (recipe.lr_scheduler.name, recipe.lr_scheduler.warmup_steps) == ("linear", 10)
    assert recipe.offload.nvme_path == (Path("/nvme"),)
    assert "curriculum_learning" in (tmp_path / "new.yaml").read_text()


def test_deepspeed_accumulates_on_each_rank() -> None:
    given = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    chosen = {choice.key: choice.value for choice in from_deepspeed(given, 8).choices}
    assert chosen["train.gradient_accumulation_steps"] == 32
    with pytest.raises(UsageError, match="give --hostfile"):
        from_deepspeed(given, None)
    with pytest.raises(UsageError, match="is not 2 × 4 × 8"):
        from_deepspeed({**given, "train_batch_size": 32}, 8)


def test_auto_chooses_nothing() -> None:
    automatic = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    config = {
        **automatic,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_type": "linear"}},
    }
    taken = from_deepspeed(config, None)
    assert [choice.key for choice in taken.choices] == ["lr_scheduler.name"]
    assert not taken.without


def test_what_has_no_counterpart_is_told() -> None:
    config = {
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-3}},
        "scheduler": {"type": "OneCycle", "params": {}},
        "sparse_attention": {},
        "gradient_clipping": 0.5,
    }
    taken = from_deepspeed(config, None)
    assert [line.partition(":")[0] for line in taken.without] == [
        "optimizer.type Lamb", "scheduler.type OneCycle", "sparse_attention",
    ]  # fmt: skip
    assert {choice.key: choice.value for choice in taken.choices}["train.max_grad_norm"] == 0.5
