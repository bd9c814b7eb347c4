"""Defects of other fixed-point libraries, which we must not have.

Each test names the defect and where it was reported. Where torchdeq is at hand, the test also records
(``record_property``) whether the installed torchdeq still has it; nothing depends on that. What is
reachable through the bridge and guarded there is tested in ``test_torchdeq_bridge.py``.
"""

from __future__ import annotations

import copy
import statistics
import warnings

import pytest
import torch
import torchdeq
from torch.utils._python_dispatch import TorchDispatchMode

import twnn_plugin as tw
from tests import problems
from tests.methods import BRIDGED, NATIVE
from twnn_plugin.solvers import StepSolver, torchdeq_bridge
from twnn_plugin.testing import problems as more
from twnn_plugin.testing.problems import relative

f64 = torch.float64


def quiet(problem, **options):
    options = {"tol": 1e-10, "max_iter": 500, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(problem.f, problem.z0, *problem.context, **options)


def theirs(problem, **options):
    """The same equation in a DEQ of torchdeq; its states and info."""
    layer = torchdeq.get_deq(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer(lambda z: problem.f(z, *problem.context), problem.z0)


def gradient(value, problem):
    return torch.autograd.grad(value.sum(), problem.parameters[0])[0]


def exact_gradient(problem):
    return problems.reference(problem, torch.ones_like(problem.z0))[1][0]


# torchdeq, as listed by number


@pytest.mark.parametrize("max_iter", [1, 2])
def test_torchdeq_1_few_iterations_return_the_initial_guess(max_iter, record_property):
    problem = problems.vector()
    _, info = theirs(problem, f_solver="anderson", f_max_iter=max_iter, core="indexing")
    record_property("torchdeq returns a residual of 1e8", float(info["abs_lowest"].max()) > 1e7)
    for solver in NATIVE:
        solution = quiet(problem, solver=solver, max_iter=max_iter)
        assert not torch.equal(solution.value, problem.z0)
        assert float(solution.residual.max()) < 10
        moved = problem.f(problem.z0, *problem.context) - problem.z0
        assert relative(solution.value, problem.z0 + moved) < (1e-12 if max_iter == 1 else 1)


def test_torchdeq_2_early_convergence_turns_the_gradient_into_a_one_step_one(record_property):
    problem = problems.vector(norm=0.9)
    exact = exact_gradient(problem)
    tight = {"f_tol": 1e-10, "b_tol": 1e-10, "f_max_iter": 300, "b_max_iter": 300}
    states, _ = theirs(problem, f_solver="anderson", core="indexing", ift=True, n_states=3, **tight)
    record_property("torchdeq's gradient error", relative(gradient(states[-1], problem), exact))
    for max_iter in (100, 300, 3000):
        solution = quiet(problem, max_iter=max_iter)
        assert int(solution.steps.max()) < max_iter
        assert relative(gradient(solution.value, problem), exact) < 1e-7


def test_torchdeq_3_the_default_gradient_is_one_step(record_property):
    problem = problems.vector(norm=0.9)
    exact = exact_gradient(problem)
    states, _ = theirs(problem, f_max_iter=300, f_tol=1e-10)
    record_property("torchdeq's gradient error", relative(gradient(states[-1], problem), exact))
    solution = tw.fix(problem.f, problem.z0, *problem.context, tol=1e-10, max_iter=500)  # all else default
    assert relative(gradient(solution.value, problem), exact) < 1e-7
    assert solution.adjoint is not None and solution.adjoint.exact


def test_torchdeq_4_second_derivatives_are_silently_wrong(record_property):
    problem = problems.vector(batch=3, size=4, norm=0.5)
    (w,), (x,) = problem.parameters, problem.context

    def second(z):
        (first,) = torch.autograd.grad((z**2).sum(), w, create_graph=True)
        return torch.autograd.grad((first**2).sum(), w)[0]

    z = problem.z0
    for _ in range(80):
        z = problem.f(z, x)
    expected = second(z)
    tight = {"f_tol": 1e-12, "b_tol": 1e-12, "f_max_iter": 200, "b_max_iter": 200}
    states, _ = theirs(problem, f_solver="fixed_point_iter", ift=True, **tight)
    record_property("torchdeq's error", relative(second(states[-1]), expected))
    checked = 0
    for adjoint in tw.adjoints.names():
        if not (tw.adjoints.get(adjoint).exact or adjoint in ("unrolled", "checkpointed")):
            continue  # says in its report that it is approximate
        try:
            got = second(quiet(problem, adjoint=adjoint, solver="picard", tol=1e-13).value)
        except (RuntimeError, NotImplementedError):
            continue  # refused: not silent
        assert relative(got, expected) < 1e-6, adjoint
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("solver", [*NATIVE, *BRIDGED])
def test_torchdeq_5_a_map_without_a_fixed_point_gives_no_warning(solver):
    problem = more.no_solution()
    with pytest.warns(tw.ConvergenceWarning, match="row"):
        solution = tw.fix(problem.f, problem.z0, *problem.context, solver=solver, tol=1e-6, max_iter=100)
    lost = problem.context[1][:, 0] > 0
    assert not bool(solution.converged[lost].any()) and bool(solution.converged[~lost].all())
    with pytest.raises(tw.FixedPointError):
        tw.fix(problem.f, problem.z0, *problem.context, solver=solver, tol=1e-6, throw=True)


def test_torchdeq_5_a_divergent_map_inside_get_deq_warns():
    for name in NATIVE:
        with pytest.warns(tw.ConvergenceWarning, match="did not converge"):
            torchdeq.get_deq(f_solver=f"twnn.{name}", f_max_iter=30)(
                lambda z: z + 1 + z**2, torch.zeros(3, 2, dtype=f64)
            )


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e6])
def test_torchdeq_6_an_absolute_regulariser_spoils_anderson_on_small_states(scale):
    problem = problems.vector(norm=0.98)
    problem.f, f = lambda z, x: scale * f(z / scale, x), problem.f
    with torch.no_grad():
        anderson = quiet(problem, solver="anderson", tol=1e-9, max_iter=3000)
        plain = quiet(problem, solver="picard", tol=1e-9, max_iter=3000)
    assert bool(anderson.converged.all())
    assert 2.5 * anderson.evaluations < plain.evaluations


def test_torchdeq_6_anderson_on_a_non_normal_system():
    """torchdeq: 400 evaluations and not converged, against 261 of plain iteration.

    Rounding decides how many evaluations acceleration takes here, from half as many as plain iteration to
    three times; so it is asked on several.
    """
    ratios = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        upper = torch.triu(torch.randn(32, 32, generator=generator, dtype=f64), 1)
        w = 0.9 * torch.eye(32, dtype=f64) + 0.05 * upper
        x = torch.randn(6, 32, generator=generator, dtype=f64)
        problem = problems.Problem("non-normal", lambda z, x, w=w: z @ w + x, torch.zeros_like(x), (x,), ())
        solved = [quiet(problem, solver=name, tol=1e-6, max_iter=2000) for name in ("anderson", "picard")]
        assert all(bool(solution.converged.all()) for solution in solved)
        ratios.append(int(solved[0].steps.max()) / int(solved[1].steps.max()))
    assert statistics.median(ratios) <= 1.2


def test_torchdeq_7_options_are_swallowed_and_dicts_mutated():
    x = torch.zeros(2, 3)
    f = lambda z, x: 0.5 * z + x  # noqa: E731
    for misspelled in ("stop_mode", "f_stop_mode", "f_tol", "max_iters"):
        with pytest.raises(TypeError, match=misspelled):
            tw.fix(f, x, x, **{misspelled: 1})
    with pytest.raises(tw.UnknownNameError, match="anderson"):  # torchdeq: an empty AssertionError
        tw.fix(f, x, x, solver="andersn")
    settings = {"solver": "anderson", "tol": 1e-3}
    options = {"memory": 3}
    kept = copy.deepcopy((settings, options))
    tw.fix(f, x, x, **settings)
    tw.solver("anderson", **options)
    tw.blocks.get("fpi")(torch.nn.Linear(3, 3), example=x, **settings)
    assert (settings, options) == kept


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("solver", "most"), [("picard", 24), ("anderson", 90), ("broyden", 155)])
def test_torchdeq_8_bookkeeping_dwarfs_the_map(solver, most, record_property):
    """Operations an iteration, the map's three among them; torchdeq 0.1.0: 45, 93 and 158."""
    x = torch.randn(4, 150)

    def operations(solve):
        counts = []
        for max_iter in (30, 70):
            with torch.no_grad(), _Operations() as mode, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                solve(max_iter)
            counts.append(mode.count)
        return (counts[1] - counts[0]) / 40

    def f(z):
        return torch.roll(z, 1, 1) * 1.0 + x  # a front: no method ends early

    name = {"picard": "fixed_point_iter"}.get(solver, solver)
    z0 = torch.zeros(4, 150)
    function = torchdeq.solver.get_solver(name)
    record_property("torchdeq's", operations(lambda k: function(f, z0, tol=1e-9, max_iter=k)))
    assert 0 < operations(lambda k: tw.fix(f, z0, solver=solver, tol=1e-9, max_iter=k)) <= most


# torchdeq, by issue


def test_torchdeq_issue_8_no_gradient_in_eval_mode(record_property):
    torch.manual_seed(0)
    layer = torchdeq.get_deq(ift=True).eval()
    w = torch.full((3, 3), 0.1, requires_grad=True)
    states, _ = layer(lambda z: torch.tanh(z @ w + 1), torch.zeros(2, 3))
    record_property("torchdeq's output is detached", not states[-1].requires_grad)
    # Saliency of a trained model: gradients in eval mode, with respect to the input.
    x = torch.randn(2, 3, requires_grad=True)
    block = tw.blocks.get("fpi")(torch.nn.Linear(3, 3), example=x.detach()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        y = block(x)
    assert y.requires_grad
    assert bool(torch.autograd.grad(y.sum(), x)[0].any())


# locuslab/deq, by issue


@pytest.mark.parametrize("solver", NATIVE)
@pytest.mark.parametrize(
    "f",
    [
        lambda z, x: x,  # constant: all differences but the first vanish
        lambda z, x: 0.5 * z + x,  # every difference on one line
        lambda z, x: z.sum(1, keepdim=True) * 0.1 + x,  # rank one
        lambda z, x: torch.where(z > 0.5, 1.0, 0.7) + 0 * x,  # two values
        lambda z, x: 0 * z,  # the fixed point is zero
    ],
)
@pytest.mark.parametrize("size", [1, 4])
def test_locuslab_20_singular_anderson(solver, f, size):
    x = torch.linspace(-1, 1, 3 * size, dtype=f64).view(3, size) * torch.tensor([[1e-12], [1.0], [1e12]])
    problem = problems.Problem("degenerate", f, torch.zeros_like(x), (x,), ())
    solution = quiet(problem, solver=solver, tol=1e-8, max_iter=200)
    assert bool(solution.converged.all()), solution.describe()
    assert bool(torch.isfinite(solution.value).all())


def test_locuslab_20_huge_states_through_the_bridge():
    """torchdeq's anderson may meet a singular system; it must end in a status and a warning."""
    problem = problems.vector(norm=0.9)
    problem.f, f = lambda z, x: 1e12 * f(z / 1e12, x), problem.f
    with torch.no_grad():
        solution = quiet(problem, solver="torchdeq.anderson", tol=1e-6, max_iter=50)
    assert bool(torch.isfinite(solution.value).all())
    image = problem.f(solution.value, *problem.context)
    true = (image - solution.value).norm(dim=1) / image.norm(dim=1)
    assert bool((true <= 1e-6 * (1 + 1e-6))[solution.converged].all())


@pytest.mark.parametrize("solver", NATIVE)
def test_locuslab_21_inference_depends_on_the_batch_size(solver, record_property):
    problem = more.by_rows(batch=16, hardest=0.95, dtype=torch.float32)
    with torch.no_grad():
        together = quiet(problem, solver=solver, tol=1e-3, max_iter=300)
        whole, _ = theirs(problem, f_tol=1e-3, f_max_iter=300, f_stop_mode="rel")
        worst = 0.0
        for size in (1, 3, 8):
            rows = slice(0, size)
            part = problems.Problem(
                "part", problem.f, problem.z0[rows], tuple(c[rows] for c in problem.context), ()
            )
            alone = quiet(part, solver=solver, tol=1e-3, max_iter=300)
            torch.testing.assert_close(alone.value, together.value[rows], rtol=1e-6, atol=1e-7)
            assert torch.equal(alone.steps, together.steps[rows])
            states, _ = theirs(part, f_tol=1e-3, f_max_iter=300, f_stop_mode="rel")
            worst = max(worst, relative(states[-1], whole[-1][rows]))
    record_property("torchdeq's difference", worst)


@pytest.mark.parametrize("memory", [2, 7])
def test_locuslab_28_the_memory_of_broyden_grows_with_max_iter(memory):
    kept = []

    class Watched(StepSolver):
        inner = tw.solver("broyden", memory=memory)

        def init(self, z):
            return self.inner.init(z)

        def step(self, problem, z, fz, r, state):
            z, state = self.inner.step(problem, z, fz, r, state)
            kept.append(state.steps.count)
            return z, state

    quiet(more.shift(size=80), solver=Watched(), tol=1e-12, max_iter=70)
    assert len(kept) > 60 and max(kept) == memory


@pytest.mark.parametrize("solver", NATIVE)
def test_locuslab_11_gradcheck(solver):
    problem = problems.vector(batch=2, size=3, norm=0.6, symmetric=False)

    def solve(w, x):
        one = problems.Problem("one", lambda z, x: torch.tanh(z @ w + x), problem.z0, (x,), ())
        return quiet(one, solver=solver, tol=1e-13).value

    leaves = [t.detach().clone().requires_grad_() for t in (*problem.parameters, *problem.context)]
    assert torch.autograd.gradcheck(solve, leaves)


def test_locuslab_33_and_35_what_is_kept_and_where_gradients_flow():
    counts = []
    for max_iter in (5, 50):
        problem = problems.vector(norm=0.99)
        x = problem.context[0].clone().requires_grad_()
        z0 = torch.zeros_like(x, requires_grad=True)
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            one = problems.Problem("one", problem.f, z0, (x,), problem.parameters)
            value = quiet(one, solver="picard", tol=1e-15, max_iter=max_iter).value
        counts.append((len(kept), sum(kept)))
        w, x, z0 = torch.autograd.grad(value.sum(), [*problem.parameters, x, z0], allow_unused=True)
        assert bool(w.any()) and bool(x.any()), "weights and input get gradients"
        assert z0 is None or not bool(z0.any()), "the starting state gets none"
    assert counts[0] == counts[1]


# deepinv, by issue


def test_deepinv_1022_and_1023_anderson_is_off_or_broken():
    w = problems.vector(size=40, norm=0.99).parameters[0].detach()
    x = problems.vector(size=40).context[0]
    problem = problems.Problem("slow", lambda z, x: z @ w + x, torch.zeros_like(x), (x,), ())
    steps = {}
    with torch.no_grad():
        for name, solver in {
            "off": "picard",
            "one": tw.solver("anderson", memory=1),
            "five": tw.solver("anderson", memory=5),
            "late": tw.solver("anderson", memory=5, start=40),
        }.items():
            solution = quiet(problem, solver=solver, tol=1e-8, max_iter=3000)
            assert bool(solution.converged.all())
            steps[name] = int(solution.steps.max())
    assert steps["five"] < steps["one"] < steps["off"]  # it is on, and its memory is used
    assert steps["five"] < steps["late"] and 8 * steps["five"] < steps["off"]


# jaxopt, optimistix, xitorch


@pytest.mark.parametrize("solver", NATIVE)
def test_jaxopt_433_the_iterates_are_to_be_had(solver):
    problem = problems.vector(batch=2, norm=0.5)
    seen = []
    with torch.no_grad():
        solution = quiet(problem, solver=solver, tol=1e-8, callback=seen.append)
    assert len(seen) == int(solution.steps.max())
    assert torch.equal(seen[0].value, problem.z0)
    for iteration in seen:
        rows = iteration.rows
        image = problem.f(iteration.value, *(c[rows] for c in problem.context))
        true = (image - iteration.value).norm(dim=1) / image.norm(dim=1)
        torch.testing.assert_close(true, iteration.residual, rtol=1e-4, atol=1e-13)


def test_jaxopt_466_the_adjoint_fails_silently_with_a_zero_gradient():
    # Anderson solves this expanding map; plain iteration cannot solve its adjoint.
    problem = more.expanding()
    for solver, budget in (("picard", 100), ("picard", 2), ("anderson", 1)):
        adjoint = tw.adjoint("implicit", solver=solver, max_iter=budget)
        solution = quiet(problem, adjoint=adjoint)
        assert bool(solution.converged.all())
        got = gradient(solution.value, problem)
        report = solution.adjoint
        assert report is not None
        assert not bool((report.status == int(tw.Status.converged)).any()), "a failure called a success"
        assert bool((report.residual > 1e-10).all())
        assert bool(got.any()) and bool(torch.isfinite(got).all())


def test_optimistix_106_and_144_many_problems_at_once():
    problem = problems.mixed(batch=40, hardest=0.99)
    with torch.no_grad():
        together = quiet(problem, max_iter=2000)
        assert bool(together.converged.all())
        each = int(together.steps.sum())
        longest = 40 * int(together.steps.max())
    assert each <= together.evaluations < 0.7 * longest  # not the slowest problem's steps for all
    assert len(set(together.steps.tolist())) > 5


def test_xitorch_28_how_to_detect_that_there_is_no_solution():
    problem = more.no_solution()
    solution = quiet(problem, tol=1e-6)
    lost = problem.context[1][:, 0] > 0
    assert torch.equal(~solution.converged, lost)
    assert "row(s) [2, 5]" in solution.describe()


# Traps met on the way


@pytest.mark.parametrize("adjoint_solver", NATIVE)
def test_trap_rows_finished_in_the_backward_solve_must_be_frozen(adjoint_solver):
    """Without context no row leaves: easy rows stay beside hard ones long after they finished."""
    problem = problems.mixed(batch=8, hardest=0.95)
    w = exact_gradient(problem)
    solution = tw.fix(
        lambda z: problem.f(z, *problem.context),
        problem.z0,
        adjoint=tw.adjoint("implicit", solver=adjoint_solver),
        tol=1e-11,
        max_iter=1000,
    )
    got = gradient(solution.value, problem)
    assert relative(got, w) < 1e-7
    assert solution.adjoint is not None
    assert len(set(solution.adjoint.steps.tolist())) > 1


@pytest.mark.parametrize("solver", [*NATIVE, *BRIDGED])
def test_trap_one_nan_row_costs_one_evaluation_and_nobody_else_anything(solver):
    problem = problems.mixed(batch=6, hardest=0.7)
    broken = more.poisoned(problem, 2, float("nan"))
    others = torch.arange(6) != 2
    with torch.no_grad():
        clean, solution = (quiet(p, solver=solver, tol=1e-8, max_iter=400) for p in (problem, broken))
    assert int(solution.steps[2]) == 1 and int(solution.steps.max()) < 100
    assert torch.equal(solution.steps[others], clean.steps[others])
    solution = quiet(broken, solver=solver, tol=1e-10)
    got = torch.autograd.grad(solution.value[others].sum(), problem.parameters)[0]
    cotangent = torch.ones_like(problem.z0) * others[:, None]
    assert relative(got, problems.reference(problem, cotangent)[1][0]) < 1e-6


@pytest.mark.parametrize("solver", ["torchdeq.simple_fixed_point_iter", "torchdeq.fixed_point_iter"])
def test_trap_their_plain_solver_as_the_backward_solver(solver):
    """torchdeq: TypeError for b_solver='simple_fixed_point_iter' with ift=True."""
    problem = problems.vector(norm=0.7)
    solution = quiet(problem, adjoint=tw.adjoint("implicit", solver=solver))
    assert relative(gradient(solution.value, problem), exact_gradient(problem)) < 1e-7


def test_trap_one_map_solved_twice_before_backward():
    """torchdeq with hook_ift=True never returns."""
    problem = problems.vector(norm=0.7)
    first, second = quiet(problem), quiet(problem)
    got = gradient(first.value + 2 * second.value, problem)
    assert relative(got, 3 * exact_gradient(problem)) < 1e-7
    assert first.adjoint is not None and second.adjoint is not None


class _Runaway(Exception):
    pass


class _Limited(StepSolver):
    """Plain iteration that may be started 40 times."""

    left = 40

    def init(self, z):
        type(self).left -= 1
        if self.left < 0:
            raise _Runaway

    def step(self, problem, z, fz, r, state):
        return fz, None


def test_trap_hook_ift_with_our_solver_inside_torchdeq_never_returns():
    """Called twice before backward, torchdeq removes the wrong hook: each solve starts another one."""
    problem = problems.vector(norm=0.5)
    (w,), (x,) = problem.parameters, problem.context
    before = tw.solvers.registry.snapshot()
    try:
        tw.solvers.register("limited", _Limited)
        torchdeq_bridge.register_with_torchdeq()
        layer = torchdeq.get_deq(f_solver="twnn.picard", b_solver="twnn.limited", hook_ift=True)
        f = lambda z: torch.tanh(z @ w + x)  # noqa: E731
        (first, _), (second, _) = layer(f, problem.z0), layer(f, problem.z0)
        with pytest.raises(tw.OptionError, match="hook_ift"):
            (first[-1] + second[-1]).sum().backward()
    finally:
        tw.solvers.registry.restore(before)


@pytest.mark.parametrize("solver", [*NATIVE, *BRIDGED])
def test_trap_bfloat16_autocast_at_a_tolerance_below_its_precision(solver):
    """torchdeq never converges at 1e-3 under autocast; here the rows converge or say that they did not."""
    w = 0.5 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    problem = problems.Problem("autocast", lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), ())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        solution = quiet(problem, solver=solver, tol=1e-3, max_iter=60)
        image = problem.f(solution.value, x).float()
    true = (image - solution.value).norm(dim=1) / image.norm(dim=1)
    assert bool((true <= 1e-3 * (1 + 1e-4))[solution.converged].all())
    assert float(true.max()) < 2e-2
