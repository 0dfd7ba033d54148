"""What `zinf init` has to know of a model and a text, found without loading either."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinf_cli.checkpoint.folder import checkpoints_of, is_checkpoint
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.errors import DatasetError, ModelError
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.positions import most_positions
from zinf_cli.models.safetensors_files import SafetensorsFiles
from zinf_cli.recipe.recipe import ADAPTER, MERGE_FIRST
from zinf_cli.text.chats import messages_of
from zinf_cli.text.documents import first_record, read_documents
from zinf_cli.text.text_files import RECORDS, about_tokens, find_texts, kind_of

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
"""Names under which configurations keep the longest sequence."""
_CHATS = ("messages", "conversations", "conversation", "chat")
_TEXTS = ("text", "content", "document", "body")
_PAIRS = (("source", "target"), ("input", "output"), ("document", "summary"), ("article", "highlights"))


@dataclass(frozen=True)
class ModelFacts:
    """What decides a recipe's first values."""

    num_parameters: int
    context: int | None
    """Tokens of the longest sequence that its configuration names, or its table of positions has."""
    is_encoder_decoder: bool


@dataclass(frozen=True)
class TextFacts:
    """What a text is, and about how much of it there is."""

    num_files: int
    num_bytes: int
    num_tokens: int
    """Exact for .npy, else by the bytes."""
    fields: Mapping[str, str]
    """Keys of the recipe's dataset section, and the fields of records that they name."""
    kind: str
    """In words: text, chats, pairs, tokens."""


def look_at_model(folder: Path) -> ModelFacts:
    """ModelError or CheckpointError if there is no model in the folder."""
    newest = folder if is_checkpoint(folder) else next(iter(checkpoints_of(folder)), folder)
    path = newest / "config.json"
    if (newest / ADAPTER).is_file():
        raise ModelError("is an adapter's, not a model's", where=str(newest / ADAPTER), hint=MERGE_FIRST)
    try:
        config: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        hint = None if path.is_file() else "download a model first: hf download ORG/NAME --local-dir DIRECTORY"
        raise ModelError(f"can't be read: {why}", where=str(path), hint=hint) from error
    if not isinstance(config, dict):
        raise ModelError("is no configuration of a model", where=str(path))
    parts = [config, *(config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict))]
    lengths = [value for of in parts for key in _LENGTHS if isinstance(value := of.get(key), int)]
    if (most := most_positions(build_model(ModelSource(newest, None, "pretrained", 0)))) is not None:
        lengths.append(most[0])  # a table may begin with rows for padding, as RoBERTa's
    return ModelFacts(
        num_parameters=_num_parameters(newest),
        context=min((length for length in lengths if length > 1), default=None),
        is_encoder_decoder=bool(config.get("is_encoder_decoder")),
    )


def _num_parameters(folder: Path) -> int:
    if is_checkpoint(folder):
        flats = (flat for unit in Manifest.load(folder).units for flat in unit.flats)
        return sum(param.numel for flat in flats for param in flat.params)
    files = SafetensorsFiles(folder)
    return sum(files.on_meta(key).numel() for key in files.keys())  # noqa: SIM118 (not a dict)


def look_at_text(paths: Sequence[Path], pairs: bool) -> TextFacts:
    """`pairs`: the model reads a source and writes a target. DatasetError if the text is not what it needs."""
    texts = find_texts(paths)
    files = [file for found in texts for file in found.files]
    num_bytes = sum(found.num_bytes for found in texts)
    fields: dict[str, str] = {}
    kind = "tokens" if kind_of(files[0]) == ".npy" else "text"
    try:
        if plain := [file for file in files if pairs and kind_of(file) not in RECORDS]:
            hint = "give .jsonl or .parquet with a field for each"
            raise DatasetError("this model reads a source and writes a target", where=str(plain[0]), hint=hint)
        if records := [file for file in files if kind_of(file) in RECORDS]:
            fields, kind = _fields(first_record(records[0]), records[0], pairs)
        tokens = {file: _tokens_in(file, fields) for file in files}
    except OSError as error:
        raise DatasetError(f"can't read: {error.strerror or error}", where=str(error.filename or files[0])) from error
    for file in files:  # one in a folder may be empty
        if not tokens[file] and (file in paths or not any(tokens.values())):
            raise DatasetError("the file is empty", where=str(file))
    return TextFacts(len(files), num_bytes, sum(tokens.values()), fields, kind)


def _tokens_in(file: Path, fields: Mapping[str, str]) -> int:
    """About how many tokens a file has. DatasetError if its beginning is not what `fields` say."""
    if kind_of(file) == ".npy":
        return about_tokens(file)
    wanted = next((name for key, name in fields.items() if key != "target_field"), "text")
    first = next(read_documents(file, wanted), None)
    if first is None:
        return 0
    if "messages_field" in fields:
        messages_of(first)
    return about_tokens(file)


def _fields(record: Mapping[str, Any], file: Path, pairs: bool) -> tuple[dict[str, str], str]:
    """Which fields of a record hold what is learned."""
    if pairs:
        for source, target in _PAIRS:
            if isinstance(record.get(source), str) and isinstance(record.get(target), str):
                return {"source_field": source, "target_field": target}, "pairs"
        raise _unclear(record, file, "dataset.source_field and dataset.target_field")
    for name in _CHATS:
        if isinstance(record.get(name), list):
            return {"messages_field": name}, "chats"
    strings = [name for name, value in record.items() if isinstance(value, str)]
    for name in (*_TEXTS, *(strings if len(strings) == 1 else ())):
        if name in strings:
            return {"text_field": name}, "text"
    raise _unclear(record, file, "dataset.text_field or dataset.messages_field")


def _unclear(record: Mapping[str, Any], file: Path, keys: str) -> DatasetError:
    names = ", ".join(list(map(str, record))[:12]) or "nothing"
    return DatasetError(
        f"which field is to be learned? There is: {names}",
        where=str(file),
        hint=f"put one field with the whole text, or chat messages, into each record, or write a recipe with {keys}",
    )
