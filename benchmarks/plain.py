"""`python -m benchmarks.plain STEPS_FILE CASE_JSON STEPS [DEVICE]`: plain PyTorch, everything in the memory of DEVICE.

On a CPU, which is the default, the case says the precision. On an accelerator AdamW is fused, and parameters are bf16.
These have fp32 masters and fp32 gradients.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.case import Case

LR, WEIGHT_DECAY = 1e-4, 0.01


class Trainer(Protocol):
    """A model, and how it is updated."""

    model: Any

    def expect(self, *, last: bool) -> None:
        """A micro-batch follows; it is the `last` of its step, or it is not."""

    def update(self, clip: float | None) -> None:
        """Update with the gradients of the step, and forget them."""


class Plain:
    def __init__(self, case: Case, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" or case.precision == "bf16" else torch.float32
        self.model = build(case, device=device, dtype=dtype)
        self._params = list(self.model.parameters())
        self._masters = self._params
        if dtype != torch.float32:
            self._masters = [param.detach().float() for param in self._params]
            for param in self._params:
                param.grad_dtype = torch.float32
        fused = device.type == "cuda" or None
        self._optimizer = torch.optim.AdamW(self._masters, lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)

    def expect(self, *, last: bool) -> None: ...

    def update(self, clip: float | None) -> None:
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self._params, clip)
        for param, master in zip(self._params, self._masters, strict=True):
            master.grad = param.grad
        self._optimizer.step()
        if self._masters is not self._params:
            with torch.no_grad():
                torch._foreach_copy_(self._params, self._masters)
        for tensor in (*self._params, *self._masters):
            tensor.grad = None


def main() -> None:
    train(Plain)


def train(make: Callable[[Case, torch.device], Trainer]) -> None:
    """The training that the arguments ask for. STEPS_FILE gets a line a step."""
    steps_file, case, steps = Path(sys.argv[1]), Case(**json.loads(sys.argv[2])), int(sys.argv[3])
    device = torch.device(sys.argv[4] if len(sys.argv) > 4 else "cpu")
    trainer = make(case, device)
    for step in range(steps):
        start = time.perf_counter()
        total = 0.0
        for number, ids in enumerate(windows(case, step), 1):
            trainer.expect(last=number == case.micro_batches)
            ids = ids.to(device)
            loss = trainer.model(input_ids=ids, labels=ids, use_cache=False).loss / case.micro_batches
            loss.backward()
            total += loss.item()
        trainer.update(case.clip)
        line = {"loss": total}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            line["gpu_mem_bytes"] = torch.cuda.max_memory_allocated(device)
        with steps_file.open("a") as file:
            file.write(json.dumps({"step_s": time.perf_counter() - start, **line}) + "\n")


def build(
    case: Case,
    reentrant: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The model of `case`, the same weights every time; `reentrant` is the flavour of its gradient checkpointing."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config), dtype=dtype).train()
    if case.checkpointing:
        # From transformers 5.20 or so on it has the first name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
    return model


def windows(case: Case, step: int) -> Iterator[Tensor]:
    """The token ids [1, tokens] of each micro-batch of `step`."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(case.micro_batches):
        yield torch.randint(0, case.config["vocab_size"], (1, case.tokens), generator=generator)


if __name__ == "__main__":
    main()
