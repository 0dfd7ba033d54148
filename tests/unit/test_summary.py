"""What of a run is held against its plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from zinf_cli.errors import UsageError
from zinf_cli.launch.failure import first_failure
from zinf_cli.launch.summary import _steady
from zinf_cli.run_folder.metrics import Watch
from zinf_cli.run_folder.names import START
from zinf_cli.trace import summarise_trace


@pytest.mark.parametrize(
    ("updated", "steady"),
    [
        ([0, 0, 0], [1, 2]),
        ([0, 0, 2, 2, 2, 0], [1, 3, 4]),  # the third updates twice, the last not at all
        ([0], [0]),
        ([0, 2], [0, 1]),
        ([], []),
    ],
)
def test_steps_that_follow_one_of_their_kind_are_compared(updated: list[int], steady: list[int]) -> None:
    steps = [{"step": number, "updated_in_backward": count} for number, count in enumerate(updated)]
    assert [step["step"] for step in _steady(steps)] == steady


@pytest.mark.parametrize("content", ["", "\0" * 8, '{"st'])
def test_files_that_are_not_whole_are_not_there(tmp_path: Path, content: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / START).write_text(content)
    (tmp_path / "logs" / "error-00000.json").write_text(content)
    watch = Watch(tmp_path, lambda line: None)
    watch.poll()
    assert watch.first_step is None
    (tmp_path / START).write_text('{"step": 3}')
    watch.poll()
    assert watch.first_step == 3
    assert first_failure(tmp_path, []) is None


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b'{"traceEvents": [1]}', b'{"traceEvents": [{"ph": "X"}]}', b"\xff"]
)
def test_what_is_no_trace_is_called_that(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(UsageError, match="not a trace"):
        summarise_trace(tmp_path / "trace.json")
