"""What `zinf init` has to know of a model and a text, found without loading either."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinf_cli.checkpoint.folder import checkpoints_of, is_checkpoint
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.errors import DatasetError, ModelError
from zinf_cli.models.headers import CLASSIFIER, is_table, shapes_in, tensor_files
from zinf_cli.recipe.recipe import ADAPTER, MERGE_FIRST
from zinf_cli.text.chats import messages_of
from zinf_cli.text.documents import first_record, read_documents
from zinf_cli.text.picture_parts import PROCESSOR_FILES
from zinf_cli.text.text_files import RECORDS, about_tokens, about_tokens_of, find_texts, kind_of
from zinf_cli.train.first_fields import Found, Reader, find_fields

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
"""Names under which configurations keep the longest sequence."""
_SEES = ("vision_config", "vision_tower", "visual")
"""Keys of a configuration whose model has a part that sees."""


@dataclass(frozen=True)
class ModelFacts:
    """What decides a recipe's first values."""

    num_parameters: int
    context: int | None
    """Tokens of the longest sequence that its configuration names, or its table of positions has."""
    reads: Reader
    """What it takes of records."""


@dataclass(frozen=True)
class TextFacts:
    """What a text is, and about how much of it there is."""

    num_files: int
    num_bytes: int
    num_tokens: int
    """Exact for .npy, else by the bytes."""
    found: Found
    """What it holds."""
    num_rows: int | None = None
    """About how many records, if each is a sequence."""
    row_tokens: int = 0
    """About how many tokens the longest text of the first one has."""


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
        if folder.is_file():
            hint = "the model's directory comes first, then the text"
        raise ModelError(f"can't be read: {why}", where=str(path), hint=hint) from error
    if not isinstance(config, dict):
        raise ModelError("is no configuration of a model", where=str(path))
    parts = [config, *(config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict))]
    lengths = [value for of in parts for key in _LENGTHS if isinstance(value := of.get(key), int)]
    shapes = _shapes(newest)
    if any(len(shape) == 2 and is_table(name.removesuffix(".weight")) for name, shape in shapes.items()):
        lengths += _positions(newest)
    return ModelFacts(
        num_parameters=sum(map(math.prod, shapes.values())),
        context=min((length for length in lengths if length > 1), default=None),
        reads=_reads(newest, config),
    )


def _reads(folder: Path, config: Mapping[str, Any]) -> Reader:
    """What a model takes of records, by its configuration."""
    architectures, names = config.get("architectures"), config.get("id2label")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    labels = tuple(map(str, names.values())) if isinstance(names, dict) else ()
    made_up = all(label.startswith("LABEL_") for label in labels)
    classifies = named.endswith(CLASSIFIER)
    return Reader(
        pairs=bool(config.get("is_encoder_decoder")) and not classifies,
        classifies=classifies,
        labels=labels if classifies and not made_up else (),
        both_ways=named.endswith(("ForMaskedLM", "ForPreTraining")),
        pictures=any(key in config for key in _SEES) and any((folder / name).is_file() for name in PROCESSOR_FILES),
    )


def _positions(folder: Path) -> list[int]:
    """The rows of its table of positions for text, which may begin with some for padding, as RoBERTa's."""
    from zinf_cli.models.model import ModelSource, build_model  # with torch, which others do without
    from zinf_cli.models.positions import most_positions

    most = most_positions(build_model(ModelSource(folder, None, "pretrained", 0)))
    return [] if most is None else [most[0]]


def _shapes(folder: Path) -> dict[str, Sequence[int]]:
    """The shape of each tensor of a model, by name."""
    if is_checkpoint(folder):
        flats = (flat for unit in Manifest.load(folder).units for flat in unit.flats)
        return {param.name: param.shape for flat in flats for param in flat.params}
    return {name: shape for path in tensor_files(folder) for name, shape in shapes_in(path).items()}


def look_at_text(paths: Sequence[Path], reads: Reader) -> TextFacts:
    """DatasetError if the text is not what a model that `reads` it needs."""
    texts = find_texts(paths)
    files = [file for found in texts for file in found.files]
    num_bytes = sum(found.num_bytes for found in texts)
    found = Found("tokens" if kind_of(files[0]) == ".npy" else "text", {}, rows=False)
    record: dict[str, Any] = {}
    try:
        needs = "reads a source and writes a target" if reads.pairs else "tells the label of a text"
        if plain := [file for file in files if kind_of(file) not in RECORDS and (reads.pairs or reads.classifies)]:
            hint = "give .jsonl or .parquet with a field for each"
            raise DatasetError(f"this model {needs}", where=str(plain[0]), hint=hint)
        if records := [file for file in files if kind_of(file) in RECORDS]:
            record = first_record(records[0])
            found = find_fields(record, records[0], reads)
        tokens = {file: _tokens_in(file, found.fields) for file in files}
    except OSError as error:
        raise DatasetError(f"can't read: {error.strerror or error}", where=str(error.filename or files[0])) from error
    for file in files:  # one in a folder may be empty
        if not tokens[file] and (file in paths or not any(tokens.values())):
            raise DatasetError("the file is empty", where=str(file))
    if not found.rows:
        return TextFacts(len(files), num_bytes, sum(tokens.values()), found)
    each = max(1, about_tokens_of(json.dumps(record, default=str)))
    longest = max(about_tokens_of(str(record.get(name, ""))) for name in found.fields.values())
    return TextFacts(len(files), num_bytes, sum(tokens.values()), found, max(1, sum(tokens.values()) // each), longest)


def _tokens_in(file: Path, fields: Mapping[str, str]) -> int:
    """About how many tokens a file has. DatasetError if its beginning is not what `fields` say."""
    if kind_of(file) == ".npy":
        return about_tokens(file)
    wanted = next(iter(fields.values()), "text")
    first = next(read_documents(file, wanted), None)
    if first is None:
        return 0
    if "messages_field" in fields:
        messages_of(first)
    return about_tokens(file)
