"""A run that Weights & Biases and MLflow follow, stopped and taken up again: one run there, and nothing left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from offline_runs import offline_runs
from programs import command
from workshop import Workshop


@pytest.mark.filterwarnings("ignore")  # of the libraries below MLflow
def test_a_run_that_goes_on_is_one_run_to_its_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for name, value in {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": store, "DO_NOT_TRACK": "true"}.items():
        monkeypatch.setenv(name, value)
    workshop = Workshop(tmp_path)
    workshop.content["checkpoint"] = {"interval": 2}
    workshop.content["logging"] |= {"wandb": "mine", "mlflow": "mine"}
    for steps in (2, 4):
        ended = workshop.launch(f"train.max_steps={steps}")
        assert ended.code == 0, ended.err
        assert "wandb: offline; to upload it, wandb sync" in ended.err
        assert f"in {store}" in ended.err
        assert "goes on without it" not in ended.err
        assert workshop.left_behind() == []

    runs = offline_runs(ended.run_dir)
    assert len({run.known_as for run in runs}) == 1
    assert [point["loss"] for run in runs for point in run.history if "loss" in point] == ended.losses
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.value for point in client.get_metric_history(run.info.run_id, "loss")] == ended.losses


def test_what_weights_and_biases_started_ends_when_the_launcher_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "logs").mkdir()
    with subprocess.Popen(command("followed_by_wandb", str(tmp_path)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert started
    assert psutil.wait_procs(started, timeout=60)[1] == []  # its own service looks for its parent every few seconds
