"""Every recipe of the house, made small: parsed, planned and run, with plain text and chats like those it names."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from forked_ranks import ForkedRanks
from pictured_models import save_pictured, write_rows
from tiny_models import CONFIGS, WORD_TEMPLATE, WORDS, dataset_for, save_word_tokenizer
from zinf_cli.run_folder.metrics import lines_in

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `data` as recipes/fetch_smollm2.py leaves it, with a tiny model and short texts."""
    folder = tmp_path_factory.mktemp("data")
    config = AutoConfig.for_model("llama", **CONFIGS["llama"])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "smollm2-135m")
    save_word_tokenizer(folder / "smollm2-135m", WORDS, eos_token="<end>", template=WORD_TEMPLATE)
    (folder / "kjv").mkdir()
    for name, count in (("train", 3000), ("held_out", 200)):
        (folder / "kjv" / f"{name}.txt").write_text(" ".join(WORDS[n * 7 % 9] for n in range(count)))
    said = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three yes"}]
    (folder / "chats").mkdir()
    for name in ("chats", "tech_support", "coding", "trivia"):
        (folder / "chats" / f"{name}.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 300)
    pair = {"prompt": "one two", "chosen": " three yes", "rejected": " no"}
    (folder / "preferences.jsonl").write_text(f"{json.dumps(pair)}\n" * 300)
    texts = [{"text": "one two three yes" if good else "no two", "label": "good" if good else "bad"} for good in (0, 1)]
    (folder / "reviews.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts) * 150)
    row = {"query": "w1 w2", "positive": "w3 w4 w5", "negative": ["w6"]}
    (folder / "queries.jsonl").write_text(f"{json.dumps(row)}\n" * 200)
    other_kinds(folder)
    save_pictured(folder / "llava", "llava")
    write_rows(folder / "pictured", 12)
    return folder


def other_kinds(folder: Path) -> None:
    """A masked model with its text, and an encoder-decoder with its pairs."""
    for name, kind, data in (("bert", AutoModelForMaskedLM, "text"), ("t5", AutoModelForSeq2SeqLM, "pairs")):
        kind.from_config(AutoConfig.for_model(name, **CONFIGS[name])).save_pretrained(folder / name)
        (folder / "made").mkdir(exist_ok=True)
        made = dataset_for(name, folder / "made")
        Path(made["tokenizer"]).rename(folder / "made" / name)
        for file in (folder / "made" / name).iterdir():
            file.rename(folder / name / file.name)
        if name == "bert":
            shutil.copytree(folder / name, folder / "minilm")
            (folder / data).mkdir()
        Path(made["path"]).rename(folder / "text" / "some.txt" if name == "bert" else folder / "pairs.jsonl")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_house_trains(recipe: Path, data: Path, tmp_path: Path, forked: ForkedRanks) -> None:
    content = yaml.safe_load(recipe.read_text().replace("data/", f"{data}/").replace("runs/", f"{tmp_path}/"))
    if "config" in content["model"]:
        content["model"]["config"].update(SMALL)
    content["train"] |= {"seq_len": 16, "max_steps": 2, "epochs": None}
    content["logging"] = {"tensorboard": False}
    small = tmp_path / recipe.name
    small.write_text(yaml.safe_dump(content))
    ranks = 2 if "launch" in content else 1
    codes = forked.run(small, ranks)
    run_dir = Path(content["output_dir"])
    log = (run_dir / "logs" / "forked.log").read_text()
    assert codes == [0] * ranks, log
    assert "note: " not in log
    assert all(math.isfinite(loss) for loss in losses(run_dir))
    assert len(losses(run_dir)) == 2


def losses(run_dir: Path) -> list[Any]:
    return [line["loss"] for line in lines_in(run_dir) if "loss" in line]
