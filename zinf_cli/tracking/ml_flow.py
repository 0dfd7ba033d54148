"""A run in MLflow, by its own library, in the store that MLFLOW_TRACKING_URI names (by default mlflow.db here)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from zinf_cli.tracking.trackers import remember, tracked

NAME = "mlflow"
_STATUS = {"done": "FINISHED", "interrupted": "KILLED"}
_MOST_PARAMS = 100
"""Of one call, and the characters of a value: what every store of MLflow takes."""
_LONGEST_PARAM = 500


class MlflowRun:
    """A run of `experiment`: a new one, or the one that the run in `run_dir` had before.

    `keys` are what the run is configured with, value by name. `say` is told where the run is to be seen. Anything that
    the library raises if it can't begin.
    """

    def __init__(self, run_dir: Path, experiment: str, keys: Mapping[str, Any], say: Callable[[str], None]) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client: Any = MlflowClient()
        known_as = tracked(run_dir, NAME)
        if known_as is None:
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found is not None else self._client.create_experiment(experiment)
            known_as = self._client.create_run(number, run_name=run_dir.name).info.run_id
            self._configure(known_as, keys)
            remember(run_dir, NAME, known_as)
        else:
            self._client.update_run(known_as, status="RUNNING")
        self._id = known_as
        say(f"mlflow: run {known_as} in {self._client.tracking_uri}")

    def _configure(self, run: str, keys: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = (Param(key, str(value)[:_LONGEST_PARAM]) for key, value in keys.items() if value is not None)
        while some := list(islice(params, _MOST_PARAMS)):
            self._client.log_batch(run, params=some)

    def add(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, _STATUS.get(status, "FAILED"))
