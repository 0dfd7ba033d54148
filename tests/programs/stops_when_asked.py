"""Goes on until it is asked to stop, as a rank does."""

from __future__ import annotations

import time

from zinf_cli.train.rank_process import stop_requested

while not stop_requested():
    time.sleep(0.01)
print("asked")
