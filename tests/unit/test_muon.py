"""Muon beside torch.optim.Muon: the same bits wherever the state lies, since every matrix is updated as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from in_process import assert_goes_on_in_the_least_memory
from in_process import run as run_here
from plain import engine_losses, everything_on, open_engine, plain_losses
from tiny_models import CONFIGS, random_source
from workshop import Workshop
from zinf_cli.errors import RecipeError
from zinf_cli.model_state import SCALED
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Optimizer
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.figures import find_figures
from zinf_cli.train.optimizer import kernel_of, newton_schulz_flops

STEPS, RATE = 10, 1e-2
VOCABULARY = CONFIGS["llama"]["vocab_size"]


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's two, on what each is for: matrices of layers, and embeddings, head and norms."""

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        every = list(params)
        super().__init__(every, {})
        matrices = [param for param in every if param.dim() == 2 and param.shape[0] != VOCABULARY]
        rest = [param for param in every if not any(param is matrix for matrix in matrices)]
        assert matrices
        assert rest
        self.both: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=RATE, weight_decay=0.1),
        )

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for each in self.both:
            each.step()


MUON = kernel_of(Optimizer(name="muon", lr=RATE, weight_decay=0.1), RATE)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("how", "dtype"),
    [*product(["in memory", "deferred", "speculative", "eager"], [torch.float32, torch.bfloat16])],
)
def test_it_trains_with_the_bits_of_torch(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Chunks of other updates are smaller than matrices."""
    clip = {"eager": None, "speculative": 1.12}.get(how, 1.0)
    expected: dict[str, torch.Tensor] = {}
    source = random_source("llama")
    losses = plain_losses(source, STEPS, clip=clip, dtype=dtype, parameters=expected, optimizer_of=MuonAndAdamW)
    options = replace(everything_on("cpu" if how == "in memory" else "nvme", tmp_path), speculate=how == "speculative")
    engine = open_engine(source, options, optimizer=MUON.state, dtype=dtype, whole="muon", chunk_numel=4096)
    assert engine_losses(engine, STEPS, clip=clip, eager=how == "eager", kernel=MUON, close=False) == losses
    found = {name: value for number in range(len(engine.units)) for name, value in engine.read_params(number).items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    engine.close()


@pytest.mark.parametrize("stored", ["BF16", SCALED])
def test_its_momentum_may_be_rounded(stored: str, tmp_path: Path) -> None:
    expected = plain_losses(random_source("llama"), STEPS, optimizer_of=MuonAndAdamW)
    state = MUON.state.stored_as(stored)
    options = everything_on("nvme", tmp_path)
    engine = open_engine(random_source("llama"), options, optimizer=state, whole="muon", chunk_numel=2**20)
    losses = engine_losses(engine, STEPS, kernel=MUON)
    assert losses != expected
    assert losses[-1] == pytest.approx(expected[-1], rel=0.02)


def workshop_of(folder: Path) -> Workshop:
    workshop = Workshop(folder)
    workshop.content["optimizer"] = {"name": "muon", "lr": RATE}
    del workshop.content["dataset"]["eval_fraction"]
    workshop.write()
    return workshop


@pytest.mark.sampled
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_in_the_least_memory(precision: str, tmp_path: Path) -> None:
    assert_goes_on_in_the_least_memory(workshop_of(tmp_path).recipe, precision)


def test_the_plan_has_every_byte_and_a_cut_leaves_matrices_whole(tmp_path: Path) -> None:
    workshop = workshop_of(tmp_path)
    losses = []
    for most in (None, 700):
        recipe = load_recipe(
            workshop.recipe,
            [
                f"output_dir={tmp_path / str(most)}",
                "train.max_grad_norm=null",
                "train.max_steps=12",
                "offload.activations=cpu",
            ],
        )
        figures = find_figures(recipe, 1, most=most)
        plan = best_plan(recipe, figures)
        lines = run_here(recipe, plan)
        losses.append([line["loss"] for line in lines])
        assert max(line["nvme_bytes"] for line in lines) <= plan.nvme_bytes
        if most is None:
            moved = sum(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in lines)
            assert moved / len(lines) == pytest.approx(plan.nvme_traffic, rel=0.08)  # the last update is a flush
        else:
            assert "model.layers.0.self_attn.q_proj.weight" in figures.model.whole
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # last bits of gradients count more in bf16 iterations


def test_a_slice_of_a_matrix_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(workshop_of(tmp_path).recipe)
    with pytest.raises(RecipeError, match=r"optimizer\.name: muon updates whole matrices, and each of 2 ranks"):
        find_figures(recipe, 2)


def test_flops_of_an_iteration_are_those_of_its_products() -> None:
    least, most = 3, 5
    gram, square, times = 2 * least * least * most, 2 * least**3, 2 * least * least * most
    assert newton_schulz_flops(5, 3) == newton_schulz_flops(3, 5) == 5 * (gram + square + times)
