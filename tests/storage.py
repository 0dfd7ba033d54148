"""What has to hold when a drive fails once, for a run, a run that goes on, and an export.

Either an error names the path and the cause, or all is as without the fault. Older checkpoints are whole, nothing is
left under a name that was to be renamed, no thread and no open file stays, and the next run goes on to the same bits.
"""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from crash_chain import TinyRun
from fault_lab import CALLS, HOW, Fault, FaultyFolder, watchdog
from zinf_cli.checkpoint.folder import checkpoints_of, remains_of
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.checkpoint.verify import verify
from zinf_cli.errors import ZinfError
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe_file import dump_recipe, load_recipe
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures
from zinf_cli.train.loop import train

STEPS = 4
PATIENCE_S = 120
KINDS = tuple(kind for kind in CALLS if kind != "stat")
"""A look at a name fails where reading it does; there are hundreds of looks in a run."""


class Lab:
    """A tiny run in `folder`, how far it got without faults, and the folders that each scenario begins with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        train_for = {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 2}
        checkpoint = {"interval": 2, "keep_latest_k": 2}
        self.run = TinyRun.write(folder / "lab", STEPS, train={**train_for, "max_steps": STEPS}, checkpoint=checkpoint)
        self.run_dir = self.run.run_dir
        self._plan(STEPS - 1)
        self._keep("begun")
        train(self.run_dir)
        self._keep("half")
        self._plan(STEPS)
        train(self.run_dir)
        self._keep("whole")
        self.expected = self._state()
        export(self.run_dir, folder / "lab" / "out")
        self.exported = _contents(folder / "lab" / "out")

    def _plan(self, steps: int) -> None:
        recipe = load_recipe(self.run.recipe, [f"train.max_steps={steps}"])
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (self.run_dir / "plan.json").write_text(json.dumps(best_plan(recipe, find_figures(recipe, 1)).to_json()))
        (self.run_dir / "recipe.yaml").write_text(dump_recipe(recipe))

    def _keep(self, name: str) -> None:
        shutil.copytree(self.run_dir, self.folder / name, symlinks=True)

    def _begin_with(self, name: str) -> None:
        shutil.rmtree(self.folder / "lab" / "out", ignore_errors=True)
        shutil.rmtree(self.run_dir)
        shutil.copytree(self.folder / name, self.run_dir, symlinks=True)
        for file in ("plan.json", "recipe.yaml"):
            shutil.copy(self.folder / "whole" / file, self.run_dir)

    def _state(self) -> tuple[Any, ...]:
        return self.run.trajectory, self.run.state

    def goes_on(self) -> str:
        """What a run says that goes on from the half of it, where it ends with the right bits."""
        self._begin_with("half")
        with redirect_stderr(io.StringIO()) as said:
            train(self.run_dir)
        assert self._state() == self.expected
        return said.getvalue()

    def survives(self, scenario: str, fault: Fault) -> bool:
        """Whether the fault was met; AssertionError where something does not hold."""
        begin, work, check = self._scenarios()[scenario]
        self._begin_with(begin)
        before = {path.name: Manifest.load(path) for path in checkpoints_of(self.run_dir)}
        files, threads = _open_files(self.folder / "lab"), set(threading.enumerate())
        drive = FaultyFolder(self.folder / "lab", fault)
        error: BaseException | None = None
        with watchdog(PATIENCE_S):
            try:
                with redirect_stderr(io.StringIO()) as said, drive():
                    work()
            except Exception as caught:
                error = caught.with_traceback(None) if isinstance(caught, ZinfError) else caught
        if error is not None:
            self._check_error(error, fault)
        else:
            check()
        error = None
        self._check_remains(before, files, threads)
        if fault.kind != "unlink":  # what could not be removed may be left
            assert not [path for path in (self.folder / "lab").rglob("*.partial") if path.parent not in self._half()]
        assert self._half() == [] or "can't be removed" in said.getvalue()
        if drive.met is not None:
            with watchdog(PATIENCE_S):
                if error is not None or scenario == "export":
                    shutil.rmtree(self.folder / "lab" / "out", ignore_errors=True)
                work()
            check()
        return drive.met is not None

    def _half(self) -> list[Path]:
        """Checkpoints that are not whole, since they could not be removed whole."""
        return remains_of(self.run_dir)

    def _scenarios(self) -> dict[str, tuple[str, Callable[[], object], Callable[[], None]]]:
        """What lies in the run's folder, what is done, and what is right then."""

        def write_export() -> None:
            export(self.run_dir, self.folder / "lab" / "out")

        def check_export() -> None:
            assert _contents(self.folder / "lab" / "out") == self.exported

        def check_run() -> None:
            assert self._state() == self.expected

        return {
            "train": ("begun", lambda: train(self.run_dir), check_run),
            "resume": ("half", lambda: train(self.run_dir), check_run),
            "export": ("whole", write_export, check_export),
        }

    def _check_error(self, error: BaseException, fault: Fault) -> None:
        if not isinstance(error, ZinfError):
            raise AssertionError(f"no error for a user: {error!r}") from error
        said = error.line()
        assert str(self.folder) in said, said
        how = "ENOSPC" if fault.how == "full" else fault.how
        cause = "short transfer" if how == "short" else os.strerror(getattr(errno, how))
        assert cause in said, said
        assert "\n" not in said

    def _check_remains(self, before: dict[str, Manifest], files: set[str], threads: set[threading.Thread]) -> None:
        there = checkpoints_of(self.run_dir)
        assert not [(path.name, bad) for path in there for bad in verify(path) if bad.problem]
        newest = max((manifest.step for manifest in before.values()), default=0)
        assert max((Manifest.load(path).step for path in there), default=0) >= newest
        names = [str(path) for path in (self.folder / "lab").rglob("*")]
        assert not [name for name in names if "damaged-" in name]
        nvme = self.folder / "lab" / "nvme"
        assert not nvme.exists() or not list(nvme.iterdir())
        assert not [name for name in names if f"{os.sep}out" in name and not (self.folder / "lab" / "out").is_dir()]
        gc.collect()
        assert not set(threading.enumerate()) - threads
        assert not _open_files(self.folder / "lab") - files, _open_files(self.folder / "lab") - files


def every_fault(lab: Lab, scenario: str, kind: str, how: str) -> int:
    """The nth call fails, n = 1, 2, 3, ... until a run passes that has fewer; how many there were."""
    nth = 1
    while lab.survives(scenario, Fault(kind, nth, how)):
        nth += 1
    return nth - 1


def all_kinds() -> list[tuple[str, str]]:
    return [(kind, how) for kind in KINDS for how in HOW[kind]]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _open_files(folder: Path) -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.add(f"{name}: {target}")
    return found
