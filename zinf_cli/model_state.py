"""What the state of a model is made of, said once and without torch; plan, checkpoint, engine and tiers read it."""

from __future__ import annotations

PAGE = 4096
"""Bytes. Buffers, extents and regions of files begin at a multiple, as direct I/O asks."""
PIECE = 4 * 2**20
"""Bytes of a field that are moved at once, and that have one checksum. The cuts are at multiples from its start."""
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes of an element, by dtype as safetensors writes it."""
CHUNK_NUMEL = PIECE // ITEM_BYTES["F32"]
"""Elements of an update's chunk, a piece of each fp32 field."""


def round_up(amount: int, multiple: int = PAGE) -> int:
    """The smallest multiple of `multiple` that is at least `amount`."""
    return -(-amount // multiple) * multiple
