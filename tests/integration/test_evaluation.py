"""Held-out texts: a loss of each, a run that ends when none falls, and the checkpoint of the lowest one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from forked_ranks import ForkedRanks
from workshop import Workshop
from zinf_cli.checkpoint.folder import checkpoints_of, find_checkpoint, step_of
from zinf_cli.checkpoint.manifest import Manifest
from zinf_cli.errors import ZinfError
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.figures import find_figures

LIKE, UNLIKE = "eval_loss/like", "eval_loss/unlike"


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """Text that counts up in sevens. Of the held-out texts one does so too; the other, which is longer, does not."""
    workshop = Workshop(tmp_path)
    np.save(tmp_path / "like.npy", np.arange(4000, 4160) * 7 % 91 + 3)
    np.save(tmp_path / "unlike.npy", np.arange(480) * 31 % 91 + 3)
    paths = {name: str(tmp_path / f"{name}.npy") for name in ("like", "unlike")}
    workshop.content["dataset"] |= {"eval_path": paths, "eval_fraction": None}
    workshop.content["train"] |= {"max_steps": 40, "eval_interval": 2}
    return workshop


def test_each_held_out_text_has_a_loss(workshop: Workshop, forked: ForkedRanks, tmp_path: Path) -> None:
    both = workshop.fork(forked, "both", "train.max_steps=4").metrics
    for line in (line for line in both if "eval_loss" in line):
        assert line["eval_loss"] == pytest.approx((10 * line[LIKE] + 30 * line[UNLIKE]) / 40, rel=1e-6)
    assert both[-1][LIKE] < both[0][LIKE]
    for name, key in (("like", LIKE), ("unlike", UNLIKE)):
        workshop.content["dataset"]["eval_path"] = str(tmp_path / f"{name}.npy")
        alone = workshop.fork(forked, name, "train.max_steps=4", ranks=2).metrics
        assert [line["eval_loss"] for line in alone if "eval_loss" in line] == pytest.approx(
            [line[key] for line in both if key in line], rel=1e-6
        )


def test_a_run_ends_when_its_held_out_loss_no_longer_falls(workshop: Workshop, tmp_path: Path) -> None:
    workshop.content["checkpoint"] = {"interval": 2, "keep_latest_k": 1, "keep_best": True}
    ended = workshop.launch("train.early_stopping_patience=3")
    assert ended.code == 0, ended.err
    losses = {line["step"]: line["eval_loss"] for line in ended.metrics if line["step"] and "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert list(losses)[-1] == best + 3 * 2 < 40
    assert f"no lower held-out loss in 3 evaluations: the run ends after step {best + 6}" in ended.err
    assert ended.summary["status"] == "done"
    assert ended.summary["best_eval"] == {"step": best, "eval_loss": losses[best]}
    assert f"the lowest held-out loss is {losses[best]:.4f}, after step {best}" in ended.out + ended.err
    assert "held-out unlike" in ended.out + ended.err

    folder = tmp_path / "run"
    assert [step_of(path) for path in checkpoints_of(folder)] == [best + 6, best]
    assert step_of(find_checkpoint(folder / "checkpoints" / "best")) == best
    again = workshop.launch("train.early_stopping_patience=3")
    assert (again.code, len(again.metrics)) == (0, len(ended.metrics)), again.err


def test_a_resume_counts_on(workshop: Workshop, forked: ForkedRanks) -> None:
    workshop.content["checkpoint"] = {"interval": 2, "keep_best": True}
    workshop.content["train"]["early_stopping_patience"] = 3
    whole = workshop.fork(forked, "whole")
    last = whole.metrics[-1]["step"]
    workshop.fork(forked, "parts", f"train.max_steps={last - 4}")
    parts = workshop.fork(forked, "parts", ranks=2)
    assert parts.metrics[-1]["step"] == last
    kept = [Manifest.load(ended.run_dir / "checkpoints" / "best").step for ended in (whole, parts)]
    assert kept == [last - 6, last - 6]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.eval_interval=null", "checkpoint.keep_best needs train.eval_interval"),
        ("checkpoint.interval=3", "checkpoint.keep_best needs a checkpoint.interval that is a multiple of"),
        ("dataset.eval_path=null", "checkpoint.keep_best needs held-out text: dataset.eval_path"),
        ("dataset.eval_path={like: /no/such/file}", "no such file or folder: /no/such/file"),
    ],
)
def test_what_the_best_needs(change: str, said: str, workshop: Workshop) -> None:
    workshop.content["checkpoint"] = {"interval": 4, "keep_best": True}
    workshop.write()
    with pytest.raises(ZinfError, match=re.escape(said)) as caught:
        find_figures(load_recipe(workshop.recipe, [change]), 1)
    assert caught.value.exit_code == 2
