"""Prints as many lines to stderr as the first argument says; ends with 1 where stdin, stdout or stderr was taken."""

from __future__ import annotations

import os
import sys

from zinf_cli.unfailing_stream import stand_on_open_descriptors

stand_on_open_descriptors()
for n in range(int(sys.argv[1])):
    print("line", n, file=sys.stderr)
sys.exit(os.open("/dev/null", os.O_RDONLY) < 3)
