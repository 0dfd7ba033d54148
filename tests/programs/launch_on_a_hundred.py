"""Launches on a hundred simulated hosts, with a run's folder at the first argument; prints its peak memory in KiB."""

from __future__ import annotations

import sys
from pathlib import Path

from simulated_hosts import Simulated, launch
from zinf_cli.launch import service, ssh  # noqa: F401  (what a launcher imports)

assert launch(Simulated(), Path(sys.argv[1])).exit_code == 0
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
