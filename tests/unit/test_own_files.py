"""What zinf removes is what zinf wrote; a drive that errs once costs no checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plain import engine_losses, open_engine
from tiny_models import random_source
from zinf_cli.checkpoint import folder as folders
from zinf_cli.checkpoint.manifest import MANIFEST, UNFINISHED, VERSION, Manifest
from zinf_cli.checkpoint.own_files import remove
from zinf_cli.checkpoint.verify import read_file, verify
from zinf_cli.engine.options import EngineOptions
from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import CheckpointError, DamagedError, UnreadableError
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.run_folder.mirror import RunFolder
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position

FILES = [("config.json", b"{}"), ("preprocessor_config.json", b"{}"), ("additional_chat_templates/tool.jinja", b"")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with three checkpoints."""
    run_dir = tmp_path_factory.mktemp("run")
    engine = open_engine(random_source("llama"), EngineOptions())
    engine_losses(engine, 1, close=False)
    for step in (2, 4, 6):
        writer = CheckpointWriter(run_dir, engine, Ranks(), lambda: iter(FILES), None)
        writer.write(Position(step, "fp32", step, "text", None, {}))
        writer.close()
    engine.close()
    return run_dir


@pytest.fixture
def run_dir(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run", symlinks=True))


def step(run_dir: Path, number: int) -> Path:
    return folders.step_folder(run_dir, number)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["step-00000003", "damaged-step-00000003"])
def test_a_file_named_as_a_checkpoint_is_the_users(run_dir: Path, name: str) -> None:
    file = run_dir / "checkpoints" / name
    file.write_text("mine")
    assert file not in folders.remains_of(run_dir) + folders.set_aside_in(run_dir) + folders.made_by_runs(run_dir)
    assert folders.remove_remains(run_dir) == []
    assert folders.keep_latest(step(run_dir, 6), 1) == []
    assert file.read_text() == "mine"
    if name == step(run_dir, 3).name:
        with pytest.raises(CheckpointError, match="a file, where a checkpoint"):
            folders.begin(file)
    assert remove(file) == []
    assert file.read_text() == "mine"


def test_a_checkpoint_that_was_renamed_is_the_users(run_dir: Path) -> None:
    best = run_dir / "checkpoints" / "best-model"
    for number in (2, 4):
        shutil.rmtree(step(run_dir, number))
    step(run_dir, 6).rename(best)
    (best / "NOTES.txt").write_text("the good one")
    before = names(best)
    assert folders.remove_remains(run_dir) == []
    assert names(run_dir / "checkpoints") == {"best-model"}  # the link led nowhere
    assert names(best) == before
    assert folders.steps_done(best) == 6


@pytest.mark.parametrize("how", ["half", "half, announced", "damaged manifest", "retention", "begin again"])
def test_only_what_a_run_wrote_goes(how: str, run_dir: Path) -> None:
    folder = step(run_dir, 2)
    (folder / "NOTES.txt").write_text("mine")
    (folder / "samples.partial").write_text("mine")
    (folder / "plots").mkdir()
    left = {"NOTES.txt", "samples.partial", "plots"}
    if how == "half":
        for name in (MANIFEST, *(name for name, _ in FILES)):
            (folder / name).unlink()
        (folder / "additional_chat_templates").rmdir()
        (folder / f"{MANIFEST}.123.partial").touch()
        gone = folders.remove_remains(run_dir)
    elif how == "half, announced":
        (folder / MANIFEST).unlink()
        folders.announce(folder, [name for name, _ in FILES])
        (folder / "config.json.77.partial").touch()
        gone = folders.remove_remains(run_dir)
    elif how == "damaged manifest":
        content = (folder / MANIFEST).read_bytes().replace(b'"step": 2', b'"step": 3')
        (folder / MANIFEST).write_bytes(content)
        gone = folders.keep_latest(step(run_dir, 6), 1)
    elif how == "retention":
        gone = folders.keep_latest(step(run_dir, 6), 1)
        assert not step(run_dir, 4).exists()
    else:
        folders.begin(folder)
        gone = [folder / name for name in left]
    assert names(folder) == left
    assert set(gone) == {folder / name for name in left}
    assert folders.remains_of(run_dir) == []  # it is nobody's business any more
    assert "NOTES.txt" in folders.kept_back(gone)


def test_a_folder_named_as_a_checkpoint_with_nothing_of_a_run_in_it_stays(run_dir: Path) -> None:
    (mine := step(run_dir, 9)).mkdir()
    (mine / "weights.txt").touch()
    (run_dir / "checkpoints" / "upload.partial").touch()
    (run_dir / "checkpoints" / "old").mkdir()
    (run_dir / "checkpoints" / "old" / "a.partial").touch()
    before = sorted(run_dir.rglob("*"))
    assert folders.remove_remains(run_dir) == []
    assert sorted(run_dir.rglob("*")) == before


def test_a_linked_checkpoint_is_resumed_from_and_left_alone(run_dir: Path, tmp_path: Path) -> None:
    shutil.move(step(run_dir, 2), tmp_path / "archive")
    step(run_dir, 2).symlink_to(tmp_path / "archive")
    assert step(run_dir, 2) in folders.checkpoints_of(run_dir)
    folders.keep_latest(step(run_dir, 6), 1)
    assert verify(tmp_path / "archive")[0].problem is None
    with pytest.raises(CheckpointError, match="a link, where a checkpoint is to be written"):
        folders.begin(step(run_dir, 2))


def test_what_is_later_than_the_newest_of_this_life_does_not_count(run_dir: Path) -> None:
    """A run that could not read step 6 went on from 4; 5 is its newest."""
    shutil.copytree(step(run_dir, 4), step(run_dir, 5))
    folders.keep_latest(step(run_dir, 5), 1)
    assert [folders.step_of(path) for path in folders.checkpoints_of(run_dir)] == [6, 5]


def test_what_could_not_be_removed_goes_with_the_next(run_dir: Path) -> None:
    (step(run_dir, 2) / MANIFEST).rename(step(run_dir, 2) / UNFINISHED)
    (half := step(run_dir, 8)).mkdir()  # being written
    folders.keep_latest(step(run_dir, 6), 2)
    assert names(run_dir / "checkpoints") == {step(run_dir, 4).name, step(run_dir, 6).name, half.name, "latest"}


def test_setting_aside_takes_no_ones_place(run_dir: Path) -> None:
    first = run_dir / "checkpoints" / f"damaged-{step(run_dir, 4).name}"
    first.mkdir()
    (first / "NOTES.txt").touch()
    folders.set_damaged_aside(run_dir, [step(run_dir, 4)])
    assert names(first) == {"NOTES.txt"}
    assert folders.set_aside_in(run_dir) == [first, first.with_name(f"{first.name}-2")]


def zinf(*arguments: object) -> str:
    command = [sys.executable, "-m", "zinf_cli.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_clean_asks_before_it_takes_what_was_set_aside_and_keeps_what_is_whole(run_dir: Path) -> None:
    for name in ("recipe.yaml", "plan.json", "mine.partial"):
        (run_dir / name).touch()
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "upload.partial").touch()
    whole, damaged = step(run_dir, 4), step(run_dir, 6)
    with (damaged / "rank-00000.safetensors").open("r+b") as file:
        file.write(b"?")
    (damaged / "NOTES.txt").touch()
    folders.set_damaged_aside(run_dir, [whole, damaged])
    whole, damaged = folders.set_aside_in(run_dir)
    before = sorted(run_dir.rglob("*"))
    said = zinf("clean", run_dir)
    assert f"{damaged}: a checkpoint that was set aside as damaged; --damaged removes it" in said
    assert "nothing removed" in said
    assert sorted(run_dir.rglob("*")) == before
    said = zinf("clean", run_dir, "--damaged")
    assert f"{whole}: a checkpoint that was set aside as damaged; it is whole after all" in said
    assert "(rank-00000.safetensors: damaged in bytes 0 to " in said
    assert "1 removed" in said
    assert f"not removed, since zinf did not write it: {damaged / 'NOTES.txt'}" in said
    assert not [verdict for verdict in verify(whole) if verdict.problem]
    assert names(damaged) == {"NOTES.txt"}


def test_a_mirror_leaves_what_it_did_not_send(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), [], "launch")
    folder.open({"recipe.yaml": "a: 1"})
    (tmp_path / "logs" / "rank-00000.log").write_text("said")
    assert [name for name, _, _ in folder.news()] == ["logs/rank-00000.log"]
    (tmp_path / "logs" / "mine").mkdir()
    (tmp_path / "logs" / "mine" / "NOTES.txt").touch()
    folder.remove()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["NOTES.txt", "logs", "mine"]


def once(call: Callable[..., Any], how: str) -> Callable[..., Any]:
    """`call`, wrong the first time."""
    asked = []

    def faulty(*arguments: Any, **named: Any) -> Any:
        asked.append(arguments)
        if len(asked) > 1:
            return call(*arguments, **named)
        if how == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        descriptor, (memory,), offset = arguments
        if how == "short":
            return call(descriptor, [memory[:7]], offset)
        count = call(descriptor, [memory], offset)
        memory[0] ^= 1
        return count

    return faulty


@pytest.mark.parametrize("how", ["EIO", "short", "flipped"])
@pytest.mark.parametrize("what", ["manifest", "small file", "piece", "verify"])
def test_a_read_that_is_wrong_once_is_read_again(
    what: str, how: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = step(run_dir, 6)
    manifest = Manifest.load(folder)
    reader = CheckpointReader(folder)
    expected = reader.read("model.norm.weight", "param", 0, 8)
    reader.close()
    monkeypatch.setattr(os, "preadv", once(os.preadv, how))
    if what == "manifest":
        assert Manifest.load(folder) == manifest
    elif what == "small file":
        assert read_file(folder, manifest, "config.json") == b"{}"
    elif what == "piece":
        assert reader.read("model.norm.weight", "param", 0, 8).equal(expected)
        reader.close()
    else:
        assert not [verdict for verdict in verify(folder) if verdict.problem]


def test_what_the_drive_does_not_give_is_not_called_damaged(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = step(run_dir, 6)
    reader = CheckpointReader(folder)

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(UnreadableError, match=r"rank-00000\.safetensors: can't be read: Input/output error"):
        reader.read("model.norm.weight", "param", 0, 8)
    with pytest.raises(UnreadableError, match=r"manifest\.json: can't be read"):
        Manifest.load(folder)
    assert not [verdict for verdict in verify(folder) if verdict.damaged]


def test_a_folder_that_can_not_be_looked_into_is_not_empty(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call in ("listdir", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(UnreadableError):
                folders.remove_remains(run_dir)
    assert len(folders.checkpoints_of(run_dir)) == 3


def test_a_manifest_of_another_version_is_not_damage(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zinf_cli.checkpoint.manifest.READABLE", (99,))
    with pytest.raises(CheckpointError, match=f"version {VERSION} is not known here") as caught:
        Manifest.load(step(run_dir, 6))
    assert not isinstance(caught.value, DamagedError)
