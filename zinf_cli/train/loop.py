"""The training loop of one rank. It begins with the recipe and the plan in the run's folder."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from zinf_cli.batches.collator import Sample
from zinf_cli.batches.mixture import MixedOrder
from zinf_cli.engine.compute.loss_scale import LossScale
from zinf_cli.engine.engine import Engine, StepResult
from zinf_cli.engine.ranks import Ranks
from zinf_cli.models.base_digest import base_digest
from zinf_cli.models.model_files import model_files
from zinf_cli.plan.plan import Plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.run_folder.metrics import HELD_OUT, Metrics, sequences_of
from zinf_cli.run_folder.names import PLAN, RECIPE, rank_trace
from zinf_cli.run_folder.start import announce, tells_loaded
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.tiers.streams import streams_of
from zinf_cli.told import nobody
from zinf_cli.trace import Trace
from zinf_cli.train.blow_ups import BlowUps
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position
from zinf_cli.train.evaluation import Evaluation
from zinf_cli.train.near import stay_near, stay_near_drives
from zinf_cli.train.open_engine import open_engine
from zinf_cli.train.optimizer import kernel_of, undecayed
from zinf_cli.train.process_memory import PeakMemory, mapped_apart, return_free_memory, returning_free_memory
from zinf_cli.train.rank_batches import RankBatches
from zinf_cli.train.rank_process import stop_requested
from zinf_cli.train.reading import pooling_files_of
from zinf_cli.train.reference import References, find_references, references_file, stored_references
from zinf_cli.train.resume import Start, plain, resume
from zinf_cli.train.same_bits import keep_order
from zinf_cli.train.samples import Writer
from zinf_cli.train.schedule import learning_rate
from zinf_cli.train.setup import (
    Text,
    model_source,
    open_text,
)
from zinf_cli.train.stragglers import straggler_of


def train(run_dir: Path) -> int:
    """Run the recipe of `run_dir`. Returns 0 when it is done, or has stopped because the user asked for it."""
    recipe = load_recipe(run_dir / RECIPE)
    plan = Plan.load(run_dir / PLAN)
    if recipe.train.deterministic:
        keep_order()
    device = _device(plan)
    ranks = Ranks.join(device, plan.collective_timeout_s) if plan.world_size > 1 else Ranks()
    trace = Trace(ranks.rank)
    with mapped_apart():
        engine, model, weights = open_engine(recipe, plan, device, ranks, trace, note)
    metrics = None
    try:
        text = open_text(recipe, model, plan.world_size, note)
        with mapped_apart():
            told = tells_loaded(run_dir) if ranks.rank == 0 else nobody
            start = resume(recipe, engine, model, text, ranks, note, told)
            (engine.load if start.folder is None else engine.load_unstored)(weights.read, told)
        del weights  # with the states of the generator that made them
        return_free_memory()
        if ranks.rank == 0:
            metrics = Metrics(run_dir, note, start.step)
            announce(run_dir, start.step, start.folder)
        with returning_free_memory(above=plan.cpu_bytes_at_rest):
            Run(recipe, plan, run_dir, engine, model, text, ranks, metrics, device, start).go()
    finally:
        if recipe.profiler.enabled:
            try:
                trace.write(run_dir / rank_trace(ranks.rank))
            except OSError as error:
                note(f"the trace can't be written: {error.strerror}; the run is none the worse for it")
        if metrics is not None:
            metrics.close()
        engine.close()
    ranks.leave()
    return 0


def _device(plan: Plan) -> torch.device:
    if not plan.figures.machine.accelerators:
        stay_near_drives(plan.nvme_folders, plan.figures.ranks_per_host, plan.threads_per_rank)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    streams_of(device).set_device(device)
    stay_near(device, plan.threads_per_rank)
    return device


def note(line: str) -> None:
    """Tell the user something, if there is room in the log. The launcher shows the notes of rank 0."""
    with suppress(OSError):
        print(f"note: {line}", file=sys.stderr, flush=True)


@dataclass
class Run:
    """One run on one rank."""

    recipe: Recipe
    plan: Plan
    run_dir: Path
    engine: Engine
    model: torch.nn.Module
    text: Text
    ranks: Ranks
    metrics: Metrics | None
    device: torch.device
    start: Start

    def go(self) -> None:
        """Run every step, with the evaluations and checkpoints that the recipe asks for."""
        self._writer = self._checkpoints()
        try:
            self._go()
        finally:
            self._writer.close()

    def _go(self) -> None:
        max_steps = self.plan.max_steps
        self._peak = PeakMemory()
        self._no_decay = undecayed(self.model, self.recipe.optimizer.no_decay)
        self._loss_scale = None
        if self.plan.precision == "fp16":
            self._loss_scale = LossScale()
            if self.start.loss_scale is not None:
                self._loss_scale.scale, self._loss_scale.finite_steps = self.start.loss_scale
        self.text.order.start_at(self.start.step, self.start.sequences)
        self._blow_ups = BlowUps(self.recipe, self.run_dir, self.start.step, note)
        self._drives = [tier for tier in self.engine.opened.values() if isinstance(tier, NvmeTier)]
        self._moved = self._traffic()
        self._batches = RankBatches(self.recipe, self.model, self.text.collator, self.ranks, self.device)
        self._batches.references.update(self._references())
        evaluation = Evaluation(self.engine, self._batches, self.plan.per_sweep, self.text.held_out)
        self._standing = evaluation.begin(self.start.held_out)
        interval, save_interval = self.recipe.train.eval_interval, self.recipe.checkpoint.interval
        saved = step = self.start.step
        looks = bool(evaluation.texts) or self.text.prompts is not None
        if looks and not step:
            self._write({"step": 0, **evaluation.losses(), **self._samples()})
        while step < max_steps and not self._stop_requested() and not self._gets_worse(step):
            self.engine.trace.enabled = self.recipe.profiler.enabled and (
                self.recipe.profiler.steps is None or step < self.recipe.profiler.steps
            )
            last = step + 1 == max_steps
            evaluate = looks and (last or _due(step + 1, interval))
            save = _due(step + 1, save_interval) or (last and save_interval is not None)
            values = self._step(step, more=not (last or evaluate), save=save)
            step += 1
            if evaluate:
                values |= {**evaluation.losses(), **self._samples()}
                saves = save and self._writer.has_room
                self._standing = self._standing.after(step, values.get(HELD_OUT, math.nan), saved=saves)
            self._write(values)
            if save and values.get("skipped") and not self._blow_ups.skips:
                written = self._writer.write(self._position(step), required=last)
            else:
                written = save and self._writer.complete(self._position(step))
            if written:
                saved = step
        self.engine.flush()
        if save_interval and saved < step:  # the run was told to stop, or there was no room for the step's checkpoint
            self._writer.write(self._position(step))
        self._writer.finish()

    def _checkpoints(self) -> CheckpointWriter:
        return CheckpointWriter(
            self.run_dir,
            self.engine,
            self.ranks,
            partial(self._files, cache(note)),
            self.recipe.checkpoint.keep_latest_k,
            note,
            keep_best=self.recipe.checkpoint.keep_best,
        )

    def _files(self, notice: Callable[[str], None]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the small files of a checkpoint."""
        ours = dict(pooling_files_of(self.recipe, self.model))
        for name, content in model_files(model_source(self.recipe), self.model, self.recipe.dataset.tokenizer, notice):
            if name not in ours:
                yield name, content
        yield from ours.items()
        if references := self._batches.references:
            yield references_file(references)

    def _references(self) -> References:
        """Of preferences: what the model thought of them as the run began."""
        if self.recipe.train.objective != "dpo":
            return {}
        texts = [self.text.train, *self.text.held_out.values()]
        if self.start.folder is not None:
            return stored_references(self.start.folder, texts)
        return find_references(self.engine, self._batches, self.plan.per_sweep, texts)

    @cached_property
    def _base(self) -> str | None:
        """The hash of the model that an adapter is trained on."""
        return base_digest(self.recipe.model.folder) if self.recipe.adapter.type is not None else None

    def _position(self, step: int) -> Position:
        """Where the run stands after `step` steps. First their lines of metrics.jsonl are synced."""
        if self.metrics is not None:
            self.metrics.sync()
        scale = self._loss_scale
        return Position(
            step=step,
            precision=self.plan.precision,
            sequences=self.text.order.sequences_before(step),
            text=self.text.train.fingerprint,
            loss_scale=(scale.scale, scale.finite_steps) if scale is not None else None,
            recipe=plain(self.recipe),
            held_out=asdict(self._standing),
            base=self._base,
        )

    def _step(self, step: int, *, more: bool, save: bool) -> dict[str, Any]:
        """Train one step, or skip it. Returns its line of metrics.jsonl.

        `more`: another step follows at once. `save`: the step has a checkpoint.
        """
        start = time.perf_counter()
        self._writer.advance()
        self._peak.reset()
        for tier in self._drives:
            tier.peak = tier.used
        lr = learning_rate(self.recipe, step, self.plan.max_steps)
        windows = self.text.order.windows(step)
        first = self.text.order.sequences_before(step)
        self._batches.margins.clear()
        samples = [Sample(*pair) for pair in zip(windows, count(first), strict=False)]
        mine = self._batches.of(self.text.train, samples)
        counts = [sum(batch.num_targets for batch in mine), sum(batch.num_tokens for batch in mine)]
        targets, tokens = self.ranks.totals(counts)
        if not targets:
            return self._skipped(step, windows, lr, start)
        sink = self._writer.begin(step + 1, required=step + 1 == self.plan.max_steps) if save else None
        work = [self._batches.work(batch, batch.num_targets / targets, step) for batch in mine]
        result = self.engine.train_step(
            work,
            replace(
                kernel_of(self.recipe.optimizer, lr),
                no_decay=self._no_decay,
                fused=not streams_of(self.device).on_cpu,
            ),
            max_grad_norm=self.recipe.train.max_grad_norm,
            loss_scale=self._loss_scale.scale if self._loss_scale is not None else 1.0,
            eager=self.plan.update == "eager",
            more=more,
            sink=sink,
        )
        weighted = sum(
            loss * batch.num_targets for loss, batch in zip(result.losses, mine, strict=True) if batch.num_targets
        )
        loss = self.ranks.totals([weighted])[0] / targets
        self._writer.judge(finite=result.finite)
        if not result.finite and sink is not None:
            self._writer.drop_newest()
        of_scale = self._loss_scale is not None and self._loss_scale.takes(finite=result.finite, loss=loss)
        if not result.finite and not of_scale:
            self._blow_ups.judge(f"step {step + 1}: loss {loss}, gradient norm {result.grad_norm} {_windows(windows)}")
        if result.finite:
            self._blow_ups.over(step + 1)
        return self._line(step, int(tokens), lr, loss, result, start)

    def _line(self, step: int, tokens: int, lr: float, loss: float, result: StepResult, start: float) -> dict[str, Any]:
        """The line of metrics.jsonl for a step that began at `start`."""
        waits = self.ranks.all(round(result.wait_s * 1e6))
        seconds = time.perf_counter() - start
        flops = self.plan.figures.model.flops_per_token * tokens / self.ranks.world_size
        slowest = straggler_of([micros / 1e6 for micros in waits], seconds)
        return {
            "step": step + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": tokens,
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "tflops_per_rank": flops / seconds / 1e12,
            "wait_s": result.wait_s,
            "updated_in_backward": result.updated,
            **({} if slowest is None else {"straggler": slowest}),
            **self._sources(step),
            **self._rewards(),
            **self._experts(),
            **self._memory(),
        }

    def _samples(self) -> dict[str, list[dict[str, str]]]:
        """What the model writes now, if the recipe has prompts."""
        if (prompts := self.text.prompts) is None:
            return {}
        written = Writer(self.engine, self.model, self.ranks, self.device).write(prompts)
        return {"samples": [{"prompt": one, "text": other} for one, other in zip(prompts.texts, written, strict=True)]}

    def _sources(self, step: int) -> dict[str, float]:
        """How many sequences of a step are from each text that has a weight."""
        order = self.text.order
        counts = order.sources(step) if isinstance(order, MixedOrder) else []
        return {sequences_of(number): count for number, count in enumerate(counts)}

    def _rewards(self) -> dict[str, float]:
        """Of preferences: how far the step's pairs went for the chosen answer, and for how many they did so."""
        if self.recipe.train.objective != "dpo":
            return {}
        margins = torch.cat([torch.zeros(0), *(margin.float().cpu() for margin in self._batches.margins.values())])
        total, right, pairs = self.ranks.totals([margins.sum().item(), (margins > 0).sum().item(), len(margins)])
        return {"reward_margin": total / pairs, "reward_accuracy": right / pairs}

    def _experts(self) -> dict[str, float]:
        """The share of the experts that some token of the step has reached, if they are units."""
        experts = [unit for unit in self.engine.units if unit.layout.on_demand and unit.trained]
        reached = sum(not unit.life.zeros for unit in experts)
        return {"experts_reached": reached / len(experts)} if experts else {}

    def _skipped(self, step: int, windows: Sequence[int], lr: float, start: float) -> dict[str, Any]:
        """Skip a step in which no token has a loss. Nothing is updated, by weight decay neither. Returns its line."""
        note(f"skipped step {step + 1}: no token has a loss {_windows(windows)}")
        self.engine.flush()  # fetches for this step are under way
        return {
            "step": step + 1,
            "skipped": True,
            **dict.fromkeys(("loss", "grad_norm"), math.nan),
            "lr": lr,
            **dict.fromkeys(("tokens", "tokens_per_s", "tflops_per_rank", "wait_s"), 0),
            "step_s": time.perf_counter() - start,
            "updated_in_backward": False,
            **self._memory(),
        }

    def _stop_requested(self) -> bool:
        asked = stop_requested() if self.ranks.rank == 0 else False
        return self.ranks.totals([asked])[0] > 0

    def _gets_worse(self, step: int) -> bool:
        """Whether the run ends after `step` since its held-out loss no longer falls."""
        patience = self.recipe.train.early_stopping_patience
        if patience is None or self._standing.since < patience:
            return False
        note(f"no lower held-out loss in {self._standing.since} evaluations: the run ends after step {step}")
        return True

    def _traffic(self) -> tuple[int, int]:
        read, written = self._writer.traffic()
        for tier in self._drives:
            read, written = read + tier.read_bytes, written + tier.write_bytes
        return read, written

    def _memory(self) -> dict[str, int]:
        """This rank's peaks of memory in the step, and its traffic to and from drives."""
        read, write = self._traffic()
        before, self._moved = self._moved, (read, write)
        values = {
            "device_bytes": self.engine.device_bytes(),
            "cpu_bytes": self._peak.read(),
            "nvme_bytes": sum(tier.peak for tier in self._drives),
            "nvme_read_bytes": read - before[0],
            "nvme_write_bytes": write - before[1],
        }
        if self.device.type == "cuda":
            values["gpu_mem_bytes"] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return values

    def _write(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(values)


def _due(step: int, interval: int | None) -> bool:
    return bool(interval) and step % (interval or 1) == 0


def _windows(windows: Sequence[int]) -> str:
    """Windows of the text, as words of a message."""
    shown = ", ".join(str(window) for window in windows[:8])
    return f"(windows {shown}{', ...' if len(windows) > 8 else ''})"
