"""What a report is made of: a run's folder, whole or not, and texts from outside that stay texts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tiny_recipes import recipe_of
from zinf_cli.amounts import format_bytes
from zinf_cli.commands import report as command
from zinf_cli.errors import UsageError
from zinf_cli.launch.summary import _predicted
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.hosts import Host
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.report.curves import _thinned
from zinf_cli.report.run import read_run, read_runs
from zinf_cli.run_folder.error_records import ErrorRecord
from zinf_cli.run_folder.metrics import Metrics, held_out_of
from zinf_cli.train.figures import find_figures

EVIL = "<script>alert(1)</script>&\u202e\x1b[31m$x_1$"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    recipe = recipe_of(tmp_path_factory.mktemp("plan"), "llama")
    return best_plan(recipe, find_figures(recipe, 1))


def write_run(folder: Path, plan: Plan, steps: int = 6, lr: float = 1e-3) -> Path:
    """A run's folder as a run leaves it; step 3 has no finite loss, every second norm is clipped, rank 1 is slow."""
    folder.mkdir(parents=True)
    recipe = recipe_of(folder.parent, "llama", max_grad_norm=1.0)
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": lr})})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    metrics = Metrics(folder, pytest.fail)
    metrics.write({"step": 0, "eval_loss": 4.5})
    for step in range(1, steps + 1):
        line = {
            "step": step, "loss": math.nan if step == 3 else 4.0 / step, "lr": lr,
            "grad_norm": 2.0 if step % 2 else 0.5, "tokens": 96, "step_s": 0.5,
            "tokens_per_s": 192.0, "tflops_per_rank": 0.1, "wait_s": 0.1,
            "updated_in_backward": 0, "device_bytes": 2**20, "cpu_bytes": 2**28, "nvme_bytes": 2**24,
            "nvme_read_bytes": 2**22, "nvme_write_bytes": 2**21, **({"straggler": 1} if step > 4 else {}),
        }  # fmt: skip
        metrics.write(line)
    metrics.close()
    return folder


class Page(HTMLParser):
    """The tags of a page, and all that it shows as text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.shown = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        assert not any(name.startswith("on") for name, _ in attrs)
        for name, value in attrs:
            assert name not in ("src", "href", "xlink:href") or str(value).startswith(("#", "data:,")), (tag, value)

    def handle_data(self, data: str) -> None:
        self.shown += f" {data}"


def page_of(*runs: Path) -> Page:
    out = runs[0].parent / "page.html"
    command.report(list(runs), out)
    return Page(out)


def test_every_curve_is_there_and_the_first_words_say_what_happened(tmp_path: Path, plan: Plan) -> None:
    page = page_of(write_run(tmp_path / "run", plan))
    curves = ("loss", "eval_loss", "grad_norm", "lr", "step_s", "waiting", "traffic", "cpu", "nvme")
    assert {f"curve-{name}-0" for name in curves} | {"figure-tiers", "figure-units"} <= set(page.ids)
    words = " ".join(page.shown.split())
    assert "not ended after 6 of 3 steps" in words
    assert "loss 0.6667 from 4.0000" in words
    assert "3 of 6 clipped to 1" in words
    assert "skipped, or not finite" in words
    assert f"max_steps: {recipe_of(tmp_path, 'llama').train.max_steps}" in page.shown


def test_several_runs_share_their_figures(tmp_path: Path, plan: Plan) -> None:
    runs = [write_run(tmp_path / name / "run", plan, lr=lr) for name, lr in (("a", 1e-3), ("b", 1e-2))]
    recipe = runs[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("intermediate_size: 48", "intermediate_size: 96"))
    page = page_of(*runs)
    assert {"curve-loss-0", "curve-loss-1"} <= set(page.ids)
    assert page.ids.count("figure-loss") == 1
    assert [run.name for run in read_runs(runs)] == list(map(str, runs))
    words = " ".join(page.shown.split())
    assert f"What differs in their recipes key {runs[0]}" in words
    assert "optimizer.lr 0.001 0.01" in words
    assert "model.config.intermediate_size 48 96" in words
    assert "model.config.hidden_size" not in words.split("Learning")[0]
    with pytest.raises(UsageError, match="8 runs, not for 9"):
        command.report([runs[0]] * 9)


def test_a_run_without_steps_lies_beside_others(tmp_path: Path, plan: Plan) -> None:
    begun, run = write_run(tmp_path / "begun", plan, steps=0), write_run(tmp_path / "run", plan)
    (begun / "metrics.jsonl").write_text("")
    words = " ".join(page_of(begun, run).shown.split())
    assert "2 runs, side by side" in words
    assert "loss 0.6667 from 4.0000" in words
    assert {"curve-loss-0", "curve-loss-1"} <= set(page_of(begun, run).ids)


def test_each_held_out_text_has_its_curve(tmp_path: Path, plan: Plan) -> None:
    run = write_run(tmp_path / "run", plan)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [{**line, held_out_of("books"): 3.0, held_out_of("code"): 1.0 / (1 + line["step"])} for line in lines]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in evaluated))
    page = page_of(run)
    assert {"curve-eval_loss-0", "curve-eval_loss-0-1", "curve-eval_loss-0-2"} <= set(page.ids)
    words = " ".join(page.shown.split())
    assert "held-out, books" in words
    assert "held-out loss, code 0.1429 from 1.0000" in words


def test_a_step_that_takes_no_time_waits_no_share(tmp_path: Path, plan: Plan) -> None:
    run = write_run(tmp_path / "run", plan)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"step_s": 0.5', '"step_s": 0'))
    assert "curve-waiting-0" in page_of(run).ids
    assert np.isnan(read_run(run).curve("wait_s", "step_s")[1]).all()


def test_a_plan_that_never_waits_waits_no_less_than_nothing(plan: Plan) -> None:
    """It was told as "-0 %" where times of one lane add up to a little more than the step."""
    busy = replace(plan, busy={**plan.busy, "compute": 1 + 1e-9})
    assert _predicted(busy, 1, [])["wait_share"] == 0


def test_traffic_lies_beside_that_of_clipped_and_of_unclipped_steps(tmp_path: Path, plan: Plan) -> None:
    unclipped = replace(plan, nvme_traffic=plan.nvme_traffic_clipped * 2, calm_step_s=plan.step_s)
    words = [" ".join(page_of(write_run(tmp_path / n, p)).shown.split()) for n, p in (("a", plan), ("b", unclipped))]
    said = f"where nothing is clipped {format_bytes(unclipped.nvme_traffic)}"
    assert [said in each for each in words] == [False, True]


def test_texts_from_outside_stay_texts(tmp_path: Path, plan: Plan) -> None:
    hosts = (Host(EVIL, (0,)), Host("node2", (0, 1)))
    run = write_run(tmp_path / EVIL.replace("/", ""), replace(plan, hosts=hosts, nvme_folders=(EVIL,)))
    (run / "recipe.yaml").write_text(f"model: {{name_or_path: {json.dumps(EVIL)}}}\n# {EVIL}\n")
    summary = {
        "status": EVIL, "error": EVIL, "first_failure": {"rank": 1, "host": EVIL, "log": "../rank.log"},
        "measured": {"step_s": EVIL}, "predicted": {"wait_share": 0.5},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "logs").mkdir()
    (run / "logs" / "rank.log").write_text(EVIL)
    page = page_of(run)
    assert "script" not in page.tags
    assert "alert(1)" in page.shown
    assert not {"\u202e", "\x1b"} & set(page.shown)
    assert r"$x_1$" in page.shown
    assert "2 of 6" in page.shown


def test_what_is_damaged_or_missing_is_left_out(tmp_path: Path, plan: Plan) -> None:
    run = write_run(tmp_path / "run", plan)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss"\n\0\0\0\n[]\n{"step": true}\n')
    assert len(read_run(run).steps) == 6
    for name in ("plan.json", "summary.json", "trace.json"):
        (run / name).write_text('{"hosts": [1]')
    (run / "recipe.yaml").write_bytes(b"\xff: [")
    assert "loss 0.6667" in " ".join(page_of(run).shown.split())
    for name in ("plan.json", "summary.json"):
        (run / name).write_text('[{"hosts": 1}]')
    (run / "metrics.jsonl").unlink()
    assert "another zinf's" in page_of(run).shown
    with pytest.raises(UsageError, match=r"no run here: recipe\.yaml"):
        read_run(tmp_path)


def test_a_killed_run_tells_the_first_record_of_its_ranks(tmp_path: Path, plan: Plan) -> None:
    run = write_run(tmp_path / "run", plan)
    (run / "logs").mkdir()
    (run / "logs" / "rank-00001.log").write_text("\n".join(map(str, range(40))))
    for rank, secondary in ((0, True), (1, False)):
        told = ErrorRecord(rank, 1, {"message": f"of rank {rank}"}, secondary=secondary, host="node", time=float(rank))
        (run / "logs" / f"error-{rank:05d}.json").write_text(json.dumps(vars(told)))
    failed = read_run(run).failed
    assert failed is not None
    assert failed.error == "node, rank 1: of rank 1"
    assert failed.lines[-1] == "39"
    assert len(failed.lines) == 15
    assert "failed after 6" in page_of(run).shown


def test_a_long_run_is_a_small_page_and_no_value_is_lost_in_it(tmp_path: Path, plan: Plan) -> None:
    steps, values = np.arange(1.0, 1004.0), np.random.default_rng(0).normal(size=1003)
    values[[5, 600]] = np.nan
    thin, mean, low, high = _thinned(steps, values)
    finite = values[np.isfinite(values)]
    assert len(thin) == 300
    assert (low.min(), high.max()) == (finite.min(), finite.max())
    assert np.all((low <= mean) & (mean <= high))
    assert np.all(np.diff(thin) > 0)
    run = write_run(tmp_path / "run", plan, steps=2000)
    page_of(run)
    assert (tmp_path / "page.html").stat().st_size < 400_000


def test_the_numbers_as_json(tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    command.report([write_run(tmp_path / "run", replace(plan, hosts=(Host("a", (0,)), Host("b", (0,)))))], as_json=True)
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert [line["step"] for line in told["metrics"]] == list(range(7))
    assert told["hosts"] == [{"host": "a", "ranks": 1, "waited_for": 0}, {"host": "b", "ranks": 1, "waited_for": 2}]
    assert told["recipe"]["train.max_grad_norm"] == 1.0
    assert told["plan"] == json.loads((tmp_path / "run" / "plan.json").read_text())
    assert not list(tmp_path.rglob("*.html"))


def test_without_the_extra_a_run_has_no_page_and_the_command_says_why(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", plan)
    monkeypatch.setattr(command, "_LIBRARIES", ("no_library_of_this_name",))
    assert command.leave_report(run, pytest.fail) is None
    with pytest.raises(UsageError, match=r"pip install 'zinf\[report\]'"):
        command.report([run])


def test_a_page_that_cant_be_written_ends_no_run(tmp_path: Path, plan: Plan) -> None:
    run = write_run(tmp_path / "run", plan)
    said: list[str] = []
    (run / "report.html").mkdir()
    assert command.leave_report(run, said.append) is None
    assert "not written" in said[0]
    with pytest.raises(UsageError, match="can't be written"):
        command.report([run])
