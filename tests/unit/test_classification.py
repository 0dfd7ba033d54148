"""Classifiers of texts: the losses of plain transformers on any ranks, with a new head or with the model's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    FunnelTokenizer,
)
from transformers import AutoTokenizer as Tokenizers

from forked_ranks import ForkedRanks
from tiny_models import CONFIGS, save_word_tokenizer
from workshop import Workshop
from zinf_cli.errors import FileError, ZinfError
from zinf_cli.models.model import build_model
from zinf_cli.models.weights import open_weights
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.text.documents import Document
from zinf_cli.text.tokens import Tokenizer
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures
from zinf_cli.train.setup import model_source, open_model, open_text
from zoo.shrink import configs

LABELS = ["bad", "so so", "good"]
SEQ_LEN, STEPS = 8, 4
WORDS = ["<pad>", "</s>", "[MASK]", *(f"w{number}" for number in range(60))]


def row(number: int, label: Any) -> dict[str, Any]:
    """A text of up to eleven words, of which some are longer than a sequence."""
    return {"text": " ".join(f"w{(number * 7 + word) % 60}" for word in range(2 + number * 5 % 10)), "label": label}


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    torch.manual_seed(5)
    for name, kind in (("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)):
        settings = {key: value for key, value in CONFIGS[name].items() if key != "architectures"}
        kind.from_config(AutoConfig.for_model(name, **settings)).save_pretrained(tmp_path / name)
        special = {"pad_token": "<pad>"} if name == "bert" else {}
        save_word_tokenizer(tmp_path / name, WORDS, unk_token="[MASK]", end="</s>", eos_token="</s>", **special)
    rows = [row(number, LABELS[number * 5 % 3]) for number in range(40)]
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "scores.jsonl", [row(number, number / 40) for number in range(40)])
    workshop = Workshop(tmp_path)
    workshop.content["model"] = {"name_or_path": str(tmp_path / "llama")}
    workshop.content["dataset"] = {"path": str(tmp_path / "rows.jsonl"), "labels": LABELS, "eval_fraction": 0.2}
    workshop.content["train"] = {
        "objective": "classification", "seq_len": SEQ_LEN, "micro_batch_size": 2, "global_batch_size": 6,
        "max_steps": STEPS,
    }  # fmt: skip
    workshop.content["checkpoint"] = {"interval": 4}
    workshop.content["optimizer"] = {"lr": 1e-3}
    return workshop


def write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def plain(recipe_path: Path, folder: Path, rows: Path) -> tuple[list[float], nn.Module]:
    """The losses of AutoModelForSequenceClassification on its tokenizer's batches, with zinf's new head; the model."""
    recipe = load_recipe(recipe_path)
    source = model_source(recipe)
    labels = recipe.dataset.labels
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels)).train()
    blank: Any = build_model(source)
    drawn = open_weights(blank, source).read([name for name, _ in blank.named_parameters()])
    with torch.no_grad():
        for name, param in model.named_parameters():
            if not name.startswith(model.base_model_prefix) or "pooler" in name:
                assert param.shape == drawn[name].shape
                param.copy_(drawn[name])
            assert torch.equal(param, drawn[name])
    tokenizer = Tokenizers.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    texts = [json.loads(line) for line in rows.read_text().splitlines()]
    order = open_text(recipe, open_model(recipe, "fp32"), 1).order
    if recipe.adapter.type is not None:
        model = with_adapter(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        chosen = [texts[window] for window in order.windows(step)]
        wanted = [labels.index(one["label"]) if len(labels) > 1 else one["label"] for one in chosen]
        batch = tokenizer(
            [one["text"] for one in chosen], truncation=True, max_length=SEQ_LEN, padding=True, return_tensors="pt"
        )
        batch.pop("token_type_ids", None)
        loss = model(**batch, labels=torch.tensor(wanted)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_new_head_learns_as_in_plain_transformers(
    name: str, workshop: Workshop, forked: ForkedRanks, tmp_path: Path
) -> None:
    workshop.content["model"]["name_or_path"] = str(tmp_path / name)
    if name == "bert":
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            path = tmp_path / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: 0.0}))
    one = workshop.fork(forked, "one")
    losses, model = plain(workshop.recipe, tmp_path / name, tmp_path / "rows.jsonl")
    config: Any = model.config
    assert one.losses == pytest.approx(losses, abs=1e-6)
    if name == "llama":
        assert workshop.fork(forked, "two", ranks=2).losses == pytest.approx(losses, abs=1e-6)
    export(one.run_dir, tmp_path / "exported")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert [exported.config.id2label[number] for number in range(3)] == LABELS
    assert exported.config.pad_token_id == config.pad_token_id
    for ours, theirs in zip(exported.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_padding_token_that_the_model_does_not_know_pads_nothing(
    workshop: Workshop, forked: ForkedRanks, tmp_path: Path
) -> None:
    """Older configurations have -1 for none."""
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": -1}))
    run = workshop.fork(forked, "one")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    losses, _ = plain(workshop.recipe, tmp_path / "llama", tmp_path / "rows.jsonl")
    assert run.losses == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("pad", [0, None])
def test_a_model_of_several_parts_pads_as_its_text_does(
    pad: int | None, workshop: Workshop, forked: ForkedRanks, tmp_path: Path
) -> None:
    """Gemma 3's configuration names the padding token in its part of text alone; or it is the tokenizer's, there."""
    entries = next(configs("gemma3"))
    folder, model_type = tmp_path / "gemma3", entries.pop("model_type")
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **entries)).save_pretrained(folder)
    save_word_tokenizer(folder, WORDS, unk_token="[MASK]", end="</s>", eos_token="</s>", pad_token="<pad>")
    workshop.content["model"]["name_or_path"] = str(folder)
    entries = json.loads((folder / "config.json").read_text())
    entries["text_config"]["pad_token_id"] = pad
    (folder / "config.json").write_text(json.dumps(entries))
    run = workshop.fork(forked, "one")
    losses, _ = plain(workshop.recipe, folder, tmp_path / "rows.jsonl")
    assert run.losses == pytest.approx(losses, abs=1e-6)
    export(run.run_dir, tmp_path / "exported")
    assert AutoConfig.from_pretrained(tmp_path / "exported").get_text_config().pad_token_id == WORDS.index("<pad>")


def test_tokens_of_several_kinds_are_refused(tmp_path: Path) -> None:
    """Funnel's model tells its first token from the others by what its tokenizer says of it."""
    words = {word: number for number, word in enumerate(["<unk>", "<cls>", "<sep>", "<pad>", "<mask>", "one", "two"])}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    FunnelTokenizer(vocab=words, model_input_names=names).save_pretrained(tmp_path)
    with pytest.raises(ZinfError, match="FunnelTokenizer gives tokens of a text kinds"):
        Tokenizer(tmp_path).encode_whole([Document("here", "one two")])


def test_a_model_that_reads_where_texts_are_padded_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    """XLNet sums a text up in the last token of its row; its own tokenizer pads at the beginning."""
    small = {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    workshop.content["model"] = {"config": {"model_type": "xlnet", "vocab_size": 96, **small}}
    workshop.content["dataset"]["tokenizer"] = str(tmp_path / "bert")
    workshop.write()
    with pytest.raises(ZinfError, match="XLNetForSequenceClassification sums a text up in the last token of its row"):
        find_figures(load_recipe(workshop.recipe), 1)


def test_a_single_label_is_a_number_to_come_close_to(workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    workshop.content["dataset"] |= {"path": str(tmp_path / "scores.jsonl"), "labels": ["score"]}
    losses, _ = plain_of(workshop, tmp_path)
    notes = find_figures(load_recipe(workshop.recipe), 1).model.notes
    assert "new, and drawn from the seed: score.weight" in notes
    assert workshop.fork(forked, "one").losses == pytest.approx(losses, abs=1e-6)


def with_adapter(model: Any, recipe: Recipe) -> Any:
    """The same with an adapter of peft's, which makes a copy of the head that is trained whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see plain_peft.py
        torch.manual_seed(recipe.seed)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=16, task_type="SEQ_CLS")).train()


def test_an_adapter_brings_its_head(workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    workshop.content["adapter"] = {"type": "lora", "r": 4}
    run = workshop.fork(forked, "one")
    losses, model = plain(workshop.recipe, tmp_path / "llama", tmp_path / "rows.jsonl")
    assert run.losses == pytest.approx(losses, abs=1e-6)
    export(run.run_dir, tmp_path / "merged", merge=True)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    theirs: Any = model
    for ours, wanted in zip(merged.parameters(), theirs.merge_and_unload().parameters(), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-5)


def test_an_adapter_holds_all_that_is_new(workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    """A pooler that the checkpoint lacks is no part of peft's heads: it would be drawn anew where the adapter is
    loaded."""
    workshop.content["model"]["name_or_path"] = str(tmp_path / "bert")
    workshop.content["adapter"] = {"type": "lora", "r": 4, "target_modules": ["query"]}
    workshop.write()
    wanted = r"adapter.modules_to_save: bert.pooler.dense.bias, .* are new, .*: add \[pooler\]"
    with pytest.raises(ZinfError, match=wanted):
        find_figures(load_recipe(workshop.recipe), 1)
    workshop.content["adapter"] |= {"modules_to_save": ["pooler"]}
    run = workshop.fork(forked, "one")
    export(run.run_dir, tmp_path / "adapter")
    export(run.run_dir, tmp_path / "merged", merge=True)
    torch.manual_seed(8)  # of another head and pooler
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=len(LABELS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see plain_peft.py
        loaded: Any = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    ids = torch.arange(3, 11).view(1, -1)
    assert torch.allclose(loaded.eval()(ids).logits, merged.eval()(ids).logits, atol=1e-5)


def plain_of(workshop: Workshop, tmp_path: Path) -> tuple[list[float], nn.Module]:
    workshop.write()
    return plain(workshop.recipe, tmp_path / "llama", tmp_path / "scores.jsonl")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["dataset.labels=[bad, good]"], "rows.jsonl:3: expected one of bad, good in 'label', got 'so so'"),
        (["dataset.labels=[]"], "dataset.labels: which labels are there? The model's configuration names none (the fi"),
        (["dataset.labels=[]"], "the first texts have bad, good, so so: dataset.labels=[...] names all"),
        (["dataset.labels=[good, good]"], "a label is given twice: good, good"),
        (["dataset.label_field=text2"], "rows.jsonl:1: expected one of bad, so so, good in 'text2', got None"),
        (["dataset.path=FOLDER/tokens.npy"], "LlamaForSequenceClassification tells the label of a text, and .npy has"),
        (["dataset.packing=documents"], "dataset.packing: LlamaForSequenceClassification tells the label of a text"),
        (["dataset.path=FOLDER/stars.jsonl", "dataset.labels=[1, 2, 3]"], "expected one of 1, 2, 3 in 'label', got 0"),
        (["samples.prompts=[w1]"], "samples.prompts: LlamaForSequenceClassification does not go on with a text"),
        (["dataset.path=FOLDER/empty.jsonl"], "empty.jsonl:1: expected text, got ''"),
        (
            ["dataset.path=FOLDER/nan.jsonl", "dataset.labels=[score]"],
            "nan.jsonl:1: expected a finite number in 'label'",
        ),
    ],
)
def test_what_is_no_text_with_a_label(changes: list[str], said: str, workshop: Workshop, tmp_path: Path) -> None:
    write(tmp_path / "empty.jsonl", [{"text": "", "label": "good"}])
    write(tmp_path / "stars.jsonl", [row(number, number % 4) for number in range(40)])
    write(tmp_path / "nan.jsonl", [{"text": "w1", "label": float("nan")}])
    workshop.write()
    with pytest.raises(ZinfError) as caught:
        find_figures(load_recipe(workshop.recipe, [change.replace("FOLDER", str(tmp_path)) for change in changes]), 1)
    error = caught.value
    assert said in (error.problems[0] if isinstance(error, FileError) else error.line())


def test_what_a_configuration_learns_otherwise_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    """Trained with one label, a model of several at once would silently learn another loss than its own."""
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": "multi_label_classification"}))
    workshop.write()
    with pytest.raises(ZinfError, match="with 3 outputs has problem_type multi_label_classification, and what is trai"):
        find_figures(load_recipe(workshop.recipe), 1)


def test_a_new_head_stands_for_no_lost_weight(workshop: Workshop, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
    workshop.write()
    with pytest.raises(ZinfError, match=r"1 missing: model\.norm\.weight"):
        find_figures(load_recipe(workshop.recipe), 1)
