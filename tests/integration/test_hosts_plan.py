"""`zinf launch --hosts --dry-run`: the plan of many hosts, made without a connection to any of them."""

from __future__ import annotations

import json

import pytest

from workshop import Workshop
from zinf_cli.machine.drive_files import GROWTH


def test_a_dry_run_plans_for_every_host_and_opens_no_connection(workshop: Workshop) -> None:
    hostfile = workshop.folder / "hosts"
    hostfile.write_text("alice@no-such-host.invalid:2222 slots=2\nother.invalid slots=2\n")
    ended = workshop.launch("--hosts", str(hostfile), "--exclude", "other.invalid:0", "--dry-run", "--json")
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert plan["hosts"] == [
        {"host": "no-such-host.invalid", "user": "alice", "port": 2222, "slots": [0, 1], "job": None, "gpus": 0},
        {"host": "other.invalid", "user": None, "port": None, "slots": [1], "job": None, "gpus": 0},
    ]
    assert plan["world_size"] == 3
    assert "2 (no-such-host.invalid:2222, other.invalid), 3 CPU ranks" in ended.err
    # what a host must have is what its own two ranks need, not all three
    (nvme,) = (limit["needed"] for limit in plan["limits"] if limit["tier"] == "nvme")
    assert nvme == 2 * (plan["nvme_bytes"] + GROWTH)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hosts", "nowhere"], "nowhere: No such file"),
        (["--hosts", "HOSTS", "--include", ""], 'error: --include "": expected HOST'),
        (["--hosts", "HOSTS", "--slots", "2"], "--slots is for this machine"),
        (["--include", "node1"], "--include and --exclude choose among --hosts"),
    ],
)
def test_hosts_that_make_no_sense(workshop: Workshop, arguments: list[str], said: str) -> None:
    hostfile = workshop.folder / "hosts"
    hostfile.write_text("node1 slots=2\n")
    ended = workshop.launch(*(str(hostfile) if word == "HOSTS" else word for word in arguments))
    assert ended.code == 2
    assert said in ended.message
