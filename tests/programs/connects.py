"""Connects to the hosts of a file at once, as a launcher does: HOSTFILE [wait].

Prints, for each host in order, the LAB_HOST that its supervisor has or the error, as JSON. With `wait` it then waits to
be killed.
"""

from __future__ import annotations

import json
import shutil
import sys
import time

from zinf_cli.errors import HostError
from zinf_cli.launch.connection import Lifelines, at_all, transport_to
from zinf_cli.recipe.hosts import Host, load_hosts

PRINTENV = str(shutil.which("printenv", path="/usr/bin:/bin"))  # a launcher without OpenSSH has an empty PATH
hosts = load_hosts(sys.argv[1])
with Lifelines(transport_to(hosts)) as lifelines:

    def attempt(host: Host) -> str:
        try:
            told = lifelines.connect(host).capture([PRINTENV, "LAB_HOST"], within=20)
        except HostError as error:
            return error.line()
        return str(told["output"]).strip()

    print(json.dumps(at_all(attempt, hosts)), flush=True)
    if sys.argv[2:]:
        time.sleep(60)
