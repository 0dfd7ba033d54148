"""`.venv-peer/bin/python -m benchmarks.deepspeed_peer`: DeepSpeed ZeRO-3 on a CPU, parameters and optimizer on NVMe.

With STEPS_FILE CASE_JSON STEPS FOLDER SMALL it trains, with its state in FOLDER; without arguments it compiles
DeepSpeed's operators.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.plain import LR, WEIGHT_DECAY, build, windows

VENV = Path(sys.prefix)
# Read by DeepSpeed while it is imported, so that happens in the functions. Its operators need the venv's ninja.
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "1",
    "LOCAL_RANK": "0",
    "TORCH_EXTENSIONS_DIR": str(VENV / "operators"),
    "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
}


def main() -> None:
    if len(sys.argv) == 1:
        compile_operators()
        return
    steps_file, case, steps = Path(sys.argv[1]), Case(**json.loads(sys.argv[2])), int(sys.argv[3])
    folder, small = Path(sys.argv[4]), json.loads(sys.argv[5])
    import deepspeed

    folder.mkdir(parents=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    # The other flavour keeps recomputed weights by their memory, swap buffers overwritten before backward needs them.
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model, settings = build(case, reentrant=True, dtype=dtype), config(case, str(folder), small)
    # initialize() would give Init the model's dtype, which makes its buffers bf16 on a CPU without fp16: see findings/.
    deepspeed.zero.Init(module=model, remote_device="nvme", config_dict_or_path=settings)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    for step in range(steps):
        start = time.perf_counter()
        total = 0.0
        for ids in windows(case, step):
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            total += loss.item() / case.micro_batches
            engine.backward(loss)
            engine.step()  # updates at the last micro-batch
        with steps_file.open("a") as file:
            file.write(json.dumps({"step_s": time.perf_counter() - start, "loss": total}) + "\n")


def config(case: Case, folder: str, small: bool) -> dict[str, Any]:
    """Tuned by hand for these models. Sizes are in elements; what is not said here is DeepSpeed's default.

    The fastest: a micro-batch's parameters stay in memory from its forward to the end of its backward, each in a
    buffer of its own, and updates overlap with reads and writes. `small`: they are read for the forward and again for
    the backward, and the update reads, computes and writes in turn.
    """
    largest = case.config["vocab_size"] * case.config["hidden_size"]
    matrices = 7 * case.config["num_hidden_layers"] + 2
    window = 2 * largest if small else matrices * largest
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.micro_batches,
        "gradient_clipping": case.clip or 0.0,
        "bf16": {"enabled": case.precision == "bf16"},
        "steps_per_print": sys.maxsize,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": WEIGHT_DECAY}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {
                "device": "nvme",
                "nvme_path": folder,
                "buffer_count": 24 if small else matrices + 1,  # one for each matrix in memory
                "buffer_size": largest,
                "max_in_cpu": 0,  # the default, 1e9, would leave all of this model in memory
            },
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": folder,
                "buffer_count": 5 if small else 12,  # {parameter, m, v, gradient}: read, updated and written
                "pipeline_read": not small,
                "pipeline_write": not small,
            },
            "sub_group_size": largest,
            "reduce_bucket_size": largest,
            "stage3_max_live_parameters": window,
            "stage3_max_reuse_distance": window,
            # With more it ends in "already assigned swap buffer": it takes a parameter from its queue twice.
            "stage3_prefetch_bucket_size": 0,
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 64, "intra_op_parallelism": 4},
    }


def compile_operators() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, PinMemoryBuilder, ShareMemCommBuilder

    for builder in (PinMemoryBuilder, AsyncIOBuilder, CPUAdamBuilder, ShareMemCommBuilder):
        builder().load(verbose=False)


if __name__ == "__main__":
    main()
