"""A launcher of one host, whose ends wait HERE_S and THERE_S seconds for a sign of life.

Prints its supervisor's pid; when it has read a line, asks its host for something, and prints that it was answered.
"""

from __future__ import annotations

import sys

from impatient import Impatient
from zinf_cli.launch.connection import Lifelines
from zinf_cli.recipe.hosts import this_machine

with Lifelines(Impatient(float(sys.argv[1]), float(sys.argv[2]))) as lifelines:
    connection = lifelines.connect(this_machine(1))
    print(connection._channel._process.pid, flush=True)  # type: ignore[attr-defined]
    sys.stdin.readline()
    assert connection.lost is None, connection.lost
    connection.request("own_address")
    print("answered", flush=True)
