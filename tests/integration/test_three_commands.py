"""From a model and a folder of texts to an exported model, as a new user types it: init, launch, report, export."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tiny_models import CONFIGS, WORDS, save_word_tokenizer
from workshop import ZINF
from zinf_cli.run_folder.metrics import lines_in


def test_three_commands_lead_to_an_exported_model(tmp_path: Path) -> None:
    def zinf(*arguments: str) -> str:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [*ZINF, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    config = AutoConfig.for_model("llama", **CONFIGS["llama"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tiny")
    save_word_tokenizer(tmp_path / "tiny", WORDS, eos_token="<end>")
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(WORDS[n * 7 % len(WORDS)] for n in range(1000)))
    assert "next: zinf launch tiny.yaml" in zinf("init", "tiny", "texts")
    zinf("launch", "tiny.yaml", "optimizer.lr=1e-2")
    assert Path(tmp_path, zinf("report", "runs/tiny").strip()).stat().st_size > 10_000
    zinf("export", "runs/tiny", "trained")

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "trained")(" ".join(WORDS[:8]), return_tensors="pt")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    with torch.no_grad():
        assert not torch.equal(trained(**tokens).logits, before(**tokens).logits)
    losses = [line["loss"] for line in lines_in(tmp_path / "runs" / "tiny") if "loss" in line]
    assert losses[-1] < losses[0]
