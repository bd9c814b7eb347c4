"""Certificates: every figure against dense linear algebra, every warning by a case that earns it."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import twnn_plugin as tw
from tests import problems
from twnn_plugin.certificates import (
    certify,
    contraction_rate,
    gradient_error,
    observed_rate,
    spectral_radius,
)
from twnn_plugin.certificates.linear import Jacobian, solve_shifted
from twnn_plugin.errors import MapError, OptionError

DOUBLE = torch.float64
DOCS = Path(__file__).resolve().parents[1] / "docs" / "certificates.md"


def rotation(angle: float, scale: float = 0.9) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return scale * torch.tensor([[c, -s], [s, c]], dtype=DOUBLE)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def dense(f, z: Tensor, *context: Tensor) -> Tensor:
    """(B, D, D) Jacobians, one row at a time."""
    rows = []
    for i in range(z.shape[0]):
        one = [c[i : i + 1].detach() for c in context]
        jacobian = torch.autograd.functional.jacobian(lambda v, one=one: f(v[None], *one)[0], z[i].detach())
        assert isinstance(jacobian, Tensor)
        rows.append(jacobian.detach())
    return torch.stack(rows)


def settled(problem: problems.Problem, steps: int = 400) -> Tensor:
    z = problem.z0
    with torch.no_grad():
        for _ in range(steps):
            z = problem.f(z, *problem.context)
    return z


# ------------------------------------------------------------------------------------------- the spectrum


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, 2.0, math.pi])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_radius_of_a_rotation_is_seen_whatever_its_angle(angle, dtype):
    w = rotation(angle).to(dtype)
    found = spectral_radius(lambda z: z @ w, torch.ones(3, 2, dtype=dtype))
    torch.testing.assert_close(found.value, torch.full((3,), 0.9, dtype=dtype))
    assert (found.error < 1e-5).all()
    rate = contraction_rate(lambda z: z @ w, torch.ones(3, 2, dtype=dtype))
    torch.testing.assert_close(rate.value, torch.full((3,), 0.9, dtype=dtype))


@pytest.mark.parametrize("make", problems.ALL)
def test_radius_and_rate_are_those_of_the_dense_jacobian(make):
    problem = make()
    z = settled(problem)
    jacobian = dense(problem.f, z, *problem.context)
    radius = spectral_radius(problem.f, z, *problem.context)
    torch.testing.assert_close(
        radius.value, torch.linalg.eigvals(jacobian).abs().amax(dim=1), rtol=1e-8, atol=0
    )
    rate = contraction_rate(problem.f, z, *problem.context)
    torch.testing.assert_close(rate.value, torch.linalg.matrix_norm(jacobian, 2), rtol=1e-8, atol=0)
    assert (rate.value >= radius.value * (1 - 1e-9)).all()


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 40), seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
@example(size=27, seed=293396, scale=1.0)  # its second singular value is accurate before the first one shows
@example(size=28, seed=2156, scale=1.0)  # and stays so for two looks
def test_figures_of_random_matrices_are_within_their_error(size, seed, scale):
    w = scale * draw(size, size, seed=seed)
    z = torch.zeros(2, size, dtype=DOUBLE)
    norm = contraction_rate(lambda z: z @ w, z)
    true = torch.linalg.matrix_norm(w, 2)
    # From below, and within the residual: J^T J is symmetric.
    assert (norm.value <= true * (1 + 1e-9)).all()
    assert (norm.value + norm.error >= true * (1 - 1e-9)).all()
    radius = spectral_radius(lambda z: z @ w, z, iterations=60, tol=0.0)
    torch.testing.assert_close(
        radius.value, torch.linalg.eigvals(w).abs().max().expand(2), rtol=2e-2, atol=1e-12
    )


def test_a_start_that_misses_the_largest_singular_value_is_one_in_thousands():
    """Beyond what is kept there is no certainty: about one random matrix in ten thousand of these sizes."""
    missed = 0
    for size in (41, 50, 60):
        w = draw(500 * size, size, seed=size).unflatten(0, (500, size))
        found = contraction_rate(
            lambda z, w: torch.einsum("bi,bij->bj", z, w), torch.zeros(500, size).double(), w
        )
        missed += int((found.value + found.error < torch.linalg.matrix_norm(w, 2) * (1 - 1e-9)).sum())
    assert missed <= 1


def test_the_method_restarts_where_one_krylov_space_is_not_enough():
    """A random matrix has many eigenvalues of almost the largest modulus, most of them complex."""
    w = draw(256, 256)
    w = 0.9 * w / torch.linalg.eigvals(w).abs().max()
    z = torch.zeros(1, 256, dtype=DOUBLE)
    short = spectral_radius(lambda z: z @ w, z, iterations=40)
    long = spectral_radius(lambda z: z @ w, z, iterations=200)
    assert short.products == 40 and 40 < long.products < 200
    assert float(short.error) > 1e-2 and float(long.error) < 1e-3
    assert abs(float(long.value) - 0.9) < 1e-3


def test_an_estimate_that_has_not_settled_says_so():
    """A shift has all its eigenvalues on one circle, the worst case for a Krylov space."""
    w = 0.9 * torch.roll(torch.eye(200, dtype=DOUBLE), 1, 0)
    found = spectral_radius(lambda z: z @ w, torch.zeros(1, 200, dtype=DOUBLE))
    assert 0.8 < float(found.value) < 0.9
    assert float(found.value + found.error) > 0.9


def test_the_estimate_stops_as_soon_as_every_row_is_accurate():
    w = torch.diag(torch.tensor([0.9] + [0.1] * 99, dtype=DOUBLE))
    found = spectral_radius(lambda z: z @ w, torch.zeros(2, 100, dtype=DOUBLE))
    assert found.products == 10
    exact = spectral_radius(lambda z: z @ w, torch.zeros(2, 100, dtype=DOUBLE), iterations=30, tol=0.0)
    assert exact.products == 30 or float(exact.error.max()) == 0.0


def test_a_rows_figures_depend_on_that_row_alone():
    problem = problems.mixed(batch=8, size=30)
    z = settled(problem, 50)
    together = spectral_radius(problem.f, z, *problem.context)
    assert torch.equal(together.value, spectral_radius(problem.f, z, *problem.context).value)
    spoilt = z.clone()
    spoilt[3] = float("nan")
    spoilt[5] = float("inf")
    others = [0, 1, 2, 4, 6, 7]
    for figure in (spectral_radius, contraction_rate):
        whole = figure(problem.f, z, *problem.context).value
        beside = figure(problem.f, spoilt, *problem.context).value
        torch.testing.assert_close(beside[others], whole[others], rtol=1e-12, atol=0)
        assert beside[3].isnan()
        for i in (0, 7):
            one = figure(problem.f, z[i : i + 1], *(c[i : i + 1] for c in problem.context)).value
            torch.testing.assert_close(one[0], whole[i], rtol=1e-9, atol=0)


def test_tuple_and_dict_states_and_multi_axis_tensors():
    w = draw(6, 6) * 0.2

    def whole(z):
        return torch.tanh(z @ w)

    def parts(z):
        out = whole(torch.cat([z[0].flatten(1), z[1]], dim=1))
        return out[:, :4].view(-1, 2, 2), out[:, 4:]

    def named(z):
        return dict(zip("ab", parts((z["a"], z["b"])), strict=True))

    z = draw(3, 6, seed=1)
    expected = spectral_radius(whole, z).value
    state = z[:, :4].view(-1, 2, 2), z[:, 4:]
    torch.testing.assert_close(spectral_radius(parts, state).value, expected)
    torch.testing.assert_close(spectral_radius(named, {"a": state[0], "b": state[1]}).value, expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_states(shape):
    z = torch.zeros(shape)
    for figure in (spectral_radius, contraction_rate):
        found = figure(lambda z: 0.5 * z, z)
        assert found.value.tolist() == [0.0] * shape[0]
    solution = tw.fix(lambda z: 0.5 * z, z)
    assert certify(lambda z: 0.5 * z, solution).residual.shape == (shape[0],)


def test_a_constant_map_and_one_that_ignores_its_state():
    z = torch.ones(2, 3)
    x = torch.ones(2, 3)
    for f in (torch.ones_like, lambda z: x.clone()):
        assert spectral_radius(f, z).value.tolist() == [0.0, 0.0]
        assert contraction_rate(f, z).value.tolist() == [0.0, 0.0]


def test_neither_gradients_nor_the_global_random_state_are_touched():
    problem = problems.vector()
    before = torch.random.get_rng_state()
    with torch.no_grad():
        spectral_radius(problem.f, problem.z0, *problem.context)
        contraction_rate(problem.f, problem.z0, *problem.context)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in problem.parameters)


def test_half_precision_is_computed_in_float32():
    w = rotation(1.0).to(torch.bfloat16)
    found = spectral_radius(lambda z: z @ w, torch.ones(2, 2, dtype=torch.bfloat16))
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, torch.full((2,), 0.9), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, z: spectral_radius(f, z, iterations=0), "iterations must be a whole number"),
        (lambda f, z: spectral_radius(f, z, iterations=True), "iterations must be a whole number"),
        (lambda f, z: contraction_rate(f, z, tol=-1.0), "tol must be a number"),
        (lambda f, z: contraction_rate(f, z, tol=float("nan")), "tol must be a number"),
        (lambda f, z: gradient_error(f, z, iterations=1.5), "iterations must be a whole number"),
        (lambda f, z: certify(f, z), "a Solution; got a Tensor"),
        (lambda f, z: certify(f, tw.fix(f, z), stop="relative"), "stop must be one of"),
        (lambda f, z: certify(f, tw.fix(f, z), norm="l1"), "norm must be one of"),
        (lambda f, z: observed_rate(z[0]), "trace"),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(OptionError, match=message):
        call(lambda z: 0.5 * z, torch.ones(2, 3))


def test_a_map_or_context_that_does_not_fit_is_refused():
    with pytest.raises(MapError, match="keep the shape"):
        spectral_radius(lambda z: z[:, :1], torch.ones(2, 3))
    with pytest.raises(MapError, match="2 rows"):
        spectral_radius(lambda z, x: z + x, torch.ones(2, 3), torch.ones(3, 3))


def test_the_observed_rate_is_the_slope_of_the_trace():
    steps = torch.arange(20, dtype=DOUBLE)
    trace = torch.stack([0.7**steps, 5 * 0.2**steps, torch.full_like(steps, float("nan")), 0.5**steps])
    trace[1, 12:] = float("nan")  # done early
    trace[0, :5] = 3.0  # a transient
    trace[3, 1:] = float("nan")  # one residual only
    rate = observed_rate(trace)
    torch.testing.assert_close(rate[:2], torch.tensor([0.7, 0.2], dtype=DOUBLE))
    assert rate[2].isnan() and rate[3].isnan()
    assert observed_rate(torch.empty(2, 0)).isnan().all()


def test_the_observed_rate_of_plain_iteration_is_the_spectral_radius():
    from twnn_plugin.observe import Trace

    problem, trace = problems.affine(size=4), Trace()
    tw.fix(problem.f, problem.z0, *problem.context, solver="picard", tol=1e-12, max_iter=200, callback=trace)
    radius = spectral_radius(problem.f, problem.z0, *problem.context).value
    torch.testing.assert_close(observed_rate(trace.residual), radius, rtol=0.05, atol=0)


# --------------------------------------------------------------------------------- linear systems, errors


@pytest.mark.parametrize("make", problems.ALL)
def test_the_linear_solve_is_exact_in_a_full_space(make):
    problem = make()
    z = settled(problem)
    jacobian = Jacobian(problem.f, z, problem.context)
    matrix = dense(problem.f, z, *problem.context)
    b = draw(*z.shape, seed=7)
    torch.testing.assert_close(jacobian.push(b), torch.einsum("bij,bj->bi", matrix, b))
    torch.testing.assert_close(jacobian.pull(b), torch.einsum("bij,bi->bj", matrix, b))
    x = solve_shifted(jacobian.push, b, 40)
    torch.testing.assert_close(x - torch.einsum("bij,bj->bi", matrix, x), b)


def true_errors(problem: problems.Problem, solution: tw.Solution, context, g: Tensor):
    """Relative errors of each row's gradient (all context) and of the parameters' against dense algebra."""
    mine = torch.autograd.grad(solution.value, [*problem.parameters, *context], g)
    z = settled(problem, 3000)
    eye = torch.eye(z.shape[1], dtype=DOUBLE)
    matrix = dense(problem.f, z, *context)
    u = torch.stack([torch.linalg.solve(eye - m.T, b) for m, b in zip(matrix, g, strict=True)])
    right = torch.autograd.grad(problem.f(z, *context), [*problem.parameters, *context], u)
    count = len(problem.parameters)
    rows = [torch.cat([c.flatten(1) for c in grads[count:]], dim=1) for grads in (mine, right)]
    weights = [torch.cat([p.flatten() for p in grads[:count]]) for grads in (mine, right)]
    by_row = (rows[0] - rows[1]).norm(dim=1) / rows[1].norm(dim=1)
    return by_row, problems.relative(*weights), (solution.value.detach() - z).norm(dim=1)


def solved(problem: problems.Problem, tol: float, adjoint_tol: float):
    context = tuple(c.detach().requires_grad_() for c in problem.context)
    solution = tw.fix(
        problem.f,
        problem.z0,
        *context,
        solver="picard",
        tol=tol,
        max_iter=2000,
        adjoint=tw.adjoint("implicit", solver="picard", tol=adjoint_tol, max_iter=2000),
    )
    return context, solution


@pytest.mark.parametrize("make", problems.ALL)
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-5])
def test_the_error_from_the_state_is_tracked(make, tol):
    problem = make()
    context, solution = solved(problem, tol, 1e-13)
    g = draw(*problem.z0.shape, seed=5)
    rows, weights, distance = true_errors(problem, solution, context, g)
    found = gradient_error(problem.f, solution, *context, cotangent=g)
    visible = rows > 1e-9
    ratio = found.total[visible] / rows[visible]
    assert (ratio > 1 / 1.5).all() and (ratio < 1.5).all()
    assert 1 / 1.5 < float(found.weights) / weights < 1.5
    certificate = certify(problem.f, solution, *context, cotangent=g)
    assert (certificate.state_bound >= distance).all()
    ratio = certificate.state_error / distance
    assert (ratio > 1 / 1.1).all() and (ratio < 1.1).all()


@pytest.mark.parametrize("make", problems.ALL)
@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_the_error_from_the_adjoint_is_bounded(make, tol):
    problem = make()
    context, solution = solved(problem, 1e-13, tol)
    g = draw(*problem.z0.shape, seed=5)
    rows, weights, _ = true_errors(problem, solution, context, g)
    found = gradient_error(problem.f, solution, *context, cotangent=g)
    # The bound is on u; df/dcontext may make more of the error than of u.
    assert (found.total >= rows / 3).all() and (found.total <= 30 * rows).all()
    assert weights <= float(found.weights) <= 10 * weights
    assert (found.adjoint > 100 * found.state).all()


@pytest.mark.parametrize("make", problems.ALL)
def test_the_bound_on_the_adjoints_own_error_holds(make):
    """For u itself, the quantity of the theorem, with any residual of a given size."""
    problem = make()
    z = settled(problem)
    matrix, g = dense(problem.f, z, *problem.context), draw(*z.shape, seed=5)
    system = torch.eye(z.shape[1], dtype=DOUBLE) - matrix.mT
    u = torch.stack([torch.linalg.solve(m, b) for m, b in zip(system, g, strict=True)])
    rho = 1e-3 * g.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(draw(*z.shape, seed=6), dim=1)
    wrong = torch.stack([torch.linalg.solve(m, b) for m, b in zip(system, g + rho, strict=True)])
    found = gradient_error(problem.f, z, *problem.context, cotangent=g, adjoint_residual=1e-3)
    assert ((wrong - u).norm(dim=1) / u.norm(dim=1) <= found.adjoint * (1 + 1e-6)).all()


def test_a_loss_may_stand_in_for_its_cotangent():
    """Then the change of dL/dz with the state counts, too: here it is all there is."""
    w = torch.tensor([[0.5]], dtype=DOUBLE)

    def f(z, x):
        return z @ w + x

    x, z = torch.ones(1, 1, dtype=DOUBLE), torch.full((1, 1), 1.9, dtype=DOUBLE)  # the solution is 2
    constant = gradient_error(f, z, x, cotangent=torch.ones(1, 1, dtype=DOUBLE))
    cubic = gradient_error(f, z, x, cotangent=lambda z: (z**3).sum())
    assert float(constant.state) < 1e-12
    torch.testing.assert_close(float(cubic.state), 1 - 1.9**2 / 2**2)
    assert float(cubic.weights) == 0.0  # w wants no gradient


def test_rows_with_nan_stay_out_of_everybody_elses_figures():
    problem = problems.vector(batch=4)
    x = problem.context[0].detach().clone()
    clean = tw.fix(problem.f, problem.z0[[0, 1, 3]], x[[0, 1, 3]], tol=1e-3)
    x[2] = float("nan")
    with pytest.warns(tw.ConvergenceWarning):
        solution = tw.fix(problem.f, problem.z0, x, tol=1e-3)
    g = draw(4, 8)
    found = gradient_error(problem.f, solution, x, cotangent=g)
    alone = gradient_error(problem.f, clean, x[[0, 1, 3]], cotangent=g[[0, 1, 3]])
    torch.testing.assert_close(found.total[[0, 1, 3]], alone.total)
    torch.testing.assert_close(found.weights, alone.weights)
    assert found.total[2].isnan()
    text = str(certify(problem.f, solution, x))
    assert "non_finite: 1 row(s) [2]" in text and "nan" not in text


# -------------------------------------------------------------------------------------------- certificates


def assert_warned(certificate, *phrases: str) -> None:
    text = " ".join(certificate.warnings)
    for phrase in phrases:
        assert phrase in text, text


def test_a_sound_solution_gets_a_clean_certificate():
    problem = problems.vector()
    context, solution = solved(problem, 1e-9, 1e-9)
    solution.value.sum().backward()
    certificate = certify(problem.f, solution, *context)
    assert certificate.warnings == ()
    text = str(certificate)
    assert text.splitlines()[0].split() == ["figure", "median", "largest", "in", "row"]
    assert text.endswith("Nothing to warn about.")
    for name in ("spectral radius", "Lipschitz constant", "gradient error, adjoint"):
        assert name in text
    assert (certificate.residual <= 1e-9).all()


@pytest.mark.parametrize("stop", ["rel", "abs"])
@pytest.mark.parametrize("norm", ["l2", "max"])
def test_the_residual_is_measured_as_the_solver_measures_it(stop, norm):
    problem = problems.mixed()
    solution = tw.fix(
        problem.f, problem.z0, *problem.context, stop=stop, norm=norm, tol=1e-3, max_iter=500, solver="picard"
    )
    certificate = certify(problem.f, solution, *problem.context, stop=stop, norm=norm)
    torch.testing.assert_close(certificate.residual, solution.residual)


def test_warnings_name_the_rows_and_the_reason():
    slope = torch.tensor([[0.5], [1.5]], dtype=DOUBLE)
    z = torch.zeros(2, 3, dtype=DOUBLE)
    solution = tw.fix(lambda z, a: a * z, z, slope)  # both rows rest at zero, the second on a knife's edge
    certificate = certify(lambda z, a: a * z, solution, slope)
    assert certificate.state_bound[1] == float("inf")
    assert_warned(
        certificate, "1 row(s) [1]: the spectral radius is not below 1", "No backward solve has run"
    )


def test_a_non_normal_map_is_told_from_one_that_does_not_converge():
    w = torch.tensor([[0.5, 3.0], [0.0, 0.5]], dtype=DOUBLE)
    solution = tw.fix(lambda z, x: z @ w + x, torch.zeros(1, 2, dtype=DOUBLE), draw(1, 2), max_iter=200)
    certificate = certify(lambda z, x: z @ w + x, solution, draw(1, 2))
    assert float(certificate.radius.value) < 0.6 and float(certificate.lipschitz.value) > 3
    assert_warned(certificate, "Lipschitz constant is not safely below 1")


def test_a_solution_of_another_function_is_found_out():
    problem = problems.vector()
    solution = tw.fix(problem.f, problem.z0, *problem.context, tol=1e-6)
    other = certify(lambda z, x: 0.9 * problem.f(z, x), solution, *problem.context)
    assert_warned(other, "residual is larger than the solver reported")


def test_inexact_adjoints_and_large_errors_are_named():
    problem = problems.vector(norm=0.97)
    x = problem.context[0].detach().requires_grad_()
    solution = tw.fix(problem.f, problem.z0, x, adjoint="one_step", tol=1e-6)
    solution.value.sum().backward()
    assert_warned(certify(problem.f, solution, x), "'one_step' is an approximation")
    rough = tw.fix(problem.f, problem.z0, x, tol=0.5)
    assert_warned(certify(problem.f, rough, x), "may be more than 10 % off")


def test_rows_that_failed_and_radii_that_have_not_settled_are_named():
    scale = torch.tensor([1.0, 2.0], dtype=DOUBLE).repeat(100)  # non-normal, with all moduli 0.9
    w = 0.9 * torch.roll(torch.eye(200, dtype=DOUBLE), 1, 0) * scale / scale[:, None]
    x = draw(2, 200)
    with pytest.warns(tw.ConvergenceWarning):
        solution = tw.fix(lambda z, x: z @ w + x, torch.zeros_like(x), x, max_iter=3, solver="picard")
    assert_warned(
        certify(lambda z, x: z @ w + x, solution, x), "max_iter: 2 row(s) [0, 1]", "has not settled"
    )


# ------------------------------------------------------------------------------------------- the document


def test_the_documented_snippets_print_what_the_document_says():
    """Words and counts must agree, and errors (in scientific notation) within a factor of two."""
    text = DOCS.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    number = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
    for code, expected in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(DOCS), "exec"), names)
        printed = out.getvalue()
        words = [re.sub(r"[\s-]+", " ", re.sub(number, "#", one)).strip() for one in (printed, expected)]
        assert words[0] == words[1]
        for mine, theirs in zip(re.findall(number, printed), re.findall(number, expected), strict=True):
            slack = 0.5 if "e" in theirs else 0.05
            assert float(mine) == pytest.approx(float(theirs), rel=slack, abs=1e-12), (code, printed)


def test_the_certificate_where_no_row_is_finite_asks_nothing_of_an_empty_batch():
    w = torch.nn.Parameter(0.1 * torch.eye(3))

    def f(z, x):  # which cannot take one
        return (z.view(z.shape[0], -1) @ w + x).view_as(z)

    x = torch.full((2, 3), float("nan"))
    with pytest.warns(tw.ConvergenceWarning):
        solution = tw.fix(f, torch.zeros(2, 3), x)
    found = tw.certify(f, solution, x)
    assert bool(found.residual.isnan().all()) and float(found.gradient.weights) == 0.0


@pytest.mark.parametrize("residual", [-1, -0.5, torch.tensor([0.1, -0.1])])
def test_a_negative_residual_is_refused(residual):
    with pytest.raises(tw.OptionError, match="not negative"):
        tw.gradient_error(
            lambda z, x: 0.5 * z + x, torch.zeros(2, 3), torch.ones(2, 3), adjoint_residual=residual
        )
