"""What a map reaches when the backward pass evaluates it again, and what tells that it is another one."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import twnn_plugin as tw

f64 = torch.float64
D = 5
NAN = float("nan")
LAYER: nn.Module = nn.Identity()  # every turn of a loop binds it anew


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def layer(seed: int) -> nn.Linear:
    made = nn.Linear(D, D, dtype=f64)
    with torch.no_grad():
        made.weight.copy_(0.6 * torch.linalg.qr(drawn(D, D, seed=seed))[0])
        made.bias.copy_(0.1 * drawn(D, seed=seed + 10))
    return made


def inputs() -> Tensor:
    return drawn(6, D, seed=20)


def solve(f, x: Tensor, adjoint: str, **options) -> Tensor:
    options = {"tol": 1e-12, "max_iter": 200, **options}
    return tw.fix(f, torch.zeros_like(x), x, adjoint=adjoint, **options).value


def assert_close(found, expected, bound: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= bound * b.norm().clamp_min(1e-12)


# Variables that are bound anew ----------------------------------------------------------------------


def inner(z: Tensor) -> Tensor:
    return LAYER(z)


def nested(z, c):
    def one(u):
        def two(v):
            return LAYER(v)

        return two(u)

    return torch.tanh(one(z) + c)


def by_default(z, c, used=inner):
    return torch.tanh(used(z) + c)


def by_keyword(z, c, *, used=inner):
    return torch.tanh(used(z) + c)


LISTED = [inner]
TREE = {"a": {"b": [lambda z: inner(z)]}}
PARTS = {"a": functools.partial(lambda scale, z: scale * inner(z), 1.0)}
MAPS = {
    "comprehension": lambda z, c: sum([torch.tanh(LAYER(z) + c) for _ in range(1)]),
    "generator": lambda z, c: sum(torch.tanh(LAYER(z) + c) for _ in range(1)),
    "lambda": lambda z, c: torch.tanh((lambda u: LAYER(u))(z) + c),
    "nested": nested,
    "default": by_default,
    "keyword default": by_keyword,
    "list": lambda z, c: torch.tanh(LISTED[0](z) + c),
    "dict of dicts": lambda z, c: torch.tanh(TREE["a"]["b"][0](z) + c),
    "partial in a dict": lambda z, c: torch.tanh(PARTS["a"](z) + c),
    "default of a partial": functools.partial(lambda z, c, used=by_default: used(z, c)),
}


def chained(kind: str, adjoint: str):
    """Solves in a row, after which the variable is something else."""
    global LAYER
    layers, h = [layer(seed) for seed in range(3)], inputs()
    for LAYER in layers:  # noqa: B007
        h = solve(MAPS[kind], h, adjoint)
    LAYER = nn.Identity()
    return h, [p for one in layers for p in one.parameters()]


@pytest.mark.parametrize("kind", MAPS)
def test_loops_that_bind_a_variable_anew(kind):
    found, expected = (
        torch.autograd.grad(h.square().sum(), parameters)
        for h, parameters in (chained(kind, adjoint) for adjoint in ("checkpointed", "unrolled"))
    )
    assert_close(found, expected, bound=1e-12)


@pytest.mark.parametrize("kind", MAPS)
def test_second_derivatives_of_loops_that_bind_a_variable_anew(kind):
    found = []
    for adjoint in ("implicit", "unrolled", "checkpointed"):
        h, parameters = chained(kind, adjoint)
        once = torch.autograd.grad(h.square().sum(), parameters, create_graph=True)
        total = torch.stack([g.square().sum() for g in once]).sum()
        found.append(torch.autograd.grad(total, parameters))
    assert_close(found[0], found[1], bound=1e-6)
    assert_close(found[2], found[1], bound=1e-12)


class Net(nn.Module):
    """Solves with a map that reaches the layer in one of several ways."""

    def __init__(self, kind: str, adjoint: str):
        super().__init__()
        self.layer, self.kind, self.adjoint = layer(0), kind, adjoint

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        tree, part = {"a": {"b": layer.forward}}, functools.partial(layer)
        maps = {
            "default": lambda z, c, layer=layer: torch.tanh(layer(z) + c),
            "list by default": lambda z, c, layers=(layer,): torch.tanh(layers[0](z) + c),
            "function by default": lambda z, c, used=lambda z: layer(z): torch.tanh(used(z) + c),
            "dict of dicts": lambda z, c: torch.tanh(tree["a"]["b"](z) + c),
            "list of partials": lambda z, c, used=[part]: torch.tanh(used[0](z) + c),
        }
        return solve(maps[self.kind], x, self.adjoint)


@pytest.mark.parametrize(
    "kind", ["default", "list by default", "function by default", "dict of dicts", "list of partials"]
)
def test_functional_call(kind):
    given = {name: p.detach().clone() for name, p in Net(kind, "unrolled").named_parameters()}
    given["layer.weight"] = 0.6 * torch.linalg.qr(drawn(D, D, seed=30))[0]

    def loss(p, adjoint):
        return functional_call(Net(kind, adjoint), p, (inputs(),)).square().sum()

    wanted = {name: p.clone().requires_grad_() for name, p in given.items()}
    expected = torch.autograd.grad(loss(wanted, "unrolled"), list(wanted.values()))
    found = torch.autograd.grad(loss(wanted, "checkpointed"), list(wanted.values()))
    assert_close(found, expected, bound=1e-12)
    transformed = torch.func.grad(lambda p: loss(p, "implicit"))(given)
    assert_close(list(transformed.values()), expected, bound=1e-8)


# What cannot be put back ----------------------------------------------------------------------------


class Cell:
    """A callable object that is no module."""

    def __init__(self):
        self.layer, self.gain = layer(0), 0.9

    def __call__(self, z: Tensor, c: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.layer(z) + c)


def buffer():
    module, scale = layer(0), torch.ones(D, dtype=f64)
    return module, lambda z, c: torch.tanh(module(z) * scale + c), lambda: scale.mul_(0.5)


def buffer_of_a_module():
    module = nn.BatchNorm1d(D, dtype=f64).eval()
    assert module.running_mean is not None
    change = module.running_mean.add_
    return module, lambda z, c: torch.tanh(0.5 * module(z) + c), lambda: change(1.0)


def attribute():
    cell = Cell()
    return cell.layer, cell, lambda: setattr(cell, "gain", 0.3)


def item():
    module, gains = layer(0), [0.9]
    return module, lambda z, c: gains[0] * torch.tanh(module(z) + c), lambda: gains.insert(0, 0.3)


@pytest.mark.parametrize("solver", ["picard", "anderson", "newton_krylov", "torchdeq.anderson"])
@pytest.mark.parametrize("make", [buffer, buffer_of_a_module, attribute, item])
def test_another_value_is_refused(make, solver):
    module, f, change = make()
    value = solve(f, inputs(), "checkpointed", solver=solver, tol=1e-8)
    parameters = list(module.parameters())
    (expected, *_) = torch.autograd.grad(
        solve(f, inputs(), "unrolled", solver=solver, tol=1e-8).sum(), parameters
    )
    (found, *_) = torch.autograd.grad(value.sum(), parameters, retain_graph=True)
    assert_close([found], [expected], bound=1e-12)
    change()
    with pytest.raises(RuntimeError, match="'checkpointed' evaluated it again"):
        torch.autograd.grad(value.sum(), parameters)


def test_another_value_of_few_rows_is_refused():
    """Rows that leave early are not in the last evaluations."""
    module, scale, x = layer(0), torch.ones(D, dtype=f64), inputs()
    x[1:] *= 10  # saturated
    value = solve(lambda z, c: torch.tanh(module(z) * scale + c), x, "checkpointed", solver="picard")
    scale.mul_(0.99)
    with pytest.raises(RuntimeError, match="'checkpointed'"):
        value[1:].sum().backward()


# What is no change ----------------------------------------------------------------------------------


def plain(module):
    return lambda z, c: torch.tanh(module(z) + c)


def dropped(module):
    return lambda z, c: torch.tanh(nn.functional.dropout(module(z), 0.2) + c)


def coupled(module):
    return lambda z, c: torch.tanh(module(z) + 0.1 * z.nan_to_num().mean(0)) + c


@pytest.mark.parametrize(
    "f, dtype, surroundings",
    [
        (plain, f64, contextlib.nullcontext),
        (coupled, f64, contextlib.nullcontext),
        (dropped, f64, contextlib.nullcontext),
        (plain, torch.float32, contextlib.nullcontext),
        (plain, torch.bfloat16, contextlib.nullcontext),
        (plain, torch.float32, functools.partial(torch.autocast, "cpu", torch.bfloat16)),
    ],
    ids=["plain", "NaN", "dropout", "float32", "bfloat16", "autocast"],
)
def test_the_same_value_is_taken(f, dtype, surroundings):
    x = inputs()
    if f is coupled:
        x[2] = NAN  # which stays in the batch
    found = []
    for adjoint in ("checkpointed", "unrolled"):
        torch.manual_seed(0)
        module = layer(0).to(dtype)
        with warnings.catch_warnings(), surroundings():
            warnings.simplefilter("ignore", tw.ConvergenceWarning)
            options = {"solver": "picard", "tol": 1e-2, "max_iter": 20, "coupled": f is coupled}
            value = solve(f(module), x.to(dtype), adjoint, **options)
        value[[0, 1, 3, 4, 5]].sum().backward()
        found.append([p.grad for p in module.parameters()])
    assert all(bool(g.isfinite().all()) for g in found[1])
    assert_close(*found, bound=1e-12)


class Damped(tw.solvers.StepSolver):
    """Takes a step for which autograd need not keep the value of the map."""

    def init(self, z: Tensor) -> None:
        return None

    def step(self, problem, z: Tensor, fz: Tensor, r: Tensor, state: None) -> tuple[Tensor, None]:
        return z + 0.5 * r, None


def test_values_to_compare_with_are_those_of_the_last_evaluations_alone():
    module, x = layer(0), inputs()
    gc.collect()
    known = {id(found) for found in gc.get_objects() if type(found) is Tensor}
    solution = tw.fix(
        plain(module), torch.zeros_like(x), x, solver=Damped(), adjoint="checkpointed", max_iter=60
    )
    gc.collect()
    held = {
        found.data_ptr()
        for found in gc.get_objects()
        if type(found) is Tensor and id(found) not in known and found.shape == x.shape
    }
    steps = int(solution.steps.max())
    assert steps >= 15 and len(held) <= steps + 6  # the states, which are evaluated again
    solution.value.sum().backward()


@pytest.mark.parametrize("adjoint", ["implicit", "checkpointed"])
def test_a_variable_of_an_inner_function_is_not_the_outer_one_of_that_name(adjoint):
    torch.manual_seed(0)
    lin, found = torch.nn.Linear(4, 4).double(), []
    for how in ("unrolled", adjoint):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for a in (0.2, 0.3, 0.4):

            def f(z, c):
                def own(u):
                    a = 1.0
                    return (lambda: a * u)()

                return torch.tanh(a * lin(own(z)) + c)

            x = tw.fix(f, torch.zeros_like(x), x, adjoint=how, tol=1e-12, max_iter=200).value
        a = None
        found.append(torch.autograd.grad(x.sum(), lin.weight)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")
def test_a_row_that_failed_does_not_hide_a_change():
    torch.manual_seed(0)
    lin, x, s = torch.nn.Linear(4, 4).double(), torch.randn(6, 4).double(), torch.ones(4).double()
    x[1] = float("nan")

    def f(z, c):
        whole = torch.nan_to_num(z)
        return torch.tanh(0.3 * lin(whole) * s + 0.1 * whole.mean(0)) + c

    value = tw.fix(
        f, torch.zeros_like(x), x, coupled=True, adjoint="checkpointed", solver="picard", max_iter=100
    ).value
    s.mul_(0.5)
    with pytest.raises(RuntimeError, match="'checkpointed'"):
        torch.autograd.grad(value[[0, 2, 3, 4, 5]].sum(), lin.weight)
