"""The held-out losses of a run, and what follows from them: when it ends early, and which checkpoint is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from zinf_cli.batches.collator import Sample, Stream
from zinf_cli.engine.engine import Engine
from zinf_cli.run_folder.metrics import ACCURACY, held_out_of
from zinf_cli.text.token_stream import digest
from zinf_cli.train.rank_batches import RankBatches


@dataclass(frozen=True)
class Standing:
    """What the evaluations of a run have come to. A manifest holds it, so that a resume goes on with it."""

    texts: str
    """The fingerprint of the held-out texts, without which their losses have no meaning."""
    best: float | None = None
    """The lowest held-out loss. None: there was none that is a number."""
    since: int = 0
    """Evaluations after that one."""
    kept: float | None = None
    """The lowest held-out loss of a step with a checkpoint."""
    kept_step: int | None = None
    """That step."""

    def after(self, step: int, loss: float, *, saved: bool) -> Standing:
        """The standing when `step` has the held-out `loss`, and a checkpoint if it is `saved`."""
        now = replace(self, since=self.since + 1)
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            now = replace(now, best=loss, since=0)
        if math.isfinite(loss) and saved and (self.kept is None or loss < self.kept):
            now = replace(now, kept=loss, kept_step=step)
        return now


@dataclass(frozen=True)
class Evaluation:
    """Evaluates the model on held-out texts, in sweeps of `per_sweep` micro-batches on each rank."""

    engine: Engine
    batches: RankBatches
    per_sweep: int
    texts: Mapping[str, Stream]
    """By their names; a single one has none, ""."""

    def begin(self, earlier: Standing | None) -> Standing:
        """The standing of a run that goes on from `earlier`, unless that is one of other texts."""
        texts = digest(" ".join(f"{name} {text.fingerprint}" for name, text in self.texts.items()))
        return earlier if earlier is not None and earlier.texts == texts else Standing(texts)

    def losses(self) -> dict[str, float]:
        """The mean loss over all held-out windows, and that over those of each text with a name, by their keys.

        Of a loss that chooses, also the share of right choices. All ranks together.
        """
        sums = {name: self._sum(text) for name, text in self.texts.items()}
        if not sums:
            return {}
        of_all = tuple(map(sum, zip(*sums.values(), strict=True)))
        found: dict[str, float] = {}
        for name, (loss, right, targets) in {"": of_all, **sums}.items():
            found[held_out_of(name)] = loss / max(1.0, targets)
            if self.batches.chooses is not None:
                found[held_out_of(name, ACCURACY)] = right / max(1.0, targets)
        return found

    def _sum(self, held_out: Stream) -> tuple[float, float, float]:
        """(the sum of the loss over all targets of a text, how many were chosen rightly, their number), of all ranks
        together."""
        model, ranks, train = self.batches.model, self.batches.ranks, self.batches.recipe.train
        windows = held_out.num_windows(train.seq_len)
        per_pass = max(ranks.world_size, self.per_sweep * train.micro_batch_size * ranks.world_size)
        model.eval()
        loss = right = targets = 0.0
        for first in range(0, windows, per_pass):
            samples = [Sample(window, window) for window in range(first, min(first + per_pass, windows))]
            mine = self.batches.of(held_out, samples)
            losses = self.engine.evaluate([self.batches.work(batch, 0.0, 0) for batch in mine])
            real = [(value, batch) for value, batch in zip(losses, mine, strict=True) if batch.num_targets]
            loss += sum(value * batch.num_targets for value, batch in real)
            right += sum(int(self.batches.right[batch.index].sum()) for _, batch in real if self.batches.chooses)
            targets += sum(batch.num_targets for _, batch in real)
            self.batches.right.clear()
        model.train()
        loss, right, targets = ranks.totals([loss, right, targets])
        return loss, right, targets
