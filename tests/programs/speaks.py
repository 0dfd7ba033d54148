"""Says what it reads at first, line by line up to an empty one; then what it is told."""

from __future__ import annotations

import sys

while line := sys.stdin.readline().strip():
    print("I have read", line, flush=True)
print("told", sys.stdin.read())
