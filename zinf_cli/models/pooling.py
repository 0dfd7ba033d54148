"""How hidden states become the embedding of a text, in sentence-transformers' words and files.

Beside a model, `modules.json` lists what a text passes: the model, its pooling, and it may be a normalization. What
pools has its settings in a folder of its own. A run writes these files into its checkpoints, so that
SentenceTransformer(exported) embeds as it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from zinf_cli.checkpoint.manifest import POOLING
from zinf_cli.errors import ModelError

Pooling = Literal["mean", "cls", "lasttoken"]

MODULES, SETTINGS = "modules.json", f"{POOLING}/config.json"
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""The switches of older files, each with its name in newer ones."""
_KNOWN = ("Transformer", "Pooling", "Normalize")
"""Modules without weights of their own beside the model's."""


def pooling_of(folder: Path | None, asked: str, architecture: str) -> tuple[Pooling, str]:
    """(the pooling, why) of a model in `folder`, of which a recipe has `asked`.

    `architecture` is the class that its configuration names. ModelError if the folder's files ask for what is not
    known here.
    """
    modules = _modules(folder)
    if other := next((kind for kind, _ in modules if kind not in _KNOWN), None):
        raise ModelError(
            f"embeddings pass a module {other} as well, which would not be trained, nor be the same afterwards",
            where=f"{folder}/{MODULES}",
            hint="take it out of modules.json to train without it",
        )
    if asked in get_args(Pooling):
        return asked, "train.pooling"  # type: ignore[return-value]
    if path := next((path for kind, path in modules if kind == "Pooling"), None):
        return _stored(Path(path)), str(Path(path).relative_to(folder or Path()))
    if architecture.endswith("ForCausalLM"):
        return "lasttoken", f"of {architecture}"
    return "mean", "the default"


def pooled(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """fp32 [texts, width] of hidden states [texts, length, width]. The mask (int64 [texts, length]) ends in zeros."""
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "lasttoken":
        last = attention_mask.sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1, dtype=torch.float32) / mask.sum(1, dtype=torch.float32)


def pooling_files(folder: Path | None, pooling: Pooling, width: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files that say so, beside a model that came from `folder`."""
    listed = [("", "Transformer"), (POOLING, "Pooling")]
    if any(kind == "Normalize" for kind, _ in _modules(folder)):
        listed.append(("2_Normalize", "Normalize"))
    kinds = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(listed)
    ]
    settings = {"word_embedding_dimension": width, **{key: mode == pooling for key, mode in _MODES.items()}}
    yield MODULES, json.dumps(kinds, indent=2).encode()
    yield SETTINGS, json.dumps(settings, indent=2).encode()


def _modules(folder: Path | None) -> list[tuple[str, str]]:
    """(kind, the path of its settings) of the modules that `folder` lists; none if it lists none."""
    if folder is None or not (folder / MODULES).is_file():
        return []
    found = _read(folder / MODULES)
    if not isinstance(found, list) or not all(
        isinstance(each, dict) and isinstance(each.get("type"), str) and isinstance(each.get("path"), str)
        for each in found
    ):
        raise ModelError("is no list of modules", where=str(folder / MODULES), hint="copy it again")
    return [(each["type"].rpartition(".")[2], str(folder / each["path"] / "config.json")) for each in found]


def _stored(path: Path) -> Pooling:
    settings = _read(path)
    found: Any = settings.get("pooling_mode") if isinstance(settings, dict) else None
    if isinstance(settings, dict) and found is None:
        found = [mode for key, mode in _MODES.items() if settings.get(key)]
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if found not in get_args(Pooling):
        raise ModelError(
            f"embeddings are pooled by {found or 'nothing that is named'}, and not by one of "
            f"{', '.join(get_args(Pooling))}",
            where=str(path),
            hint="set train.pooling to train with another",
        )
    pooling: Pooling = found
    return pooling


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ModelError(f"can't be read: {why}", where=str(path), hint="copy it again") from error
