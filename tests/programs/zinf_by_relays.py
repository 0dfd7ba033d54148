"""`zinf`, which connects to more than one host through relays already."""

from __future__ import annotations

from zinf_cli.cli import main
from zinf_cli.launch.openssh import OpenSsh
from zinf_cli.launch.srun import Srun

OpenSsh.most_direct = Srun.most_direct = 1
main()
