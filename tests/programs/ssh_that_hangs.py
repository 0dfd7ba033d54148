"""An `ssh` whose host never answers. It writes into the file HANGING_SSH how it takes SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

if "-V" in sys.argv:
    sys.exit("OpenSSH_9.2")
if "-G" in sys.argv:
    print("hostname nobody")
    sys.exit()
Path(os.environ["HANGING_SSH"]).write_text(repr(signal.getsignal(signal.SIGTERM)))
time.sleep(60)
