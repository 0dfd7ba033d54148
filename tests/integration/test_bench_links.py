"""zinf bench links with real ranks: its file, with that of bench nvme, is a profile the planner takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import namespace_lab
from zinf_cli.machine.profile_file import load_measured, load_profile


def test_both_benches_make_a_profile(tmp_path: Path) -> None:
    out = tmp_path / "hardware.yaml"
    zinf = [sys.executable, "-m", "zinf_cli.cli"]
    for command in (["links"], ["nvme", str(tmp_path), "--size", "16MiB", "--block-sizes", "1MiB", "--threads", "2"]):
        done = subprocess.run(
            [*zinf, "bench", *command, "--out", str(out), "--json"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        if command == ["links"]:
            assert {"matmul", "block", "adamw", "collective", "cpu_memory"} <= set(found)
    profile = load_profile(str(out))
    assert profile.flops("fp32", 256) > 1e8
    assert profile.adamw > 1e6
    assert profile.collective_inside > 1e6
    asked = [*zinf, "estimate", "--params", "100M", "--hardware", str(out), "--json"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["step_s"] > 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif("ZINF_FAULT_MOMENTS" not in os.environ, reason="takes a minute: make test-faults runs it")
def test_hosts_are_measured_together(tmp_path: Path) -> None:
    with namespace_lab(tmp_path, 2) as lab:
        command = lab.zinf("bench", "links", "--hosts", lab.hostfile(), "--out", str(tmp_path / "h.yaml"), "--json")
        done = subprocess.run(command, env=lab.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["across"] > 1e6
        assert "collective" not in found
        assert "node2" in done.stderr
        assert lab.left_behind() == []
    assert load_measured(tmp_path / "h.yaml").name == "node1"
