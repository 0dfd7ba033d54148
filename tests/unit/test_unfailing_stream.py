"""A screen that is closed, full or stands still ends nobody who prints."""

from __future__ import annotations

import os
import subprocess
import time
from typing import IO

import pytest

from programs import command


def prints(stderr: IO[bytes] | int, count: int = 3000) -> int:
    return subprocess.run(command("prints_lines", count), stderr=stderr, timeout=30, check=False).returncode


def test_a_full_drive() -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        assert prints(full) == 0


def test_a_pipe_that_nobody_reads_from() -> None:
    end, other = os.pipe()
    os.close(end)
    assert prints(other) == 0
    os.close(other)


def test_a_terminal_that_is_gone() -> None:
    ours, terminal = os.openpty()
    os.close(ours)
    assert prints(terminal) == 0
    os.close(terminal)


def test_a_closed_descriptor_is_taken_by_no_other_file() -> None:
    words = ["sh", "-c", '"$@" 2>&- <&-', "sh", *command("prints_lines", 1)]
    assert subprocess.run(words, check=False).returncode == 0


def test_a_reader_that_stands_still_is_told_what_it_missed() -> None:
    end, other = os.pipe()
    began = time.monotonic()
    assert prints(other, 20_000) == 0  # more than a pipe holds
    assert time.monotonic() - began < 20
    os.close(other)
    with open(end, "rb") as pipe:  # noqa: PTH123
        assert pipe.read().startswith(b"line 0\nline 1\n")


def test_what_was_left_out_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    from zinf_cli.unfailing_stream import _Unfailing

    end, other = os.pipe()
    os.set_blocking(other, False)
    stream = _Unfailing(other)
    assert stream.write(b"x" * (1 << 20)) == 1 << 20
    taken = len(os.read(end, 1 << 20))
    stream.write(b"again\n")
    assert os.read(end, 1 << 20).decode() == f"note: {(1 << 20) - taken} bytes could not be written here\nagain\n"
    os.close(end)
    os.close(other)
