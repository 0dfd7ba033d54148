"""Seeds of random generators, derived from what the numbers are for."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int | str) -> int:
    """A seed below 2**63, the same with every interpreter and on every machine: exact resume rests on it.

    It is the first 8 bytes, little-endian and halved, of the SHA-256 of `parts` in decimal, with colons between them.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
