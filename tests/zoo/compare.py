"""A model type, made tiny: three steps on NVMe against plain PyTorch. `python -m zoo.compare` prints the table."""

from __future__ import annotations

import sys
import tempfile
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers

from plain import engine_losses, everything_on, open_engine, plain_losses, relative_difference
from zinf_cli.engine.compute.survey import survey
from zinf_cli.errors import ZinfError
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.objective import objective_of
from zinf_cli.models.side_outputs import CapturedOutputs
from zinf_cli.train.setup import model_loss
from zoo.shrink import class_names, configs, model_types

STEPS = 3
TOLERANCE = 1e-5
"""Of a loss: a few units in the last place, where gradients are summed in another order."""
PARAMS_PER_ROOM = 1_000_000
LARGE = 8_000_000
"""Parameters of a model with parts that no table shrinks; there is no time to train it twice."""


@dataclass(frozen=True)
class Verdict:
    """`kind`: "agrees", "refused" (by zinf, before training), "untrained" (by plain PyTorch alone) or "wrong"."""

    kind: str
    why: str = ""
    difference: float = 0.0

    def row(self, model_type: str) -> str:
        """Of the table in docs/zoo.md: of what zinf says, the first sentence."""
        return f"| {model_type} | {self.kind} | {self.why.split('. ')[0].replace('|', '/')} |"


def verdict(model_type: str) -> Verdict:
    """Of all its classes the one that agrees least."""
    found = [_verdict(model_type, name) for name in class_names(model_type)]
    return next((one for one in found if one.kind != "agrees"), max(found, key=lambda one: one.difference))


def _verdict(model_type: str, name: str) -> Verdict:
    """With activations recomputed, and with all of them kept; of the first configuration that is trained at all."""
    refused = failed = ""
    for config in configs(model_type, name):
        source = ModelSource(None, config, "random", 0)
        try:
            _look_at(source)
            expected = plain_losses(source, STEPS)
        except ZinfError as error:
            refused = refused or error.message
            continue
        except Exception as error:  # whatever a model does at sizes that it was not made for
            failed = failed or _where(error)
            continue
        if all(abs(loss) < 1e6 for losses in expected for loss in losses):
            return _compare(source, expected)
        failed = failed or "its loss is not finite"
    return Verdict("refused", refused) if refused else Verdict("untrained", failed)


def _look_at(source: ModelSource) -> None:
    """What zinf does before it trains: ZinfError where it will not."""
    model = build_model(source)
    objective_of(model)
    ids = torch.zeros((2, 12), dtype=torch.long, device="meta")
    survey(model, partial(model_loss, model, ids, ids), world_size=1, side=CapturedOutputs())


def _compare(source: ModelSource, expected: list[list[float]]) -> Verdict:
    num_params = sum(param.numel() for param in build_model(source).parameters())
    room = max(16, num_params // PARAMS_PER_ROOM)
    largest = 0.0
    for keep in (False, True) if num_params < LARGE else (False,):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            try:
                engine = open_engine(source, everything_on("nvme", Path(folder)), keep=keep, room=room)
            except ZinfError as error:
                return Verdict("refused", str(error))
            except Exception as error:
                return Verdict("wrong", _where(error))
            try:
                found = engine_losses(engine, STEPS)
            except Exception as error:
                return Verdict("wrong", _where(error))
        difference = relative_difference(found, expected)
        if not difference < TOLERANCE:
            return Verdict("wrong", f"losses differ by {difference:.1e}{', activations kept' if keep else ''}")
        largest = max(largest, difference)
    return Verdict("agrees", f"{largest:.0e}" if largest else "to the bit", largest)


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {said} ({Path(frame.filename).name}, {frame.name})"


def main() -> None:
    """Print the table of docs/zoo.md, and how many there are of each kind."""
    counts: dict[str, int] = {}
    print(f"| transformers {transformers.__version__} | | |\n|---|---|---|")
    for model_type in sys.argv[1:] or model_types():
        found = verdict(model_type)
        counts[found.kind] = counts.get(found.kind, 0) + 1
        print(found.row(model_type), flush=True)
    print(f"\n{counts}", file=sys.stderr)


if __name__ == "__main__":
    main()
