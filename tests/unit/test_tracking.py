"""What follows a run: TensorBoard, Weights & Biases and MLflow by their own libraries, none of which may hold it up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offline_runs import offline_runs
from small_drives import fill
from tiny_recipes import recipe_of
from zinf_cli.errors import PreflightError
from zinf_cli.recipe.recipe import Logging
from zinf_cli.tracking import trackers
from zinf_cli.tracking.board import Board
from zinf_cli.tracking.chosen import check_trackers, tracking_of
from zinf_cli.tracking.trackers import Tracker, Tracking

Tracked = Callable[..., list[str]]


def line(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "lr": 0.1, "nvme_bytes": 7, **more}


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracked:
    """Follows some lines of a run in `tmp_path`/run; what the user was told."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    recipe = recipe_of(tmp_path, "llama")
    (tmp_path / "run" / "logs").mkdir(parents=True)

    def follow(*lines: dict[str, Any], status: str = "done", **logging: Any) -> list[str]:
        said: list[str] = []
        asked = recipe.model_copy(update={"logging": Logging(**{"tensorboard": False, **logging})})
        tracking = tracking_of(asked, tmp_path / "run", said.append)
        for each in lines:
            tracking.write(each)
        tracking.close(status)
        return said

    return follow


def test_tensorboard_reads_the_curves_of_a_run_that_went_on(tmp_path: Path, tracked: Tracked) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):  # the first one had done four steps when it crashed
        steps = [line(step, step / 2 + start) for step in range(start + 1, start + 5)]
        assert tracked(*steps, line(start + 5, None, skipped=True), tensorboard=True) == []
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["loss", "lr"]
    curve = [(point.step, point.value) for point in read.Scalars("loss")]
    assert curve == [(1, 0.5), (2, 1.0), (3, 3.5), (4, 4.0), (5, 4.5), (6, 5.0)]


def test_wandb_has_the_run_and_goes_on_with_it(tmp_path: Path, tracked: Tracked) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    before = line(0, None, eval_loss=5.0)
    first = tracked(before, line(1, 4.0), line(2, None), line(3, 2.0), wandb="mine", interval=1, status="failed")
    second = tracked(line(3, 2.0), line(4, 1.0, eval_loss=0.5), wandb="mine")
    assert [said.startswith("wandb: offline; to upload it, wandb sync ") for said in first + second] == [True, True]
    runs = offline_runs(tmp_path / "run")
    assert len({run.known_as for run in runs}) == 1
    assert [run.project for run in runs] == ["mine", "mine"]
    assert [run.exit_code for run in runs] == [1, 0]
    assert runs[0].config["train.seq_len"] == 16
    losses = [{point["_step"]: point.get("loss") for point in run.history} for run in runs]
    assert losses == [{0: None, 1: 4.0, 2: None, 3: 2.0}, {3: 2.0, 4: 1.0}]
    assert runs[0].history[0]["eval_loss"] == 5.0
    assert "nvme_bytes" not in runs[0].history[1]


@pytest.mark.filterwarnings("ignore")  # of the libraries below MLflow
def test_mlflow_has_the_run_and_goes_on_with_it(tmp_path: Path, tracked: Tracked) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    assert len(tracked(line(1, 4.0), line(2, None), line(3, 2.0), mlflow="mine", status="failed")) == 1
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert run.info.run_name == "run"
    assert run.data.params["train.seq_len"] == "16"
    tracked(line(4, 1.0), mlflow="mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 4.0), (3, 2.0), (4, 1.0)]
    assert client.get_metric_history(run.info.run_id, "nvme_bytes") == []


def test_wandb_asks_for_no_key(tracked: Tracked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed").teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    said = tracked(line(1, 4.0), wandb="mine")
    assert said == [
        "wandb: no key for its server is known (wandb login, or set WANDB_MODE=offline); the run goes on without it"
    ]


def test_a_library_that_is_not_here_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zinf_cli.tracking.chosen.find_spec", lambda name: None)
    check_trackers(Logging())
    with pytest.raises(PreflightError) as refused:
        check_trackers(Logging(mlflow="mine"))
    assert refused.value.line() == (
        "logging.mlflow: mlflow is not installed (pip install 'zinf[mlflow]', or leave the key out)"
    )


class Deaf:
    """A tracker that takes a step when it is allowed to."""

    def __init__(self, may_go_on: threading.Event) -> None:
        self.took: list[int] = []
        self._may_go_on = may_go_on

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._may_go_on.wait()
        self.took.append(step)

    def close(self, status: str) -> None:
        self._may_go_on.wait()


def test_a_tracker_that_hangs_or_fails_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.1)
    released, said = threading.Event(), list[str]()
    deaf, well = Deaf(released), Deaf(released)

    def broken() -> Tracker:
        raise RuntimeError("\nno such server\nand more")

    tracking = Tracking({"deaf": lambda: deaf, "broken": broken, "well": lambda: well}, 2, said.append)
    for step in range(1, 6):
        tracking.write(line(step, 1.0))
    tracking.close("done")
    assert said[0] == "broken: no such server; the run goes on without it"
    assert said[1:] == [
        f"{name}: does not end, and may lack the last steps; metrics.jsonl has them all" for name in ("deaf", "well")
    ]
    released.set()
    tracking.close("done")
    assert [deaf.took, well.took] == [[2, 4], [2, 4]]


def test_a_board_on_a_drive_without_room_is_given_up(small_drive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    fill(small_drive)
    tracking = Tracking({"tensorboard": partial(Board, small_drive)}, 1, said.append)
    for step in range(1, 100):
        tracking.write(line(step, 1.0))
    tracking.close("done")
    assert said == ["tensorboard: No space left on device; the run goes on without it"]
    assert capfd.readouterr().err == ""
