"""The core in uses that are rare: other defaults, inference mode, exact zeros, callbacks that write."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

import twnn_plugin as tw
from twnn_plugin.adjoints.linear import LinearSettings, Products, solve_linear

ADJOINTS = ["implicit", "ad_fixed_point", "unrolled", "checkpointed", "phantom", "one_step"]
SOLVERS = ["picard", "anderson", "broyden", "newton_krylov", "auto"]


def contraction(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.8 * matrix / torch.linalg.matrix_norm(matrix, 2)).to(dtype)


def quietly(f, z0, *context, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(f, z0, *context, **options)


@contextlib.contextmanager
def default_device(name: str):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)  # naming the CPU would outdo `with torch.device(...)` in later tests


# Exact zeros


@pytest.mark.parametrize("solver", ["broyden", "auto"])
def test_a_row_whose_solution_is_zero_leaves_unrolled_gradients_finite(solver):
    """Its last steps are so short that the square of what their square is divided by is infinite."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        gradients = []
        for seed in range(12):
            w = contraction(dtype, seed).requires_grad_()
            x = torch.tensor([[0.0, 0.0, 0.0], [0.5, -1.0, 0.3]], dtype=dtype)
            start = torch.linspace(-1, 1, 6, dtype=dtype).view(2, 3)
            solution = tw.fix(
                lambda z, x, w=w: torch.tanh(z @ w + x),
                start,
                x,
                solver=solver,
                adjoint="unrolled",
                tol=1e-5,
                max_iter=200,
            )
            gradients.append(torch.autograd.grad(solution.value.sum(), w)[0])
        found[dtype] = torch.stack(gradients).double()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("adjoint", ["unrolled", "checkpointed"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_that_is_done_where_it_starts_has_its_gradient_in_company_too(solver, adjoint):
    w = contraction()

    def gradient(x):
        x = x.clone().requires_grad_()
        solution = tw.fix(
            lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), x, solver=solver, adjoint=adjoint
        )
        return torch.autograd.grad(solution.value.sum(), x)[0][:1]

    still = torch.zeros(1, 3)
    torch.testing.assert_close(gradient(still), torch.ones(1, 3))
    torch.testing.assert_close(gradient(torch.cat([still, torch.ones(2, 3)])), torch.ones(1, 3))


@pytest.mark.parametrize("adjoint", ["unrolled", "checkpointed"])
def test_a_row_that_is_done_where_it_starts_has_its_gradient_beside_one_that_overflows(adjoint):
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    gain = torch.tensor([[1e15], [1.0]])  # two steps, then a number without a norm
    solution = quietly(
        lambda z, x, gain: 0.5 * gain * z + x, torch.zeros(2, 2), x, gain, adjoint=adjoint, solver="picard"
    )
    assert solution.status.tolist() == [tw.Status.non_finite, tw.Status.converged]
    (gradient,) = torch.autograd.grad(solution.value[1].sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_a_start_that_wants_a_gradient_keeps_it_where_nothing_moves():
    start = torch.zeros(2, 3, requires_grad=True)
    x = torch.tensor([[0.0] * 3, [1.0] * 3])
    solution = tw.fix(lambda z, x: torch.tanh(0.5 * z + x), start, x, adjoint="unrolled", solver="picard")
    (gradient,) = torch.autograd.grad(solution.value.sum(), start)
    torch.testing.assert_close(gradient[0], torch.ones(3))
    assert bool((gradient[1].abs() < 0.1).all())


# What nobody asked for


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_where_no_row_is_finite_a_gradient_is_offered_only_if_something_wants_one(adjoint):
    def solve(x):
        return quietly(lambda z, x: z * float("nan") + x, torch.zeros(2, 3), x, adjoint=adjoint).value

    assert not solve(torch.ones(2, 3)).requires_grad
    assert solve(torch.ones(2, 3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_callback_is_given_is_its_own(solver):
    def overwrite(seen):
        for tensor in (seen.value, seen.rows, seen.residual):
            tensor.zero_()

    w, x = contraction(), torch.linspace(-1, 1, 12).view(4, 3)
    start = torch.ones(4, 3)
    expected = tw.fix(lambda z, x: torch.tanh(z @ w + x), start, x, solver=solver)
    found = tw.fix(lambda z, x: torch.tanh(z @ w + x), start, x, solver=solver, callback=overwrite)
    assert torch.equal(start, torch.ones(4, 3))
    assert torch.equal(found.value, expected.value)
    assert found.steps.tolist() == expected.steps.tolist()


def test_a_warm_start_remembers_a_bounded_number_of_shapes():
    """Batches of sequences come in any number of lengths."""
    adjoint = tw.adjoint("implicit", warm_start=True)

    def solved(length):
        x = torch.ones(2, length, requires_grad=True)
        solution = tw.fix(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x, adjoint=adjoint)
        solution.value.sum().backward()
        return solution

    for length in range(1, 40):
        solved(length)
    assert len(adjoint._last) <= 16
    assert int(solved(39).adjoint.steps.max()) == 2  # the newest are still there


# Inference mode and default devices


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_features_made_in_inference_mode_may_be_context_and_start(adjoint):
    torch.manual_seed(0)
    cell = torch.nn.Linear(3, 3)
    x = torch.randn(4, 3)

    def gradient(start, x):
        cell.zero_grad()
        solution = tw.fix(
            lambda z, x: torch.tanh(0.3 * cell(z) + cell(x)), start, x, adjoint=adjoint, solver="picard"
        )
        solution.value.sum().backward()
        return cell.weight.grad.clone()

    expected = gradient(torch.zeros(4, 3), x)
    with torch.inference_mode():
        frozen, start = x.clone(), torch.zeros(4, 3)
    assert torch.equal(gradient(start, frozen), expected)


def test_figures_do_not_depend_on_the_default_device():
    w, x = contraction(), torch.linspace(-1, 1, 12).view(4, 3)
    start = torch.zeros(4, 3)
    x.requires_grad_()

    def f(z, x):
        return torch.tanh(z @ w + x)

    def figures():
        trace = tw.Trace()
        solution = tw.fix(f, start, x, callback=trace)
        solution.value.sum().backward()
        certificate = tw.certify(f, solution, x)
        return [
            certificate.residual,
            certificate.radius.value,
            certificate.lipschitz.value,
            certificate.gradient.total,
            tw.gradient_error(f, solution, x).weights,
            tw.spectral_penalty(f, solution.value, x, target=0.0, measure="radius"),
            tw.observed_rate(trace.residual),
            trace.newest.steps,
            trace.newest.evaluations,
            tw.Trace().residual,
        ]

    expected = figures()
    with default_device("meta"):  # as "cuda" would be, were there one
        found = figures()
        assert [figure.device.type for figure in found] == ["cpu"] * len(found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_state_without_numbers_is_refused():
    state = torch.zeros(2, 3, device="meta")
    with pytest.raises(tw.MapError, match="z0 must hold numbers"):
        tw.fix(lambda z: 0.5 * z, state)
    with pytest.raises(tw.MapError, match="z must hold numbers"):
        tw.spectral_radius(lambda z: 0.5 * z, state)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_residuals_of_nothing_are_of_the_states_dtype(shape):
    solution = tw.fix(lambda z: 0.5 * z, torch.zeros(shape, dtype=torch.float64))
    assert solution.residual.dtype == torch.float64


@pytest.mark.parametrize("adjoint", ["implicit", "phantom", "one_step"])
def test_rows_of_a_value_have_memory_of_their_own(adjoint):
    """Also if ``f`` returns one row for all of them."""
    row = torch.full((1, 3), 0.5, requires_grad=True)

    def f(z, x):
        return (row * 2).expand(z.shape[0], 3)

    with torch.no_grad():
        value = tw.fix(f, torch.zeros(4, 3), torch.zeros(4, 3), adjoint=adjoint).value
        value[0] = 7.0
    assert value[1:].eq(1).all()
    solution = tw.fix(f, torch.zeros(4, 3), torch.zeros(4, 3), adjoint=adjoint)
    assert 0 not in solution.value.stride()


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_what_a_state_in_eight_bits_is_called_is_true_of_it(solver):
    """The state that is given back is judged, not what it was rounded from."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, w = torch.randn(3, 4, generator=generator), 0.3 * torch.randn(4, 4, generator=generator)

        def f(z, x, w=w):
            return torch.tanh(z.float() @ w + x).to(z.dtype)

        solution = quietly(f, torch.zeros(3, 4).to(torch.float8_e4m3fn), x, solver=solver, tol=0.02)
        after = f(solution.value, x).float()
        residual = (after - solution.value.float()).norm(dim=1) / after.norm(dim=1)
        assert bool((residual <= 0.02)[solution.converged].all())


def test_numbers_that_are_none_are_refused():
    w, x = contraction(), torch.ones(2, 3)

    def f(z, x):
        return torch.tanh(z @ w + x)

    for wrong in (True, 10**400, "0.1"):
        with pytest.raises(tw.OptionError, match="tol must be a number"):
            tw.spectral_radius(f, x, x, tol=wrong)
        with pytest.raises(tw.OptionError, match="target must be a number"):
            tw.spectral_penalty(f, x, x, target=wrong)
        for constrain in (tw.contractive, tw.orthogonal):
            with pytest.raises(tw.OptionError, match="rate must be a positive number"):
                constrain(torch.nn.Linear(2, 2), wrong)
    with pytest.raises(tw.OptionError, match="through_solution must be True or False"):
        tw.jacobian_frobenius(f, x, x, through_solution="no")
    with pytest.raises(tw.OptionError, match="iterates of Trace must be True or False"):
        tw.Trace(iterates="no")


@pytest.mark.parametrize("name", ["gcr", "bicgstab", "auto"])
def test_a_long_solution_of_the_adjoint_equation_is_not_claimed_on_the_word_of_a_rounded_residual(name):
    """After a new start residuals are updates of one that was measured, with the rounding of the solution."""
    g = torch.Generator().manual_seed(0)
    batch, size, tol = 200, 7, 1e-5
    left, right = (torch.linalg.qr(torch.randn(batch, size, size, generator=g))[0] for _ in range(2))
    stretch = torch.logspace(0, -3, size)
    matrix = torch.eye(size) - (left * stretch) @ right  # I - matrix has the condition 1e3
    rhs = torch.randn(batch, size, generator=g)

    def product(u):
        return torch.einsum("bij,bj->bi", matrix, u)

    problem = Products(product, rhs, torch.finfo(rhs.dtype).eps, None)
    solved = solve_linear(problem, LinearSettings(tw.linear_solver(name), tol, 100))
    rest = rhs + product(solved.value) - solved.value  # as it is measured where a claim is tested
    residual = rest.norm(dim=1) / rhs.norm(dim=1)
    claimed = solved.status == int(tw.Status.converged)
    assert bool(claimed.any())
    assert float(residual[claimed].max()) <= 1.01 * tol


@pytest.mark.parametrize("recorded", [False, True])
def test_a_row_of_anderson_that_starts_anew_forgets_what_was_before_and_no_other_row_does(recorded):
    """Where a residual has grown a hundredfold, from there on the row is one that has begun there."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor(
        [[1, 0.5, 0.3, 0.2, 0.1, 30, 8, 4, 2, 1], [1, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]]
    )
    jump, steps = 5, sizes.shape[1]
    z = torch.randn(steps, 2, 6, generator=g, dtype=torch.float64)
    r = torch.nn.functional.normalize(torch.randn(steps, 2, 6, generator=g, dtype=torch.float64), dim=2)
    r = r * sizes.T[:, :, None]

    def outputs(rows, first):
        solver = tw.solver("anderson", start=0)
        state, found = solver.init(z[first, rows]), []
        with torch.set_grad_enabled(recorded):
            for k in range(first, steps):
                given = z[k, rows].clone(), (z + r)[k, rows], r[k, rows].clone()
                following, state = solver.step(None, *given, state)
                found.append(following.clone())
        return torch.stack(found)

    both = outputs([0, 1], 0)
    assert torch.equal(both[jump, 0], (z + r)[jump, 0])
    torch.testing.assert_close(both[jump:, :1], outputs([0], jump))
    torch.testing.assert_close(both[:, 1:], outputs([1], 0))
    assert not torch.allclose(both[jump + 1 :, :1], (z + r)[jump + 1 :, :1])


def test_a_relative_tolerance_below_what_can_be_squared_is_no_error():
    """Only an absolute one is compared with numbers that may vanish."""
    solution = quietly(lambda z: torch.cos(z), torch.ones(2, 3), tol=1e-30, max_iter=100)
    assert set(solution.status.tolist()) <= {int(tw.Status.stagnated), int(tw.Status.converged)}
    with pytest.raises(tw.OptionError, match="cannot be measured"):
        tw.fix(lambda z: torch.cos(z), torch.ones(2, 3), tol=1e-30, stop="abs")


def test_one_iteration_is_enough_for_a_figure():
    w, x = contraction(), torch.ones(2, 3)

    def f(z, x):
        return torch.tanh(z @ w + x)

    solution = tw.fix(f, torch.zeros(2, 3), x)
    for figure in (
        tw.gradient_error(f, solution, x, iterations=1).total,
        tw.spectral_radius(f, solution.value, x, iterations=1).value,
        tw.certify(f, solution, x, iterations=1).state_error,
        tw.spectral_penalty(f, solution.value, x, iterations=1, reduction="none"),
    ):
        assert figure.shape == (2,)
        assert bool(figure.isfinite().all())


@pytest.mark.parametrize("adjoint", ["unrolled", "checkpointed"])
@pytest.mark.parametrize("company", [False, True])
def test_a_row_that_is_done_where_it_starts_keeps_its_value(adjoint, company):
    """Its residual is within the tolerance; that of ``f`` of it, which has the gradient, need not be."""
    weight = torch.tensor(1.5, requires_grad=True)
    z0 = torch.tensor([[0.9], [3.0]])[: 1 + company]
    solution = tw.fix(
        lambda z, x: torch.where(x > 0, 0.5 * weight * z + 0.1, weight * z),
        z0,
        torch.tensor([[-1.0], [1.0]])[: 1 + company],
        **{"adjoint": adjoint, "solver": "picard", "tol": 0.46, "stop": "abs"},
    )
    assert solution.converged.all() and (solution.steps == 1).tolist() == [True, False][: 1 + company]
    assert solution.value[0, 0].item() == z0[0, 0].item()
    (gradient,) = torch.autograd.grad(solution.value[0, 0], weight)
    assert gradient.item() == pytest.approx(0.9)
