"""`python -m benchmarks.fsdp2 STEPS_FILE CASE_JSON STEPS DEVICE`: FSDP2 with CPU offload, on one rank.

Parameters, gradients and the states of AdamW lie in CPU memory in fp32, and AdamW computes there, fused. The device
computes a block at a time; an accelerator does so in bf16, and has all gradients of a step until its last micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from benchmarks.case import Case
from benchmarks.plain import LR, WEIGHT_DECAY, build, train


class Fsdp2:
    def __init__(self, case: Case, device: torch.device) -> None:
        cuda = device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        precision = MixedPrecisionPolicy(torch.bfloat16 if cuda else None, torch.float32)
        policy: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (1,)),
            "mp_policy": precision,
            "offload_policy": CPUOffloadPolicy(pin_memory=cuda),
        }
        self.model = build(case, device=device)
        for block in self.model.model.layers:
            fully_shard(block, **policy)
        fully_shard(self.model, **policy)
        self._params = list(self.model.parameters())
        self._optimizer = torch.optim.AdamW(self._params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def expect(self, *, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)

    def update(self, clip: float | None) -> None:
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self._params, clip)
        self._optimizer.step()
        self._optimizer.zero_grad()


if __name__ == "__main__":
    train(Fsdp2)
    dist.destroy_process_group()
