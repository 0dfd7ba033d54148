"""Steps whose loss or gradient is not finite: skipped where the recipe says so, or the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from zinf_cli.checkpoint.folder import checkpoints_of, step_of
from zinf_cli.errors import NonFiniteError, ZinfError
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train.safetensors_files import SafetensorsFiles
from zinf_cli.train.setup import model_source

MAX_SKIPS = 10
"""Steps in a row that are not finite, after which there is no hope that the next will be."""


class BlowUps:
    """Those of a run that begins after step `first`."""

    def __init__(self, recipe: Recipe, run_dir: Path, first: int, notice: Callable[[str], None]) -> None:
        self.skips = 0
        """Steps in a row that were skipped."""
        self._last_finite = first
        self._recipe = recipe
        self._run_dir = run_dir
        self._notice = notice

    def over(self, step: int) -> None:
        """A run that has done `step` steps is finite."""
        self.skips, self._last_finite = 0, step

    def judge(self, what: str) -> None:
        """The engine has already dropped the update; NonFiniteError, unless the recipe says to go on."""
        skip = self._recipe.train.non_finite == "skip"
        self.skips += 1
        if skip and self.skips < MAX_SKIPS:
            self._notice(f"skipped {what}")
            return
        if skip:
            what += f", after {MAX_SKIPS - 1} steps that were skipped too"
        raise NonFiniteError(what, hint=self._cause() + self._way_back())

    def _cause(self) -> str:
        """Before the first update nothing but the weights and the text has had a say."""
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
        """The newest checkpoint that a finite step came after; later ones may be of what has blown up."""
        good = next((found for found in checkpoints_of(self._run_dir) if step_of(found) < self._last_finite), None)
        return f"; the last good checkpoint: checkpoint.resume={good}" if good is not None else ""
