"""The micro-batches of one rank: its share of a batch, as the engine takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import nn

from zinf_cli.batches.batches import deal, deal_whole
from zinf_cli.batches.collator import Batch, Collator, Sample, Stream
from zinf_cli.batches.preferences import preference_loss
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.ranks import Ranks
from zinf_cli.models.objective import Objective
from zinf_cli.models.seeds import derived_seed
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train.setup import choice_of, loss_of


@dataclass(frozen=True)
class RankBatches:
    """Makes this rank's micro-batches of a text."""

    recipe: Recipe
    model: nn.Module
    collator: Collator
    ranks: Ranks
    device: torch.device
    references: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of texts with preferences, by fingerprint: fp32 [pairs] (reference.py)."""
    margins: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of preferences, by the number of a micro-batch: fp32 [pairs], how far it went for the chosen answer."""
    right: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of a loss that chooses, evaluated, by the number of a micro-batch: bool [n], whether it chose the label."""

    @cached_property
    def chooses(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
        """See choice_of()."""
        return choice_of(self.recipe, self.model)

    @cached_property
    def _loss(self) -> Callable[..., torch.Tensor]:
        return loss_of(self.recipe, self.model)

    def of(self, stream: Stream, samples: Sequence[Sample]) -> list[Batch]:
        """This rank's share of the `samples` of all ranks. Every rank gets as many micro-batches."""
        dealt = deal_whole if self.collator.objective is Objective.SIMILARITY else deal
        shares = dealt(samples, self.ranks.rank, self.ranks.world_size, self.recipe.train.micro_batch_size)
        first = self.ranks.rank * len(shares)
        found = []
        for number, share in enumerate(shares):
            batch = self.collator.collate(stream, share, first + number)
            if share and batch.reference is not None:
                known = self.references[stream.fingerprint]
                batch = replace(batch, reference=known[[sample.window for sample in share]])
            found.append(batch)
        return found

    def work(self, batch: Batch, weight: float, step: int) -> MicroBatch:
        """A micro-batch of `step` for the engine; its loss counts with `weight`."""
        seed = derived_seed(self.recipe.seed, step, batch.index)
        inputs = batch.inputs(self.device)
        if batch.reference is None:
            return MicroBatch(self._forward(batch.index, inputs, notes=not weight), weight, seed)

        def forward() -> torch.Tensor:
            loss, margins = preference_loss(self.model, **inputs, beta=self.recipe.train.dpo_beta)
            if weight:  # not an evaluation, nor a micro-batch without a pair
                self.margins[batch.index] = margins.detach()
            return loss

        return MicroBatch(forward, weight, seed)

    def _forward(self, index: int, inputs: Mapping[str, torch.Tensor], *, notes: bool) -> Callable[[], torch.Tensor]:
        """The loss of micro-batch `index`. It `notes` what was chosen rightly, if the loss chooses."""
        chooses = self.chooses
        if chooses is None or not notes:
            return partial(self._loss, self.model, **inputs)

        def forward() -> torch.Tensor:
            loss, scores = chooses(self.model, **inputs)
            self.right[index] = scores.detach().argmax(-1) == inputs["labels"]
            return loss

        return forward
