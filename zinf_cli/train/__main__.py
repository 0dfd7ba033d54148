"""`python -m zinf_cli.train RUN_DIR`: one rank, started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

from zinf_cli.train.rank_process import run_rank


def main() -> int:
    from zinf_cli.train.loop import train  # torch only after the rank's process is set up

    return train(Path(sys.argv[1]))


if __name__ == "__main__":
    run_rank(main, Path(sys.argv[1]))
