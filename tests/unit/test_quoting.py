"""What reaches a remote shell arrives word by word, whatever an interpreter's path has in it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.launch.transport import remote_line, supervisor_command, supervisor_program

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40) | st.text(
    "a b$`'\"\\\n;&|<>(){}*?[]!#~-", min_size=1, max_size=20
)


@pytest.mark.parametrize("shell", [shell for shell in ("sh", "bash", "zsh") if shutil.which(shell)])
@given(name=names.filter(lambda name: name not in (".", "..")))
def test_the_words_of_a_command_arrive_as_they_are(shell: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / name
        python.symlink_to(str(shutil.which("echo")))
        command = supervisor_command(str(python), b"x" * 123, "0" * 32)
        done = subprocess.run([shell, "-c", remote_line(command)], capture_output=True, text=True, check=False)
    assert done.stdout == f"{' '.join(command[command.index(str(python)) + 1 :])}\n", done.stderr


def test_the_program_of_a_supervisor_stands_alone() -> None:
    """It runs in a Python that has nothing but the standard library, and ends when its lifeline does."""
    program = supervisor_program("0" * 32, 10.0)
    python = str(shutil.which("python3", path="/usr/bin:/bin") or shutil.which("python3"))
    *before, _, isolated, loads, loader, size = supervisor_command(python, program, "0" * 32)
    done = subprocess.run(
        [*before, python, isolated, "-S", loads, loader, size],
        input=program,
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b'{"event": "hello"')
    assert done.stderr == b""
