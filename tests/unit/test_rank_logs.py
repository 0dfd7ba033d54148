"""Which lines of the ranks' logs a user sees while they run."""

from __future__ import annotations

import subprocess
import tracemalloc
from pathlib import Path

from programs import command
from zinf_cli.launch.logs import RankLogs
from zinf_cli.recipe.hosts import Host
from zinf_cli.run_folder.log_end import last_lines

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


def test_a_rank_that_prints_100_mb_is_followed_in_bounded_memory(tmp_path: Path) -> None:
    write(tmp_path, 0, "")
    logs = RankLogs(tmp_path, HOSTS)
    path = tmp_path / "logs" / "rank-00000.log"
    with path.open("ab") as log, subprocess.Popen(command("prints_100_mb"), stdout=log) as rank:
        tracemalloc.start()
        polls: list[list[str]] = []
        while rank.poll() is None or path.stat().st_size > logs._offsets.get(0, 0):
            polls.append([line.text for line in logs.poll()])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert path.stat().st_size > 90e6
    assert peak < 30e6
    assert max(map(len, polls)) <= 41
    write(tmp_path, 0, "and after\n")
    shown = [text for poll in polls for text in poll] + [line.text for line in logs.poll()]
    assert "and after" in shown
    assert any("of the ranks' output are not shown here" in text for text in shown)
    assert last_lines(path, 2) == ["the last line", "and after"]


def test_a_line_without_an_end(tmp_path: Path) -> None:
    logs = RankLogs(tmp_path, HOSTS)
    write(tmp_path, 0, "#" * (3 << 20))
    write(tmp_path, 2, "error " + "#" * (3 << 20))
    for _ in range(12):
        assert all(len(line.text) <= 2000 for line in logs.poll())
    write(tmp_path, 0, "\nand after\n")
    write(tmp_path, 2, "\nwarning: more\n")
    assert {"and after", "warning: more"} <= {line.text for line in logs.poll()}
