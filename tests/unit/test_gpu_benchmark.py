"""What `make gpu-check` measures follows from the machine; its runs have a limit of time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.case import MODELS, Case
from benchmarks.choice import Machine, choose, needs
from benchmarks.gpu import CASE, SMALLER
from benchmarks.gpu import MODELS as TRAINED
from benchmarks.limited import run_limited
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.train.figures import _flops_per_token

GIB = 2**30
H200 = Machine(device=139 * GIB, cpu=122 * GIB, drive=55 * GIB, drive_bytes_per_s=2e9)


def chosen(machine: Machine) -> tuple[list[str], list[str]]:
    """Of each trial its contender, its model and the first place for its state; and what is left out."""
    trials, left_out = choose(machine, CASE, TRAINED, SMALLER, longest_step_s=10.0)
    return [f"{t.ways[0].contender}, {t.case.model}: {t.ways[0].states_on}" for t in trials], left_out


def test_what_does_not_fit_is_left_out_with_the_numbers() -> None:
    trials, left_out = chosen(H200)
    assert trials == [
        "zinf, 3B: CPU memory",
        "zinf, 8B: CPU memory, gradients on the device",
        "plain PyTorch, 3B: device",
        "FSDP2 with CPU offload, 3B: CPU memory, whole gradients on the device",
        "zinf, 216M: NVMe",
    ]
    assert left_out == [
        "plain PyTorch, 8B: device: it takes 138 GiB of device, of which 139 GiB is free",
        "FSDP2 with CPU offload, 8B: CPU memory, whole gradients on the device: it takes 120 GiB of cpu, "
        "of which 122 GiB is free",
        "zinf, 3B: NVMe: it takes 59.1 GiB of nvme, of which 55.0 GiB is free",
        "zinf, 8B: NVMe: it takes 143 GiB of nvme, of which 55.0 GiB is free",
        "zinf, 1B: NVMe: a step would take 22 s, as the drive reads and writes at 2.00 GB/s",
    ]


@pytest.mark.parametrize("device", [24, 80, 139])
@pytest.mark.parametrize("cpu", [16, 64, 500])
@pytest.mark.parametrize("drive", [8, 2000])
def test_every_choice_fits(device: int, cpu: int, drive: int) -> None:
    machine = Machine(device * GIB, cpu * GIB, drive * GIB, 6e9)
    trials, left_out = choose(machine, CASE, TRAINED, SMALLER, longest_step_s=60.0)
    for way, case in ((way, trial.case) for trial in trials for way in trial.ways):
        need = needs(way, case, on_accelerator=True)
        assert need["device"] < device * GIB
        assert need["cpu"] < cpu * GIB
        assert need["nvme"] < drive * GIB
    assert len({(t.ways[0].contender, t.case.model, t.ways[0].states_on == "NVMe") for t in trials}) == len(trials)
    assert trials
    assert bool(left_out) == (trials != choose(Machine(1 << 60, 1 << 60, 1 << 60, 1e15), CASE, TRAINED, (), 60.0)[0])


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_a_case_are_those_of_the_plan(name: str) -> None:
    case = Case(1, 2048, name)
    model = build_model(ModelSource(None, case.config, "random", 0))
    assert case.num_params == sum(param.numel() for param in model.parameters())
    assert case.flops_per_token == _flops_per_token(model, case.tokens)


STEP = "echo '{\"step_s\": 0.1}' >> steps; "


def test_steps_and_exit_status_of_a_command_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run_limited(["sh", "-c", STEP + STEP + "echo no room; exit 4"], os.environ, tmp_path / "steps", 60.0)
    assert (ended.code, ended.steps, ended.said) == (4, [{"step_s": 0.1}] * 2, "no room\n")


def test_a_command_whose_time_is_up_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last step counts: zinf ends after the step in which it is interrupted."""
    monkeypatch.chdir(tmp_path)
    words = ["sh", "-c", "end() { " + STEP + "exit; }; trap end INT; while :; do sleep 0.1; done"]
    ended = run_limited(words, os.environ, tmp_path / "steps", 1.0)
    assert (ended.code, len(ended.steps)) == (None, 1)
