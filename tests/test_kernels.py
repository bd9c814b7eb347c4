"""The compiled kernels give what operations of torch give, whatever the shape, the rows and the options."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import twnn_plugin as tw
from tests import problems
from tests.test_hostile import build, problem, run
from twnn_plugin import kernels
from twnn_plugin.blocks.message import maxima, pool
from twnn_plugin.solvers.anderson_rows import AndersonRows
from twnn_plugin.solvers.base import Control
from twnn_plugin.solvers.book_rows import BookRows, fits
from twnn_plugin.solvers.measure import EPS, measure, threshold
from twnn_plugin.types import Iteration

ROOT = Path(__file__).resolve().parents[1]
built = pytest.mark.skipif(not kernels.available(), reason=f"compiled kernels: {kernels.describe()}")
quiet = pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")


def both(solve):
    """By the kernels, and by operations of torch."""
    one = solve()
    with kernels.disabled():
        return one, solve()


def alike(one: tw.Solution, other: tw.Solution, rtol: float = 1e-9) -> None:
    assert torch.equal(one.status, other.status)
    assert torch.equal(one.steps, other.steps)
    assert one.evaluations == other.evaluations
    assert one.residual.dtype == other.residual.dtype and one.value.dtype == other.value.dtype
    assert torch.allclose(one.residual, other.residual, rtol=max(rtol, 1e-6), atol=1e-14, equal_nan=True)
    assert torch.allclose(one.value, other.value, rtol=rtol, atol=1e-12, equal_nan=True)


# The same solves.


@built
@quiet
@settings(max_examples=200, deadline=None, derandomize=True)
@given(p=problem)
def test_plain_iteration_of_hostile_rows_ends_in_the_same_way(p):
    f, z0, context = build(p)
    one, other = both(lambda: run(p, "picard", f, z0, context))
    assert torch.equal(one.status, other.status) and torch.equal(one.steps, other.steps)
    assert torch.allclose(one.residual, other.residual, rtol=1e-4, equal_nan=True)
    assert torch.allclose(one.value, other.value, rtol=0, atol=0, equal_nan=True)  # what f returned


@built
@quiet
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 9),
    size=st.sampled_from([1, 2, 3, 7, 31, 32, 33, 70]),
    memory=st.integers(1, 6),
    start=st.integers(0, 5),
    damping=st.sampled_from([1.0, 0.5]),
    norm=st.sampled_from(["l2", "max"]),
    stop=st.sampled_from(["rel", "abs"]),
    seed=st.integers(0, 1000),
)
def test_anderson_takes_the_same_steps(batch, size, memory, start, damping, norm, stop, seed):
    p = problems.mixed(batch=batch, size=size, seed=seed)
    solver = tw.solver("anderson", memory=memory, start=start, damping=damping)

    def solve():
        with torch.no_grad():
            options = {"tol": 1e-6, "max_iter": 60, "norm": norm, "stop": stop}
            return tw.fix(p.f, p.z0, *p.context, solver=solver, **options)

    one, other = both(solve)
    # In float64 rounding moves no row across this tolerance by more than a step in a long solve.
    assert int((one.steps - other.steps).abs().max()) <= 1
    same = one.steps == other.steps
    assert torch.equal(one.status[same], other.status[same])
    assert torch.allclose(one.value[same], other.value[same], rtol=1e-6, atol=1e-8)


@built
@quiet
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 7),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    exponent=st.integers(-6, 6),
    solver=st.sampled_from(["picard", "anderson"]),
    options=st.fixed_dictionaries({"start": st.integers(0, 4), "damping": st.sampled_from([1.0, 0.5])}),
    norm=st.sampled_from(["l2", "max"]),
    seed=st.integers(0, 1000),
)
def test_parts_in_different_units_take_the_same_steps(batch, sizes, exponent, solver, options, norm, seed):
    generator = torch.Generator().manual_seed(seed)
    units = [10.0 ** (exponent * i) for i in range(len(sizes))]
    weights = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in sizes]
    weights = [0.8 * w / torch.linalg.matrix_norm(w, 2) for w in weights]
    x = torch.randn(batch, 1, generator=generator, dtype=torch.float64)

    def f(z, x):
        mean = sum(part.mean(dim=1, keepdim=True) / unit for part, unit in zip(z, units, strict=True))
        pairs = zip(z, weights, units, strict=True)
        return tuple(u * torch.tanh(part / u @ w + x + 0.1 * mean) for part, w, u in pairs)

    z0 = tuple(torch.zeros(batch, n, dtype=torch.float64) for n in sizes)
    method = tw.solver("anderson", **options) if solver == "anderson" else solver

    def solve():
        with torch.no_grad():
            return tw.fix(f, z0, x, solver=method, tol=1e-5, max_iter=80, norm=norm)

    one, other = both(solve)
    assert int((one.steps - other.steps).abs().max()) <= (0 if solver == "picard" else 1)
    for a, b, unit in zip(one.value, other.value, units, strict=True):
        assert torch.allclose(a / unit, b / unit, rtol=1e-4, atol=1e-5)


@built
def test_a_part_that_is_not_a_number_is_the_farthest_from_rest():
    x = torch.ones(3, 2, dtype=torch.float64)
    x[1, 0], x[2, 1] = math.nan, math.inf

    def f(z, x):
        return 0.5 * z[0] + x[:, :1], 0.5 * z[1] + x[:, 1:]

    def solve():
        start = (torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
        with torch.no_grad(), pytest.warns(tw.ConvergenceWarning, match="2 of 3"):
            return tw.fix(f, start, x, solver="picard", tol=1e-6)

    one, other = both(solve)
    assert one.status.tolist() == other.status.tolist() == [0, 3, 3]
    assert torch.equal(one.steps, other.steps)


@built
@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "solver", ["picard", "anderson", "broyden", "newton_krylov", "auto", "ad_fixed_point"]
)
@pytest.mark.parametrize("make", problems.ALL)
def test_every_solver_has_the_same_outcome(make, solver, dtype):
    p = make()
    context = tuple(c.to(dtype) for c in p.context)
    f = p.f if dtype == torch.float64 else _cast(p.f, dtype)

    def solve():
        with torch.no_grad():
            return tw.fix(f, p.z0.to(dtype), *context, solver=solver, tol=1e-4, max_iter=200)

    one, other = both(solve)
    alike(one, other, rtol=1e-2 if dtype == torch.float32 else 1e-9)


def _cast(f, dtype):
    return lambda z, *c: f(z.double(), *(x.double() for x in c)).to(dtype)


@built
@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point", "phantom", "one_step"])
def test_gradients_agree(adjoint):
    p = problems.vector(batch=12)

    def gradients() -> tuple[Tensor, ...]:
        x = p.context[0].clone().requires_grad_()
        solver = "ad_fixed_point" if adjoint == "ad_fixed_point" else "anderson"
        solution = tw.fix(
            p.f, p.z0, x, *p.context[1:], solver=solver, adjoint=adjoint, tol=1e-10, max_iter=200
        )
        return torch.autograd.grad(solution.value.sin().sum(), [x, *p.parameters])

    for one, other in zip(*both(gradients), strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


@built
def test_a_scale_of_the_tolerance_is_kept_as_rows_leave():
    p = problems.mixed(batch=9)
    scale = torch.linspace(0.1, 3, 9, dtype=torch.float64)
    control = Control(1e-8, 400, scale=scale)
    from twnn_plugin.adjoints.equation import Equation
    from twnn_plugin.solvers import driver
    from twnn_plugin.state import Layout

    def solve():
        layout, z = Layout.of(p.z0)
        with torch.no_grad():
            return driver.drive(tw.solvers.get("picard")(), Equation(p.f, layout, p.context, 9), z, control)

    one, other = both(solve)
    assert torch.equal(one.steps, other.steps) and len(set(one.steps.tolist())) > 3
    assert torch.allclose(one.residual, other.residual, rtol=1e-9)
    assert bool((one.residual <= 1e-8).all())
    last = p.f(one.value, *p.context) - one.value
    assert torch.allclose(last.norm(dim=1) / scale, one.residual, rtol=1e-6)


@built
@quiet
def test_a_callback_sees_the_same():
    p = problems.mixed(batch=9)

    def watched() -> list[Iteration]:
        seen: list[Iteration] = []
        with torch.no_grad():
            tw.fix(p.f, p.z0, *p.context, solver="picard", tol=1e-6, max_iter=300, callback=seen.append)
        return seen

    one, other = both(watched)
    assert len(one) == len(other) > 10
    for a, b in zip(one, other, strict=True):
        assert (a.step, a.evaluations) == (b.step, b.evaluations)
        assert torch.equal(a.rows, b.rows) and torch.equal(a.value, b.value)
        assert torch.allclose(a.residual, b.residual, rtol=1e-9)


@built
def test_nobody_listening_and_somebody_listening_are_the_same_solve():
    p = problems.mixed(batch=9)

    def solve(**options):
        with torch.no_grad():
            return tw.fix(p.f, p.z0, *p.context, solver="anderson", tol=1e-6, max_iter=300, **options)

    assert torch.equal(solve().value, solve(callback=lambda seen: None).value)


# Rows.


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_the_same_alone_and_among_others(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 50, generator=generator, dtype=dtype)
    rate = torch.linspace(0.05, 0.95, 40, dtype=dtype)[:, None]
    x[7], x[8] = math.nan, math.inf

    def f(z, x, rate):  # each entry by itself: the arithmetic does not depend on the batch
        return rate * torch.sin(z.roll(1, dims=1)) + x

    def solve(pick):
        with torch.no_grad():
            return tw.fix(f, torch.zeros_like(x[pick]), x[pick], rate[pick], tol=1e-5, max_iter=200)

    with pytest.warns(tw.ConvergenceWarning, match="non_finite: 2 row"):
        whole = solve(slice(None))
    for row in (0, 3, 6, 9, 20, 39):
        alone = solve(slice(row, row + 1))
        assert torch.equal(alone.value[0], whole.value[row]) and alone.steps[0] == whole.steps[row]


@built
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_threads_share_rows_and_change_nothing(solver):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 4000, generator=generator)
    rate = torch.linspace(0.05, 0.9, 37)[:, None]
    before = torch.get_num_threads()

    def solve(threads: int) -> tw.Solution:
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                f = lambda z, x, rate: rate * torch.sin(z.roll(1, dims=1)) + x  # noqa: E731
                return tw.fix(f, torch.zeros_like(x), x, rate, solver=solver, tol=1e-4, max_iter=99)
        finally:
            torch.set_num_threads(before)

    one, two, many = solve(1), solve(2), solve(5)
    for other in (two, many):
        assert torch.equal(one.value, other.value) and torch.equal(one.residual, other.residual)
        assert torch.equal(one.steps, other.steps)


@built
@quiet
def test_values_that_lie_elsewhere_in_memory_are_read_right():
    """Transposed, expanded, of every second column: f and the start may return any of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 10, generator=generator)
    views = {
        "transposed": lambda y: y.T.contiguous().T,
        "every second": lambda y: y.repeat_interleave(2, dim=1)[:, ::2],
        "as it is": lambda y: y,
    }
    with torch.no_grad():
        expected = tw.fix(lambda z, x: 0.5 * z.cos() + x, torch.zeros(6, 10), x, tol=1e-6)
        for name, view in views.items():
            solution = tw.fix(
                lambda z, x, v=view: v(0.5 * z.cos() + x), view(torch.zeros(6, 10)), x, tol=1e-6
            )
            assert torch.equal(solution.value, expected.value), name
        one = torch.zeros(1, 10).expand(6, 10)
        assert torch.equal(tw.fix(lambda z, x: 0.5 * z.cos() + x, one, x, tol=1e-6).value, expected.value)


@built
def test_a_view_that_waits_to_be_negated_is_read_negated():
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))

    def f(z, x):
        value = torch._neg_view(-(0.5 * z + x))  # as the imaginary part of a conjugate is
        assert value.is_neg() and value.is_contiguous()
        return value

    def solve():
        with torch.no_grad():
            return tw.fix(f, torch.zeros(5, 1), x, solver="picard", tol=1e-5, max_iter=50)

    one, other = both(solve)
    assert torch.allclose(one.value, 2 * x, rtol=1e-4) and torch.equal(one.steps, other.steps)


@built
def test_nothing_is_read_where_there_is_nothing():
    r = torch.zeros(3, 4)
    for wrong in (torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(3, 4, device="meta")):
        with pytest.raises(ValueError, match=r"need \(3, 4\) on the CPU"):
            kernels.same(wrong, r)


@built
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    parts=st.sampled_from([(), (3, 4), (1, 5, 1)]),
    norm=st.sampled_from(["l2", "max"]),
    relative=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    picked=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rows_that_move_are_those_that_operations_of_torch_find(parts, norm, relative, dtype, picked, seed):
    generator = torch.Generator().manual_seed(seed)
    fz = torch.randn(9, 7, generator=generator, dtype=dtype)
    places = torch.randint(9, (6,), generator=generator) if picked else None
    mine = fz if places is None else fz[places]
    z = mine + 10 ** -torch.randint(1, 7, (len(mine), 1), generator=generator).to(dtype)
    z[0, seed % 7] = math.nan if seed % 2 else z[0, 0]
    status = torch.randint(2, (len(mine),), generator=generator)
    control = Control(tol=1e-3, max_iter=1, stop="rel" if relative else "abs", norm=norm, parts=parts)
    change, size = measure(mine - z, mine, norm, parts)
    within = change <= 4 * threshold(size, control) + 1e-5 * size
    found = kernels.moving(
        fz,
        z,
        places=places,
        status=status,
        meant=1,
        tol=1e-3,
        floor=EPS,
        slack=4.0,
        rounding=1e-5,
        relative=relative,
        largest=norm == "max",
        parts=parts,
    )
    assert found == int((~within & (status == 1)).sum())
    assert kernels.moving(fz, fz, rounding=1e-5) == 0 and kernels.moving(fz, 2 * fz, rounding=0.5) == 9
    with pytest.raises(ValueError, match="rows alike"):
        kernels.moving(fz, z[:, :6])
    with pytest.raises(ValueError, match=r"torch\.int64"):
        kernels.moving(fz, fz, status=torch.zeros(9))


@built
def test_any_number_of_evaluations_may_be_allowed():
    with torch.no_grad():
        solution = tw.fix(lambda z, x: 0.5 * z + x, torch.zeros(2, 3), torch.ones(2, 3), max_iter=10**30)
    assert bool(solution.converged.all())


@built
@given(keep=st.lists(st.booleans(), min_size=1, max_size=12), width=st.integers(1, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_rows_move_to_the_front(keep, width):
    x = torch.arange(len(keep) * width, dtype=torch.float32).view(len(keep), width)
    kept = torch.tensor([i for i, stays in enumerate(keep) if stays], dtype=torch.long)
    arrays = [x, x.repeat(3, 1), x[:, :1].to(torch.float64).contiguous()]
    found = kernels.shrunk([array.clone() for array in arrays], kept)
    for array, shrunk in zip(arrays, found, strict=True):
        assert torch.equal(shrunk[: len(kept)], array[kept])
        assert len(shrunk) == len(kept) or len(kept) <= len(shrunk) < 2 * len(kept)  # no memory is held long


@built
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_rows_keep_their_own_history_when_some_have_begun_anew_and_others_leave(steps):
    solver, (weight, x) = tw.solver("anderson").compiled(), _linear()
    kept = torch.tensor([1, 2, 4])

    def iterate(z, state, x, count):
        for _ in range(count):
            fz = z @ weight + x
            z, state = solver.step(None, z, fz, fz - z, state)
        return z, state

    with torch.no_grad():
        z, state = iterate(torch.zeros_like(x), solver.init(x), x, steps)
        z = z.index_fill(0, torch.tensor([0, 4]), 0.0)  # these begin anew
        state = solver.keep(solver.renew(state, torch.tensor([0, 4]), z), kept)
        together, _ = iterate(z[kept], state, x[kept], 6)
        for place, row in enumerate(kept.tolist()):
            mine = slice(row, row + 1)
            begun = 0 if row == 4 else steps
            alone, _ = iterate(
                torch.zeros(1, x.shape[1], dtype=x.dtype), solver.init(x[mine]), x[mine], begun + 6
            )
            assert torch.allclose(together[place], alone[0], rtol=1e-8, atol=1e-10), row


def _linear() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    return 0.9 * weight / torch.linalg.matrix_norm(weight, 2), torch.randn(
        6, 9, generator=generator, dtype=torch.float64
    )


@built
def test_a_solve_does_not_write_to_what_it_was_given_or_returned_before():
    p = problems.mixed(batch=8)
    z0 = p.z0 + 0.1
    before = [t.clone() for t in (z0, *p.context)]
    given_back = []

    def f(z, *context):
        given_back.append((p.f(z, *context), None))
        value = given_back[-1][0]
        given_back[-1] = (value, value.clone())
        return value

    with torch.no_grad():
        tw.fix(f, z0, *p.context, solver="anderson", tol=1e-8, max_iter=200)
    for now, then in zip((z0, *p.context), before, strict=True):
        assert torch.equal(now, then)
    for value, kept in given_back:
        assert torch.equal(value, kept)


# Where they are used, and where not.


@built
def test_they_are_used_where_nothing_is_recorded():
    control = Control(1e-3, 10)
    z = torch.zeros(3, 4)
    with torch.no_grad():
        assert fits(z, control) and fits(z.double(), control)
        assert isinstance(tw.solvers.get("anderson")().compiled(), AndersonRows)
        assert isinstance(BookRows(z, control), BookRows)
        for other in (z.half(), z.bfloat16(), z.to("meta"), z.long(), torch.nn.Parameter(z)):
            assert not fits(other, control)
        assert not fits(z, Control(1e-3, 10, coupled=True))
        assert fits(z, Control(1e-3, 10, parts=(1, 3)))
        with forward_ad.dual_level():
            assert not fits(z, control)
        with kernels.disabled():
            assert not fits(z, control) and not kernels.available()
        assert torch.func.vmap(lambda z: torch.tensor(fits(z, control)))(torch.zeros(2, 3, 4)).sum() == 0
        assert kernels.available()
    assert not fits(z, control)  # gradients are recorded


def test_a_subclass_of_a_solver_keeps_its_own_steps():
    class Lazy(tw.solvers.get("anderson")):
        def step(self, problem, z, fz, r, state):
            return fz, state

    assert type(Lazy().compiled()) is Lazy
    long = tw.solvers.get("anderson")(memory=kernels.SLOTS + 1)
    assert long.compiled() is long  # longer than the kernels' histories
    assert tw.solvers.get("picard")().compiled() == tw.solvers.get("picard")()


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_environment_switches_them_off():
    code = "from twnn_plugin import kernels; print(kernels.available(), kernels.describe())"
    off = _python(code, TWNN_KERNELS="0")
    assert off.stdout.strip() == "False switched off by TWNN_KERNELS=0", off.stderr
    wrong = _python(code, TWNN_KERNELS="no")
    assert wrong.returncode != 0 and "TWNN_KERNELS must be 0" in wrong.stderr and "'no'" in wrong.stderr


def test_without_them_the_solvers_say_why_and_work(tmp_path):
    code = (
        "import sys; sys.modules['twnn_plugin.kernels._rows'] = None\n"
        "import torch, twnn_plugin as tw\n"
        "from twnn_plugin import kernels\n"
        "solution = tw.fix(lambda z, x: 0.5 * z + x, torch.zeros(2, 3), torch.ones(2, 3), tol=1e-5)\n"
        "assert bool(solution.converged.all()) and solution.value.sub(2).abs().max() < 1e-3\n"
        "print(kernels.describe())"
    )
    done = _python(code, TWNN_KERNELS="1")
    assert done.stdout.startswith("not built: install the package again where there is a C compiler"), (
        done.stderr
    )


@pytest.mark.slow
def test_a_machine_without_a_compiler_installs_all_the_same(tmp_path):
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            tmp_path / "l",
            "--build-temp",
            tmp_path,
        ],
        env={**os.environ, "CC": "/nonexistent/cc"},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "_rows" in done.stderr + done.stdout  # a warning names what was not built
    assert not list((tmp_path / "l").rglob("*_rows*"))


# A gate's look.


def _gate(channels: int, per: str = "sample", bias: float = -1.0, pooling: str = "avg") -> tw.gates.Gate:
    torch.manual_seed(0)
    gate = tw.gates.get("straight_through")(channels, per=per, bias=bias, pooling=pooling).eval()
    torch.nn.init.normal_(gate.score.weight)
    gate.running_mean.normal_()
    gate.running_var.uniform_(0, 2)
    return gate


SHAPES = {
    "NC": (3, 12),
    "NLC": (3, 7, 12),
    "NHWC": (3, 9, 5, 12),
    "NCHW": (3, 12, 9, 5),
    "NCHW, many positions": (2, 12, 17, 13),
    "NCHW, wide": (2, 70, 3, 3),
    "NCHW, channels_last": (3, 12, 4, 3),
}


@built
@pytest.mark.parametrize("per", ["sample", "channel"])
@pytest.mark.parametrize("kind", ["means", "maxima, too"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gate_looks_as_it_glances(shape, per, kind):
    layout = shape.split(",")[0]
    gate = _gate(
        SHAPES[shape][1 if layout == "NCHW" else -1], per, pooling="avg" if kind == "means" else "catavgmax"
    )
    for seed in range(8):
        out = torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(seed))
        if shape.endswith("channels_last"):
            out = out.to(memory_format=torch.channels_last)
        with torch.no_grad():
            gate.threshold.fill_(5.0 * seed)
            told = gate.look(out, layout)
            mine = gate.scores
            seen = [pool(out, layout, torch.float32), maxima(out, layout, torch.float32)]
            glanced = gate.glance(torch.cat(seen, dim=1) if gate.pooling == "catavgmax" else seen[0])
        assert told is not None and (told[0] is None) == (glanced is None)
        if glanced is not None and told[0] is not None:
            assert mine is not None and torch.allclose(mine, gate.scores, atol=1e-5)
            assert torch.allclose(told[0](), glanced(), atol=1e-6)
    assert glanced is not None  # the last thresholds close it


@built
def test_what_a_gate_tells_later_is_of_the_pass():
    gate, out = _gate(6, bias=-3.0), torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.threshold.fill_(9.0)
        told = gate.look(out, "NCHW")
        assert told is not None and told[0] is not None
        before = told[0]()
        gate.threshold.fill_(-5.0)
        gate.temperature = 7.0
        assert torch.equal(told[0](), before)


def _other_data(gate: tw.gates.Gate) -> None:
    for parameter in gate.parameters():
        parameter.data = torch.randn_like(parameter)


def _other_parameters(gate: tw.gates.Gate) -> None:
    for layer in (gate.hidden, gate.score):
        layer.weight, layer.bias = (torch.nn.Parameter(torch.randn_like(p)) for p in layer.parameters())


def _other_numbers(gate: tw.gates.Gate) -> None:
    gate.running_mean = torch.randn_like(gate.running_mean)
    gate.running_var = torch.rand_like(gate.running_var)


def _in_place(gate: tw.gates.Gate) -> None:
    gate.load_state_dict({key: torch.rand_like(value) for key, value in gate.state_dict().items()})


def _assigned(gate: tw.gates.Gate) -> None:
    values = {key: torch.rand_like(value) for key, value in gate.state_dict().items()}
    gate.load_state_dict(values, assign=True)


def _fewer_units(gate: tw.gates.Gate) -> None:
    gate.hidden.weight.data, gate.hidden.bias.data = gate.hidden.weight.data[:8], gate.hidden.bias.data[:8]
    gate.score.weight.data = gate.score.weight.data[:, :8]  # of one score: in one piece still


def _transposed(gate: tw.gates.Gate) -> None:
    gate.hidden.weight.data = gate.hidden.weight.data.t().contiguous().t()


CHANGES = [
    *(_other_data, _other_parameters, _other_numbers, _in_place, _assigned, _fewer_units, _transposed),
    lambda gate: gate.double().float(),
]


@built
@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__.strip("_<>") for c in CHANGES])
def test_a_gate_looks_with_the_weights_of_now(change):
    gate, out = _gate(12), torch.randn(3, 12, 4, 4)
    with torch.no_grad():
        gate.threshold.fill_(50.0)
        assert gate.look(out, "NCHW") is not None  # where the weights lie is noted
        change(gate)
        gate.threshold.fill_(50.0)
        told = gate.look(out, "NCHW")
        scores = None if told is None else gate.scores
        gate.glance(pool(out, "NCHW", torch.float32))
    assert (told is None) == (change is _transposed)  # which the kernel cannot read
    assert scores is None or torch.allclose(scores, gate.scores, atol=1e-5)


@built
@pytest.mark.parametrize("again", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_copies_of_a_gate_look_with_their_own_weights(again):
    gate, out = _gate(12), torch.randn(3, 12, 4, 4)
    with torch.no_grad():
        gate.threshold.fill_(50.0)
        assert gate.look(out, "NCHW") is not None
        other, before = again(gate), gate.scores
        assert other.scores is None  # copies hold no activations
        for parameter in other.parameters():
            parameter.add_(1.0)
        other.look(out, "NCHW")
        assert not torch.allclose(other.scores, before)
        gate.look(out, "NCHW")
        assert torch.equal(gate.scores, before)


@built
@pytest.mark.parametrize("pooling", ["avg", "catavgmax"])
def test_a_gate_concludes_nothing_from_what_is_not_a_number(pooling):
    gate = _gate(6, bias=-50.0, pooling=pooling)
    for broken in (math.nan, math.inf, -math.inf):
        out = torch.randn(2, 6, 4, 4)
        with torch.no_grad():
            assert gate.look(out, "NCHW") is not None and gate.look(out, "NCHW")[0] is not None
            out[1, 2, 3, 3] = broken
            assert gate.look(out, "NCHW") == (None,)


@built
def test_a_gate_looks_only_at_what_the_kernel_can_read():
    gate, out = _gate(6), torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        assert gate.look(out, "NCHW") is not None
        shapes = (out.transpose(2, 3), out[:0], out[:, :3], out.repeat(1, 2, 1, 1))
        for other in (out.double(), out.half(), out.to("meta"), *shapes):
            assert gate.look(other, "NCHW") is None
        assert gate.train().look(out, "NCHW") is None
        assert _gate(6).double().look(out, "NCHW") is None
        normed = _gate(6)
        torch.nn.utils.parametrizations.weight_norm(normed.hidden)
        assert normed.look(out, "NCHW") is None
        with kernels.disabled():
            assert gate.eval().look(out, "NCHW") is None
    assert gate.look(out, "NCHW") is None  # gradients are recorded
