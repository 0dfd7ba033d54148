"""`followed_by_wandb RUN_DIR`: a process that sends a step to Weights & Biases, says so, and waits to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from zinf_cli.tracking.weights_and_biases import WandbRun

run = WandbRun(Path(sys.argv[1]), "mine", {}, say=lambda line: None)
run.add({"loss": 1.0}, step=1)
print("ready", flush=True)
time.sleep(600)
