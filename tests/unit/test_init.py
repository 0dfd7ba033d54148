"""`zinf init` writes a recipe that launch takes, for every kind of text, and reads DeepSpeed's configurations."""

from __future__ import annotations

import copy
import gzip
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoConfig, AutoModelForMaskedLM

from checkpoints import save
from plain import open_engine
from tiny_models import random_source
from written_recipes import TURNS, holding, records, saved, written
from zinf_cli.commands.init import InitRequest, init
from zinf_cli.engine.options import EngineOptions
from zinf_cli.errors import UsageError, ZinfError
from zinf_cli.models.model import build_model
from zinf_cli.recipe.deepspeed import from_deepspeed
from zinf_cli.recipe.draft import Choice, draft
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.screen import Screen
from zinf_cli.train.first_look import look_at_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("t5", tmp_path_factory.mktemp("models") / "t5")


def array(path: Path, values: Any) -> Path:
    np.save(path, values)
    return path


def mixed(folder: Path, *values: Any) -> Path:
    folder.mkdir()
    for number, value in enumerate(values):
        records(folder / f"{number}.jsonl", value)
    return folder


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
    assert (recipe.train.global_batch_size, recipe.dataset.eval_fraction) == (1, None)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: records(folder / "a.jsonl", {"question": "a", "answer": "b"}), "question, answer"),
        (lambda folder: records(folder / "a.jsonl", ["a"]), "expected a record, got a list"),
        (lambda folder: records(folder / "a.jsonl"), "no record here"),
        (lambda folder: folder / "nothing.txt", "no such file or folder"),
        (lambda folder: holding(folder / "a.txt", b""), "the file is empty"),
        (lambda folder: holding(folder / "a.txt.gz", gzip.compress(b"")), "the file is empty"),
        (lambda folder: holding(folder / "a.npy", b"\1"), "not a .npy file of numbers"),
        (lambda folder: array(folder / "a.npy", np.ones(9)), "expected one-dimensional integers"),
        (lambda folder: array(folder / "a.npy", np.zeros(0, np.int32)), "the file is empty"),
        (lambda folder: records(folder / "a.jsonl", {"messages": [{"from": "me", "value": "a"}]}), "{role, content}"),
        (lambda folder: mixed(folder / "two", {"messages": TURNS}, {"text": "a b"}), "no field 'messages'"),
    ],
)
def test_a_text_that_says_too_little(tmp_path: Path, llama: Path, prepare: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(ZinfError, match=said):
        written(llama, prepare(tmp_path))
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("name", ["my model: v2 #1", "$HOME", "~x", "-a", "null", "1e5", "a'b", "two\nlines"])
def test_whatever_the_folders_are_called(
    tmp_path: Path, llama: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, name)
    (tmp_path / f"{name}.txt").write_text("one two three\n")
    init(InitRequest(Path(name), (Path(f"{name}.txt"),), None, None, None), Screen())
    recipe = load_recipe(Path(f"{name}.yaml"))
    assert (recipe.model.name_or_path, recipe.dataset.path) == (tmp_path / name, (tmp_path / f"{name}.txt",))
    assert recipe.output_dir == tmp_path / "runs" / name
    if "\n" not in name:
        word = shlex.split(capsys.readouterr().out.splitlines()[-1])[-1]
        assert (tmp_path / word).is_file()
        assert not word.startswith("-")


def test_a_sequence_is_no_longer_than_the_text(tmp_path: Path, llama: Path) -> None:
    assert written(llama, records(tmp_path / "a.jsonl", *[{"text": "one two"}] * 8)).train.seq_len == 16


def test_an_encoder_decoder_takes_pairs_alone(tmp_path: Path, t5: Path) -> None:
    for text in (holding(tmp_path / "a.txt", b"one two"), array(tmp_path / "a.npy", np.zeros(9, np.int32))):
        with pytest.raises(ZinfError, match="reads a source and writes a target"):
            written(t5, text)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "1" * 5000])
def test_a_damaged_configuration_of_a_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ZinfError, match=r"config\.json: (can't be read|is no configuration)"):
        written(tmp_path, holding(tmp_path / "a.txt", b"one two"))


def test_a_table_of_positions_may_begin_with_rows_for_padding(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "roberta", vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=34,
    )  # fmt: skip
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    assert written(tmp_path / "model", holding(tmp_path / "a.txt", b"one two " * 400)).train.seq_len == 32


def test_an_adapter_is_no_model(tmp_path: Path, llama: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ZinfError, match=r"adapter_config\.json: is an adapter's, .*merge it into its model first"):
        written(tmp_path / "model", holding(tmp_path / "a.txt", b"one two"))


def test_a_run_or_one_of_its_checkpoints_is_a_model(tmp_path: Path) -> None:
    engine = open_engine(random_source("llama"), EngineOptions())
    folder = save(engine, tmp_path / "run", 1)
    engine.close()
    numel = sum(param.numel() for param in build_model(random_source("llama")).parameters())
    assert [look_at_model(path).num_parameters for path in (tmp_path / "run", folder)] == [numel, numel]


def test_a_run_has_a_folder_of_its_own(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "new").mkdir(parents=True)
    assert written(llama, holding(tmp_path / "a.txt", b"one two")).output_dir == tmp_path / "runs" / "new-2"


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
    with pytest.raises(ZinfError, match="directory comes first"):
        written(tmp_path / "a.txt", tmp_path)


def test_values_stay_what_they_are() -> None:
    values = {"lr": 5e-5, "tiny": 1e-300, "half": 0.5, "pair": [0.9, 1e-8], "none": None, "is_on": True, "text": "on"}
    read = yaml.safe_load(draft([Choice(f"section.{key}", value, "why") for key, value in values.items()], ["heading"]))
    assert read == {"section": values}


DEEPSPEED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.9, 0.95]}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 1e2}},
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
    assert (train.micro_batch_size, train.global_batch_size, train.max_steps) == (2, 32, 100)
    assert (train.precision, train.max_grad_norm) == ("bf16", None), "DeepSpeed clips nothing unless told"
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.95), 0.0), "its default decay"
    assert optimizer.lr == 1e-3, "WarmupDecayLR sets its own, by default this one"
    assert (recipe.lr_scheduler.name, recipe.lr_scheduler.warmup_steps) == ("linear", 10)
    assert recipe.offload.nvme_path == (Path("/nvme"),)
    assert "curriculum_learning" in (tmp_path / "new.yaml").read_text()


def test_the_sizes_of_deepspeeds_batch_agree(tmp_path: Path, llama: Path) -> None:
    given = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    (tmp_path / "a.txt").write_text("one two three\n")
    (tmp_path / "ds.json").write_text(json.dumps(given))
    train = written(llama, tmp_path / "a.txt", deepspeed=tmp_path / "ds.json").train
    assert (train.global_batch_size, train.sequences_per_step(8)) == (None, 64)
    with pytest.raises(UsageError, match="is not 2 × 4 × 8"):
        from_deepspeed({**given, "train_batch_size": 32}, 8)


def test_a_size_of_deepspeeds_batch_follows_from_the_others() -> None:
    def chosen(given: dict[str, Any], num_ranks: int | None = None) -> list[Any]:
        values = {choice.key: choice.value for choice in from_deepspeed(given, num_ranks).choices}
        keys = ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size")
        return [values.get(f"train.{key}") for key in keys]

    assert chosen({"train_batch_size": 64, "gradient_accumulation_steps": 2}, 8) == [4, None, 64]
    assert chosen({"train_batch_size": 64, "gradient_accumulation_steps": 2}) == [None, None, 64]
    assert chosen({"train_micro_batch_size_per_gpu": 4}) == [4, 1, None]
    assert chosen({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto"}) == [4, None, None]


def test_the_learning_rate_is_that_of_deepspeeds_scheduler() -> None:
    def rate(kind: str, **params: Any) -> Any:
        optimizer = {"type": "AdamW", "params": {"lr": 3e-5}}
        config = {"optimizer": optimizer, "scheduler": {"type": kind, "params": params}}
        return {choice.key: choice.value for choice in from_deepspeed(config, None).choices}["optimizer.lr"]

    assert [rate("WarmupLR"), rate("WarmupDecayLR"), rate("WarmupCosineLR")] == [1e-3, 1e-3, 3e-5]
    assert [rate("WarmupLR", warmup_max_lr=value) for value in (2e-5, "auto")] == [2e-5, 3e-5]


def keys_of(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*above, key))


def refused(model: Path, text: Path, deepspeed: Path) -> UsageError | None:
    try:
        written(model, text, deepspeed=deepspeed)
    except UsageError as error:
        return error
    return None


NONSENSE: tuple[Any, ...] = (
    None,
    [],
    [1],
    {},
    {"a": 1},
    "x",
    "16",
    16,
    -1,
    0,
    1.5,
    float("inf"),
    float("nan"),
    True,
    2**70,
)


@pytest.mark.parametrize("path", [*keys_of(DEEPSPEED)], ids=".".join)
def test_any_value_in_a_deepspeed_configuration(tmp_path: Path, llama: Path, path: tuple[str, ...]) -> None:
    """Each gives a recipe, or one line that names the JSON."""
    (tmp_path / "a.txt").write_text("one two three\n")
    for value in NONSENSE:
        config = copy.deepcopy(DEEPSPEED)
        section: Any = config
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        (tmp_path / "ds.json").write_text(json.dumps(config))
        (tmp_path / "new.yaml").unlink(missing_ok=True)
        error = refused(llama, tmp_path / "a.txt", tmp_path / "ds.json")
        assert error is None or (error.where, error.line().count("\n")) == (str(tmp_path / "ds.json"), 0)
        assert (tmp_path / "new.yaml").exists() == (error is None)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1} x', "[" * 100_000, "\ufeff{", "1" * 5000])
def test_what_is_no_deepspeed_configuration(tmp_path: Path, llama: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UsageError, match="is no"):
        written(llama, tmp_path / "a.txt", deepspeed=tmp_path / "ds.json")


def test_a_key_with_lines_of_its_own_stays_a_comment(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    (tmp_path / "ds.json").write_text(json.dumps({"a\ntrain: {}\x85\0": 1, "optimizer": {"type": "L\nx: 1"}}))
    assert written(llama, tmp_path / "a.txt", deepspeed=tmp_path / "ds.json").train.seq_len >= 2


def test_auto_chooses_nothing() -> None:
    automatic = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    rates = dict.fromkeys(("warmup_num_steps", "warmup_max_lr"), "auto")
    config = {
        **automatic,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {**rates, "warmup_type": "linear"}},
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
    adam = {"type": "Adam", "params": {"bias_correction": False, "adam_w_mode": False, "weight_decay": 0.1}}
    assert [line.split()[0] for line in from_deepspeed({"optimizer": adam}, None).without] == [
        "optimizer.params.adam_w_mode", "optimizer.params.bias_correction",
    ]  # fmt: skip
