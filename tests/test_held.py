"""Backward passes evaluate a map again: it must be the one that the forward pass had."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call

import twnn_plugin as tw
import zoo  # noqa: F401 - registers models
from twnn_plugin.adjoints.held import Held

f64 = torch.float64
D = 6
SIZES = {"tol": 1e-11, "max_iter": 400}
GRAFTED = ("implicit", "ad_fixed_point")


def layer(seed: int) -> nn.Linear:
    made = nn.Linear(D, D).to(f64)
    with torch.no_grad():
        made.weight.copy_(0.7 * torch.linalg.qr(torch.randn(D, D, dtype=f64, generator=_seeded(seed)))[0])
        made.bias.zero_()
    return made


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs() -> torch.Tensor:
    """Most rows are saturated and leave the backward solve early: then the map is evaluated again."""
    x = torch.randn(20, D, dtype=f64, generator=_seeded(9))
    x[:16] *= 5
    x[16:] *= 0.1
    return x


class Net(nn.Module):
    def __init__(self, adjoint: str, seed: int = 0):
        super().__init__()
        self.lin, self.adjoint, self.gain = layer(seed), adjoint, 1.0

    def forward(self, x):
        return tw.fix(
            lambda z, c: torch.tanh(self.gain * self.lin(z) + c), 0 * x, x, adjoint=self.adjoint, **SIZES
        ).value


def assert_close(found, expected, bound: float = 1e-7) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= bound * b.norm().clamp_min(1e-12)


def grads(out, parameters, **options):
    return torch.autograd.grad(out.square().sum(), parameters, **options)


@pytest.mark.parametrize("adjoint", [*GRAFTED, "checkpointed"])
def test_functional_call(adjoint):
    other = {name: p.detach().clone().requires_grad_() for name, p in Net(adjoint, 1).named_parameters()}
    found, expected = (
        grads(functional_call(net, other, (inputs(),)), list(other.values()))
        for net in (Net(adjoint), Net("unrolled"))
    )
    assert_close(found, expected)


@pytest.mark.parametrize("adjoint", GRAFTED)
def test_functional_call_twice(adjoint):
    other = {name: p.detach().clone().requires_grad_() for name, p in Net(adjoint, 1).named_parameters()}
    found = []
    for net in (Net(adjoint), Net("unrolled")):
        once = grads(functional_call(net, other, (inputs(),)), list(other.values()), create_graph=True)
        total = sum(g.square().sum() for g in once)
        found.append(torch.autograd.grad(total, list(other.values())))
    assert_close(*found, bound=1e-5)


@pytest.mark.parametrize("adjoint", GRAFTED)
def test_transforms_of_a_module_that_solves(adjoint):
    net, x = Net(adjoint), inputs()
    p = {name: q.detach() for name, q in Net(adjoint, 1).named_parameters()}
    names = list(p)

    def loss(p, x, net=net):
        return functional_call(net, p, (x,)).square().sum()

    expected = torch.func.grad(functools.partial(loss, net=Net("unrolled")))(p, x)
    found = torch.func.grad(loss)(p, x)
    assert_close([found[n] for n in names], [expected[n] for n in names])
    each = torch.func.vmap(torch.func.grad(lambda p, x: loss(p, x[None])), (None, 0))(p, x)
    assert_close([each[n].sum(0) for n in names], [expected[n] for n in names])
    few = x[15:18]
    back = torch.func.jacrev(lambda p: functional_call(net, p, (few,)))(p)
    forth = torch.func.jacfwd(lambda p: functional_call(net, p, (few,)))(p)
    assert_close([back[n] for n in names], [forth[n] for n in names])


def late(kind: str, early: bool):
    """Solves whose maps read a variable that has another value by the time of the backward pass.

    Args:
        kind: what the variable holds.
        early: whether it is given to the map when this is made, instead.
    """
    layers, x = [layer(seed) for seed in range(3)], inputs()
    h = x
    for i, a in enumerate((0.5, 0.7, 0.9)):
        linear = layers[i]

        def cell(z):
            return torch.tanh(linear(z))  # noqa: B023

        maps = {
            "module": lambda z, c: torch.tanh(linear(z) + c),  # noqa: B023
            "index": lambda z, c: torch.tanh(layers[i](z) + c),  # noqa: B023
            "number": lambda z, c: a * torch.tanh(layers[0](z) + c),  # noqa: B023
            "helper": lambda z, c: cell(z) + 0.1 * c,
        }
        bound = {
            "module": lambda z, c, linear=linear: torch.tanh(linear(z) + c),
            "index": lambda z, c, linear=linear: torch.tanh(linear(z) + c),
            "number": lambda z, c, a=a: a * torch.tanh(layers[0](z) + c),
            "helper": lambda z, c, linear=linear: torch.tanh(linear(z)) + 0.1 * c,
        }
        h = tw.fix((bound if early else maps)[kind], 0 * x, h, **SIZES).value
    return h, [p for linear in layers for p in linear.parameters()]


@pytest.mark.parametrize("kind", ["module", "index", "number", "helper"])
def test_late_bound_variables(kind):
    used = {"allow_unused": True, "materialize_grads": True}
    found, expected = (grads(*late(kind, early), **used) for early in (False, True))
    assert_close(found, expected, bound=1e-12)
    found, expected = (
        torch.autograd.grad(
            sum(g.square().sum() for g in grads(out, parameters, create_graph=True, **used)),
            parameters,
            **used,
        )
        for out, parameters in (late(kind, early) for early in (False, True))
    )
    assert_close(found, expected, bound=1e-12)


GAIN = 0.9


def test_late_bound_globals():
    global GAIN
    linear, found = layer(0), []
    for adjoint in ("implicit", "unrolled"):
        GAIN = 0.9
        x = inputs()

        def f(z, c):
            return GAIN * torch.tanh(linear(z) + c)  # noqa: B023

        out = tw.fix(f, 0 * x, x, adjoint=adjoint, **SIZES)
        GAIN = 0.2
        found.append(grads(out.value, list(linear.parameters())))
        assert GAIN == 0.2  # as it was left
    assert_close(*found)


def changed(kind: str, adjoint: str):
    """What cannot be put back: the gradient is right all the same, and a second derivative is refused."""
    net, x = Net(adjoint), inputs()
    c = x.clone()
    out = net(c)
    if kind == "attribute":
        net.gain = 0.3
    elif kind == "data":
        net.lin.weight.data = 0.5 * net.lin.weight.data
    return out, list(net.parameters())


@pytest.mark.parametrize("kind", ["attribute", "data"])
def test_other_changes_are_found_out(kind):
    found, expected = (grads(*changed(kind, adjoint)) for adjoint in ("implicit", "unrolled"))
    assert_close(found, expected)
    out, parameters = changed(kind, "implicit")
    once = grads(out, parameters, create_graph=True)
    assert_close([g.detach() for g in once], expected)
    with pytest.raises(RuntimeError, match="f is not what it was"):
        torch.autograd.grad(sum(g.sum() for g in once), parameters)


def test_context_that_is_written_to():
    found = []
    for adjoint in ("implicit", "unrolled"):
        net = Net(adjoint)
        c = inputs()
        out = net(c)
        c.mul_(0.1)
        found.append(grads(out, list(net.parameters())))
    assert_close(*found)


def test_unchanged_maps_are_evaluated_for_the_rows_that_are_left():
    net = Net("implicit")
    x = inputs()
    seen = []

    def f(z, c):
        seen.append(z.shape[0])
        return torch.tanh(net.lin(z) + c)

    out = tw.fix(f, 0 * x, x, **SIZES).value
    before = len(seen)
    grads(out, list(net.parameters()))
    assert len(seen) > before and max(seen[before:]) < 20


def test_counters_go_on():
    calls = 0
    linear, x = layer(0), inputs()

    def f(z, c):
        nonlocal calls
        calls += 1
        return torch.tanh(linear(z) + c)

    out = tw.fix(f, 0 * x, x, **SIZES).value
    calls = 1000
    grads(out, list(linear.parameters()))
    assert calls > 1000


def test_what_is_held_and_put_back():
    linear, x = layer(0), inputs()
    scale = 2.0

    def plain(z):
        return scale * linear(z)

    expected = 2.0 * linear(x)
    made = (plain, functools.partial(lambda m, z: scale * m(z), linear), lambda z: plain(z))
    held = [Held(function) for function in made]
    scale, linear = 7.0, layer(1)
    for function in held:
        assert torch.equal(function(x), expected)
        assert scale == 7.0 and linear is not None
    other = dict(layer(2).named_parameters())
    first = layer(0)
    method = Held(first.forward)
    assert torch.equal(method(x), first(x))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = first

        def forward(self, x):
            return method(x)

    # Inside of functional_call the module has other parameters; those that it had come back for the call.
    found = functional_call(Outer(), {f"inner.{name}": p for name, p in other.items()}, (x,))
    assert torch.equal(found, first(x))


def test_a_closed_over_leaf_that_is_returned_gets_its_gradient():
    for adjoint in (*GRAFTED, "one_step", "unrolled"):
        c = torch.randn(3, 4, requires_grad=True)
        w = torch.randn(3, 4, requires_grad=True)
        solution = tw.fix(lambda z, c: c, torch.zeros(3, 4), c, adjoint=adjoint)
        (solution.value.sum() + w.sum()).backward()
        assert torch.equal(c.grad, torch.ones(3, 4)), adjoint


@pytest.mark.parametrize("solver", [None, "gcr", "gmres", "bicgstab", "neumann", "auto", "picard"])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_gradients_that_cannot_be_squared(solver, size):
    w = (0.8 * torch.linalg.qr(torch.randn(16, 16, generator=_seeded(0)))[0]).requires_grad_()
    x = 0.1 * torch.randn(4, 16, generator=_seeded(1))
    found, steps = [], []
    for by in (1.0, size):
        adjoint = tw.adjoint("implicit", solver=solver)
        solution = tw.fix(
            lambda z, x: torch.tanh(z @ w + x), 0 * x, x, tol=1e-5, max_iter=300, adjoint=adjoint
        )
        (g,) = torch.autograd.grad(by * solution.value.sum(), w)
        found.append(g.double() / by)
        steps.append(solution.adjoint.steps.tolist())
        assert (solution.adjoint.status == 0).all() and (solution.adjoint.residual <= 1e-5).all()
    assert_close(found[1:], found[:1], bound=1e-4)
    assert steps[0] == steps[1]


def test_parts_of_a_state_settle_each_in_forward_mode():
    w = 0.95 * torch.linalg.qr(torch.randn(4, 4, dtype=f64, generator=_seeded(0)))[0]
    x = 0.2 * torch.randn(5, 4, dtype=f64, generator=_seeded(1))

    def solved(p, scale, tol, adjoint, solver):
        def f(z, c):
            return torch.tanh(z[0] @ w + c + p), scale * torch.tanh(0.1 * z[1] / scale + p)

        start = (torch.zeros(5, 4, dtype=f64), torch.zeros(5, 3, dtype=f64))
        return tw.fix(f, start, x, tol=tol, max_iter=2000, adjoint=adjoint, solver=solver).value[0]

    p = torch.tensor(0.1, dtype=f64)
    tangent = (torch.ones_like(p),)
    exact = torch.func.jvp(lambda p: solved(p, 1.0, 1e-12, "implicit", "anderson"), (p,), tangent)[1]
    for scale in (1.0, 1e3, 1e6):
        solve = functools.partial(
            solved, scale=scale, tol=1e-4, adjoint="ad_fixed_point", solver="ad_fixed_point"
        )
        found = torch.func.jvp(solve, (p,), tangent)[1]
        assert (found - exact).norm() < 1e-3 * exact.norm()


def test_threads_do_not_hear_of_each_other():
    w = 0.5 * torch.linalg.qr(torch.randn(5, 5, dtype=f64, generator=_seeded(0)))[0]
    x = torch.randn(3, 5, dtype=f64, generator=_seeded(1))

    def loss(w):
        return tw.fix(lambda z, x: torch.tanh(z @ w + x), 0 * x, x, **SIZES).value.square().sum()

    def twice(w):
        return torch.func.grad(lambda w: torch.func.grad(loss)(w).square().sum())(w)

    expected, wrong = twice(w), []

    def work():
        try:
            for _ in range(6):
                if (twice(w) - expected).norm() > 1e-6 * expected.norm():
                    wrong.append("value")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def wormhole(adjoint: str) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    options = {"gate": "always", "adjoint": adjoint, "tol": 1e-6, "max_iter": 200, "scale": 1.0}
    return tw.blocks.get("wormhole")(body, torch.randn(2, 8), **options)


def resnet(adjoint: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"scale": 0.3, "policy": "always", "tol": 1e-6, "adjoint": adjoint}
    return timm.create_model("twnn_resnet8_cifar", num_classes=5, **options)


def gru(adjoint: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("twnn_gru_rows", in_chans=1, policy="always", tol=1e-6, adjoint=adjoint)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("adjoint", GRAFTED)
@pytest.mark.parametrize(
    "make, shape", [(wormhole, (30, 8)), (resnet, (6, 3, 32, 32)), (gru, (6, 1, 28, 28))]
)
def test_models_with_other_parameters(make, shape, adjoint, training):
    model = make(adjoint).train(training)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=_seeded(2)))
    x = torch.randn(shape, generator=_seeded(3)) * torch.linspace(0.1, 3, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    used = {"allow_unused": True, "materialize_grads": True}
    found = grads(functional_call(model, given, (x,)), list(given.values()), **used)
    expected = grads(other(x), list(other.parameters()), **used)
    assert_close(found, expected, bound=1e-5)
    if make is resnet and training:
        return  # torch refuses to write running statistics inside of its transforms
    plain = {name: p.detach() for name, p in given.items()}
    found = torch.func.grad(lambda p: functional_call(model, p, (x,)).square().sum())(plain)
    assert_close([found[name] for name in plain], expected, bound=1e-3)


def test_maps_that_return_what_they_close_over():
    p = torch.randn(3, 4)

    def solved(p):
        return tw.fix(lambda z: p, torch.zeros(3, 4)).value.sum()

    assert torch.equal(torch.func.grad(solved)(p), torch.ones(3, 4))
    assert torch.equal(torch.func.jvp(solved, (p,), (p,))[1], p.sum())
    flat = torch.func.grad(lambda q: tw.fix(lambda z: q.view(3, 4), torch.zeros(3, 4)).value.sum())(
        p.flatten()
    )
    assert torch.equal(flat, torch.ones(12))


def test_what_cannot_be_differentiated_says_why():
    x = torch.randn(3, 4)
    w = (0.2 * torch.randn(4, 4)).requires_grad_()
    with pytest.raises(tw.MapError, match="context and f closes over it"):
        torch.func.grad(
            lambda x: tw.fix(lambda z, c: torch.tanh(z @ w + c + x.mean(0)), 0 * x, x).value.sum()
        )(x)
    value = tw.fix(lambda z, c: torch.tanh(z @ w + c), 0 * x, x).value
    for create in (False, True):
        with pytest.raises(tw.TransformError, match=r"torch\.func\.jacrev"):
            torch.autograd.grad(
                value,
                w,
                torch.eye(12).view(12, 3, 4),
                is_grads_batched=True,
                create_graph=create,
                retain_graph=True,
            )


def test_writes_to_the_context_are_refused():
    x = torch.randn(3, 4)
    with pytest.raises(tw.MapError, match="f writes to context 0"):
        tw.fix(lambda z, c: torch.tanh(c.mul_(0.5) + 0.3 * z), 0 * x, x)
