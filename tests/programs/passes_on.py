"""A ProxyCommand: HOST PORT. Passes bytes between its stdin and stdout and a connection to there."""

from __future__ import annotations

import os
import select
import socket
import sys

with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as there:
    ends = {0: there.fileno(), there.fileno(): 1}
    while True:
        for source in select.select(list(ends), [], [])[0]:
            data = os.read(source, 1 << 16)
            if not data:
                sys.exit()
            while data:
                data = data[os.write(ends[source], data) :]
