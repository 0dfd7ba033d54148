"""`python -m benchmarks.plain STEPS_FILE CASE_JSON STEPS`: plain PyTorch, everything in memory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.case import Case

LR, WEIGHT_DECAY = 1e-4, 0.01


def main() -> None:
    steps_file, case, steps = Path(sys.argv[1]), Case(**json.loads(sys.argv[2])), int(sys.argv[3])
    device = torch.device(sys.argv[4] if len(sys.argv) > 4 else "cpu")
    model = build(case).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(steps):
        start = time.perf_counter()
        total = 0.0
        for ids in windows(case, step):
            ids = ids.to(device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / case.micro_batches
            loss.backward()
            total += loss.item()
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        with steps_file.open("a") as file:
            file.write(json.dumps({"step_s": time.perf_counter() - start, "loss": total}) + "\n")


def build(case: Case, reentrant: bool = False) -> Any:
    """The model of `case`, the same weights every time; `reentrant` is the flavour of its gradient checkpointing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config)).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def windows(case: Case, step: int) -> Iterator[Tensor]:
    """The token ids [1, tokens] of each micro-batch of `step`."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(case.micro_batches):
        yield torch.randint(0, case.config["vocab_size"], (1, case.tokens), generator=generator)


if __name__ == "__main__":
    main()
