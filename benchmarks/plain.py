"""`python -m benchmarks.plain STEPS_FILE CASE_JSON STEPS`: plain PyTorch, everything in memory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.case import Case


def main() -> None:
    steps_file, case, steps = Path(sys.argv[1]), Case(**json.loads(sys.argv[2])), int(sys.argv[3])
    device = torch.device(sys.argv[4] if len(sys.argv) > 4 else "cpu")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config)).to(device).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    for step in range(steps):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(step)
        for _ in range(case.micro_batches):
            ids = torch.randint(0, case.config["vocab_size"], (1, case.tokens), generator=generator).to(device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / case.micro_batches
            loss.backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        with steps_file.open("a") as file:
            file.write(json.dumps({"step_s": time.perf_counter() - start}) + "\n")


if __name__ == "__main__":
    main()
