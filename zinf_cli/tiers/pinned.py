"""Page-locks CPU memory, so that copies to and from an accelerator run beside its compute.

CUDA remembers, for each thread, the error of the last call that failed, and the next kernel that the thread launches
raises it. A system may refuse to lock memory, which is no error here. So both calls are made in a thread of their own,
and what they leave behind ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from zinf_cli.tiers.streams import streams_of

_FOR_ALL_DEVICES = 1
"""cudaHostRegisterPortable. Otherwise the memory counts as locked for the current device alone."""


def pin(memory: torch.Tensor, device: torch.device) -> bool:
    """Lock `memory` for copies to and from `device`. False if the system refuses, or has no such device."""
    if not torch.cuda.is_available():
        return False
    address, num_bytes = memory.data_ptr(), memory.nbytes
    return _call(device, lambda cudart: cudart.cudaHostRegister(address, num_bytes, _FOR_ALL_DEVICES)) == 0


def unpin(memory: torch.Tensor, device: torch.device) -> None:
    """Undo `pin`. No copy may be under way, and the memory has to be there still."""
    address = memory.data_ptr()
    _call(device, lambda cudart: cudart.cudaHostUnregister(address))


def _call(device: torch.device, function: Callable[[Any], Any]) -> int:
    def call() -> int:
        streams_of(device).set_device(device)  # a new thread begins with the first device, which other ranks use
        return int(function(torch.cuda.cudart()))

    with ThreadPoolExecutor(1, "zinf-pin") as thread:
        return thread.submit(call).result()
