"""Gives the small files of a model's folder: its configuration, its tokenizer, and all else that is not its weights.

All files of the folder that a model comes from are copied, if training does not change them: processors, chat
templates, settings for generation, the licence, the model's own code (which is never run).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

from zinf_cli.amounts import format_bytes
from zinf_cli.checkpoint.manifest import CHAT_TEMPLATES, MANIFEST
from zinf_cli.file_names import is_plain
from zinf_cli.models.model import ModelSource, load_class
from zinf_cli.text.tokens import TOKENIZER_FILES

CONFIG = "config.json"
LARGEST = 128 * 2**20
"""Most bytes of such a file. The largest vocabularies have a third of it, so a larger file is no part of the model."""
_LEFT_OUT = (
    # weights, in every format they are published in, and what describes them
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.keras",
    "*.msgpack", "*.onnx", "*.onnx_data", "*.onnx.data", "*.ot", "*.tflite", "*.mlmodel", "*.pb", "*.npy", "*.npz",
    "*.pkl", "*.nemo",
    # of an adapter, of another training, of a checkpoint of zinf's
    "adapter_config.json", "trainer_state.json", MANIFEST,
    # hidden or unfinished
    ".*", "*.partial", "*.incomplete", "*.lock", "*~",
)  # fmt: skip
"""Files of a model's folder that are not copied, in small letters. CONFIG is written anew."""


def config_of(source: ModelSource, model: nn.Module) -> str:
    """The text of config.json for a model from `build_model(source)`. It names the model's class."""
    _, config = load_class(source)
    config.architectures = [type(model).__name__]
    ours: Any = model.config
    for stored, known in ((config, ours), (config.get_text_config(), ours.get_text_config())):
        if (pad := getattr(known, "pad_token_id", None)) is not None:  # a classifier may have it from the tokenizer
            stored.pad_token_id = pad
    return str(config.to_json_string())


def model_files(
    source: ModelSource, model: nn.Module, tokenizer: Path | None, notice: Callable[[str], None]
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files. `tokenizer` is a directory, if the tokenizer is not that of the model.

    `notice` is told of a file that is left out because it is too large or can't be read.
    """
    yield CONFIG, config_of(source, model).encode()
    paths = dict(_paths(source.name_or_path, notice))
    if tokenizer is not None:
        paths = {name: path for name, path in paths.items() if not _is_tokenizers(name)}
        paths |= {name: path for name, path in _paths(tokenizer, notice) if _is_tokenizers(name)}
    for name, path in paths.items():
        try:
            if (size := path.stat().st_size) > LARGEST:
                notice(f"{path} does not go into checkpoints: {format_bytes(size)} are too much for a part of a model")
            else:
                yield name, path.read_bytes()
        except OSError as error:
            notice(f"{path} does not go into checkpoints: {error.strerror}")


def _paths(folder: Path | None, notice: Callable[[str], None]) -> Iterator[tuple[str, Path]]:
    """(name in the folder, path) of each file that is copied with a model."""
    if folder is None:
        return
    try:
        paths = sorted([*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*.jinja")])
    except OSError as error:
        notice(f"the files of {folder} do not go into checkpoints: {error.strerror}")
        return
    for path in paths:
        left_out = path.name == CONFIG or any(fnmatch(path.name.lower(), pattern) for pattern in _LEFT_OUT)
        if is_plain(path.name) and not left_out and path.is_file():
            yield str(path.relative_to(folder)), path


def _is_tokenizers(name: str) -> bool:
    return name in TOKENIZER_FILES or name.startswith(f"{CHAT_TEMPLATES}/")
