"""One rank: STEPS COUNT FOLDER CASES. Prints, for each case of a JSON list, the losses of its micro-batches.

A case is an architecture, changes to its configuration, and where its state lies: fields of EngineOptions, and
`cached`, `late`, `dtype`, `most`, `chunk` (logits) and `settings` of engine_losses().
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from late_writes import late_writes
from plain import engine_losses, every_other_unit_cached, open_engine
from tiny_models import random_source
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.units import chunked_loss

torch.set_num_threads(1)
ranks = Ranks.join(torch.device("cpu"))
steps, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
for name, changes, placement in json.loads(sys.argv[4]):
    settings = placement.pop("settings", {})
    if "infinite" in settings:
        settings["infinite"] = tuple(settings["infinite"])
    cached, late = placement.pop("cached", False), placement.pop("late", False)
    dtype, most = getattr(torch, placement.pop("dtype", "float32")), placement.pop("most", None)
    if (chunk := placement.pop("chunk", None)) is not None:
        chunked_loss.CHUNK = chunk
    options = EngineOptions(**placement, nvme_folders=(folder / f"rank-{ranks.rank}",))
    if cached:
        options = every_other_unit_cached(options)
    engine = open_engine(random_source(name, **changes), options, ranks, dtype=dtype, most=most, in_chunks=bool(chunk))
    with late_writes() if late else nullcontext():
        losses = engine_losses(engine, steps, count=count, rank=ranks.rank, world_size=ranks.world_size, **settings)
    print(json.dumps(losses), flush=True)
ranks.leave()
