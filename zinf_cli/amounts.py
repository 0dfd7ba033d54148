"""Sizes, counts and times as people write them: 48GiB, 1.5 GB, 135M, 7B, 1T, 3 h 20 min."""

from __future__ import annotations

import math
import re

BYTES_PER_UNIT = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "PIB": 2**50,
}  # fmt: skip
COUNT_PER_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of "48GiB", "1.5 GB" or a plain number; ValueError names the accepted forms."""
    return _parse(text, BYTES_PER_UNIT, "a size such as 48GiB or 500MB")


def parse_count(text: str | int) -> int:
    """A count such as 135M, 7B or 1T parameters."""
    return _parse(text, COUNT_PER_SUFFIX, "a count such as 135M, 7B or 1T")


def format_bytes(num_bytes: float) -> str:
    """Binary units, three significant digits: 1.50 GiB."""
    return _format(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), " ")


def format_decimal(num_bytes: float) -> str:
    """Decimal units, as drives are rated and speeds are told in: 12.9 MB, 5 TB."""
    for name, unit in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= unit:
            return f"{format_number(num_bytes / unit)} {name}"
    return f"{format_number(num_bytes / 1000)} kB"


def format_count(count: float) -> str:
    """Decimal suffixes: 135M, 1.01T."""
    return _format(count, 1000, ("", "K", "M", "B", "T"), "")


def format_number(value: float) -> str:
    """Three significant digits and no exponent: 0.0123, 12.3, 18500."""
    return f"{float(f'{value:.3g}'):.12g}"


def format_seconds(value: float) -> str:
    """0.35 s, 12.4 s, 24 min 53 s, 3 h 20 min."""
    if value < 100:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _parse(text: str | int, factors: dict[str, int], expected: str) -> int:
    match = _AMOUNT.fullmatch(str(text))
    amount = float(match[1]) * factors.get(match[2].upper(), math.inf) if match is not None else math.inf
    if not math.isfinite(amount):
        raise ValueError(f"expected {expected}, got {str(text)[:40]!r}")
    return int(amount)


def _format(amount: float, base: int, suffixes: tuple[str, ...], gap: str) -> str:
    size = float(amount)
    step = 0
    while abs(size) >= base * 0.9995 and step < len(suffixes) - 1:
        size /= base
        step += 1
    digits = 0 if step == 0 or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f}{gap}{suffixes[step]}".rstrip()
