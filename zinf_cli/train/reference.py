"""How much likelier each chosen answer was than the rejected one, by the model as the run began.

It is found once, by an evaluation of all pairs before the first step. It goes into every checkpoint, since a run that
goes on has no other way to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load, save

from zinf_cli.batches.batches import in_turn
from zinf_cli.batches.collator import Sample, Stream
from zinf_cli.batches.preferences import log_ratio
from zinf_cli.checkpoint.manifest import REFERENCE, Manifest
from zinf_cli.checkpoint.verify import read_file
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.errors import CheckpointError
from zinf_cli.train.rank_batches import RankBatches

References = dict[str, torch.Tensor]
"""fp32 [pairs] of each text, by its fingerprint."""


def find_references(engine: Engine, batches: RankBatches, per_sweep: int, texts: Sequence[Stream]) -> References:
    """Evaluate all pairs of all texts, on all ranks together."""
    return {text.fingerprint: _ratios(engine, batches, per_sweep, text) for text in texts}


def references_file(references: References) -> tuple[str, bytes]:
    """(name, content) of the file in a checkpoint."""
    return REFERENCE, save(references)


def stored_references(folder: Path, texts: Sequence[Stream]) -> References:
    """Those of a checkpoint. CheckpointError if it has none of one of the texts."""
    manifest = Manifest.load(folder)
    stored = load(read_file(folder, manifest, REFERENCE)) if REFERENCE in manifest.files else {}
    if any(text.fingerprint not in stored for text in texts):
        raise CheckpointError(
            "what the model thought of these pairs as the run began is not known, and it has learned since",
            where=str(folder),
            hint="give the texts that the run began with, or begin anew with checkpoint.resume=never",
        )
    return stored


def _ratios(engine: Engine, batches: RankBatches, per_sweep: int, text: Stream) -> torch.Tensor:
    ranks, seq_len = batches.ranks, batches.recipe.train.seq_len
    found = torch.zeros(text.num_windows(seq_len), dtype=torch.float32)
    batches.model.eval()
    for first in range(0, len(found), per_sweep * ranks.world_size):
        pairs = range(first, min(first + per_sweep * ranks.world_size, len(found)))
        mine, padded = in_turn(pairs, ranks)
        work = []
        for pair in padded:
            batch = batches.collator.collate(text, [Sample(pair, pair)], 0)
            inputs = (batch.input_ids.to(batches.device), batch.labels.to(batches.device))
            work.append(MicroBatch(partial(_ratio, batches.model, *inputs), 0.0))
        for pair, ratio in zip(mine, engine.evaluate(work), strict=False):
            found[pair] = ratio
    batches.model.train()
    return ranks.sum(found)


def _ratio(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return log_ratio(model, input_ids, labels).sum()
