"""zinf bench links with real ranks: its file, with that of bench nvme, is a profile the planner takes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab import namespace_lab
from programs import environment
from zinf_cli.cli import app
from zinf_cli.commands import bench
from zinf_cli.machine.profile_file import load_measured, load_profile


def test_both_benches_make_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and ranks are real; ranks measure small things, since a minute of products would prove no more."""
    monkeypatch.setattr(bench, "LINKS", "programs.small_links")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    out = tmp_path / "hardware.yaml"
    for command in (["links"], ["nvme", str(tmp_path), "--size", "16MiB", "--block-sizes", "1MiB", "--threads", "2"]):
        done = CliRunner().invoke(app, ["bench", *command, "--out", str(out), "--json"])
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        if command == ["links"]:
            assert {"matmul", "block", "adamw", "collective", "cpu_memory"} <= set(found)
    profile = load_profile(str(out))
    assert profile.flops("fp32", 256) > 1e8
    assert profile.adamw > 1e6
    assert profile.collective_inside > 1e6
    answer = CliRunner().invoke(app, ["estimate", "--params", "100M", "--hardware", str(out), "--json"])
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
