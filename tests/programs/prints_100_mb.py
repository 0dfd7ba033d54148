"""A rank that prints 100 MB."""

from __future__ import annotations

import sys

text = "".join(f"line {n} " + "x" * 80 + "\n" for n in range(10_000))
for n in range(100):
    sys.stdout.write(text.replace("line", f"line {n}"))
print("the last line")
