"""metrics.jsonl after a power cut and on a full drive: the run goes on."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from zinf_cli.errors import TierError
from zinf_cli.run_folder.metrics import Metrics


def line(at: int, **values: Any) -> bytes:
    names = ("tokens", "step_s", "tokens_per_s", "tflops_per_rank", "wait_s", "device_bytes", "cpu_bytes", "nvme_bytes",
             "nvme_read_bytes", "nvme_write_bytes", "lr", "grad_norm")  # fmt: skip
    whole = {"step": at, "loss": 4.5, "updated_in_backward": False, **dict.fromkeys(names, 1)}
    return json.dumps({**whole, **values}).encode()


DAMAGED = {
    "zeros": bytes(300),
    "half a line": line(3)[:40],
    "the other half": line(3)[40:],
    "two halves": line(3)[:40] + line(4)[70:],
    "no UTF-8": b'{"step": 3, "loss": "\xff\xfe"}',
    "nothing": b"",
    "no object": b"[1, 2]",
    "a string": b'"step"',
    "null": b"null",
    "no step": b'{"loss": 4.5}',
    "a step that is a string": line(3, step="3"),
    "a step that is a fraction": line(3, step=2.5),
    "a step that is true": line(3, step=True),
    "a loss that is a list": line(3, loss=[4.5]),
    "tokens that are a string": line(3, tokens="many"),
    "seconds that are missing": line(3, step_s=None),
    "a loss and nothing else": b'{"step": 3, "loss": 4.5}',
    "deep": b"[" * 100_000,
    "carriage returns": b"\r\r",
}


def open_metrics(run_dir: Path, step: int, said: list[str]) -> Metrics:
    return Metrics(run_dir, said.append, step)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_left_out_and_said(damage: str, tmp_path: Path) -> None:
    kept = [
        b'{"step": 0, "eval_loss": 4.6}',
        line(1),
        line(2, loss=None, grad_norm=None),
        line(4),
        line(5, skipped="why"),
    ]
    lines = [*kept[:3], DAMAGED[damage], kept[3], kept[4], line(6)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n" + line(7)[:30])
    said: list[str] = []
    metrics = open_metrics(tmp_path, 5, said)
    metrics.write({"step": 6, "loss": float("inf")})
    metrics.close()
    found = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert found == [*kept, b'{"step": 6, "loss": null}']
    assert said == [f"{tmp_path / 'metrics.jsonl'}: 1 lines are not as they were written, and left out"]


def test_a_run_that_was_killed_in_a_line_has_nothing_to_say(tmp_path: Path) -> None:
    said: list[str] = []
    for rest in (b"", line(2)[:20], line(2)):
        (tmp_path / "metrics.jsonl").write_bytes(line(1) + b"\n" + rest)
        open_metrics(tmp_path, 2, said).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(1) + b"\n" + line(2) + b"\n"
    (tmp_path / "metrics.jsonl").unlink()
    open_metrics(tmp_path, 2, said).close()
    assert said == []


@contextmanager
def refusing(call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        yield


def test_lines_wait_for_room_on_a_full_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    metrics = open_metrics(tmp_path, 0, said)
    metrics.write({"step": 1, "loss": 1.0})
    with refusing("write", errno.ENOSPC, monkeypatch), refusing("fsync", errno.EIO, monkeypatch):
        for step in (2, 3):
            metrics.write({"step": step, "loss": 1.0})
            metrics.sync()
    assert said == [f"{metrics.path}: can't be written now: No space left on device; the run goes on"]
    write: Callable[..., int] = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:7]))
        metrics.write({"step": 4, "loss": 1.0})
    metrics.close()
    assert [json.loads(text)["step"] for text in metrics.path.read_bytes().splitlines()] == [1, 2, 3, 4]


def test_a_file_that_can_not_be_begun_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        refusing("fsync", errno.ENOSPC, monkeypatch),
        pytest.raises(TierError, match=r"metrics\.jsonl: can't be written"),
    ):
        open_metrics(tmp_path, 0, [])
    assert list(tmp_path.iterdir()) == []
