"""xxh3 of what lies on drives: scratch state, checkpoints."""

from __future__ import annotations

from xxhash import xxh3_64


def checksum(content: bytes | bytearray | memoryview) -> int:
    """xxh3 of 64 bits; large contents are read without the GIL, which the one-shot functions of xxhash hold."""
    state = xxh3_64()
    state.update(content)
    return state.intdigest()
