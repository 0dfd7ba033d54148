"""Programs that tests start, each a file of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def command(name: str, *arguments: object) -> list[str]:
    """The command line that runs the program `name` with the Python of the tests."""
    return [sys.executable, str(Path(__file__).parent / f"{name}.py"), *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, where a program finds the modules of tests/, and `more`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}
