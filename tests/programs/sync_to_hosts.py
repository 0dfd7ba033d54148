"""Brings a path to the hosts of a file, as a launcher does: HOSTFILE PATH. Prints the bytes that were moved."""

from __future__ import annotations

import sys
from pathlib import Path

from zinf_cli.launch.sync import sync
from zinf_cli.recipe.hosts import load_hosts

print(sync([Path(sys.argv[2])], load_hosts(sys.argv[1])))
