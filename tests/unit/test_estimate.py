"""zinf estimate by its flags: the answer, its JSON, its screen, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from programs import command
from zinf_cli.amounts import format_seconds
from zinf_cli.commands.estimate import Flags, estimate_by_flags, scenario_of
from zinf_cli.errors import CapacityError, UsageError
from zinf_cli.plan.estimate import estimate


@pytest.fixture(autouse=True)
def no_profile_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def answer(capsys: pytest.CaptureFixture[str], **flags: Any) -> dict[str, Any]:
    estimate_by_flags(Flags(**flags, as_json=True), Console(stderr=True))
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def screen(capsys: pytest.CaptureFixture[str], **flags: Any) -> str:
    estimate_by_flags(Flags(**flags), Console(width=130))
    return capsys.readouterr().out


def test_a_trillion_parameters_on_one_dgx2(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, params="1T", hardware="dgx2")
    assert found["fits"] is True
    assert found["params"] == pytest.approx(1.01e12, abs=5e9)
    assert found["model_states_bytes"] == 18 * found["params"]  # in fp16
    assert found["state_working_bytes"] / 2**30 == pytest.approx(9.77, abs=0.005)
    assert set(found["activation_bytes"]) == {"full", "checkpoints", "working"}
    assert found["placement"]["optimizer"] == "nvme"
    assert set(found["efficiency"]) == {"params", "optimizer", "activations"}
    assert all(0 < share < 1 for share in found["efficiency"].values())
    for tier in ("device", "cpu", "nvme"):
        assert 0 < found["tiers"][tier]["need_bytes"] <= found["tiers"][tier]["may_use_bytes"]
        assert sum(found["tiers"][tier]["terms"].values()) == pytest.approx(found["tiers"][tier]["need_bytes"], abs=9)
    assert found["bottleneck"] == "nvme"
    assert found["step_s_with_bottleneck_doubled"] < found["step_s"]


def test_a_machine_with_one_pool_has_its_memory_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, params="30B", hardware="dgx-spark")
    device, cpu = found["tiers"]["device"], found["tiers"]["cpu"]
    assert cpu["terms"]["device"] == pytest.approx(device["need_bytes"], abs=10)
    assert cpu["need_bytes"] > device["need_bytes"]
    assert "cpu with device" in screen(capsys, params="30B", hardware="dgx-spark")


def test_the_answer_needs_nothing_heavy() -> None:
    words = command("imported", "zinf_cli.cli:main", "estimate", "--params", "1T", "--hardware", "dgx2")
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = set(done.stderr.splitlines()[-1].split())
    assert "zinf_cli.plan.estimate" in imported
    assert not {"torch", "transformers", "numpy", "fabric", "zinf_cli.recipe.recipe"} & imported


@pytest.mark.parametrize("nodes", [1, 64])
def test_more_micro_batches_hide_more_traffic(nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    few, many = (answer(capsys, params="100B", hardware="dgx2", nodes=nodes, accumulation=count) for count in (1, 16))
    assert many["micro_batches"] == 16
    assert many["tflops_per_gpu"] > few["tflops_per_gpu"]


def test_a_hostfile_counts_the_hosts(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=16\nb slots=16\n")
    asked = [sys.executable, "-m", "zinf_cli.cli", "estimate", "--params", "1T", "--hosts", str(hostfile), "--json"]
    found = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert (found["nodes"], found["gpus_per_node"]) == (2, 16)
    hostfile.write_text("a slots=16\nb slots=8\n")
    for more, problem in (([], "8 and with 16 slots"), (["--nodes", "2"], "either --hosts or --nodes")):
        done = subprocess.run([*asked, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert problem in done.stderr


def test_pinned_tiers_stay(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, params="1B", hardware="dgx2", overrides=("offload.params=nvme", "train.seq_len=2048"))
    assert found["placement"]["params"] == "nvme"
    assert found["reasons"]["params"] == "as asked"
    assert found["seq_len"] == 2048


def test_a_small_model_stays_on_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, params="1B", hardware="dgx2")
    assert set(found["placement"].values()) == {"device"}
    assert found["bottleneck"] in ("compute", "network")


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CapacityError, match=r"nvme of a host needs .* may use .*fits on 5 of these hosts") as caught:
        answer(capsys, params="5T", hardware="dgx2")
    assert caught.value.exit_code == 4
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert answer(capsys, params="5T", hardware="dgx2", nodes=5)["fits"] is True
    with pytest.raises(CapacityError, match=r"fits with offload\.\* left to auto"):
        answer(capsys, params="100B", hardware="dgx2", overrides=("offload.optimizer=device",))


def test_the_largest_model_fits_and_a_larger_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    largest = answer(capsys, max_model=True, hardware="rtx4090-workstation")
    assert largest["fits"] is True
    with pytest.raises(CapacityError):
        answer(capsys, params=str(round(largest["params"] * 1.1)), hardware="rtx4090-workstation")


def test_the_screen_says_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    shown = screen(capsys, params="1T", hardware="dgx2", explain=True)
    for text in (
        "1.01T on 1 × dgx2",
        "16.5 TiB",
        "18 B · parameters (2 parameters, 4 gradients, 12 optimizer states)",
        "fits",
        "bound by",
        "give or take 20 %",
        "16 · hidden²",
        "█",
    ):
        assert text in shown
    assert "computed in parts" in shown
    assert "computed in parts" not in screen(capsys, params="7B", hardware="dgx2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"params": "one trillion"}, "--params: expected a count such as 135M, 7B or 1T"),
        ({"params": "12"}, "--params: 12 is no transformer"),
        ({"params": "1B", "layers": 3}, "give either --params or --layers"),
        ({"layers": 3}, "no model"),
        ({}, "no model"),
        ({"layers": 3, "hidden": 100, "heads": 7}, "can't be divided among 7 heads"),
        ({"params": "1B", "hardware": "dgx3"}, "no such profile"),
        ({"params": "1B", "strategy": "zero-4"}, "known: infinity"),
        ({"params": "1B", "global_batch": 3}, "3 sequences per step can't be dealt to 16 ranks"),
        ({"params": "1B", "overrides": ("offload.params=disk",)}, "expected auto, device, cpu or nvme"),
        ({"params": "1B", "overrides": ("optimizer.lr=1",)}, "not a key of an estimate without a recipe"),
        ({"params": "1B", "overrides": ("train.seq_len=many",)}, "expected a whole number"),
        ({"params": "1B", "timeline": Path("/proc/none/t.json")}, "can't write the timeline"),
    ],
)
def test_nonsense_is_refused_in_a_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        estimate_by_flags(Flags(**flags), Console(stderr=True))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_cpu_profile_has_no_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "hardware.yaml").write_text(
        "nvme: {folders: [/tmp], space: 100GiB, both: 2e9,\n"
        "  read: {bytes_per_s: 2e9, block_size: 4MiB, threads: 4},\n"
        "  write: {bytes_per_s: 1e9, block_size: 4MiB, threads: 4}}\n"
        "links: {accelerators: 0, cpu_memory: 16GiB, adamw: 5e8,\n"
        "  matmul: {fp32: {1024: 8e10}}, block: {fp32: {64: 6e10}}}\n"
    )
    found = answer(capsys, params="3B", hardware=str(tmp_path / "hardware.yaml"))
    assert set(found["tiers"]) == {"cpu", "nvme"}
    assert found["fits"] is True
    assert set(found["placement"].values()) <= {"cpu", "nvme"}


def test_512_gpus_are_simulated_in_a_blink() -> None:
    found = estimate(scenario_of(Flags(params="20T", hardware="dgx2", nodes=32)))
    assert found.fits
    assert found.scenario.world_size == 512


@pytest.mark.parametrize(
    ("value", "text"), [(0.12, "0.12 s"), (59.96, "60 s"), (1493, "24 min 53 s"), (12000, "3 h 20 min")]
)
def test_seconds_are_written_as_people_do(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_states_have_the_bytes_of_the_engine_and_other_strategies_those_of_the_paper(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The A100 and later compute in bf16, whose master is the parameter and two bytes more; the V100 in fp16."""
    for hardware, strategy, each in (
        ("dgx-h100", "infinity", 16), ("dgx2", "infinity", 18), ("dgx2", "infinity-cpu", 18), ("dgx2", "zero-3", 20),
    ):  # fmt: skip
        found = answer(capsys, params="1.3B", hardware=hardware, strategy=strategy)
        assert found["model_states_bytes"] == each * found["params"]
        terms = [tier["terms"] for tier in found["tiers"].values()]
        held = sum(term.get(state, 0) for term in terms for state in ("params", "grads", "optimizer"))
        assert held == pytest.approx(each * found["params"], abs=9)
