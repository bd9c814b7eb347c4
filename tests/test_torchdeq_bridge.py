"""torchdeq's solvers in ``fix`` and ours in ``torchdeq.get_deq``; its measured defects, guarded."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torchdeq

import twnn_plugin as tw
from twnn_plugin.solvers import StepSolver, registry
from twnn_plugin.solvers.torchdeq_bridge import SOLVERS, register_with_torchdeq

THEIRS = sorted(SOLVERS)
NATIVE = [name for name in registry.names() if not name.startswith("torchdeq.")]
SCALES = torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0], dtype=torch.float64)


class Problem:
    """``z = tanh(z W + x)``: easy rows where x is large, hard ones where it is small."""

    def __init__(self, dtype=torch.float64, size=12, contraction=0.8):
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.w = (contraction * w / torch.linalg.matrix_norm(w, 2)).to(dtype).requires_grad_()
        x = torch.randn(len(SCALES), size, generator=generator, dtype=torch.float64)
        self.x = (x * SCALES[:, None]).to(dtype)
        self.z0 = torch.zeros_like(self.x)

    def f(self, z, x):
        return torch.tanh(z @ self.w + x)

    def solution(self):
        z = self.z0.double()
        with torch.no_grad():
            for _ in range(2000):
                z = torch.tanh(z @ self.w.double() + self.x.double())
        return z

    def gradient(self, g):
        """d(g . z*)/dw by the exact linear solve, row by row, for a (B, D) cotangent."""
        z, w = self.solution(), self.w.detach().double()
        slope = 1 - z**2
        total = torch.zeros_like(w)
        for row in range(len(z)):
            jacobian = slope[row][:, None] * w.T  # dz_next_i / dz_j
            u = torch.linalg.solve(torch.eye(len(w), dtype=w.dtype) - jacobian.T, g[row])
            total += torch.outer(z[row], slope[row] * u)
        return total


def relative(a, b):
    return float((a - b).detach().norm() / b.norm())


def fix(problem, name, **options):
    options = {"tol": 1e-10, "max_iter": 300, **options}
    return tw.fix(problem.f, problem.z0, problem.x, solver=name, **options)


# torchdeq's solvers in fix


@pytest.mark.parametrize("name", THEIRS)
def test_their_solver_by_name_reports_each_row(name):
    problem = Problem()
    solution = fix(problem, name)
    assert solution.converged.all()
    assert relative(solution.value, problem.solution()) < 1e-9
    measured = (problem.f(solution.value, problem.x) - solution.value).norm(dim=1)
    measured = measured / problem.f(solution.value, problem.x).norm(dim=1)
    torch.testing.assert_close(solution.residual, measured.detach(), rtol=1e-2, atol=1e-13)
    assert solution.steps[-1] < solution.steps[0]  # the easy row is done long before the hard one
    assert solution.evaluations < len(problem.x) * int(solution.steps.max())  # rows left


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_gradient_agrees_with_a_linear_solve(name, adjoint):
    problem = Problem()
    solution = fix(problem, name, tol=1e-12, adjoint=adjoint)
    (got,) = torch.autograd.grad((solution.value**3).sum(), problem.w)
    assert relative(got, problem.gradient(3 * problem.solution() ** 2)) < 1e-8


@pytest.mark.parametrize("name", ["torchdeq.broyden", "torchdeq.anderson"])
def test_unrolled_gradient_is_that_of_the_computed_state(name):
    """Against finite differences of the solver itself, stopped long before it converges."""
    problem = Problem()
    w = problem.w.detach()

    def run(w):
        problem.w = w
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tw.ConvergenceWarning)
            return fix(problem, name, max_iter=7, tol=1e-14, adjoint="unrolled").value

    direction = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype)
    leaf = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(leaf).sum(), leaf)
    step = 1e-6
    numeric = (run(w + step * direction).sum() - run(w - step * direction).sum()) / (2 * step)
    assert abs(float((grad * direction).sum() - numeric)) < 1e-6 * abs(float(numeric))


def test_unrolled_broyden_survives_rows_that_stand_still():
    """0/0 in Broyden's update of a finished row must not reach the weights as NaN."""
    problem = Problem(torch.float32)
    problem.x[-1] = 1e4  # saturated: exactly at its fixed point after one step
    solution = tw.fix(
        lambda z: problem.f(z, problem.x), problem.z0, solver="torchdeq.broyden", adjoint="unrolled", tol=1e-5
    )
    (grad,) = torch.autograd.grad((solution.value**3).sum(), problem.w)
    assert relative(grad.double(), problem.gradient(3 * problem.solution() ** 2)) < 1e-3


def test_unrolled_still_notices_weights_edited_before_backward():
    problem = Problem()
    solution = fix(problem, "torchdeq.anderson", adjoint="unrolled")
    with torch.no_grad():
        problem.w.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified in place"):
        solution.value.sum().backward()


@pytest.mark.parametrize("name", THEIRS)
def test_a_nan_row_changes_nothing_for_the_others(name):
    problem = Problem()
    clean = fix(problem, name)
    problem.x[2] = float("nan")
    with pytest.warns(tw.ConvergenceWarning, match="non_finite: 1"):
        broken = fix(problem, name)
    others = torch.tensor([0, 1, 3, 4])
    assert broken.status[2] == tw.Status.non_finite
    assert broken.value[2].isnan().any()
    assert broken.steps[2] == 1
    torch.testing.assert_close(broken.value[others], clean.value[others], rtol=1e-12, atol=1e-14)
    assert torch.equal(broken.steps[others], clean.steps[others])
    (grad,) = torch.autograd.grad(broken.value[others].sum(), problem.w)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", THEIRS)
def test_a_non_finite_start_is_flagged(name):
    problem = Problem()
    problem.z0[1, 0] = float("inf")
    problem.z0[3, 0] = float("nan")
    with pytest.warns(tw.ConvergenceWarning):
        solution = fix(problem, name)
    assert solution.status.tolist() == [0, 3, 0, 3, 0]


@pytest.mark.parametrize("name", THEIRS)
def test_a_row_does_not_depend_on_its_batch_mates(name):
    problem = Problem()
    together = fix(problem, name, tol=1e-3)
    for row in range(len(problem.x)):
        one = slice(row, row + 1)
        alone = tw.fix(problem.f, problem.z0[one], problem.x[one], solver=name, tol=1e-3, max_iter=300)
        torch.testing.assert_close(alone.value, together.value[one], rtol=1e-9, atol=1e-12)
        assert alone.steps == together.steps[row]


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_few_iterations_are_measured_and_bounded(name, max_iter):
    """torchdeq's anderson returns the initial guess for max_iter <= 2."""
    problem = Problem()
    with torch.no_grad(), pytest.warns(tw.ConvergenceWarning, match="max_iter"):
        solution = fix(problem, name, max_iter=max_iter)
    assert solution.evaluations <= max_iter * len(problem.x)
    assert (solution.residual < 1e7).all()
    assert not torch.equal(solution.value, problem.z0)


@pytest.mark.parametrize("name", THEIRS)
def test_a_divergent_map_is_reported(name):
    with pytest.warns(tw.ConvergenceWarning):
        solution = tw.fix(lambda z, x: z**2 * 1e3 + x, torch.ones(2, 3), torch.ones(2, 3), solver=name)
    assert not solution.converged.any()


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("options", [{"norm": "max"}, {"stop": "abs"}, {"coupled": True}])
def test_every_stopping_rule_works(name, options):
    problem = Problem()
    seen = []
    solution = fix(problem, name, tol=1e-6, callback=seen.append, **options)
    assert solution.converged.all()
    assert len(seen) == int(solution.steps.max())
    if "coupled" in options:
        assert (solution.steps == solution.steps[0]).all()


@pytest.mark.parametrize("name", THEIRS)
def test_half_precision_and_empty_batches(name):
    """torchdeq's anderson has no bfloat16 kernel and fails on an empty batch."""
    problem = Problem(torch.float32)
    w = problem.w.detach().bfloat16()
    x = problem.x.bfloat16()
    solution = tw.fix(lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), x, solver=name, tol=2e-2)
    assert solution.value.dtype == torch.bfloat16
    assert solution.converged.all()
    empty = tw.fix(problem.f, problem.z0[:0], problem.x[:0], solver=name)
    assert empty.value.shape == (0, 12)


def test_a_singular_system_is_a_status_and_a_warning(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("linalg.solve: (Batch element 0): the matrix is singular")

    monkeypatch.setattr(torch.linalg, "solve", fail)
    problem = Problem()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = fix(problem, "torchdeq.anderson")
    assert any("singular" in str(w.message) and "solver='anderson'" in str(w.message) for w in caught)
    assert (solution.status == int(tw.Status.stagnated)).any()
    assert solution.value.isfinite().all()
    assert (solution.steps <= 2).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("anderson", {"m": 1}),
        ("anderson", {"lam": 0.0}),
        ("anderson", {"tau": 0.0}),
        ("broyden", {"LBFGS_thres": 0}),
        ("fixed_point_iter", {"tau": -1.0}),
        ("simple_fixed_point_iter", {"tau": float("nan")}),
    ],
)
def test_bad_options_are_refused(name, options):
    with pytest.raises(tw.errors.OptionError, match=f"{next(iter(options))} of solver 'torchdeq.{name}'"):
        tw.solver(f"torchdeq.{name}", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("anderson", {"m": 2, "tau": 0.8}),
        ("broyden", {"LBFGS_thres": 5}),
        ("broyden", {"ls": True}),
        ("fixed_point_iter", {"tau": 0.7}),
        ("simple_fixed_point_iter", {"tau": 0.7}),
    ],
)
def test_their_options_reach_them(name, options):
    problem = Problem()
    solution = fix(problem, tw.solver(f"torchdeq.{name}", **options), tol=1e-8)
    assert solution.converged.all()
    assert relative(solution.value, problem.solution()) < 1e-6


# our solvers in torchdeq


def deq(problem, name, **options):
    options = {"f_tol": 1e-12, "b_tol": 1e-12, "f_max_iter": 200, "b_max_iter": 200, **options}
    modes = {"f_stop_mode": "rel", "b_stop_mode": "rel"}
    layer = torchdeq.get_deq(f_solver=f"twnn.{name}", b_solver=f"twnn.{name}", ift=True, **modes, **options)
    return layer(lambda z: problem.f(z, problem.x), problem.z0)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("core", ["indexing", "sliced"])
def test_our_solver_inside_get_deq(name, core):
    problem = Problem()
    states, info = deq(problem, name, core=core)
    assert relative(states[-1], problem.solution()) < 1e-10
    batch = len(problem.x)
    for key in ("abs_lowest", "rel_lowest", "nstep", "status"):
        assert info[key].shape == (batch,)
    for key in ("abs_trace", "rel_trace"):
        assert info[key].shape == (batch, int(info["nstep"].max()))
    assert "sradius" in info
    assert (info["rel_lowest"] <= 1e-12).all()
    assert torch.equal(info["rel_trace"][:, -1], info["rel_lowest"])
    (grad,) = torch.autograd.grad((states[-1] ** 3).sum(), problem.w)
    assert relative(grad, problem.gradient(3 * problem.solution() ** 2)) < 1e-9


@pytest.mark.parametrize("name", NATIVE)
def test_early_convergence_keeps_the_implicit_gradient(name):
    """torchdeq's own solvers then return too few states, and the gradient becomes a one-step one."""
    problem = Problem()
    states, _ = deq(problem, name, core="indexing", n_states=3, f_max_iter=300)
    assert len(states) == 3
    (grad,) = torch.autograd.grad((states[-1] ** 3).sum(), problem.w)
    assert relative(grad, problem.gradient(3 * problem.solution() ** 2)) < 1e-9


def test_indexed_states_are_those_of_the_steps():
    problem = Problem()
    f = lambda z: problem.f(z, problem.x).detach()  # noqa: E731
    solve = torchdeq.solver.get_solver("twnn.picard")
    with pytest.warns(tw.ConvergenceWarning):
        final, states, _ = solve(f, problem.z0, max_iter=4, tol=1e-12, indexing=[1, 3, 4])
    assert torch.equal(states[0], f(problem.z0))
    assert torch.equal(states[1], f(f(f(problem.z0))))
    assert torch.equal(states[2], final)


def test_a_deq_of_several_states():
    problem = Problem()
    options = {"f_max_iter": 200, "f_tol": 1e-11, "b_tol": 1e-11, "f_stop_mode": "rel", "b_max_iter": 200}
    layer = torchdeq.get_deq(f_solver="twnn.anderson", b_solver="twnn.anderson", ift=True, **options)
    half = 5

    def f(a, b):
        z = problem.f(torch.cat([a, b.flatten(1)], dim=1), problem.x)
        return z[:, :half], z[:, half:].unflatten(1, b.shape[1:])

    start = problem.z0[:, :half], problem.z0[:, half:].reshape(len(problem.x), 7, 1)
    states, info = layer(f, start)
    z = torch.cat([states[-1][0], states[-1][1].flatten(1)], dim=1)
    assert relative(z, problem.solution()) < 1e-9
    (grad,) = torch.autograd.grad((z**3).sum(), problem.w)
    assert relative(grad, problem.gradient(3 * problem.solution() ** 2)) < 1e-8
    assert info["nstep"].shape == (len(problem.x),)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (2, 3, 2)])
def test_states_of_any_shape(shape):
    z, _, info = torchdeq.solver.get_solver("twnn.anderson")(torch.cos, torch.zeros(shape), tol=1e-5)
    torch.testing.assert_close(z, torch.full(shape, 0.7390851), rtol=1e-4, atol=1e-5)
    assert info["nstep"].shape == shape[:1]


def test_bfloat16_states_inside_torchdeq():
    z, _, _ = torchdeq.solver.get_solver("twnn.anderson")(
        torch.cos, torch.zeros(3, 2, dtype=torch.bfloat16), tol=2e-2
    )
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), torch.full((3, 2), 0.7390851), rtol=2e-2, atol=0)


def test_options_of_the_solver_pass_and_unknown_ones_raise():
    solve = torchdeq.solver.get_solver("twnn.anderson")
    solve(torch.cos, torch.zeros(3, 1), memory=2)
    with pytest.raises(tw.errors.OptionError, match=r"no option 'memry'.*Did you mean 'memory'"):
        solve(torch.cos, torch.zeros(3, 1), memry=2)
    with pytest.raises(tw.errors.OptionError, match="stop_mode"):
        solve(torch.cos, torch.zeros(3, 1), stop_mode="relative")
    with pytest.raises(tw.errors.OptionError, match="n_states"):
        solve(torch.cos, torch.zeros(3, 1), max_iter=0)


def test_failures_inside_torchdeq_warn_with_statuses():
    problem = Problem()
    with pytest.warns(tw.ConvergenceWarning, match=r"info\['status'\]"):
        _, info = deq(problem, "picard", f_max_iter=3)
    assert info["status"].tolist()[:2] == [int(tw.Status.max_iter)] * 2


def test_second_derivatives_raise_instead_of_being_wrong():
    problem = Problem()
    states, _ = deq(problem, "anderson")
    with pytest.raises(tw.errors.OptionError, match="without a graph"):
        torch.autograd.grad((states[-1] ** 3).sum(), problem.w, create_graph=True)


def test_a_solver_registered_later_is_known_after_another_call():
    class Half(StepSolver):
        """Moves half of the way."""

        def step(self, problem, z, fz, r, state):
            return z + 0.5 * r, None

    before = registry.snapshot()
    try:
        tw.solvers.register("half", Half)
        assert "twnn.half" in register_with_torchdeq()
        z, _, _ = torchdeq.solver.get_solver("twnn.half")(torch.cos, torch.zeros(2, 1), tol=1e-5)
        torch.testing.assert_close(z, torch.full((2, 1), 0.7390851), rtol=1e-4, atol=0)
    finally:
        registry.restore(before)


def test_a_deq_with_our_solver_can_be_copied_and_pickled():
    layer = torchdeq.get_deq(f_solver="twnn.anderson")
    copy.deepcopy(layer)
    solver = torchdeq.solver.get_solver("twnn.anderson")
    assert pickle.loads(pickle.dumps(solver)) == solver
