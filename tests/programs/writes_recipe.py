"""`zinf init MODEL TEXT`, which ends with the names of the heavy libraries that it has imported."""

from __future__ import annotations

import sys
from pathlib import Path

from zinf_cli.commands.init import InitRequest, init
from zinf_cli.screen import Screen

model, text = map(Path, sys.argv[1:])
init(InitRequest(model, (text,), text.with_suffix(".yaml"), None, None), Screen(stderr=True))
print(*({"torch", "transformers"} & sys.modules.keys()))
