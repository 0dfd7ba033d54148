"""What `ps` shows of a launch, here and on its hosts: no value of a variable."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from programs import command
from zinf_cli.command_line import without_values
from zinf_cli.launch.connection import Lifelines
from zinf_cli.launch.pipes import Pipes
from zinf_cli.launch.program import Agent
from zinf_cli.recipe.hosts import this_machine

SECRET = "s3cret-of-the-test"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["launch", "--env", f"A={SECRET}", "a.yaml"], ["launch", "--env", "A=*", "a.yaml"]),
        (["launch", f"--env=A={SECRET}", "train.lr=1"], ["launch", "--env=A=*", "train.lr=1"]),
        (["launch", "--env", f"A=b={SECRET} x\n", "--env", "HOME"], ["launch", "--env", "A=*", "--env", "HOME"]),
        (["launch", "--env", "A=1", "--env", f"B={SECRET}"], ["launch", "--env", "A=*", "--env", "B=*"]),
    ],
)
def test_the_launcher_hides_values_and_still_has_them(given: list[str], shown: list[str]) -> None:
    done = subprocess.run(command("shows_itself", *given), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"shown": shown, "given": given}


@given(st.lists(st.sampled_from([b"--env", b"--env=", b"--env=A=1", b"A=12", b"A=", b"=", b"", b"A", b"--env=A"])))
def test_words_never_grow(words: list[bytes]) -> None:
    hidden = without_values(words, b"--env")
    assert len(hidden) == len(words)
    assert all(len(after) <= len(before) for after, before in zip(hidden, words, strict=True))


def test_no_process_of_a_host_is_started_with_one() -> None:
    secret = f"{SECRET}-on-a-host"
    says = "import os, sys; print(os.environ['LAB_SECRET'], flush=True); sys.stdin.read()"
    with Lifelines(Pipes()) as lifelines:
        connection = lifelines.connect(this_machine(1))
        told = Agent("zinf_cli.train.loop", {"LAB_SECRET": secret}).start()
        connection.request("stand_by", **{**told, "command": [sys.executable, "-c", says]})
        assert connection.hear_event(20) == {"event": "said", "line": secret}  # it runs, and has it
        assert secret not in " ".join(told["command"])
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                assert secret.encode() not in (process / "cmdline").read_bytes()
