"""Launches on a hundred simulated hosts, with a run's folder at the first argument; prints its peak memory in KiB."""

from __future__ import annotations

import sys
from pathlib import Path

import zinf_cli.commands.launch
import zinf_cli.launch.ssh  # noqa: F401  (what a launcher imports)
from simulated_hosts import Simulated, launch

assert launch(Simulated(), Path(sys.argv[1])).exit_code == 0
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
