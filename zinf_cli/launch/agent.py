"""`python -m zinf_cli.launch.agent`: torchrun's agent, which imports torch before it is told what to run.

It may thus be started while the plan is still being made. The order comes on stdin as JSON: torchrun's "arguments",
the "environment" of the ranks, "defaults" for what this host does not set itself, and the "log" all output goes to.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch.distributed.run import main as torchrun


def main() -> None:
    """Wait for the order and follow it."""
    order = json.load(sys.stdin)
    with Path(order["log"]).open("wb") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    for name, value in order["defaults"].items():
        os.environ.setdefault(name, value)
    os.environ.update(order["environment"])
    torchrun(order["arguments"])


if __name__ == "__main__":
    main()
