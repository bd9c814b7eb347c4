"""The problems: maps of known difficulty, built in float64 from a seed and cast to what a run needs.

======================  =============================================================================
``a``                   ``tanh(zW + x)``, z in R^256, symmetric W of norm 0.9
``a_hard``              the same, slow in every row: norm 0.985 and inputs too small to saturate
``b``                   the residual conv cell of the deep-implicit-layers tutorial (Kolter, Duvenaud &
                        Johnson 2020, chapter 4), which torchdeq's and locuslab/deq's image models use;
                        48 channels, 16x16, group norms
``c``                   as ``a`` with a contraction rate for each row: 80 % of 0.05 to 0.3, 15 % of 0.5 to
                        0.8, 5 % of 0.97 to 0.985 (times the slope of tanh)
``c_conv``              the same rates for a pre-normalised conv cell, 48 channels, 16x16
``easy``                32 rows of 64, norm 0.4: a handful of cheap steps, bookkeeping shows
``nonsymmetric``        as ``a_hard`` with W far from symmetric, complex eigenvalues
``two_scale``           a tuple state whose parts differ 1000-fold in size and settle at different rates
``resnet_span``         a block of timm's resnet18 (eval mode) with its output fed back
``conv_slow``           ``c_conv``'s cell with rate 0.97 in every row (``backward`` alone uses it)
======================  =============================================================================

The gradient is that of ``sum(cotangent * z)`` with respect to the parameters and to the input x.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .maps import MixedConvCell, MixedVector, ResidualSpan, TwoScale, Vector

__all__ = ["NAMES", "Problem", "build", "flat"]

f64 = torch.float64


@dataclass
class Problem:
    """``z = f(z, *context)`` from ``z0``; the first context tensor and f's parameters want gradients.

    Attributes:
        name: of the problem.
        f: the map.
        z0: zeros, a tensor or a tuple of tensors, batch first.
        context: tensors with one row per sample.
        cotangent: of the state's structure; the loss is its inner product with the solution.
        easy: (B,) bool of the rows that are meant to be easy; None: rows are alike.
        hard: the same for the hard rows.
    """

    name: str
    f: nn.Module
    z0: Any
    context: tuple[Tensor, ...]
    cotangent: Any
    easy: Tensor | None = None
    hard: Tensor | None = None
    note: str = field(default="")

    def to(self, dtype: torch.dtype, device: str) -> Problem:
        """A copy in another dtype or on another device."""

        def cast(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cast(v) for v in value)
            return value.detach().to(device=device, dtype=dtype)

        f = copy.deepcopy(self.f).to(device=device, dtype=dtype)
        masks = [None if mask is None else mask.to(device) for mask in (self.easy, self.hard)]
        return Problem(
            self.name, f, cast(self.z0), cast(self.context), cast(self.cotangent), *masks, note=self.note
        )

    def rows(self, index: Tensor) -> Problem:
        """The problem of some rows."""

        def pick(value: Any) -> Any:
            return tuple(v[index] for v in value) if isinstance(value, tuple) else value[index]

        masks = [None if mask is None else mask[index] for mask in (self.easy, self.hard)]
        return Problem(
            self.name, self.f, pick(self.z0), pick(self.context), pick(self.cotangent), *masks, note=self.note
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return flat(self.z0).shape[0]

    @property
    def parameters(self) -> list[Tensor]:
        """What f closes over and wants gradients."""
        return list(self.f.parameters())


def flat(state: Any) -> Tensor:
    """A state as a (B, D) matrix."""
    parts = state if isinstance(state, (tuple, list)) else (state,)
    return torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1)


class _Random:
    """Seeded normal and uniform numbers in float64."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=f64)

    def uniform(self, n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator, dtype=f64)

    def symmetric(self, size: int, norm: float) -> Tensor:
        w = self.normal(size, size)
        w = (w + w.T) / 2
        return norm * w / torch.linalg.matrix_norm(w, 2)

    def general(self, size: int, radius: float) -> Tensor:
        w = self.normal(size, size)
        return radius * w / torch.linalg.eigvals(w).abs().max()


def _vector(name: str, draw: _Random, batch: int, weight: Tensor, size: float) -> Problem:
    x = size * draw.normal(batch, weight.shape[0])
    return Problem(name, Vector(weight), torch.zeros_like(x), (x,), draw.normal(*x.shape))


def _a(draw: _Random, batch: int) -> Problem:
    return _vector("a", draw, batch, draw.symmetric(256, 0.9), 0.5)


def _a_hard(draw: _Random, batch: int) -> Problem:
    return _vector("a_hard", draw, batch, draw.symmetric(256, 0.985), 0.1)


def _easy(draw: _Random, batch: int) -> Problem:
    return _vector("easy", draw, batch, draw.symmetric(64, 0.4), 0.5)


def _nonsymmetric(draw: _Random, batch: int) -> Problem:
    return _vector("nonsymmetric", draw, batch, draw.general(256, 0.97), 0.1)


def _rates(draw: _Random, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Contraction rates (B,) in random order, and masks of the easy and the hard rows."""
    hard = max(1, round(0.05 * batch))
    medium = round(0.15 * batch)
    easy = batch - hard - medium
    rate = torch.cat(
        [draw.uniform(easy, 0.05, 0.3), draw.uniform(medium, 0.5, 0.8), draw.uniform(hard, 0.97, 0.985)]
    )
    rate = rate[torch.randperm(batch, generator=draw.generator)]
    return rate, rate <= 0.3, rate >= 0.97


def _c(draw: _Random, batch: int) -> Problem:
    x = 0.1 * draw.normal(batch, 256)
    rate, easy, hard = _rates(draw, batch)
    f = MixedVector(draw.symmetric(256, 1.0))
    return Problem("c", f, torch.zeros_like(x), (x, rate[:, None]), draw.normal(*x.shape), easy, hard)


def _two_scale(draw: _Random, batch: int) -> Problem:
    x = 0.2 * draw.normal(batch, 128)
    f = TwoScale(draw.symmetric(128, 0.2), draw.symmetric(128, 0.93), draw.general(128, 0.05))
    weights = draw.normal(*x.shape), draw.normal(*x.shape) / f.scale  # both parts matter to the loss
    return Problem("two_scale", f, (torch.zeros_like(x), torch.zeros_like(x)), (x,), weights)


def _initialise(module: nn.Module, draw: _Random, std: Callable[[Tensor], float]) -> None:
    """Normal weights for convolutions; norms keep their initial values."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(std(parameter) * draw.normal(*parameter.shape))


def _he(weight: Tensor) -> float:
    return (2.0 / weight[0].numel()) ** 0.5


def _b(draw: _Random, batch: int) -> Problem:
    from zoo.models.deq import Cell

    f = Cell(48, 64).to(f64)
    _initialise(f, draw, lambda w: 0.01)
    x = draw.normal(batch, 48, 16, 16)
    return Problem("b", f, torch.zeros_like(x), (x,), draw.normal(*x.shape))


def _conv(
    name: str,
    draw: _Random,
    batch: int,
    rate: Tensor,
    easy: Tensor | None = None,
    hard: Tensor | None = None,
) -> Problem:
    f = MixedConvCell(48).to(f64)
    _initialise(f, draw, _he)
    x = draw.normal(batch, 48, 16, 16)
    problem = Problem(
        name, f, torch.zeros_like(x), (x, rate.view(-1, 1, 1, 1)), draw.normal(*x.shape), easy, hard
    )
    return _contract(problem, lambda share: share)


def _c_conv(draw: _Random, batch: int) -> Problem:
    rate, easy, hard = _rates(draw, batch)
    return _conv("c_conv", draw, batch, rate, easy, hard)


def _conv_slow(draw: _Random, batch: int) -> Problem:
    return _conv("conv_slow", draw, batch, torch.full((batch,), 0.97, dtype=f64))


def _resnet_span(draw: _Random, batch: int) -> Problem:
    import timm

    stage = timm.create_model("resnet18", num_classes=0).get_submodule("layer2.1").to(f64)
    _initialise(stage, draw, _he)
    f = ResidualSpan(stage)
    x = draw.normal(batch, 128, 8, 8).relu()
    problem = Problem("resnet_span", f, torch.zeros_like(x), (x,), draw.normal(*x.shape))
    return _contract(problem, lambda share: 0.85)


def _contract(problem: Problem, wanted: Callable[[float], float]) -> Problem:
    """Rescale the map until its Jacobian at the fixed point has the wanted spectral radius.

    Measured on the two rows with the largest rates (or any two), the larger radius counts. A few rounds
    suffice, as the fixed point moves little.
    """
    f: Any = problem.f
    worst = torch.arange(min(2, problem.batch))
    share = 1.0
    if len(problem.context) > 1:
        rate = problem.context[1].flatten()
        worst = rate.argsort(descending=True)[:2]
        share = float(rate.max())
    few = problem.rows(worst)
    f.rescale(0.1)
    for _ in range(4):
        z = few.z0
        with torch.no_grad():
            for _ in range(150):
                z = f(z, *few.context)
        f.rescale(wanted(share) / _radius(f, z, few.context))
    return problem


def _radius(f: nn.Module, z: Tensor, context: tuple[Tensor, ...], products: int = 40) -> float:
    """Growth rate of vector-Jacobian products at z, the largest over its rows."""
    z = z.detach().requires_grad_()
    value = f(z, *context)
    u = torch.ones_like(z) + torch.linspace(0, 1, z.numel(), dtype=z.dtype).view(z.shape)
    growth = []
    for _ in range(products):
        u = u / flat(u).norm(dim=1).view(-1, *[1] * (u.dim() - 1))
        (u,) = torch.autograd.grad(value, z, u, retain_graph=True)
        growth.append(flat(u).norm(dim=1))
    return float(torch.stack(growth[-10:]).log().mean(0).exp().max())


_BUILDERS: dict[str, tuple[Callable[[_Random, int], Problem], int]] = {
    "a": (_a, 128),
    "a_hard": (_a_hard, 128),
    "b": (_b, 32),
    "c": (_c, 128),
    "c_conv": (_c_conv, 32),
    "easy": (_easy, 32),
    "nonsymmetric": (_nonsymmetric, 128),
    "two_scale": (_two_scale, 128),
    "resnet_span": (_resnet_span, 32),
    "conv_slow": (_conv_slow, 8),
}
NAMES = tuple(name for name in _BUILDERS if name != "conv_slow")
"""The problems of the benchmark ``solvers``."""


def build(name: str, seed: int = 0, batch: int | None = None) -> Problem:
    """A problem in float64 on the CPU.

    Args:
        name: one of the table above.
        seed: of all its random numbers.
        batch: rows; None: 128 for vectors, 32 for convolutions and the small problem.
    """
    maker, usual = _BUILDERS[name]
    return maker(_Random(1000 * seed + 17), batch or usual)
