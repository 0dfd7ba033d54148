"""Writes its pid to the file of the first argument, then says what it is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

Path(sys.argv[1]).write_text(str(os.getpid()))
print("told", sys.stdin.read(), os.getpid())
