"""States whose parts are measured in different units, or kept in different dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import twnn_plugin as tw
from tests import problems
from twnn_plugin.testing import problems as reference

f64 = torch.float64
SCALES = (1e-4, 1e2, 1e4)


def joined(state: Any) -> Tensor:
    return torch.cat(list(state), dim=1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


# -------------------------------------------------------------------------------------------- certificates


@dataclass
class Halves:
    """A problem whose state is given as two halves, the second in units ``scale`` times smaller."""

    problem: problems.Problem
    scale: float

    @property
    def unit(self) -> Tensor:
        unit = torch.ones(self.problem.z0.shape[1], dtype=f64)
        unit[len(unit) // 2 :] = self.scale
        return unit

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        half = z.shape[1] // 2
        return z[:, :half], z[:, half:]

    def whole(self, z: Tensor, *context: Tensor) -> Tensor:
        return self.unit * self.problem.f(z / self.unit, *context)

    def f(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, ...]:
        return self.split(self.whole(joined(z), *context))

    def solved(self, tol: float, adjoint_tol: float) -> tuple[tuple[Tensor, ...], tw.Solution]:
        context = tuple(c.detach().requires_grad_() for c in self.problem.context)
        solution = tw.fix(
            self.f,
            self.split(self.unit * self.problem.z0),
            *context,
            solver="picard",
            tol=tol,
            max_iter=2000,
            adjoint=tw.adjoint("implicit", solver="picard", tol=adjoint_tol, max_iter=2000),
        )
        return context, solution

    def exact(self) -> tuple[Tensor, Tensor]:
        """The fixed point, and the Jacobians there, (B, D, D)."""
        z = reference.solution(self.problem)
        matrix = reference.jacobian(self.problem, z)
        return self.unit * z, self.unit[:, None] * matrix / self.unit


def true_errors(halves: Halves, context, solution: tw.Solution, g: Tensor) -> tuple[Tensor, float]:
    """Relative errors of each row's gradient (all context) and of the weights' against dense algebra."""
    wanted = [*halves.problem.parameters, *context]
    mine = torch.autograd.grad(joined(solution.value), wanted, g)
    z, matrix = halves.exact()
    u = torch.linalg.solve(torch.eye(z.shape[1], dtype=f64) - matrix.mT, g)
    right = torch.autograd.grad(halves.whole(z, *context), wanted, u)
    count = len(halves.problem.parameters)
    rows = [torch.cat([c.flatten(1) for c in grads[count:]], dim=1) for grads in (mine, right)]
    weights = [torch.cat([p.flatten() for p in grads[:count]]) for grads in (mine, right)]
    return (rows[0] - rows[1]).norm(dim=1) / rows[1].norm(dim=1), problems.relative(*weights)


def in_units(z: Tensor, halves: Halves) -> Tensor:
    """(B, D) the rms of the half that an entry is of."""
    rms = [part.square().mean(dim=1, keepdim=True).sqrt().expand_as(part) for part in halves.split(z)]
    return torch.cat(rms, dim=1)


@pytest.mark.parametrize("make", problems.ALL)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loss", ["of the numbers", "of the quantities"])
def test_the_adjoint_error_of_parts_in_different_units_is_that_of_the_truth(make, scale, loss):
    """As large as it is for one tensor: see docs/certificates.md."""
    halves = Halves(make(), scale)
    context, solution = halves.solved(1e-13, 1e-2)
    g = draw(*halves.problem.z0.shape, seed=5)
    if loss == "of the quantities":
        g = g / halves.unit
    rows, weights = true_errors(halves, context, solution, g)
    found = tw.gradient_error(halves.f, solution, *context, cotangent=halves.split(g))
    assert (found.total >= rows / 3).all() and (found.total <= 30 * rows).all()
    assert weights <= float(found.weights) <= 15 * weights


@pytest.mark.parametrize("make", problems.ALL)
@pytest.mark.parametrize("scale", SCALES)
def test_the_error_of_u_is_bounded_in_the_units_that_the_backward_solve_measures_in(make, scale):
    """For u itself, the quantity of the theorem, with any residual of a given size."""
    halves = Halves(make(), scale)
    context = halves.problem.context
    z, matrix = halves.exact()
    unit = in_units(z, halves)
    g = draw(*z.shape, seed=5)
    direction = torch.nn.functional.normalize(draw(*z.shape, seed=6), dim=1)
    rho = 1e-3 * (unit * g).norm(dim=1, keepdim=True) * direction / unit
    system = torch.eye(z.shape[1], dtype=f64) - matrix.mT
    u, wrong = torch.linalg.solve(system, g), torch.linalg.solve(system, g + rho)
    found = tw.gradient_error(
        halves.f, halves.split(z), *context, cotangent=halves.split(g), adjoint_residual=1e-3
    )
    truth = (unit * (wrong - u)).norm(dim=1) / (unit * u).norm(dim=1)
    assert (truth <= found.adjoint * (1 + 1e-6)).all()
    assert (found.adjoint <= 60 * truth).all()


@pytest.mark.parametrize("make", problems.ALL)
@pytest.mark.parametrize("scale", SCALES)
def test_spectrum_and_state_error_against_dense_algebra(make, scale):
    halves = Halves(make(), scale)
    context, solution = halves.solved(1e-4, 1e-4)
    z, matrix = halves.exact()
    found = tw.certify(halves.f, solution, *context)
    radius = torch.linalg.eigvals(matrix).abs().amax(dim=1)
    torch.testing.assert_close(found.radius.value, radius, rtol=1e-3, atol=0)
    unit = in_units(z, halves)
    norm = torch.linalg.matrix_norm(matrix * unit[:, None, :] / unit[:, :, None], 2)
    torch.testing.assert_close(found.lipschitz.value, norm, rtol=1e-3, atol=0)
    distance = (joined(solution.value).detach() - z).norm(dim=1)
    torch.testing.assert_close(found.state_error, distance, rtol=1e-2, atol=0)
    assert (found.state_bound >= distance).all()
    assert torch.equal(found.state_bound.isfinite(), found.lipschitz.value < 1)


@pytest.mark.parametrize("scale", [2.0**-13, 2.0**13])
def test_what_parts_are_measured_in_makes_no_difference(scale):
    """Powers of two: what is left is the constant that keeps a residual relative to zero finite."""
    certificates = []
    for halves in (Halves(problems.mixed(), 1.0), Halves(problems.mixed(), scale)):
        context, solution = halves.solved(1e-3, 1e-2)
        (joined(solution.value) / halves.unit).sum().backward()
        drawn = tw.certify(halves.f, solution, *context)
        own = tw.certify(
            halves.f,
            solution,
            *context,
            cotangent=lambda v, unit=halves.unit: ((joined(v) / unit) ** 3).sum(),
        )
        closed = tw.certify(lambda z, h=halves, c=context: h.f(z, *[t.detach() for t in c]), solution)
        certificates.append((drawn, own, closed))
    for one, other in zip(*certificates, strict=True):
        for a, b in (
            (one.residual, other.residual),
            (one.radius.value, other.radius.value),
            (one.radius.error, other.radius.error),
            (one.lipschitz.value, other.lipschitz.value),
            *zip(one.gradient, other.gradient, strict=True),
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
        assert one.warnings == other.warnings


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_spectral_radius_in_float32(scale):
    """Over the plain row the method's own rounding was larger than the small part."""
    halves = Halves(problems.non_symmetric(batch=16), scale)
    z, matrix = halves.exact()
    parts = tuple(part.float() for part in halves.split(z))

    def f(z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.float() for part in halves.f(tuple(part.double() for part in z), x.double()))

    x = halves.problem.context[0].float()
    truth = torch.linalg.eigvals(matrix).abs().amax(dim=1)
    found = tw.spectral_radius(f, parts, x)
    torch.testing.assert_close(found.value.double(), truth, rtol=1e-3, atol=0)
    assert (found.error < 0.1).all()


def test_rows_with_nan_and_parts_that_are_zero_or_empty():
    x = draw(4, 3)

    def f(z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        return 1e4 * torch.tanh(0.5e-4 * z[0] + x), 0.5 * z[1], z[2]

    zero, empty = torch.zeros(4, 2, dtype=f64), torch.zeros(4, 0, dtype=f64)
    solution = tw.fix(f, (torch.zeros(4, 3, dtype=f64), zero, empty), x, tol=1e-6)
    clean = tw.certify(f, solution, x)
    torch.testing.assert_close(clean.radius.value.amax(), torch.tensor(0.5, dtype=f64), rtol=1e-3, atol=0)
    assert bool(clean.gradient.total.isfinite().all()) and bool(clean.state_bound.isfinite().all())
    for broken in (float("nan"), float("inf")):
        spoilt = solution.value[0].detach().clone()
        spoilt[1, 0] = broken
        found = tw.gradient_error(f, (spoilt, zero, empty), x, adjoint_residual=1e-3)
        assert found.total.isnan().tolist() == [False, True, False, False]
    nothing = tw.fix(lambda z: z, (empty, empty))
    assert tw.certify(lambda z: z, nothing).state_bound.tolist() == [0.0] * 4


# --------------------------------------------------------------------------------- parts of different dtype


Pair = tuple[Callable[..., Any], tuple[Tensor, Tensor]]


def pair(first: torch.dtype, second: torch.dtype, weight: Tensor) -> Pair:
    """A map of two parts of one size, each rounded to its own dtype."""

    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        p, q = z[0].double(), z[1].double()
        return torch.tanh(p @ weight + q + x).to(first), (0.5 * torch.cos(q + p)).to(second)

    return f, (torch.zeros(7, 5, dtype=first), torch.zeros(7, 5, dtype=second))


def quiet(*arguments: Any, **options: Any) -> tw.Solution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(*arguments, **options)


SPREAD = torch.logspace(-3, 0.5, 7, dtype=f64)[:, None]
INPUTS = draw(7, 5, seed=2) * SPREAD


@pytest.mark.parametrize(
    "dtypes, plain, tol",
    [
        ((f64, torch.float32), torch.float32, 2e-6),
        ((torch.float32, f64), torch.float32, 2e-6),
        ((f64, torch.bfloat16), torch.bfloat16, 2e-2),
        ((torch.float32, torch.bfloat16), torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("options", [{}, {"stop": "abs"}, {"coupled": True}])
def test_differences_stand_out_from_the_rounding_of_the_coarsest_part(dtypes, plain, tol, options):
    """No more evaluations than where every part is as coarse."""
    weight, counts = 0.25 * draw(5, 5, seed=1), []
    for first, second in (dtypes, (plain, plain)):
        f, z0 = pair(first, second, weight)
        with torch.no_grad():
            solution = quiet(f, z0, INPUTS, solver="newton_krylov", tol=tol, max_iter=300, **options)
        assert bool(solution.converged.all())
        counts.append(solution.evaluations)
    assert counts[0] <= 1.2 * counts[1], counts


def test_in_the_backward_solve_too():
    counts = []
    for second in (f64, torch.float32):
        f, z0 = pair(f64, second, 0.25 * draw(5, 5, seed=1))
        x = INPUTS.clone().requires_grad_()
        backward = tw.adjoint("implicit", solver=tw.solver("newton_krylov"), tol=2e-6, max_iter=300)
        solution = tw.fix(f, z0, x, tol=2e-6, max_iter=300, adjoint=backward)
        (solution.value[0].sum() + solution.value[1].double().sum()).backward()
        assert solution.adjoint is not None and not bool(solution.adjoint.status.any())
        counts.append(solution.adjoint.evaluations)
    assert counts[1] <= 1.2 * counts[0], counts


def test_the_derivative_of_the_steps_where_a_part_is_in_single_precision():
    weight = (0.25 * draw(5, 5, seed=5)).requires_grad_()
    f, z0 = pair(f64, torch.float32, weight)
    cotangent = draw(7, 10, seed=8)

    def gradients(value: Any, x: Tensor) -> tuple[Tensor, ...]:
        z = torch.cat([part.double() for part in value], dim=1)
        return torch.autograd.grad((z * cotangent).sum() + z.square().sum(), [weight, x])

    x = (draw(7, 5, seed=25) * SPREAD).requires_grad_()
    z = z0
    for _ in range(300):
        z = f(z, x)
    solution = tw.fix(f, z0, x, solver="newton_krylov", adjoint="unrolled", tol=2e-6, max_iter=600)
    for mine, right in zip(gradients(solution.value, x), gradients(z, x), strict=True):
        assert problems.relative(mine, right) < 1e-4


def test_under_autocast_the_rounding_is_that_of_its_products():
    """The sum after the product is in float32, and hides what the product was rounded to."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(30, 30)
    torch.nn.init.normal_(layer.weight, std=0.15)
    x = draw(16, 30).float()
    counts = []
    for solver in ("newton_krylov", "picard"):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            solution = quiet(
                lambda z, x: torch.tanh(layer(z) + x),
                torch.zeros_like(x),
                x,
                solver=solver,
                tol=2e-2,
                max_iter=200,
            )
        assert bool(solution.converged.all())
        counts.append(solution.evaluations)
    assert counts[0] <= 1.5 * counts[1], counts


def test_numbers_that_happen_to_be_exact_do_not_make_a_state_coarse():
    """An obstacle that was read in single precision: in the rows that touch it some entries are its own."""
    x = draw(16, 30, seed=4)
    weight = draw(30, 30, seed=5)
    weight = 2 * weight / torch.linalg.matrix_norm(weight, 2)
    counts = []
    for obstacle in (x, x.float().double()):
        with torch.no_grad():
            solution = quiet(
                lambda z, b: torch.maximum(torch.tanh(z) @ weight, b),
                torch.zeros_like(x),
                obstacle,
                solver="newton_krylov",
                tol=1e-12,
                max_iter=300,
            )
        assert bool(solution.converged.all())
        counts.append(solution.evaluations)
    assert counts[1] <= 1.3 * counts[0], counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_penalty_on_the_radius_is_the_same_in_other_units(scale, dtype):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)

    def penalty(scale):
        w = weight.to(dtype).requires_grad_()

        def f(z, x):
            out = torch.tanh(torch.cat([z[0], z[1] / scale], dim=1) @ w + x)
            return out[:, :4], scale * out[:, 4:]

        zero = torch.zeros(3, 4, dtype=dtype)
        solution = tw.fix(f, (zero, zero), x, tol=1e-6, max_iter=200, solver="picard")
        z = tuple(part.detach() for part in solution.value)
        options = {"measure": "radius", "iterations": 8, "generator": torch.Generator().manual_seed(0)}
        found = tw.spectral_penalty(f, z, x, **options)
        return found.detach(), torch.autograd.grad(found, w)[0]

    expected, found = penalty(1.0), penalty(scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_radius_of_attention_whose_fused_kernels_are_differentiated_once():
    def f(z):
        return 0.5 * torch.nn.functional.scaled_dot_product_attention(z, z, z)

    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobians = [torch.func.jacrev(lambda row: f(row[None])[0])(row).reshape(12, 12) for row in z]
    expected = torch.stack([torch.linalg.eigvals(j).abs().amax() for j in jacobians])
    torch.testing.assert_close(tw.spectral_radius(f, z).value, expected, rtol=1e-3, atol=1e-4)
