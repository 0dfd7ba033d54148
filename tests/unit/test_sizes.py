"""The closed forms give the paper's own figures (ZeRO-Infinity, figures 2a and 3), to the digits it prints."""

from __future__ import annotations

import pytest

from zinf_cli.plan.sizes import Transformer, efficiency, shape_of

GIB, TIB = 2**30, 2**40
PEAK = 70e12
"""FLOP/s of a V100, section 4."""

# params (1e12), layers, hidden, heads; states TiB, activations TiB (64 sequences), checkpoints TiB (32),
# working memory of states and of activations (4 sequences) GiB
FIGURE_2A = [
    (0.10, 80, 10, 128, 1.83, 2.03, 0.05, 1.5625, 1.63),
    (1.01, 128, 25, 256, 18.31, 7.13, 0.20, 9.77, 3.56),
    (101.47, 315, 160, 1024, 1845.70, 88.59, 3.08, 400.00, 18.00),
]


@pytest.mark.parametrize("row", FIGURE_2A)
def test_memory_is_that_of_figure_2a(row: tuple[float, ...]) -> None:
    params, layers, hidden, heads, states, full, checkpoints, state_working, working = row
    model = Transformer(int(layers), int(hidden) * 1024, int(heads))
    assert model.params / 1e12 == pytest.approx(params, abs=0.005)
    assert model.state_bytes / TIB == pytest.approx(states, abs=0.005)
    assert model.activation_bytes(64) / TIB == pytest.approx(full, abs=0.005)
    assert model.checkpoint_bytes(32) / TIB == pytest.approx(checkpoints, abs=0.005)
    assert model.state_working_bytes / GIB == pytest.approx(state_working, abs=0.005)
    assert model.activation_working_bytes(4) / GIB == pytest.approx(working, abs=0.005)


@pytest.mark.parametrize(("sequences", "bandwidth", "percent"), [(1, 1e9, 1.44), (1, 70e9, 50.59)])
def test_efficiency_of_moving_parameters(sequences: int, bandwidth: float, percent: float) -> None:
    intensity = Transformer(128, 25600, 256).params_intensity(sequences)
    assert 100 * efficiency(intensity, bandwidth, PEAK) == pytest.approx(percent, abs=0.005)


@pytest.mark.parametrize(("sequences", "bandwidth", "percent"), [(1, 273.4e9, 50.0), (2, 1.5e12, 91.65)])
def test_efficiency_of_moving_optimizer_states(sequences: int, bandwidth: float, percent: float) -> None:
    intensity = Transformer(128, 25600, 256).optimizer_intensity(sequences)
    assert 100 * efficiency(intensity, bandwidth, PEAK) == pytest.approx(percent, abs=0.005)


@pytest.mark.parametrize(("hidden", "percent"), [(2, 41.25), (4, 58.41), (8, 73.74), (32, 91.83), (64, 95.74)])
def test_efficiency_of_moving_activations(hidden: int, percent: float) -> None:
    intensity = Transformer(1, hidden * 1024, 16).activations_intensity
    assert 100 * efficiency(intensity, 1e9, PEAK) == pytest.approx(percent, abs=0.005)


def test_a_checkpoint_every_other_block_halves_checkpoints_and_doubles_working_memory() -> None:
    every, other = (Transformer(128, 25600, 256, checkpoint_interval=interval) for interval in (1, 2))
    assert other.checkpoint_bytes(8) == every.checkpoint_bytes(8) / 2
    assert other.activation_working_bytes(8) == 2 * every.activation_working_bytes(8)
    assert other.activations_intensity == 2 * every.activations_intensity


@pytest.mark.parametrize("params", [125e6, 1.3e9, 7e9, 13e9, 70e9, 175e9, 100e9, 1e12, 5e12, 20e12, 32e12, 100e12])
def test_a_number_of_parameters_becomes_a_shape_of_about_as_many(params: float) -> None:
    model = shape_of(params)
    assert model.params == pytest.approx(params, rel=0.03)
    assert model.hidden % model.heads == 0


def test_a_trillion_is_the_trillion_of_the_paper() -> None:
    assert shape_of(1e12) == Transformer(128, 25600, 256)
    assert shape_of(1e11) == Transformer(80, 10240, 128)


def test_an_embedding_counts() -> None:
    assert shape_of(7e9, vocab=128256).params == pytest.approx(7e9, rel=0.03)
    assert Transformer(2, 64, 4, vocab=100).params == 2 * 12 * 64**2 + 6400
