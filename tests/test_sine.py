"""Task B of the first paper: the network of algorithm 3 and its fixed point, trained to a sine wave."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.sequencing.sine import ADJOINTS, TARGET, train_wave
from zoo.data.sequences import sine_wave
from zoo.errors import ConfigError
from zoo.models.sequence_sine import WaveNet

pytestmark = pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")


def test_predictions_are_fixed_points_of_algorithm_3():
    torch.manual_seed(0)
    model = WaveNet(tol=1e-6)
    wave = sine_wave(50)
    with torch.no_grad():
        predictions = model(wave.times)
        hidden, output = model.last.value
        again = model.net((hidden, output), wave.times)
    torch.testing.assert_close(again[0], hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(again[1], predictions, atol=1e-5, rtol=0)
    assert bool(((predictions > 0) & (predictions < 1)).all())
    assert int(model.last.steps.min()) > 2  # it is iterated


def test_the_adjoints_agree():
    grads = []
    for adjoint, solver in ADJOINTS.items():
        torch.manual_seed(0)
        model = WaveNet(hidden=8, solver=solver, adjoint=adjoint, tol=1e-7)
        wave = sine_wave(40)
        (model(wave.times) - wave.values).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], atol=1e-5, rtol=1e-3)


def test_the_wave_is_learnt_in_less_than_300_updates():
    """The target of the task, on fewer samples than the benchmark's."""
    run = train_wave("implicit", 0.01, seed=0, samples=3000, updates=200)
    assert run["mse"] < TARGET and run["reached"] is not None and run["reached"] <= 200
    assert run["updates"] == 200 and run["every"] == 2 and len(run["losses"]) == len(run["norms"]) == 100
    assert run["last_loss"] < 2 * run["losses"][-1]
    times, wanted, made = run["wave"]
    assert max(abs(a - b) for a, b in zip(wanted, made, strict=True)) < 0.2
    assert max(made) > 0.8 and min(made) < 0.2 and len(times) == 100


def test_one_seed_gives_one_run():
    runs = [train_wave("ad_fixed_point", 0.01, seed=3, samples=300, updates=4) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != train_wave("ad_fixed_point", 0.01, seed=4, samples=300, updates=4)


def test_the_wave_is_a_sine():
    wave = sine_wave(401, periods=2.0, margin=0.05)
    expected = 0.5 + 0.45 * torch.sin(2 * math.pi * (wave.times + 1))
    torch.testing.assert_close(wave.values, expected)
    assert float(wave.values.max()) == pytest.approx(0.95, abs=1e-3)
    with pytest.raises(ConfigError, match="margin"):
        sine_wave(margin=0.5)
    with pytest.raises(ConfigError, match="length"):
        sine_wave(0)
