"""Writes 5000 bytes to the file of the first argument."""

from __future__ import annotations

import sys
from pathlib import Path

from zinf_cli.durable import write_durably

write_durably(Path(sys.argv[1]), "x" * 5000)
