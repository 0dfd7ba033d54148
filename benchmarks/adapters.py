"""`python -m benchmarks.adapters`: an adapter on a model on NVMe, beside that model trained whole and plain peft.

The demo's model (recipes/fetch_smollm2.py) learns from chats in fp32. Trained whole, it has parameters, gradients
and optimizer states on NVMe; with an adapter, the model's parameters alone. Neither recomputes: there is memory for
activations, and the plan keeps them. They take turns, and are watched from outside. A few steps of plain peft, in
memory, have the losses that the adapter's have to be.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.contenders import environment
from benchmarks.results import add_save, report
from benchmarks.rows import Row
from benchmarks.watch import Watched, watch
from zinf_cli.batches.collator import kind_of_stream
from zinf_cli.plan.plan import Plan
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.text.token_stream import MASKED
from zinf_cli.train.setup import open_text

WHOLE = {"params": "nvme", "grads": "nvme", "optimizer": "nvme", "activations": "cpu"}
ADAPTED = {"params": "nvme", "grads": "cpu", "optimizer": "cpu", "activations": "cpu"}
SEQ_LEN, SEQUENCES = 256, 2


def main() -> None:
    parser = argparse.ArgumentParser(description="An adapter beside a model that is trained whole, both on NVMe.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="what recipes/fetch_smollm2.py has fetched")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn")
    parser.add_argument("--r", type=int, default=8, help="rank of the adapter, on all linear modules but the head")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the drive is")
    add_save(parser)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder)).absolute()
    try:
        adapter = {"type": "lora", "r": arguments.r, "alpha": 2 * arguments.r, "target_modules": "all-linear"}
        recipes = {
            "whole": recipe_of(arguments.data.absolute(), arguments.steps, folder / "whole", WHOLE, None),
            "adapter": recipe_of(arguments.data.absolute(), arguments.steps, folder / "adapter", ADAPTED, adapter),
        }
        found: dict[str, list[Watched]] = {name: [] for name in recipes}
        for _ in range(arguments.rounds):
            for name, recipe in recipes.items():
                shutil.rmtree(folder / name, ignore_errors=True)
                found[name].append(run(folder, name, recipe))
        expected = plain_losses(folder / "adapter.yaml", arguments.r)
        rows = [row_of(name, folder / name, watched, found["whole"]) for name, watched in found.items()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    apart = max(abs(a - b) / b for a, b in zip(found["adapter"][0].loss, expected, strict=True))
    rows[1] = {**rows[1], "losses_apart_from_peft": apart}
    report(f"LoRA, r {arguments.r}, SmolLM2-135M, {SEQUENCES}×{SEQ_LEN}", rows, arguments.save)


def recipe_of(data: Path, steps: int, out: Path, tiers: dict[str, str], adapter: dict[str, Any] | None) -> Any:
    return {
        "model": {"name_or_path": str(data / "smollm2-135m")},
        **({} if adapter is None else {"adapter": adapter}),
        "dataset": {"path": str(data / "chats"), "messages_field": "messages"},
        "train": {
            "seq_len": SEQ_LEN,
            "micro_batch_size": SEQUENCES,
            "global_batch_size": SEQUENCES,
            "max_steps": steps,
            "precision": "fp32",
        },
        "optimizer": {"lr": 2e-4},
        "offload": {**tiers, "nvme_path": str(out / "nvme")},
        "logging": {"tensorboard": False, "report": False},
        "output_dir": str(out),
    }


def run(folder: Path, name: str, recipe: Any) -> Watched:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "zinf_cli.cli", "launch", str(path), "--slots", "1"]
    return watch(command, environment(folder), folder / name / "metrics.jsonl", skip=2)


def row_of(name: str, run_dir: Path, watched: Sequence[Watched], whole: Sequence[Watched]) -> Row:
    """`of_2_reads_of_all`: what a step reads, by two reads of the model and the adapter (fp32)."""
    plan = Plan.load(run_dir / "plan.json")
    units = plan.figures.model.units
    read = statistics.median(run.read_bytes for run in watched)
    return {
        "trained": name,
        "step_s": _step(watched),
        "ratio": _step(watched) / _step(whole),
        "peak_memory_bytes": max(run.peak_bytes for run in watched),
        "read_per_step_bytes": (int(plan.nvme_traffic - plan.nvme_written), int(read)),
        "written_per_step_bytes": statistics.median(run.write_bytes for run in watched),
        "of_2_reads_of_all": read / (2 * sum(u.trainable_bytes + u.frozen_bytes for u in units)),
    }


def _step(watched: Sequence[Watched]) -> float:
    return statistics.median(seconds for run in watched for seconds in run.step_s)


def plain_losses(recipe_path: Path, r: int) -> list[float]:
    """The loss of each step, by plain PyTorch and peft."""
    recipe = load_recipe(recipe_path)
    model: Any = AutoModelForCausalLM.from_pretrained(recipe.model.folder, dtype=torch.float32)
    text = open_text(recipe, model, 1)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        torch.manual_seed(recipe.seed)
        model = get_peft_model(model, config).train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)
    losses = []
    for step in range(recipe.train.max_steps or 0):
        losses.append(0.0)
        windows = [kind_of_stream(text.train).window(window, SEQ_LEN) for window in text.order.windows(step)]
        targets = [int((labels[1:] != MASKED).sum()) for _, labels, *_ in windows]
        for (ids, labels, *positions), count in zip(windows, targets, strict=True):
            apart = {"position_ids": positions[0][None]} if positions else {}
            loss = model(input_ids=ids[None], labels=labels[None], use_cache=False, **apart).loss * (
                count / sum(targets)
            )
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


if __name__ == "__main__":
    main()
