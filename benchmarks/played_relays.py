"""`python -m benchmarks.played_relays SOCKET`: a real relay, in a process of its own, for each link to SOCKET-relays.

Its hosts are those that benchmarks.played_hosts plays at SOCKET.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from benchmarks.launch_on_played import Played
from zinf_cli.launch.relay import Relay


def main() -> None:
    path = sys.argv[1]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{path}-relays")
        door.listen(128)
        print("open", flush=True)
        while True:
            link, _ = door.accept()
            if os.fork() == 0:
                played = Played(path)
                Relay(link.fileno(), link.fileno(), "", played, played).serve()
                os._exit(0)
            link.close()


if __name__ == "__main__":
    main()
