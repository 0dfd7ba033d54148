"""Handles steps whose loss or gradient is not finite: they are skipped if the recipe says so, or end the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from zinf_cli.checkpoint.folder import checkpoints_of, step_of
from zinf_cli.errors import NonFiniteError, ZinfError
from zinf_cli.models.safetensors_files import SafetensorsFiles
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train.setup import model_source

MAX_SKIPS = 10
"""After so many steps in a row that are not finite, there is no hope for the next one."""


class BlowUps:
    """The steps that are not finite, of a run that begins after step `first`."""

    def __init__(self, recipe: Recipe, run_dir: Path, first: int, notice: Callable[[str], None]) -> None:
        self.skips = 0
        """Steps in a row that were skipped."""
        self._last_finite = first
        self._recipe = recipe
        self._run_dir = run_dir
        self._notice = notice

    def over(self, step: int) -> None:
        """Note that step `step` was finite."""
        self.skips, self._last_finite = 0, step

    def judge(self, what: str) -> None:
        """Skip a step, whose update the engine has dropped, or raise NonFiniteError, as the recipe says."""
        skip = self._recipe.train.non_finite == "skip"
        self.skips += 1
        if skip and self.skips < MAX_SKIPS:
            self._notice(f"skipped {what}")
            return
        if skip:
            what += f", after {MAX_SKIPS - 1} steps that were skipped too"
        raise NonFiniteError(what, hint=self._cause() + self._way_back())

    def _cause(self) -> str:
        """What to do. Before the first update, only the weights, the text or the model can be the cause."""
        source = model_source(self._recipe)
        if self._last_finite == 0 and source.init == "pretrained" and source.name_or_path is not None:
            with suppress(ZinfError, RuntimeError):
                if name := SafetensorsFiles(source.name_or_path).not_finite():
                    return f"{name} of {source.name_or_path} holds a NaN or an infinity: use another checkpoint"
        if self._last_finite == 0:
            return "no update has been made yet: look at these windows of the text, or at the model"
        skip = "" if self._recipe.train.non_finite == "skip" else ", or set train.non_finite=skip"
        return f"look at these windows of the text, lower optimizer.lr{skip}"

    def _way_back(self) -> str:
        """The newest checkpoint with a finite step after it. Later checkpoints may hold the blown-up state."""
        good = next((found for found in checkpoints_of(self._run_dir) if step_of(found) < self._last_finite), None)
        return f"; the last good checkpoint: checkpoint.resume={good}" if good is not None else ""
