"""Embedding models: the losses of plain PyTorch with in-batch negatives, wherever state lies and on any ranks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from forked_ranks import ForkedRanks
from tiny_models import CONFIGS, save_word_tokenizer
from workshop import Ended, Workshop
from zinf_cli.batches.batches import deal_whole
from zinf_cli.commands.estimate import Flags
from zinf_cli.commands.estimate_recipe import estimate_recipe
from zinf_cli.errors import FileError, ModelError, ZinfError
from zinf_cli.models.model import build_model
from zinf_cli.models.pooling import MODULES, SETTINGS, Pooling, pooled, pooling_files, pooling_of
from zinf_cli.models.weights import open_weights
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures
from zinf_cli.train.setup import model_source, open_model, open_text

ROWS, HELD_OUT, SEQ_LEN, STEPS, MICRO, NEGATIVES = 40, 9, 8, 4, 3, 2
TEMPERATURE = 0.1
WORDS = ["<pad>", "</s>", "[MASK]", *(f"w{number}" for number in range(60))]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def text_of(number: int) -> str:
    """Up to eleven words: some texts are longer than a sequence."""
    return " ".join(f"w{(number * 7 + word) % 60}" for word in range(2 + number * 5 % 10))


def row(number: int) -> dict[str, Any]:
    return {
        "query": text_of(number), "positive": text_of(number + 3),
        "negative": [text_of(number * 3 + 11 + each) for each in range(NEGATIVES + number % 2)],
    }  # fmt: skip


def write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    for name, kind in (("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)):
        changes = NO_DROPOUT if name == "bert" else {}
        kind.from_config(AutoConfig.for_model(name, **CONFIGS[name] | changes)).save_pretrained(folder / name)
        special = {"pad_token": "<pad>"} if name == "bert" else {}
        save_word_tokenizer(folder / name, WORDS, unk_token="[MASK]", end="</s>", eos_token="</s>", **special)
    return folder


@pytest.fixture
def workshop(tmp_path: Path, models: Path) -> Workshop:
    write(tmp_path / "rows.jsonl", [row(number) for number in range(ROWS)])
    workshop = Workshop(tmp_path)
    workshop.content["model"] = {"name_or_path": str(models / "bert")}
    workshop.content["dataset"] = {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": HELD_OUT / ROWS}
    workshop.content["train"] = {
        "objective": "embedding", "temperature": TEMPERATURE, "seq_len": SEQ_LEN, "micro_batch_size": MICRO,
        "global_batch_size": 2 * MICRO, "max_steps": STEPS,
    }  # fmt: skip
    workshop.content["checkpoint"] = {"interval": STEPS}
    workshop.content["optimizer"] = {"lr": 1e-3}
    return workshop


class Plain:
    """AutoModel on its tokenizer's batches, each column by itself, as sentence-transformers feeds them."""

    def __init__(self, workshop: Workshop, pooling: Pooling) -> None:
        workshop.write()
        self.recipe, self.pooling = load_recipe(workshop.recipe), pooling
        folder = self.recipe.model.folder
        self.model: Any = AutoModel.from_pretrained(folder).train()
        blank: Any = build_model(model_source(self.recipe))
        drawn = open_weights(blank, model_source(self.recipe)).read([name for name, _ in blank.named_parameters()])
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                if name.startswith("pooler."):  # the masked language model has none
                    param.copy_(drawn[name])
                assert torch.equal(param, drawn[name])
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.rows = [row(number) for number in range(ROWS)]

    def losses(self) -> Iterator[float]:
        order = open_text(self.recipe, open_model(self.recipe, "fp32"), 1).order
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.01)
        for step in range(STEPS):
            chosen = [self.rows[window] for window in order.windows(step)]
            micros = [chosen[:MICRO], chosen[MICRO:]]
            losses = [self.loss(micro)[0] / len(micros) for micro in micros]
            for loss in losses:
                loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield sum(loss.item() for loss in losses)

    def loss(self, rows: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, int]:
        """(the mean loss of a micro-batch, how many queries are nearest to their own text)."""
        columns = [[one["query"] for one in rows], [one["positive"] for one in rows]]
        count = self.recipe.train.num_negatives
        columns += [[one["negative"][number] for one in rows] for number in range(count)]
        queries, *texts = (F.normalize(self.embeddings(column), dim=-1) for column in columns)
        scores = queries @ torch.cat(texts).T / TEMPERATURE
        labels = torch.arange(len(rows))
        return F.cross_entropy(scores, labels), int((scores.argmax(1) == labels).sum())

    def embeddings(self, texts: list[str]) -> torch.Tensor:
        batch = self.tokenizer(texts, truncation=True, max_length=SEQ_LEN, padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        hidden: torch.Tensor = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"]
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "lasttoken":
            return torch.stack([states[length - 1] for states, length in zip(hidden, mask.sum(1), strict=True)])
        return torch.stack([states[:length].mean(0) for states, length in zip(hidden, mask.sum(1), strict=True)])

    def evaluated(self) -> tuple[float, float]:
        """(loss, accuracy) of the last rows, in micro-batches as they come."""
        rows = self.rows[-HELD_OUT:]
        micros = [rows[first : first + MICRO] for first in range(0, HELD_OUT, MICRO)]
        with torch.no_grad():
            found = [(self.loss(micro), len(micro)) for micro in micros]
        return sum(loss.item() * n for (loss, _), n in found) / HELD_OUT, sum(n for (_, n), _ in found) / HELD_OUT


def assert_evaluated(run: Ended, plain: Plain) -> None:
    loss, accuracy = plain.evaluated()
    last = run.metrics[-1]
    assert last["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert last["eval_accuracy"] == pytest.approx(accuracy)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "pooling", "num_negatives"), [("bert", "mean", NEGATIVES), ("bert", "cls", 0), ("llama", "lasttoken", 1)]
)
def test_losses_are_those_of_plain_pytorch(
    name: str,
    pooling: Pooling,
    num_negatives: int,
    workshop: Workshop,
    models: Path,
    forked: ForkedRanks,
    tmp_path: Path,
) -> None:
    workshop.content["model"]["name_or_path"] = str(models / name)
    workshop.content["train"] |= {"num_negatives": num_negatives}
    if pooling == "cls":
        workshop.content["train"] |= {"pooling": pooling}
    one, plain = workshop.fork(forked, "one"), Plain(workshop, pooling)
    losses = list(plain.losses())
    assert one.losses == pytest.approx(losses, abs=1e-6)
    assert_evaluated(one, plain)
    assert workshop.fork(forked, "cpu", *(f"offload.{kind}=cpu" for kind in STATE)).losses == one.losses
    assert workshop.fork(forked, "two", ranks=2).losses == pytest.approx(losses, abs=1e-6)
    export(one.run_dir, tmp_path / "exported")
    exported = AutoModel.from_pretrained(tmp_path / "exported")
    for ours, theirs in zip(exported.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert pooling_of(tmp_path / "exported", "auto", "")[0] == pooling


STATE = ("params", "grads", "optimizer", "activations")


def test_three_ranks_have_the_micro_batches_of_one(workshop: Workshop, forked: ForkedRanks) -> None:
    """Two micro-batches, and rows of each that are each other's negatives: a rank has none."""
    one = workshop.fork(forked, "one")
    three = workshop.fork(forked, "three", ranks=3)
    assert three.losses == pytest.approx(one.losses, abs=1e-6)
    assert three.metrics[-1]["eval_accuracy"] == one.metrics[-1]["eval_accuracy"]


@pytest.mark.parametrize("world_size", range(1, 7))
@pytest.mark.parametrize("count", [1, 5, 6, 13])
def test_micro_batches_are_the_same_on_any_ranks(count: int, world_size: int) -> None:
    dealt = [deal_whole(range(count), rank, world_size, 3) for rank in range(world_size)]
    assert len({len(shares) for shares in dealt}) == 1
    found = [share for shares in dealt for share in shares if share]
    assert found == [tuple(range(first, min(first + 3, count))) for first in range(0, count, 3)]


def test_an_adapter_brings_texts_together(workshop: Workshop, forked: ForkedRanks) -> None:
    workshop.content["adapter"] = {"type": "lora", "r": 4}
    run, plain = workshop.fork(forked, "one"), Plain(workshop, "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see plain_peft.py
        torch.manual_seed(plain.recipe.seed)
        plain.model = get_peft_model(plain.model, LoraConfig(r=4, lora_alpha=16, task_type="FEATURE_EXTRACTION"))
        plain.model.train()
    assert run.losses == pytest.approx(list(plain.losses()), abs=1e-6)


def test_the_plan_says_what_is_compared(workshop: Workshop) -> None:
    workshop.content["train"] |= {"num_negatives": 1, "pooling": "cls"}
    workshop.write()
    data = find_figures(load_recipe(workshop.recipe), 1).data
    assert (
        "embeddings are a text's first token (train.pooling); a query is compared with 1 negatives of its own and 4 "
        in (" ".join(data.texts))
    )
    assert not data.of_tokens


@pytest.mark.usefixtures("own_folders", "looked_at_here")
def test_an_estimate_counts_all_texts_of_a_row(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.content["activation_checkpointing"] = "unit"
    workshop.write()
    flops = []
    for count in (0, 1):
        estimate_recipe(workshop.recipe, [f"train.num_negatives={count}"], Flags(as_json=True), Console(stderr=True))
        found = json.loads(capsys.readouterr().out)
        flops.append(found["tflops_per_gpu"] * found["step_s"])
    assert flops[1] / flops[0] == pytest.approx(3 / 2)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_older_and_newer_files_say_how_a_model_pools(pooling: Pooling, tmp_path: Path) -> None:
    written = dict(pooling_files(None, pooling, 32))
    (tmp_path / SETTINGS).parent.mkdir()
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    assert pooling_of(tmp_path, "auto", "LlamaForCausalLM") == (pooling, SETTINGS)
    (tmp_path / SETTINGS).write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": pooling}))
    assert pooling_of(tmp_path, "auto", "BertModel") == (pooling, SETTINGS)
    assert pooling_of(tmp_path, "mean", "BertModel") == ("mean", "train.pooling")


@pytest.mark.parametrize(
    ("modules", "settings", "said"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "embeddings pass a module Dense as well"),
        (["Transformer", "Pooling"], {"pooling_mode": "max"}, "pooled by max, and not by one of mean, cls, lasttoken"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "'cls', 'max'"),
        (["Transformer", "Pooling"], {}, "pooled by nothing that is named"),
        (["Transformer", "Pooling"], None, "can't be read: No such file or directory"),
        ("{", {}, "can't be read: "),
        ({"a": 1}, {}, "is no list of modules"),
    ],
)
def test_what_is_not_known_of_pooling(modules: Any, settings: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / SETTINGS).parent.mkdir()
    if isinstance(modules, list):
        modules = [
            {"path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(modules)
        ]
    (tmp_path / MODULES).write_text(modules if isinstance(modules, str) else json.dumps(modules))
    if settings is not None:
        (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r".") as caught:
        pooling_of(tmp_path, "auto", "BertModel")
    assert said in caught.value.line()


def test_pooling_leaves_out_what_pads() -> None:
    hidden, mask = torch.arange(24.0).view(2, 4, 3), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert torch.equal(pooled(hidden, mask, "lasttoken"), torch.stack((hidden[0, 2], hidden[1, 3])))
    assert torch.equal(pooled(hidden, mask, "mean"), torch.stack((hidden[0, :3].mean(0), hidden[1].mean(0))))
    assert torch.equal(pooled(hidden, mask, "cls"), hidden[:, 0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["train.micro_batch_size=1"],
            "embedding compares a query with the texts of its micro-batch, and has none but",
        ),
        (["train.global_batch_size=7"], "global_batch_size 7 is no multiple of micro_batch_size 3"),
        (
            ["train.num_negatives=3"],
            "rows.jsonl:1: expected 3 negatives in 'negative', a text or a list of texts, got 2",
        ),
        (["dataset.negative_field=other", "train.num_negatives=1"], "expected 1 negatives in 'other'"),
        (["dataset.positive_field=other"], "rows.jsonl:1: expected a text in 'other', got None"),
        (["dataset.query_field=negative"], "rows.jsonl:1: expected a text in 'negative', got ["),
        (["dataset.query_field=other"], "rows.jsonl:1: no field 'other', there is: query, positive, negative"),
        (["dataset.path=FOLDER/tokens.npy"], "BertModel compares the texts of a row, and .npy has none"),
        (["dataset.messages_field=chat"], "BertModel compares the texts of a row, and chats (chat) have none"),
        (["dataset.packing=documents"], "dataset.packing: embedding compares the texts of rows"),
        (["samples.prompts=[w1]"], "samples.prompts: BertModel does not go on with a text"),
        (["model.name_or_path=null", "model.config={model_type: t5}"], "t5 is an encoder-decoder"),
    ],
)
def test_what_can_not_be_compared(changes: list[str], said: str, workshop: Workshop, tmp_path: Path) -> None:
    workshop.write()
    with pytest.raises(ZinfError) as caught:
        find_figures(load_recipe(workshop.recipe, [change.replace("FOLDER", str(tmp_path)) for change in changes]), 1)
    error = caught.value
    assert said in (error.problems[0] if isinstance(error, FileError) else error.line())
