"""Exports the run whose folder is the first argument; prints its peak memory in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

from zinf_cli.train.export import export
from zinf_cli.train.process_memory import PeakMemory

peak, run = PeakMemory(), Path(sys.argv[1])
peak.reset()
export(run, run / "out")
print(peak.read())
