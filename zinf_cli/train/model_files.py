"""The small files that make a folder a model: its configuration, its tokenizer, how it generates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from zinf_cli.train.model import ModelSource, load_class
from zinf_cli.train.tokens import TOKENIZER_FILES

CONFIG = "config.json"
_GENERATION = "generation_config.json"


def config_of(source: ModelSource, model: nn.Module) -> str:
    """config.json of a model from `build_model(source)`, naming its class."""
    _, config = load_class(source)
    config.architectures = [type(model).__name__]
    return str(config.to_json_string())


def model_files(source: ModelSource, model: nn.Module, tokenizer: Path | None) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files; `tokenizer` is a directory, where it is not that of the model."""
    yield CONFIG, config_of(source, model).encode()
    home = tokenizer or source.name_or_path
    for directory, names in ((home, TOKENIZER_FILES), (source.name_or_path, (_GENERATION,))):
        for path in (directory / name for name in names) if directory is not None else ():
            if path.is_file():
                yield path.name, path.read_bytes()
