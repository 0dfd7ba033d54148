"""The program that stands between rsync and ssh, so that a login shell may print what it likes: MARK WORDS ... .

After the mark come the number of words of ssh's command, and those; then what rsync adds, the host and its command
there. The command there first prints the mark. What comes before the mark is dropped. Standard library only: it is run
as a file, by `python -I`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def main(mark: str, command: Sequence[str]) -> int:
    """Run `command`, whose output begins with `mark`. Returns its exit code."""
    ssh = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
    assert ssh.stdout is not None
    before, clean = b"", False
    while data := os.read(ssh.stdout.fileno(), 1 << 16):
        if not clean:
            before, found, data = (before + data).partition(f"{mark}\n".encode())
            clean = bool(found)
        while clean and data:
            data = data[os.write(1, data) :]
    return ssh.wait()


if __name__ == "__main__":
    mark, count, *words = sys.argv[1:]
    after_host = int(count) + 1
    sys.exit(main(mark, [*words[:after_host], f"echo {mark}; exec", *words[after_host:]]))
