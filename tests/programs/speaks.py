"""Says what it reads at first, then what it is told."""

from __future__ import annotations

import sys

print("I have read " + sys.stdin.readline(), end="", flush=True)
print("told", sys.stdin.read())
