"""`zinf init` finds what a model learns in its configuration and in the fields of the first record."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pictured_models import save_pictured
from programs import command
from written_recipes import TURNS, holding, records, saved, written
from zinf_cli.errors import ZinfError


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("models") / "llama")


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"idx": 1, "sentence": "a b c", "label": label} for label in labels]


def beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "title": "a"} for row in rows]


ROW = {"question": "a b", "positive": "a", "negatives": ["b", "c"]}
ANSWERED = {"instruction": "a b", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("model", "rows", "found"),
    [
        ("llama", labelled("good", "bad"), ("classification", "sentence", "label", ("bad", "good"))),
        ("bert", beside(labelled(1, 0, 10)), ("classification", "sentence", "label", ("0", "1", "10"))),
        ("llama", labelled(0.5, 1), ("classification", "sentence", "label", ("label",))),
        ("llama", beside(labelled("good", "bad")), ("auto", "sentence", "label", ())),
        ("llama", labelled("good", "good"), ("auto", "sentence", "label", ())),
    ],
)
def test_texts_with_labels(
    model: str, rows: list[Any], found: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe = written(request.getfixturevalue(model), records(tmp_path / "rows.jsonl", *rows))
    assert (
        recipe.train.objective,
        recipe.dataset.text_field,
        recipe.dataset.label_field,
        recipe.dataset.labels,
    ) == found


def test_a_classifier_knows_its_labels(tmp_path: Path, bert: Path) -> None:
    shutil.copytree(bert, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    names = {"id2label": {"0": "no", "1": "yes"}, "architectures": ["BertForSequenceClassification"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    recipe = written(tmp_path / "model", records(tmp_path / "rows.jsonl", *labelled("yes")))
    assert (recipe.train.objective, recipe.dataset.text_field, recipe.dataset.labels) == ("auto", "sentence", ())
    with pytest.raises(ZinfError, match="this model tells the label of a text"):
        written(tmp_path / "model", holding(tmp_path / "a.txt", b"one two"))


def test_queries_with_their_texts(tmp_path: Path, bert: Path) -> None:
    recipe = written(bert, records(tmp_path / "rows.jsonl", *[ROW] * 40))
    dataset, train = recipe.dataset, recipe.train
    assert (dataset.query_field, dataset.positive_field, dataset.negative_field) == (
        "question",
        "positive",
        "negatives",
    )
    assert (train.objective, train.num_negatives, train.micro_batch_size) == ("embedding", 2, 16)
    assert train.global_batch_size == 16


def test_pairs_of_answers(tmp_path: Path, llama: Path) -> None:
    recipe = written(llama, records(tmp_path / "rows.jsonl", *[ANSWERED] * 3))
    assert (recipe.train.objective, recipe.dataset.prompt_field) == ("dpo", "instruction")
    assert recipe.optimizer.lr == 5e-7


def test_an_adapter_where_it_is_asked_for(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    recipe = written(llama, tmp_path / "a.txt", adapter=True)
    assert (recipe.adapter.type, recipe.optimizer.lr) == ("lora", 2e-4)


SEEN = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]}, TURNS[1]]


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"messages": TURNS, "image": "a.png"}, ("messages", "image", "text")),
        ({"messages": SEEN}, ("messages", "images", "text")),
        ({"caption": "<image> a", "images": ["a.png"]}, (None, "images", "caption")),
        ({"text": "<image> a", "image": "a.png"}, (None, "image", "text")),
        ({"messages": TURNS}, ("messages", None, "text")),
    ],
)
def test_pictures(record: Any, fields: Any, tmp_path: Path) -> None:
    save_pictured(tmp_path / "llava", "llava")
    dataset = written(tmp_path / "llava", records(tmp_path / "rows.jsonl", *[record] * 3)).dataset
    assert (dataset.messages_field, dataset.images_field, dataset.text_field) == fields


def test_a_model_without_a_table_of_positions_is_looked_at_without_torch(tmp_path: Path, llama: Path) -> None:
    text = holding(tmp_path / "a.txt", b"one two three\n")
    done = subprocess.run(command("writes_recipe", str(llama), str(text)), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert (tmp_path / "a.yaml").exists()
