"""Imports zinf's command line; prints what `ps` shows of this process's arguments then, and what they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zinf_cli import cli  # noqa: F401

shown = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
print(json.dumps({"shown": [word.decode() for word in shown[2:]], "given": sys.argv[1:]}))
