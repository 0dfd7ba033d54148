"""A run's folder on a host: what is sent of it, and what becomes of what others left there."""

from __future__ import annotations

from pathlib import Path

import pytest

from zinf_cli.run_folder.mirror import RunFolder


def news(folder: RunFolder) -> list[tuple[str, int, bytes]]:
    return sorted(folder.news())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def opened(path: Path, launch_id: str = "this") -> RunFolder:
    folder = RunFolder(str(path), [str(path / "nvme")], launch_id)
    folder.open({"recipe.yaml": "seed: 0\n"})
    return folder


def test_what_is_appended_is_sent_once(path: Path) -> None:
    folder = opened(path)
    (path / "metrics.jsonl").write_text("one\n")
    (path / "logs" / "rank-00000.log").write_bytes(b"x" * 300_000)
    (path / "logs" / "error-00000.json.123.partial").write_text("half of it")
    (path / "checkpoints").mkdir()
    log = "logs/rank-00000.log"
    assert news(folder) == [(log, 0, b"x" * (1 << 18)), ("metrics.jsonl", 0, b"one\n")]
    assert folder.behind
    assert news(folder) == [(log, 1 << 18, b"x" * (300_000 - (1 << 18)))]
    assert not folder.behind
    with (path / "metrics.jsonl").open("a") as metrics:
        metrics.write("two\n")
    assert news(folder) == [("metrics.jsonl", 4, b"two\n")]
    assert news(folder) == []
    folder.remove()
    assert [entry.name for entry in path.iterdir()] == ["checkpoints"]


def test_the_launchers_own_folder_is_neither_written_nor_emptied(path: Path) -> None:
    path.mkdir()
    (path / ".this").touch()
    (path / "metrics.jsonl").write_text("one\n")
    folder = opened(path)
    assert not folder.mirrored
    assert not (path / "recipe.yaml").exists()
    folder.remove()
    assert (path / "metrics.jsonl").read_text() == "one\n"


def test_what_another_launch_left_is_set_aside_and_ones_own_is_taken_up(path: Path) -> None:
    (path / "logs").mkdir(parents=True)
    (path / "logs" / "rank-00000.log").write_text("another's")
    (path / "thesis.tex").write_text("no run's")
    first = opened(path)
    assert (path / "earlier" / "1" / "logs" / "rank-00000.log").read_text() == "another's"
    (path / "logs" / "rank-00000.log").write_text("ours")
    assert news(first) == [("logs/rank-00000.log", 0, b"ours")]
    first.leave()  # as a supervisor does that is cut off
    again = opened(path)
    assert news(again) == [("logs/rank-00000.log", 0, b"ours")]
    again.remove()
    assert sorted(entry.name for entry in path.iterdir()) == ["earlier", "thesis.tex"]


def test_a_folder_that_was_there_stays_and_one_that_was_made_goes_with_its_parents(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    opened(tmp_path / "mine").remove()
    assert not list((tmp_path / "mine").iterdir())
    deep = tmp_path / "mine" / "deep" / "run"
    opened(deep).leave()  # as a supervisor does that is cut off
    opened(deep).remove()
    assert not list((tmp_path / "mine").iterdir())


def test_two_launches_do_not_share_a_folder(path: Path) -> None:
    folder = opened(path)
    (path / "notes").touch()
    with pytest.raises(OSError, match="another run is using this folder"):
        opened(path, "other")
    (path / "notes").unlink()
    folder.remove()
    assert not path.exists()
    opened(path, "other").remove()
