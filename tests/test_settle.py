"""Wormholes that are solved together, and rows that fail."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.blocks import Feedback, SolveSettings, settle


class Union(nn.Module):
    """Three layers a, b, c; a wormhole from c's output to a's input, one inside it from b to b."""

    def __init__(self, policies=("always", "always"), gate="straight_through", **settings):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        x = torch.zeros(2, 4)
        solve = SolveSettings().changed(**{"tol": 1e-12, "max_iter": 200, **settings})
        gate = tw.blocks.wormhole.gate_factory(gate)
        made = [tw.policy(policy) if isinstance(policy, str) else policy for policy in policies]
        ends = [("c->a", x, torch.zeros(2, 4)), ("b->b", torch.zeros(2, 6), torch.zeros(2, 5))]
        self.parts = nn.ModuleList(
            Feedback(name, entry, out, gate, policy, solve, scale=0.3)
            for (name, entry, out), policy in zip(ends, made, strict=True)
        )
        self.double()

    def replay(self, entry, signals):
        hidden = torch.tanh(self.a(entry if signals[0] is None else entry + signals[0]))
        inner = torch.tanh(self.b(hidden if signals[1] is None else hidden + signals[1]))
        return torch.tanh(self.c(inner)), inner

    def forward(self, x):
        hidden = torch.tanh(self.a(x))
        outs = self.replay(x, (None, None))
        return settle(list(self.parts), (x, hidden), outs, self.replay)

    def reference(self, x, steps=400, gates=(1.0, 1.0)):
        """The nested solves, written out: the inner wormhole is at rest at every step of the outer one."""
        z = self.replay(x, (None, None))[0]
        for _ in range(steps):
            hidden = torch.tanh(self.a(x + gates[0] * self.parts[0].message(z, x.shape)))
            inner = torch.tanh(self.b(hidden))
            for _ in range(30):
                signal = gates[1] * self.parts[1].message(inner, hidden.shape)
                inner = torch.tanh(self.b(hidden + signal))
            z = torch.tanh(self.c(inner))
        return z, inner


def inputs(rows=5):
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("policies", "gates"), [(("always", "always"), (1.0, 1.0)), (("always", "never"), (1.0, 0.0))]
)
def test_a_group_has_the_fixed_point_of_nested_solves_and_its_gradients(policies, gates):
    model, x = Union(policies), inputs()
    with torch.no_grad():
        expected = model.eval().reference(x, 60, gates)
        found = model(x)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    model.train()
    learned = list(model.parameters())
    gradients = torch.autograd.grad(model(x)[0].square().sum(), learned, allow_unused=True)
    reference = torch.autograd.grad(
        model.reference(x, 40, gates)[0].square().sum(), learned, allow_unused=True, materialize_grads=True
    )
    names = [name for name, _ in model.named_parameters()]
    for name, a, b in zip(names, gradients, reference, strict=True):
        assert a is not None, name
        if "gate" not in name and not (gates[1] == 0 and "parts.1" in name):
            assert torch.allclose(a, b, atol=1e-8), name


class FirstRows(tw.policies.Policy):
    """Opens the first ``count`` rows."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, view):
        return torch.arange(view.open.numel()) < self.count


def test_a_row_takes_part_if_any_of_its_wormholes_is_open_and_closed_ones_send_nothing():
    model, x = Union((FirstRows(2), FirstRows(4))).eval(), inputs()
    with torch.no_grad():
        found = model(x)
        expected = [model.reference(x, 60, gates) for gates in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0))]
    for part in range(2):
        assert torch.allclose(found[part][:2], expected[0][part][:2], atol=1e-9)
        assert torch.allclose(found[part][2:4], expected[1][part][2:4], atol=1e-9)
        assert torch.equal(found[part][4:], expected[2][part][4:])
    first, second = (part.last for part in model.parts)
    assert first.open.tolist() == [True] * 2 + [False] * 3
    assert second.open.tolist() == [True] * 4 + [False]
    assert (
        torch.equal(first.steps, second.steps) and first.steps[4] == 0 and bool((first.steps[:4] > 0).all())
    )
    assert first.evaluations > 0 and second.evaluations == 0
    assert (first.group, second.group) == (None, "c->a")


def test_a_group_in_training_and_its_closed_rows():
    model, x = Union((FirstRows(2), FirstRows(4))).train(), inputs()
    found = model(x)
    with torch.no_grad():
        plain = model.reference(x, 60, (0.0, 0.0))
    assert torch.allclose(found[0][4:], plain[0][4:], atol=1e-12)
    found[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_closed_rows_cost_nothing_in_training_where_no_gate_learns_from_them(adjoint):
    policies, x = (FirstRows(2), "never"), inputs()
    model = Union(policies, gate="always", adjoint=adjoint, max_iter=60, tol=1e-9).train()
    found = model(x)
    record = model.parts[0].last
    again = 2 if adjoint == "implicit" else 0  # at the solution, for the gradient
    assert record.evaluations == int(record.steps.sum()) + again > again
    # As if the open rows had come alone and the others had gone through the plain network.
    sum(value.square().sum() for value in found).backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    if adjoint == "implicit":  # told of every sample of the batch
        told = record.adjoint
        assert told.steps.shape == told.status.shape == told.residual.shape == (5,)
        assert (told.steps[:2] > 0).all() and not told.steps[2:].any() and not told.residual[2:].any()
        assert (told.status == int(tw.Status.converged)).all()
    model.zero_grad()
    alone = model(x[:2])
    plain = model.replay(x[2:], (None, None))
    for value, opened, closed in zip(found, alone, plain, strict=True):
        assert torch.equal(value[2:], closed)
        torch.testing.assert_close(value[:2], opened)
    sum(value.square().sum() for value in (*alone, *plain)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, msg=name)


def test_a_training_pass_in_which_nothing_opens_evaluates_nothing_and_leaves_gradients():
    model, x = Union((FirstRows(0), "never"), gate="always").train(), inputs()
    found = model(x)
    assert model.parts[0].last.evaluations == 0 and not model.parts[0].last.open.any()
    found[0].square().sum().backward()
    assert model.a.weight.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parts.parameters())


class Unsettled(nn.Module):
    """Rows whose first entry exceeds 1 run away, those above 2 become infinite."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(self.linear(x))
        wild = (x[:, :1] > 2).to(x.dtype)
        away = (x[:, :1] > 1).to(x.dtype)
        return y + away * 3 * x.square() * 0.5 + wild * torch.exp(50 * x.square())


def failing(**options):
    torch.manual_seed(0)
    x = torch.randn(6, 4).double().clamp(-1, 0.2)
    options = {"gate": "always", "tol": 1e-9, "max_iter": 12, "scale": 0.3, "solver": "picard", **options}
    block = tw.blocks.get("wormhole")(Unsettled(), torch.zeros(2, 4), **options).double()
    return block, x


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point", "unrolled", "phantom", "one_step"])
def test_rows_that_run_out_of_iterations_keep_a_gradient_that_means_something(adjoint):
    block, x = failing(max_iter=2, adjoint=adjoint, tol=1e-12)
    x = x.requires_grad_()
    z = block.train()(x)
    record = block.last
    assert bool((record.status == int(tw.Status.max_iter)).all()) and not bool(record.fallback.any())
    weight = block.body.linear.weight
    found = torch.autograd.grad(z.square().sum(), [x, weight])
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in found)
    if adjoint not in ("implicit", "ad_fixed_point"):
        return
    # One step from the last iterate, written out.
    last = z.detach()
    step = block.body(x + block.feedback.message(last, x.shape))
    expected = torch.autograd.grad((last + step - step.detach()).square().sum(), [x, weight])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


def test_one_failed_row_changes_no_other_rows_gradient():
    block, x = failing(max_iter=200)
    x[5, 0] = 1.2  # takes longer
    with torch.no_grad():
        block.eval()(x)
    steps = block.last.steps
    assert steps[5] > steps[:5].max() + 1
    tw.configure(block, max_iter=int(steps[:5].max()) + 1)

    def gradients(x):
        block.zero_grad()
        x = x.clone().requires_grad_()
        z = block.train()(x)
        z[:5].square().sum().backward()
        return x.grad[:5], {n: p.grad.clone() for n, p in block.named_parameters()}

    mine, weights = gradients(x)
    assert bool((block.last.status[:5] == 0).all()) and int(block.last.status[5]) != 0
    alone, reference = gradients(x[:5])
    assert torch.allclose(mine, alone, rtol=1e-9)
    for key, value in reference.items():
        assert torch.allclose(weights[key], value, rtol=1e-7, atol=1e-12), key


def test_rows_that_become_infinite_fall_back_to_the_open_loop_value_and_its_gradient():
    block, x = failing(max_iter=30)
    x[5, 0] = 2.0  # finite in the open loop, infinite once the message enters

    class Explodes(type(block.feedback.message)):
        def forward(self, state, size, weight=None):
            return super().forward(state, size, weight) + 5 * (state[:, :1].abs() > 3).to(state.dtype)

    block.feedback.message.__class__ = Explodes
    x = x.requires_grad_()
    z = block.train()(x)
    record = block.last
    assert record.fallback.tolist() == [False] * 5 + [True]
    assert int(record.status[5]) == int(tw.Status.non_finite)
    plain = block.body(x)
    assert torch.equal(z[5], plain[5]) and bool(torch.isfinite(z).all())
    (found,) = torch.autograd.grad(z[5].sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(plain[5].sum(), x)
    assert torch.equal(found, expected)
    z.square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in block.parameters())
    with torch.no_grad():
        assert torch.equal(block.eval()(x)[5], plain[5])


def test_settings_of_a_group_change_together():
    timm = pytest.importorskip("timm")
    model = timm.create_model("twnn_resnet18", num_classes=2, wormholes=["layer4->layer3", "layer3->layer3"])
    tw.configure(model, spans="layer3->layer3", tol=1e-2, jacobian=0.5, policy="always")
    outer, inner = (part.feedback for part in model.wormholes)
    assert outer.settings.tol == inner.settings.tol == 1e-2
    assert outer.aids.jacobian == inner.aids.jacobian == 0.5
    assert type(outer.policy) is not type(inner.policy)
