"""Hostile inputs: every failure is reported, and nobody's row is anybody else's problem."""

from __future__ import annotations

import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twnn_plugin as tw
from tests.methods import BRIDGED, NATIVE

POISONS = (0.0, 1.0, 1e-30, 1e30, math.nan, math.inf, -math.inf)

problem = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 7),
        "size": st.integers(1, 9),
        "seed": st.integers(0, 10_000),
        "norm": st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0, 1.5, 50.0]),
        "squash": st.booleans(),
        "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        "poisons": st.lists(st.sampled_from(POISONS), max_size=4),
        "tol": st.sampled_from([1e-1, 1e-3, 1e-7]),
        "max_iter": st.sampled_from([1, 2, 3, 17, 60]),
        "stop": st.sampled_from(["rel", "abs"]),
        "norm_kind": st.sampled_from(["l2", "max"]),
    }
)


def build(p):
    generator = torch.Generator().manual_seed(p["seed"])
    w = torch.randn(p["size"], p["size"], generator=generator, dtype=torch.float64)
    w = (p["norm"] * w / torch.linalg.matrix_norm(w, 2)).to(p["dtype"])
    x = torch.randn(p["batch"], p["size"], generator=generator, dtype=torch.float64)
    for index, poison in enumerate(p["poisons"]):
        x[(3 * index) % p["batch"]] *= poison
    rate = torch.rand(p["batch"], 1, generator=generator, dtype=torch.float64) * 2
    x, rate = x.to(p["dtype"]), rate.to(p["dtype"])

    def f(z, x, rate):
        # Row by row, so that the arithmetic does not depend on the batch.
        product = (rate * z).unsqueeze(1).mul(w.T).sum(-1)
        return torch.tanh(product + x) if p["squash"] else product + x

    return f, torch.zeros_like(x), (x, rate)


def run(p, solver, f, z0, context):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(
            f,
            z0,
            *context,
            solver=solver,
            tol=p["tol"],
            max_iter=p["max_iter"],
            stop=p["stop"],
            norm=p["norm_kind"],
        )


@pytest.mark.parametrize("solver", [*NATIVE, *BRIDGED])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(p=problem)
def test_no_failure_goes_unreported(solver, p):
    f, z0, context = build(p)
    solution = run(p, solver, f, z0, context)
    assert solution.value.shape == z0.shape and solution.value.dtype == z0.dtype
    assert int(solution.steps.min()) >= 1 and int(solution.steps.max()) <= p["max_iter"]
    assert solution.evaluations >= int(solution.steps.sum())
    good = solution.converged
    # What is called converged is finite, and its residual, measured anew, is within the tolerance.
    z = solution.value[good].double()
    assert bool(torch.isfinite(z).all())
    assert bool((solution.residual[good] <= p["tol"] * (1 + 1e-6)).all())
    if p["dtype"] != torch.bfloat16 and bool(good.any()):
        image = f(solution.value, *context)[good].double()
        change = (image - z).norm(dim=1) if p["norm_kind"] == "l2" else (image - z).abs().amax(1)
        size = image.norm(dim=1) / (1 if p["norm_kind"] == "l2" else z.shape[1] ** 0.5)
        bound = p["tol"] * ((size + 1e-9) if p["stop"] == "rel" else torch.ones_like(size))
        rounding = 1e-5 * size if p["dtype"] == torch.float32 else 1e-12 * size
        assert bool((change <= bound * (1 + 1e-5) + rounding).all())
    # A row that holds NaN or infinity in its input and cannot squash it away is never "converged".
    if not p["squash"]:
        broken = ~torch.isfinite(context[0]).all(dim=1)
        assert not bool(good[broken].any())


@pytest.mark.parametrize("solver", NATIVE)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=problem)
def test_a_row_alone_is_the_row_in_company(solver, p):
    f, z0, context = build(p)
    together = run(p, solver, f, z0, context)
    row = p["seed"] % p["batch"]
    alone = run(p, solver, f, z0[row : row + 1], tuple(c[row : row + 1] for c in context))
    assert together.status[row] == alone.status[0]
    assert together.steps[row] == alone.steps[0]
    assert torch.allclose(together.value[row], alone.value[0], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("adjoint", tw.adjoints.names())
@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=problem)
def test_a_gradient_is_finite_where_only_good_rows_are_looked_at(adjoint, p):
    f, z0, (x, rate) = build(p)
    x = x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        solution = tw.fix(
            f, z0, x, rate, adjoint=adjoint, tol=p["tol"], max_iter=p["max_iter"], stop=p["stop"]
        )
    good = solution.converged
    if not bool(good.any()) or not solution.value.requires_grad:
        return
    (gradient,) = torch.autograd.grad(solution.value[good].double().square().sum(), x)
    assert gradient.shape == x.shape
    assert bool(torch.isfinite(gradient[good]).all()) or p["norm"] > 1 or p["dtype"] == torch.bfloat16


# A thousand solves, anything with anything.

ROWS = (math.nan, math.inf, -math.inf, 1e30, 1e-30, 1e-310, 0.0, 1.0, 1.0, 1.0)

MAPS = {
    "linear": lambda z, x, w: z.unsqueeze(1).mul(w).sum(-1) + x,
    "squashed": lambda z, x, w: torch.tanh(z.unsqueeze(1).mul(w).sum(-1) + x),
    "constant": lambda z, x, w: x + 0 * z,
    "constant without z": lambda z, x, w: x.clone(),
    "zero": lambda z, x, w: 0 * z,
    "jumps": lambda z, x, w: torch.where(z > x, -x, x + 1),
    "rounds": lambda z, x, w: torch.round(4 * z + x) / 8,
    "two-cycle": lambda z, x, w: x - z,
    "square": lambda z, x, w: z**2 + x,
    "no root": lambda z, x, w: z + 1 + z**2,
    "wanders": lambda z, x, w: z + 1,
    "explodes": lambda z, x, w: torch.exp(z) + x,
    "pole": lambda z, x, w: 1 / z + x,
    "half a domain": lambda z, x, w: torch.sqrt(z - 0.1) * x,
    "front": lambda z, x, w: torch.roll(z, 1, -1) * 0.99 + x,
}
SMOOTH = {"linear", "squashed", "constant", "constant without z", "zero", "front"}


def wrapped(kind, flat):
    """The map of (B, D) states as one of another structure; how to wrap a state and to unwrap it."""
    if kind == "tensor":
        return flat, lambda z: z, lambda z: z
    if kind == "image":
        shape, unshape = (lambda z: z[:, None, :, None]), (lambda z: z[:, 0, :, 0])
    elif kind == "tuple":
        shape = lambda z: (z[:, :1], z[:, 1:])  # noqa: E731
        unshape = lambda z: torch.cat(z, dim=1)  # noqa: E731
    else:
        shape = lambda z: {"b": z[:, 1:, None], "a": z[:, :1]}  # noqa: E731
        unshape = lambda z: torch.cat([z["a"], z["b"][..., 0]], dim=1)  # noqa: E731
    return (lambda z, *c: shape(flat(unshape(z), *c))), shape, unshape


def draw(chance):
    """One hostile case from a ``random.Random``."""
    batch, size = chance.choice((0, 1, 1, 2, 5, 9)), chance.choice((1, 1, 2, 3, 7))
    dtype = chance.choice((torch.float64, torch.float32, torch.bfloat16, torch.float16))
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    w = torch.randn(size, size, generator=generator, dtype=torch.float64)
    w = chance.choice((0.0, 0.3, 0.9, 1.0, 1.5, 50.0)) * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    z0 = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    z0 = torch.zeros_like(x) if chance.random() < 0.7 else z0
    for row in range(batch):
        x[row] *= chance.choice(ROWS)
        z0[row] *= chance.choice((1.0, 1.0, 1.0, 1.0, 1e30, math.nan, math.inf))
    name = chance.choice(sorted(MAPS))
    kind = "tensor" if size == 1 else chance.choice(("tensor", "image", "tuple", "dict"))
    solver = chance.choice(tw.solvers.names())
    if solver == "anderson" and chance.random() < 0.5:
        solver = tw.solver(
            solver,
            memory=chance.choice((1, 2, 9)),
            start=chance.choice((0, 3)),
            damping=chance.choice((0.3, 1.0)),
        )
    options = {
        "solver": solver,
        "adjoint": chance.choice(tw.adjoints.names()),
        "tol": chance.choice((1e-300, 1e-12, 1e-6, 1e-3, 0.5, 1e6)),
        "max_iter": chance.randint(1, 60),
        "stop": chance.choice(("rel", "abs")),
        "norm": chance.choice(("l2", "max")),
    }
    if options["stop"] == "abs":  # less cannot be measured, and is refused
        options["tol"] = max(options["tol"], 1e-150 if dtype == torch.float64 else 2e-19)
    return name, kind, w.to(dtype), z0.to(dtype), x.to(dtype), chance.random() < 0.6, options


def excess(z, image, options, sizes):
    """(B,) by how much residuals exceed the tolerance and what rounding the state to its dtype adds.

    Of a state of several parts, whose sizes these are, each meets the tolerance relative to itself.
    """
    pairs = zip(z.split(sizes, dim=1), image.split(sizes, dim=1), strict=True)
    return torch.stack([_excess(a, b, options) for a, b in pairs]).amax(dim=0)


def _excess(z, image, options):
    eps, work = torch.finfo(z.dtype).eps, torch.float64 if z.dtype == torch.float64 else torch.float32
    z, image = z.double(), image.double()
    change, size = (image - z).norm(dim=1), image.norm(dim=1)
    if options["norm"] == "max":
        change, size = (image - z).abs().amax(dim=1), size / z.shape[1] ** 0.5
    bound = options["tol"] * (size + 1e-9 if options["stop"] == "rel" else torch.ones_like(size))
    # Below this the squares in a norm underflow: the counterpart of norms that overflow to infinity.
    underflow = torch.finfo(work).tiny ** 0.5 * z.shape[1]
    rounding = 2 * eps * (z.abs().amax(dim=1) + image.abs().amax(dim=1))
    return change - bound * (1 + 1e-5) - rounding - underflow


def one_hostile_solve(case):
    name, kind, w, z0, x, passed, options = case
    f, shape, unshape = wrapped(kind, lambda z, x: MAPS[name](z, x, w))
    x = x.clone().requires_grad_()
    context, g = ((x,), f) if passed else ((), lambda z: f(z, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        solution = tw.fix(g, shape(z0), *context, **options)
    value = unshape(solution.value)
    assert value.shape == z0.shape and value.dtype == z0.dtype
    assert solution.status.shape == solution.steps.shape == solution.residual.shape == (len(z0),)
    if not len(z0):
        return
    # Every row is within the tolerance or says that it is not.
    good = solution.converged
    with torch.no_grad():
        image = unshape(f(solution.value, x))
    assert bool(torch.isfinite(value[good]).all())
    size = value.shape[1]
    sizes = [1, size - 1] if kind in ("tuple", "dict") else [size]
    assert bool((excess(value.detach(), image, options, sizes)[good] <= 0).all())
    assert int(solution.steps.min()) >= 1 and int(solution.steps.max()) <= options["max_iter"]
    # A backward pass may give what the map's derivative is, NaN included, but does not crash.
    if value.requires_grad and bool(good.any()):
        (gradient,) = torch.autograd.grad(value[good].sum(), x, allow_unused=True)
        report = solution.adjoint
        if gradient is not None and report is not None and name in SMOOTH:
            sound = good & (report.status == int(tw.Status.converged))
            assert bool(torch.isfinite(gradient[sound]).all())


@pytest.mark.parametrize("adjoint", ["implicit", "one_step", "phantom"])
def test_a_broken_row_in_a_map_that_closes_over_the_batch(adjoint):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    x[1] = math.nan
    x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        solution = tw.fix(lambda z: 0.5 * z + x, 0 * x.detach().nan_to_num(), adjoint=adjoint, tol=1e-10)
    good = torch.tensor([0, 2, 3])
    (gradient,) = torch.autograd.grad(solution.value[good].sum(), x)
    assert bool(torch.isfinite(gradient[good]).all()) and bool(gradient[good].all())


@pytest.mark.parametrize("seed", range(20))
def test_a_thousand_hostile_solves(seed):
    chance = random.Random(seed)
    for number in range(50):
        case = draw(chance)
        try:
            one_hostile_solve(case)
        except Exception as error:
            raise AssertionError(f"solve {number}: {type(error).__name__}: {error}\n{case}") from error


# The company that a row keeps.

NEIGHBOURS = {
    "slow": lambda z, x: 0.999 * z + x,
    "diverging": lambda z, x: 3 * z + x,
    "without a root": lambda z, x: z + 1 + z**2,
    "NaN": lambda z, x: z * math.nan,
    "inf": lambda z, x: z + math.inf,
    "huge": lambda z, x: 0.5 * z + 1e30 * x,
    "jumping": lambda z, x: torch.where(z > 0, -1.0, 1.0).to(z.dtype) + x,
    "frozen": lambda z, x: x + 0 * z,
}

company = st.fixed_dictionaries(
    {
        "kinds": st.lists(st.sampled_from(["good", "good", *NEIGHBOURS]), min_size=2, max_size=9),
        "size": st.integers(1, 6),
        "seed": st.integers(0, 10_000),
        "rate": st.sampled_from([0.1, 0.5, 0.9]),
        "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        "tol": st.sampled_from([1e-2, 1e-5]),
        "passed": st.booleans(),
    }
)


def gather(p):
    """A batch of good rows and bad neighbours; and the map, start and context with good rows alone."""
    generator = torch.Generator().manual_seed(p["seed"])
    count = len(p["kinds"])
    w = torch.randn(p["size"], p["size"], generator=generator, dtype=torch.float64)
    w = (p["rate"] * w / torch.linalg.matrix_norm(w, 2)).to(p["dtype"])
    x = torch.randn(count, p["size"], generator=generator, dtype=torch.float64).to(p["dtype"])
    names = sorted({kind for kind in p["kinds"] if kind != "good"})
    code = torch.tensor([0.0 if k == "good" else 1.0 + names.index(k) for k in p["kinds"]]).to(p["dtype"])

    def f(z, x, code):
        out = torch.tanh(z.unsqueeze(1).mul(w).sum(-1) + x)
        for number, name in enumerate(names):
            out = torch.where((code == number + 1)[:, None], NEIGHBOURS[name](z, x), out)
        return out

    return f, torch.zeros_like(x), (x, code), (code == 0)


def solve(p, f, z0, context, **options):
    options = {"tol": p["tol"], "max_iter": 50, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        if p["passed"]:
            return tw.fix(f, z0, *context, **options)
        return tw.fix(lambda z: f(z, *context), z0, **options)


@pytest.mark.parametrize("solver", NATIVE)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(p=company)
def test_neighbours_change_nothing(solver, p):
    f, z0, context, good = gather(p)
    harmless = (context[0], torch.zeros_like(context[1]))  # the same batch, with good rows only
    with torch.no_grad():
        mixed, clean = solve(p, f, z0, context, solver=solver), solve(p, f, z0, harmless, solver=solver)
    assert torch.equal(mixed.status[good], clean.status[good])
    assert torch.equal(mixed.steps[good], clean.steps[good])
    if not p["passed"]:  # nobody leaves: the shapes are the same, and so is every bit
        assert torch.equal(mixed.value[good], clean.value[good])
        assert torch.equal(mixed.residual[good], clean.residual[good])
    rounding = 1e-9 if p["dtype"] == torch.float64 else 4 * torch.finfo(p["dtype"]).eps
    assert torch.allclose(mixed.value[good], clean.value[good], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("solver", NATIVE)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(p=company, garbage=st.sampled_from([math.nan, math.inf, 6e4, 0.0]))
def test_frozen_rows_stay_frozen(solver, p, garbage):
    """From the moment a row is finished f returns garbage for it, and nobody notices."""
    f, z0, context, _ = gather(p)
    index = torch.arange(len(z0)).to(p["dtype"])
    done = torch.zeros(len(z0), dtype=torch.bool)

    def trap(z, x, code, index):
        return torch.where(done[index.long()][:, None], torch.full_like(z, garbage), f(z, x, code))

    def watch(seen):
        done[seen.rows[seen.residual <= p["tol"]]] = True

    with torch.no_grad():
        clean = solve(p, f, z0, context, solver=solver)
        solution = solve(p, trap, z0, (*context, index), solver=solver, callback=watch)
    assert bool((done == clean.converged).all())
    assert torch.equal(solution.status, clean.status) and torch.equal(solution.steps, clean.steps)
    value = torch.isfinite(clean.value).all(dim=1)
    assert torch.equal(solution.value[value], clean.value[value])


@pytest.mark.parametrize("adjoint", [name for name in tw.adjoints.names() if tw.adjoints.get(name).exact])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(p=company)
def test_neighbours_change_no_gradient(adjoint, p):
    f, z0, (x, code), good = gather(p)
    p = {**p, "passed": True}  # without context a broken row cannot be left out of what f is given

    def gradient(code):
        leaf = x.clone().requires_grad_()
        solution = solve(p, f, z0, (leaf, code), adjoint=adjoint)
        if not bool(good.any()):
            return leaf.detach(), solution
        return torch.autograd.grad(solution.value[good].sum(), leaf)[0], solution

    (mixed, solution), (clean, _) = gradient(code), gradient(torch.zeros_like(code))
    told = good & solution.converged
    rounding = 1e-6 if p["dtype"] == torch.float64 else 16 * torch.finfo(p["dtype"]).eps
    assert torch.allclose(mixed[told], clean[told], rtol=rounding, atol=rounding)
