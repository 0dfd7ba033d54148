"""Runs `MODULE:FUNCTION` of the first argument with the arguments behind it, and says what has been imported then.

Without a function it imports modules, whose names stand between commas. The last line of stderr has the answer.
"""

from __future__ import annotations

import atexit
import importlib
import sys

atexit.register(lambda: print("imported:", *sys.modules, file=sys.stderr))
modules, _, function = sys.argv.pop(1).partition(":")
for name in modules.split(","):
    module = importlib.import_module(name)
if function:
    getattr(module, function)()
