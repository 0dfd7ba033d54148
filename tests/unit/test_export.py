"""Exports are what transformers itself would have saved, and compute what the engine computes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plain import engine_losses, open_engine
from tiny_models import CONFIGS, batch, random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.engine.engine import Engine, EngineOptions
from zinf_cli.engine.lane import MicroBatch
from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import DamagedError, UsageError
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position
from zinf_cli.train.export import export
from zinf_cli.train.model import ModelSource
from zinf_cli.train.model_files import model_files


def save(engine: Engine, source: ModelSource, run_dir: Path) -> Path:
    """A checkpoint of `engine` as a run writes it."""
    files = partial(model_files, source, engine.model, None)
    CheckpointWriter(run_dir, engine, Ranks(), files, None).write(Position(1, "fp32", 3, "text", None, {}))
    return folders.step_folder(run_dir, 1)


def logits_of(engine: Engine) -> torch.Tensor:
    logits = []

    def forward() -> torch.Tensor:
        outputs = engine.model(**batch(), use_cache=False)
        logits.append(outputs.logits.clone())
        loss: torch.Tensor = outputs.loss
        return loss

    engine.model.eval()
    engine.evaluate([MicroBatch(forward)])
    return logits[0]


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_is_what_transformers_saves(name: str, tmp_path: Path) -> None:
    source = random_source(name)
    engine = open_engine(source, EngineOptions())
    engine_losses(engine, 1, close=False)
    folder = save(engine, source, tmp_path / "run")
    logits = logits_of(engine)
    engine.close()
    done = export(tmp_path / "run", tmp_path / "out", max_shard=20_000)
    assert (done.checkpoint, done.step) == (folder, 1)
    assert done.num_shards == len(list((tmp_path / "out").glob("*.safetensors"))) > 1

    loaded: Any = type(engine.model).from_pretrained(tmp_path / "out", dtype=torch.float32)  # type: ignore[attr-defined]
    loaded.save_pretrained(tmp_path / "again")
    exported, again = read_folder(tmp_path / "out"), read_folder(tmp_path / "again")
    assert exported.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in exported.items())
    with torch.no_grad():
        found = loaded.eval()(**batch(), use_cache=False).logits
    assert torch.equal(found, logits), (found - logits).abs().max()


def test_a_cast_is_torchs_own(tmp_path: Path) -> None:
    source = random_source("llama-tied")
    engine = open_engine(source, EngineOptions())
    save(engine, source, tmp_path / "run")
    engine.close()
    export(tmp_path / "run", tmp_path / "fp32")
    export(tmp_path / "run", tmp_path / "bf16", "bf16")
    whole, cast = read_folder(tmp_path / "fp32"), read_folder(tmp_path / "bf16")
    assert "lm_head.weight" not in whole
    assert whole.keys() == cast.keys()
    assert all(torch.equal(value.to(torch.bfloat16), cast[name]) for name, value in whole.items())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UsageError, match="new or empty"):
        export(tmp_path / "run", tmp_path / "fp32")
    rank_file = tmp_path / "run" / "checkpoints" / "latest" / "rank-00000.safetensors"
    content = bytearray(rank_file.read_bytes())
    content[10_000] ^= 1  # in the embedding
    rank_file.write_bytes(content)
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors: damaged in bytes"):
        export(tmp_path / "run", tmp_path / "damaged")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "fp32", "bf16"}


def test_memory_follows_the_largest_unit(tmp_path: Path) -> None:
    """Three times the layers, no more than 10 % more memory."""
    for layers in (8, 24):
        source = random_source("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=layers)
        engine = open_engine(source, EngineOptions())
        save(engine, source, tmp_path / str(layers))
        engine.close()
    program = (
        "import sys; from pathlib import Path; from zinf_cli.train.export import export;"
        "from zinf_cli.train.metrics import PeakMemory; peak, run = PeakMemory(), Path(sys.argv[1]); peak.reset();"
        "export(run, run / 'out'); print(peak.read())"
    )
    small, large = (
        int(
            subprocess.run(
                [sys.executable, "-c", program, str(tmp_path / layers)], check=True, capture_output=True
            ).stdout
        )
        for layers in ("8", "24")
    )
    more_weights = 16 * 4 * 3 * 256 * (256 + 1024)  # of 16 layers, in bytes
    assert large < 1.1 * small
    assert large - small < more_weights / 4
