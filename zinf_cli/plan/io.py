"""How a rank speaks to its drives: from what `zinf bench nvme` found fastest, where it was run."""

from __future__ import annotations

from dataclasses import dataclass

from zinf_cli.machine.profiles import Drives
from zinf_cli.model_state import PIECE


@dataclass(frozen=True)
class Io:
    """Threads of one rank for each folder, and bytes of one transfer: a piece at most."""

    readers: int = 2
    writers: int = 2
    block_bytes: int = PIECE


def choose_io(drives: Drives, folders: int, ranks: int, cores: int) -> Io:
    """The transfers under way at once that the drives want, dealt to the ranks of a host and their folders.

    Two at least, so that one is at work while the other ends. `cores`: where a rank computes with these, not on an
    accelerator; more threads than that take them from compute.
    """
    if not drives.measured:
        return Io()

    def threads(under_way: int) -> int:
        each = max(2, -(-under_way // max(1, folders * ranks)))
        return min(each, max(2, cores)) if cores else each

    block = 2 ** (min(drives.block_bytes, PIECE).bit_length() - 1)
    return Io(threads(drives.reads), threads(drives.writes), block)
