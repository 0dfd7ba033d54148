"""Which lines of the ranks' logs a user sees while they run."""

from __future__ import annotations

from pathlib import Path

from zinf_cli.hosts import Host
from zinf_cli.launch.logs import RankLogs

HOSTS = (Host("node1", (0, 1)), Host("node2", (0,)))


def write(run_dir: Path, rank: int, text: str) -> None:
    (run_dir / "logs").mkdir(exist_ok=True)
    with (run_dir / "logs" / f"rank-{rank:05d}.log").open("a") as log:
        log.write(text)


def test_rank_0_and_the_warnings_of_all(tmp_path: Path) -> None:
    write(tmp_path, 1, "warning: of an earlier run that this one goes on from\n")
    logs = RankLogs(tmp_path, HOSTS)
    assert list(logs.poll()) == []
    write(tmp_path, 0, "--- rank 0 on node1\nloading\nhalf a li")
    write(tmp_path, 1, "chatter\nUserWarning: slow\n")
    write(tmp_path, 2, "UserWarning: slow\nnote: buffered I/O\n")
    assert [(line.host, line.rank, line.text) for line in logs.poll()] == [
        ("node1", 0, "loading"),
        ("node1", 1, "UserWarning: slow"),  # once, though rank 2 says it as well
        ("node2", 2, "note: buffered I/O"),
    ]
    write(tmp_path, 0, "ne\nTraceback (most recent call last):\n  File ...\nRuntimeError: no\n")
    assert [line.text for line in logs.poll()] == ["half a line"]
    assert list(logs.poll()) == []
    (tmp_path / "logs" / "rank-00001.log").write_text("warning: anew\n")
    assert [line.text for line in logs.poll()] == ["warning: anew"]
