"""Task B of Habiba & Pearlmutter (2021): a sine wave by algorithms 3 and 4, figure 7 redone.

From the paper: a tanh hidden layer, a sigmoid output, ``fix``, mean squared error (algorithms 3 and 4),
learning rate and tolerance 0.001, 10000 samples, at most 300 iterations (table 4), training done within 300
(section 4.2).

Not in the paper: what the inputs are (here the time, in [-1, 1]), how many periods (two), the scale (a
sigmoid does not reach -1: here 0.5 + 0.45 sin), the hidden units (32), the optimiser (Adam), the batch (every
tenth sample; the error is that of all of them), how the state enters the network
(:class:`zoo.models.sequence_sine.WaveNet`), and whether the 300 iterations are those of training or of
``fix``: here both are at most 300. Another learning rate is tried beside the paper's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from zoo.data.sequences import WaveData, sine_wave
from zoo.models.sequence_sine import WaveNet

__all__ = ["ADJOINTS", "RATES", "TARGET", "train_wave"]

ADJOINTS = {
    "ad_fixed_point": "ad_fixed_point",
    "implicit": "anderson",
    "unrolled": "picard",
}
"""Adjoints to compare, each with its solver."""

RATES = (0.001, 0.01)
TARGET = 1e-3
STRIDE = 10
"""Every tenth sample is trained on."""

POINTS = 100
"""How many updates, and samples of the wave, are kept for the plots, at most."""


def train_wave(
    adjoint: str, rate: float, seed: int, samples: int, updates: int, device: str = "cpu"
) -> dict[str, Any]:
    """Train for so many updates.

    Returns:
        JSON values: loss and gradient norm of every ``every``-th update, the loss of the last one, the wave
        generated at the end (times, targets, outputs), the work done.
    """
    torch.manual_seed(seed)
    whole = WaveData(*(part.to(device) for part in sine_wave(samples)))
    wave = WaveData(*(part[::STRIDE] for part in whole))
    model = WaveNet(solver=ADJOINTS[adjoint], adjoint=adjoint).to(device)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    losses, norms, evaluations, products, failed = [], [], 0, 0, 0
    for _ in range(updates):
        loss = F.mse_loss(model(wave.times), wave.values)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        losses.append(float(loss.detach()))
        optimizer.step()
        solution = model.last
        evaluations += solution.evaluations
        products += solution.adjoint.evaluations if solution.adjoint is not None else 0
        failed += int((~solution.converged).sum())
    with torch.no_grad():
        made = model(whole.times)
    final = float(F.mse_loss(made, whole.values))
    reached = next((i + 1 for i, value in enumerate(losses) if value < TARGET), None)
    every = math.ceil(updates / POINTS)
    shown = slice(None, None, math.ceil(samples / POINTS))
    return {
        "mse": final,
        "reached": reached,
        "steps": evaluations / (len(wave.times) * updates),
        "products": products / (len(wave.times) * updates),
        "rows_not_converged": failed,
        "last_steps": [int(model.last.steps.min()), int(model.last.steps.max())],
        "updates": updates,
        "every": every,
        "last_loss": losses[-1],
        "losses": [float(f"{value:.3g}") for value in losses[::every]],
        "norms": [float(f"{value:.3g}") for value in norms[::every]],
        "wave": [
            [round(float(value), 3) for value in column[shown].flatten()]
            for column in (whole.times, whole.values, made)
        ],
    }
