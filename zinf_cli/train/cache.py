"""Where what is dear to compute is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of the user's cache; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "zinf" / name
