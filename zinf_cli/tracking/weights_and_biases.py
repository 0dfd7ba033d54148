"""A run in Weights & Biases, by its own library: online, offline or disabled, as its own variables say."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zinf_cli.errors import UsageError
from zinf_cli.run_folder.names import WANDB
from zinf_cli.tracking.trackers import remember, tracked

_EXIT_CODES = {"done": 0, "interrupted": 130}


class WandbRun:
    """A run of `project`: a new one, or the one that the run in `run_dir` had before.

    `keys` are what the run is configured with, value by name. `say` is told where the run is to be seen. Anything that
    the library raises if it can't begin; UsageError if it would ask for a key.
    """

    def __init__(self, run_dir: Path, project: str, keys: Mapping[str, Any], say: Callable[[str], None]) -> None:
        import wandb

        if wandb.setup().settings.mode not in ("offline", "disabled") and not wandb.login(prompt=False):
            raise UsageError("no key for its server is known", hint="wandb login, or set WANDB_MODE=offline")
        known_as = tracked(run_dir, WANDB) or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=project,
            name=run_dir.name,
            id=known_as,
            resume="allow",
            config=dict(keys),
            dir=os.environ.get("WANDB_DIR", run_dir),
            settings=wandb.Settings(silent=True, console="off"),
        )
        remember(run_dir, WANDB, known_as)
        upload = f"offline; to upload it, wandb sync {Path(self._run.dir).parent}"
        say(f"wandb: {upload if self._run.offline else self._run.url or 'disabled'}")

    def add(self, values: Mapping[str, float], step: int) -> None:
        """A step that a crashed run has sent before is not taken again; it was the same."""
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        """Waits for the library's own process as well, which writes the end of its file when `finish` is over."""
        import wandb

        self._run.finish(exit_code=_EXIT_CODES.get(status, 1))
        wandb.teardown()
