"""Exports are what transformers itself would have saved, and compute what the engine computes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from xxhash import xxh3_64_hexdigest

from checkpoints import RECIPE
from own_processes import in_processes
from peaks import peak_of_export
from plain import engine_losses, open_engine
from tiny_models import CONFIGS, batch, random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import MANIFEST, Manifest, StoredFile
from zinf_cli.checkpoint.verify import verify
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import CheckpointError, DamagedError, UsageError
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.model_files import LARGEST, model_files
from zinf_cli.models.safetensors_files import SafetensorsFiles
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position
from zinf_cli.train.export import export


def save(engine: Engine, source: ModelSource, run_dir: Path) -> Path:
    """A checkpoint of `engine` as a run writes it."""
    files = partial(model_files, source, engine.model, None, print)
    CheckpointWriter(run_dir, engine, Ranks(), files, None).write(Position(1, "fp32", 3, "text", None, RECIPE))
    return folders.step_folder(run_dir, 1)


def logits_of(engine: Engine) -> torch.Tensor:
    logits: list[torch.Tensor] = []

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


@pytest.mark.sampled
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
    ((small,), (large,)) = (in_processes(peak_of_export, [(tmp_path / layers,)]) for layers in ("8", "24"))
    more_weights = 16 * 4 * 3 * 256 * (256 + 1024)  # of 16 layers, in bytes
    assert large < 1.1 * small
    assert large - small < more_weights / 4


KEPT = {
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tekken.json", "qwen.tiktoken", "vocab.txt",
    "bpe_simple_vocab_16e6.txt.gz", "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "README.md", "LICENSE", "modeling_mine.py", "rank-notes.txt", "additional_chat_templates/tools.jinja",
}  # fmt: skip
LEFT_OUT = {
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json", "consolidated.00.pth",
    "model.Q4_K_M.GGUF", "tf_model.h5", "flax_model.msgpack", "model.onnx", "training_args.bin", "trainer_state.json",
    "adapter_config.json", "adapter_model.safetensors", ".gitattributes", "onnx/decoder.json",
}  # fmt: skip


def model_folder(folder: Path) -> ModelSource:
    """A llama as one finds it: with files of many kinds beside its weights, some of them links into a cache."""
    blank: Any = build_model(random_source("llama"))
    type(blank)._from_config(blank.config, dtype=torch.float32).save_pretrained(folder)
    for name in KEPT | LEFT_OUT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    (folder / "blobs").mkdir()
    (folder / "LICENSE").rename(folder / "blobs" / "0a1b2c")
    (folder / "LICENSE").symlink_to("blobs/0a1b2c")
    (folder / "modeling_mine.py").write_text("raise SystemExit('custom code is not run')")
    (folder / "model.safetensors.index.json").unlink()
    return ModelSource(folder, None, "pretrained", 0)


def test_all_that_training_does_not_change_goes_along(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model")
    with (tmp_path / "model" / "film.mp4").open("wb") as film:
        film.truncate(LARGEST + 1)
    notes: list[str] = []
    engine = open_engine(source, EngineOptions())
    files = partial(model_files, source, engine.model, None, notes.append)
    CheckpointWriter(tmp_path / "run", engine, Ranks(), files, None).write(Position(1, "fp32", 3, "text", None, RECIPE))
    engine.close()
    (note,) = notes
    assert "film.mp4 does not go into checkpoints: 128 MiB are too much" in note
    assert not any(bad for bad in verify(folders.step_folder(tmp_path / "run", 1)) if bad.problem)
    export(tmp_path / "run", tmp_path / "out")
    out = tmp_path / "out"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {*KEPT, "config.json", "model.safetensors"}
    for name in KEPT:
        assert (out / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert not (out / "LICENSE").is_symlink()


def test_another_tokenizer_takes_the_place_of_the_models(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model")
    other = tmp_path / "other"
    (other / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "additional_chat_templates/rag.jinja", "README.md"):
        (other / name).write_text("another")
    found = dict(model_files(source, build_model(source), other, print))
    assert found["tokenizer.json"] == found["additional_chat_templates/rag.jinja"] == b"another"
    assert found["README.md"] == b"this is README.md"
    assert not found.keys() & {"vocab.txt", "additional_chat_templates/tools.jinja"}
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").symlink_to("nowhere")
    assert "tokenizer.json" not in dict(model_files(source, build_model(source), other, print))


@pytest.mark.parametrize("name", ["../stolen", "/etc/passwd", "a/b", "..", "", "a\x00b", "line\nbreak"])
def test_names_that_lead_out_of_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    """In a manifest, which has a valid checksum, and in an index."""
    engine = open_engine(random_source("llama"), EngineOptions())
    folder = save(engine, random_source("llama"), tmp_path / "run")
    engine.close()
    manifest = Manifest.load(folder)
    content = b"evil"
    (tmp_path / "run" / "checkpoints" / "stolen").write_bytes(content)
    files = {**manifest.files, name: StoredFile(len(content), (xxh3_64_hexdigest(content),))}
    (folder / MANIFEST).write_bytes(replace(manifest, files=files).dump())
    for read in (CheckpointReader, lambda folder: export(folder, tmp_path / "new" / "out")):
        with pytest.raises(DamagedError, match="is not the name of a file in this folder"):
            read(folder)
    assert [verdict.problem is None for verdict in verify(folder)] == [False]
    assert not (tmp_path / "new").exists()

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="is not the name of a file in this folder"):
        SafetensorsFiles(tmp_path)
