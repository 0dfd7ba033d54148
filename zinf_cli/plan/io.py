"""How a rank uses its drives: as `zinf bench nvme` found fastest, or by default where it was not run."""

from __future__ import annotations

from dataclasses import dataclass

from zinf_cli.machine.profiles import Drives
from zinf_cli.model_state import PIECE


@dataclass(frozen=True)
class Io:
    """Threads of one rank per folder, and bytes of one transfer: a piece at most."""

    readers: int = 2
    writers: int = 2
    block_bytes: int = PIECE


def choose_io(drives: Drives, folders: int, ranks: int, cores: int) -> Io:
    """Deal the transfers that the drives want under way at once to the ranks of a host and their folders.

    A rank has two threads per folder at least, so that one is at work while the other ends. `cores` is the number of
    cores a rank computes on, and the most threads that it gets; 0 with an accelerator, where that is no limit.
    """
    if not drives.measured:
        return Io()

    def threads(under_way: int) -> int:
        each = max(2, -(-under_way // max(1, folders * ranks)))
        return min(each, max(2, cores)) if cores else each

    block = 2 ** (min(drives.block_bytes, PIECE).bit_length() - 1)
    return Io(threads(drives.reads), threads(drives.writes), block)
