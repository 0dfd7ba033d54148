"""Makes the tensors that a model's own loss takes from windows of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from zinf_cli.batches.compared import ComparedStream, together
from zinf_cli.batches.labelled import LabelledStream
from zinf_cli.batches.mixture import MixedStream, Part
from zinf_cli.batches.packing import PackedStream
from zinf_cli.batches.pairs import PairStream
from zinf_cli.batches.pictured import PicturedStream
from zinf_cli.batches.preferences import PreferenceStream
from zinf_cli.models.objective import Objective
from zinf_cli.text.masking import Masking
from zinf_cli.text.token_stream import MASKED
from zinf_cli.tiers.streams import streams_of

Stream = Part | MixedStream
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Sample:
    """A window of a text, and its place in the run (or in the held-out text), from which its random numbers follow."""

    window: int
    place: int


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward. An empty micro-batch is the first window without targets."""

    input_ids: torch.Tensor
    """int64 [sequences, seq_len]."""
    labels: torch.Tensor
    """int64 [sequences, seq_len], -100 where there is no loss. Without any target these are the tokens, and the loss
    has weight 0: a mean over nothing would be NaN. Of texts with a label, [sequences]; of texts that are compared,
    [rows]: for each query the number of its own text."""
    num_targets: int
    """Labels that the loss averages over."""
    index: int
    """Its number among the micro-batches of the step, of all ranks."""
    num_tokens: int
    """Tokens of the text, without what fills up a window."""
    attention_mask: torch.Tensor | None = None
    """int64 [sequences, seq_len], 0 where a source, or a text that is a sequence, is padded. None if nothing is."""
    position_ids: torch.Tensor | None = None
    """int64 [sequences, seq_len], from 0 in each document. None if documents are not kept apart."""
    reference: torch.Tensor | None = None
    """Of preferences, fp32 [pairs]: what the model thought of them as the run began (reference.py), or 0."""

    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Of texts with pictures: what else the model takes, by the name of its argument."""

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What `model_loss` takes, by name, on `device`. On an accelerator it is on its way when this returns.

        A copy from memory that is not page-locked would wait for all that compute has queued.
        """
        given = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "reference": self.reference,
            **self.beside,
        }
        there = {name: tensor for name, tensor in given.items() if tensor is not None}
        if streams_of(device).on_cpu:
            return {name: tensor.to(device) for name, tensor in there.items()}
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in there.items()}


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches for one model."""

    objective: Objective
    seq_len: int
    masking: Masking | None = None
    """For MASKED_TOKENS."""

    def collate(self, stream: Stream, samples: Sequence[Sample], index: int) -> Batch:
        """The micro-batch of `samples`."""
        rows = [self._row(stream, sample) for sample in samples or (Sample(0, 0),)]
        input_ids, labels, *third = (torch.stack(column) for column in zip(*rows, strict=True))
        num_targets = self.objective.num_targets(labels) if samples else 0
        num_tokens = input_ids.numel() if samples else 0
        kind = kind_of_stream(stream)
        if isinstance(kind, PreferenceStream):
            input_ids, labels = input_ids.flatten(0, 1), labels.flatten(0, 1)
            num_tokens = sum(_num_real(*_at(stream, sample.window, self.seq_len)) for sample in samples)
            return Batch(input_ids, labels, num_targets, index, num_tokens, reference=torch.zeros(len(rows)))
        if isinstance(kind, ComparedStream):
            input_ids, attention, num_tokens = together(input_ids), together(third[0]), int(third[0].sum())
            labels, num_tokens = torch.arange(len(rows)), num_tokens if samples else 0
            return Batch(input_ids, labels, num_targets, index, num_tokens, attention_mask=attention)
        if isinstance(kind, PairStream):
            return Batch(input_ids, labels, num_targets, index, num_tokens, attention_mask=third[0])
        if isinstance(kind, LabelledStream | PicturedStream):
            pictured = isinstance(kind, PicturedStream)
            beside = self._beside(stream, samples or (Sample(0, 0),), input_ids, labels) if pictured else {}
            num_tokens = int(third[0].sum()) if samples else 0
            return Batch(input_ids, labels, num_targets, index, num_tokens, attention_mask=third[0], beside=beside)
        if not num_targets:
            labels = input_ids
        if isinstance(kind, PackedStream):
            num_tokens = sum(_num_real(*_at(stream, sample.window, self.seq_len)) for sample in samples)
            return Batch(input_ids, labels, num_targets, index, num_tokens, position_ids=third[0])
        return Batch(input_ids, labels, num_targets, index, num_tokens)

    def _beside(
        self, stream: Stream, samples: Sequence[Sample], input_ids: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the model takes beside the tokens of texts with pictures."""
        rows = [_at(stream, sample.window, self.seq_len) for sample in samples]
        parts = [(part, index) for part, index in rows if isinstance(part, PicturedStream)]
        return parts[0][0].processor.beside([part.pictures(index) for part, index in parts], input_ids, labels)

    def has_targets(self, stream: Stream) -> bool:
        """Whether any window has a label that the loss uses. True for a stream that is shorter than a window."""
        if isinstance(stream, MixedStream):
            return all(map(self.has_targets, stream.parts))
        if isinstance(stream, PackedStream | PreferenceStream | PicturedStream):
            return stream.num_windows(self.seq_len) > 0
        if isinstance(stream, PairStream | LabelledStream | ComparedStream) or stream.loss_mask is None:
            return True
        first = 0 if self.objective is Objective.MASKED_TOKENS else 1  # nothing predicts the first token
        windows = stream.num_windows(self.seq_len)
        if not windows:
            return True
        at_once = max(1, _BLOCK // self.seq_len)
        for start in range(0, windows, at_once):
            stop = min(windows, start + at_once)
            mask = stream.loss_mask[start * self.seq_len : stop * self.seq_len].reshape(-1, self.seq_len)
            if np.any(mask[:, first:]):
                return True
        return False

    def _row(self, stream: Stream, sample: Sample) -> tuple[torch.Tensor, ...]:
        part, index = _at(stream, sample.window, self.seq_len)
        input_ids, labels, *third = part.window(index, self.seq_len)
        if self.objective is Objective.NEXT_TOKEN_GIVEN:
            labels = torch.cat((labels[1:], labels.new_full((1,), MASKED)))
        elif self.masking is not None:
            input_ids, labels = self.masking.apply(input_ids, labels, sample.place)
        return input_ids, labels, *third


def kind_of_stream(stream: Stream) -> Part:
    """A text of the kind that all of a stream are."""
    return stream.parts[0] if isinstance(stream, MixedStream) else stream


def _at(stream: Stream, index: int, seq_len: int) -> tuple[Part, int]:
    return stream.at(index, seq_len) if isinstance(stream, MixedStream) else (stream, index)


def _num_real(part: Part, index: int) -> int:
    assert isinstance(part, PackedStream | PreferenceStream)
    return part.num_real(index)
