"""What lies in the folder that a user is in is never run, whatever it is called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from programs import command
from workshop import Workshop

ROOT = Path(__file__).parents[2]
NAMES = ("socket", "json", "torch", "transformers", "typing_extensions", "queue", "numpy", "runpy", "sitecustomize")


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A folder with a recipe, and files named as modules are, each of which leaves a mark when it is run."""
    workshop = Workshop(tmp_path)
    workshop.content["train"]["max_steps"] = 1
    workshop.content["output_dir"] = str(tmp_path / "run")
    workshop.recipe.write_text(yaml.safe_dump(workshop.content))
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path)!r} + '/ran-{name}', 'w')\n")
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "tests" / "programs" / "entry_point.py", tmp_path / "bin" / "zinf")
    return tmp_path


def run(folder: Path, python_path: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": python_path}
    words = [sys.executable, *command]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_run_in_a_folder_of_modules(poisoned: Path) -> None:
    (poisoned / "zinf_cli").mkdir()
    (poisoned / "zinf_cli" / "__init__.py").write_text((poisoned / "socket.py").read_text())
    done = run(poisoned, str(ROOT), "bin/zinf", "launch", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert not list(poisoned.glob("ran-*"))


def test_relative_entries_of_a_python_path(poisoned: Path) -> None:
    (poisoned / "sitecustomize.py").unlink()  # which Python has run before zinf begins
    done = run(poisoned, f".::{ROOT}", "-m", "zinf_cli.cli", "clean", ".")
    assert done.returncode == 0, done.stderr
    assert not [mark for mark in poisoned.glob("ran-*") if mark.name != "ran-runpy"]  # Python's own -m


def test_a_zinf_that_is_not_installed_is_found(poisoned: Path) -> None:
    """As where it is run out of a checkout: its processes find it beside themselves."""
    (poisoned / "elsewhere").mkdir()
    (poisoned / "elsewhere" / "zinf_cli").symlink_to(ROOT / "zinf_cli")
    done = run(poisoned, "bin:.", *command("asks_version", poisoned / "elsewhere")[1:])
    assert done.stdout == "0 \n", done.stderr
    assert [mark.name for mark in poisoned.glob("ran-*")] == ["ran-sitecustomize"]  # by the test's own Python
