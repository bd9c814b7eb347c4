"""Propagators: their formulas, what they conserve, and the report on stability."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twnn_plugin as tw
from twnn_plugin.blocks.propagation import ACTIVATIONS, Antisymmetric, Euler, Verlet
from twnn_plugin.blocks.propagation.activations import antiderivative, resolve

NAMES = ("euler", "antisymmetric", "verlet")


def make(name, features=6, **options):
    torch.manual_seed(0)
    return tw.blocks.registry.make(name, features=features, **options).double()


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Formulas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_parameters_and_layers(name, kernel, shared):
    block = make(name, layers=4, kernel_size=kernel, shared=shared)
    x = rows(3, 6, 5, 5) if kernel else rows(3, 7, 6)
    assert block(x).shape == x.shape
    assert block.weight.shape[0] == block.bias.shape[0] == (1 if shared else 4)
    states = list(block.trajectory(x))
    assert len(states) == 5
    torch.testing.assert_close(states[0], x)
    torch.testing.assert_close(states[-1], block(x))
    block(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in block.parameters())
    torch.testing.assert_close(pickle.loads(pickle.dumps(block))(x), block(x))
    torch.testing.assert_close(copy.deepcopy(block)(x), block(x))


def test_euler_is_its_formula_and_the_plain_residual_network_at_step_one():
    block = make("euler", layers=2, h=0.3, activation="relu")
    nn.init.normal_(block.bias)
    y = x = rows(4, 6)
    for k, b in zip(block.weight, block.bias, strict=True):
        y = y + 0.3 * torch.relu(y @ k.T + b)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_antisymmetric_weights_are_antisymmetric_but_for_gamma(gamma):
    block = make("antisymmetric", layers=3, gamma=gamma)
    a = block.matrices()
    torch.testing.assert_close(a + a.mT, -2 * gamma * torch.eye(6, dtype=a.dtype).expand_as(a))
    torch.testing.assert_close(a, block.weight - block.weight.mT - gamma * torch.eye(6, dtype=a.dtype))
    x = rows(4, 6)
    y = x
    for matrix in a:
        y = y + 0.1 * torch.tanh(y @ matrix.T)
    torch.testing.assert_close(block(x), y)


def test_antisymmetric_convolution_is_convolution_less_transposed_convolution():
    block = make("antisymmetric", kernel_size=3, gamma=0.4, h=0.2)
    x, k = rows(2, 6, 5, 4), block.weight[0]
    inner = F.conv2d(x, k, padding=1) - F.conv_transpose2d(x, k, padding=1) - 0.4 * x
    torch.testing.assert_close(block(x), x + 0.2 * torch.tanh(inner))


def test_verlet_is_its_formula_dense_and_convolutional():
    block = make("verlet", layers=2, h=0.2, split=4)
    nn.init.normal_(block.bias)
    x = rows(5, 6)
    y, z = x[:, :4], x[:, 4:]
    for k, b in zip(block.weight, block.bias, strict=True):
        z = z - 0.2 * torch.tanh(y @ k + b[4:])
        y = y + 0.2 * torch.tanh(z @ k.T + b[:4])
    torch.testing.assert_close(block(x), torch.cat([y, z], 1))
    block = make("verlet", h=0.2, split=4, kernel_size=3, bias=False)
    x = rows(2, 6, 5, 4)
    y, z = x[:, :4], x[:, 4:]
    z = z - 0.2 * torch.tanh(F.conv_transpose2d(y, block.weight[0], padding=1))
    y = y + 0.2 * torch.tanh(F.conv2d(z, block.weight[0], padding=1))
    torch.testing.assert_close(block(x), torch.cat([y, z], 1))


def test_augmented_verlet_starts_z_at_zero_and_returns_all_of_the_state():
    block = make("verlet", features=3, augment=2, layers=4)
    x = rows(5, 3)
    split = make("verlet", features=5, split=3, layers=4)
    split.load_state_dict(block.state_dict())
    padded = torch.cat([x, torch.zeros(5, 2, dtype=x.dtype)], 1)
    torch.testing.assert_close(block(x), split(padded))
    torch.testing.assert_close(block.inverse(block(x)), padded)
    assert make("verlet", features=3, augment=1, kernel_size=1)(rows(2, 3, 4, 4)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_one_and_is_the_derivative_of_its_antiderivative(name):
    act = resolve(name).double()
    v = torch.linspace(-4, 4, 41, dtype=torch.float64)
    fine = v[0] + (torch.arange(40_000, dtype=v.dtype) + 0.5) * (8 / 40_000)
    with torch.no_grad():
        areas = act(fine).view(40, 1000).mean(dim=1) * 0.2
        found = antiderivative(act, v).diff()
    # Quadrature is exact but for kinks and, worst, the jump of hardshrink.
    torch.testing.assert_close(found, areas, rtol=0, atol=0.03 if name == "hardshrink" else 2e-3)
    if type(act) in (nn.Tanh, nn.ReLU, nn.Identity, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Mish):
        torch.testing.assert_close(found, areas, rtol=0, atol=1e-6)


def test_antiderivative_of_tanh_is_accurate_near_zero_and_far_from_it():
    tanh = nn.Tanh()
    small = torch.tensor([1e-4, -1e-3, 0.0099, 0.0101, -0.7], dtype=torch.float64)
    torch.testing.assert_close(antiderivative(tanh, small), torch.cosh(small).log(), rtol=1e-7, atol=0)
    assert float(antiderivative(tanh, torch.tensor(500.0))) == pytest.approx(500 - math.log(2))


def test_an_activation_by_module_and_by_any_spelling():
    x = rows(2, 6)
    by_name, by_module = make("euler", activation="Leaky_ReLU"), make("euler", activation=nn.LeakyReLU())
    torch.testing.assert_close(by_name(x), by_module(x))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("euler", {"features": 0}, tw.OptionError, "features must be a whole number"),
        ("euler", {"layers": 2.0}, tw.OptionError, "layers must be a whole number"),
        ("euler", {"h": 0.0}, tw.OptionError, "h must be a finite number > 0"),
        ("euler", {"h": math.nan}, tw.OptionError, "h must be"),
        ("euler", {"kernel_size": 4}, tw.OptionError, "kernel_size must be odd"),
        ("euler", {"activation": "tahn"}, tw.UnknownNameError, "Did you mean 'tanh'"),
        ("euler", {"activation": nn.Tanh}, tw.OptionError, "as a module"),
        ("euler", {"shared": "yes"}, tw.OptionError, "shared must be True or False"),
        ("euler", {"gama": 1}, tw.OptionError, "no option 'gama'"),
        ("antisymmetric", {"gamma": -1}, tw.OptionError, "gamma must be a finite number >= 0"),
        ("verlet", {"features": 1}, tw.OptionError, "at least 2"),
        ("verlet", {"split": 6}, tw.OptionError, "split must leave z"),
        ("verlet", {"split": 2, "augment": 2}, tw.OptionError, "exclude each other"),
        ("verlet", {"reversible": True, "activation": "prelu"}, tw.OptionError, "without parameters"),
        ("verlet", {"reversible": True, "activation": nn.RReLU()}, tw.OptionError, "without random numbers"),
        ("verlet", {"reversible": 1}, tw.OptionError, "reversible must be"),
    ],
)
def test_bad_options_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        tw.blocks.registry.make(name, **{"features": 6, **options})


def test_inputs_that_do_not_fit_are_refused():
    for block, x in ((make("euler"), rows(3, 5)), (make("verlet", kernel_size=3), rows(3, 6, 4))):
        with pytest.raises(tw.MapError, match=r"takes \(B, "):
            block(x)
    with pytest.raises(tw.MapError, match="8 features"):
        make("verlet", augment=2).inverse(rows(3, 6))


# What is kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [None, 3])
def test_verlet_is_undone_and_retraces_its_path(kernel):
    block = make("verlet", layers=100, h=0.5, kernel_size=kernel, activation="softsign")
    x = rows(3, 6, 4, 4) if kernel else rows(3, 6)
    torch.testing.assert_close(block.inverse(block(x)), x, rtol=1e-9, atol=1e-9)
    forth, back = list(block.trajectory(x)), list(block.backwards(block(x)))
    torch.testing.assert_close(torch.stack(forth), torch.stack(back[::-1]), rtol=1e-9, atol=1e-9)


def test_a_verlet_step_preserves_volume_and_the_symplectic_form():
    block = make("verlet", h=0.7)
    p = torch.autograd.functional.jacobian(lambda u: block(u[None])[0], rows(6))
    assert float(torch.linalg.det(p)) == pytest.approx(1, abs=1e-12)
    k = block.weight[0].detach()
    zero = torch.zeros_like(k)
    form = torch.linalg.inv(torch.cat([torch.cat([zero, k], 1), torch.cat([-k.T, zero], 1)]))
    torch.testing.assert_close(p @ form @ p.T, form)
    euler = torch.autograd.functional.jacobian(lambda u: make("euler", h=0.7)(u[None])[0], rows(6))
    assert abs(float(torch.linalg.det(euler)) - 1) > 0.01


@pytest.mark.parametrize(("name", "order"), [("antisymmetric", 1), ("verlet", 2)])
def test_the_energy_drifts_with_the_order_of_the_method(name, order):
    drifts = []
    for layers in (50, 100):
        block = make(name, layers=layers, h=5 / layers, shared=True)
        nn.init.normal_(block.bias)
        report = tw.stability(block, rows(4, 6))
        drifts.append(report.worst_drift)
        states, operator = list(block.trajectory(rows(4, 6))), block.operators()[0]
        start, end = block.energy(states[0], operator), block.energy(states[-1], operator)
        torch.testing.assert_close(report.energy_drift[-1], (end / start - 1).detach())
    assert drifts[1] == pytest.approx(drifts[0] / 2**order, rel=0.25)


def test_damping_makes_the_energy_fall():
    block = make("antisymmetric", layers=50, h=0.05, gamma=0.5, shared=True)
    report = tw.stability(block, rows(4, 6))
    assert bool((report.energy_drift.diff(dim=0) < 0).all())


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_reversible_gradients_are_the_gradients(shared, kernel):
    x = rows(2, 6, 4, 4) if kernel else rows(2, 6)
    grads = []
    for reversible in (False, True):
        block = make("verlet", layers=30, h=0.3, shared=shared, kernel_size=kernel, reversible=reversible)
        start = x.clone().requires_grad_()
        block(start).square().sum().backward()
        grads.append([start.grad, *(p.grad for p in block.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


def test_reversible_keeps_nothing_between_the_layers():
    kept = {}
    for reversible in (False, True):
        for layers in (10, 100):
            block = make("verlet", layers=layers, reversible=reversible)
            own = {p.untyped_storage().data_ptr() for p in block.parameters()}
            sizes = {}

            def pack(tensor, sizes=sizes, own=own):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = block(rows(32, 6).requires_grad_())
            kept[reversible, layers] = sum(sizes.values())
            del out
    assert kept[True, 100] == kept[True, 10] <= 2 * 32 * 6 * 8
    assert kept[False, 100] > 8 * kept[False, 10]


def test_reversible_layers_that_share_weights_have_one_gradient_of_them():
    # With one gradient a layer a thousand layers took the memory that their states were spared.
    given = []
    for layers in (3, 30):
        block = make("verlet", layers=layers, shared=True, reversible=True)
        node = block(rows(2, 6).requires_grad_()).grad_fn
        while "Reversible" not in type(node).__name__:
            node = node.next_functions[0][0]
        given.append(len(node.next_functions))
    assert given[0] == given[1]


def test_reversible_says_what_it_cannot_do():
    block = make("verlet", layers=3, reversible=True)
    x = rows(2, 6).requires_grad_()
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(tw.MapError, match="float32 or float64"):
        block.bfloat16()(x.detach().bfloat16())


# Weights in time ------------------------------------------------------------------------------------


def test_smoothness_is_the_integral_of_the_squared_change():
    values = []
    for layers in (10, 40):
        block = make("euler", features=1, layers=layers, h=2 / layers, bias=False)
        middles = (torch.arange(layers, dtype=torch.float64) + 0.5) * 2 / layers
        with torch.no_grad():
            block.weight.copy_((3 * middles)[:, None, None])
        values.append(tw.smoothness(block).item())
    # K = 3 t on [0, 2]: 1/2 * 9 * 2, less the half layers at both ends.
    assert values == pytest.approx([9 * 0.9, 9 * 0.975])
    with pytest.raises(tw.OptionError, match="nothing to smooth"):
        tw.smoothness(nn.Sequential(nn.Linear(2, 2), make("euler", layers=5, shared=True)))


@pytest.mark.parametrize("name", NAMES)
def test_a_resampled_propagator_goes_on_to_the_same_state(name):
    block = make(name, layers=40, h=0.05, bias=True)
    middles = (torch.arange(40) + 0.5).double() / 40
    with torch.no_grad():
        block.weight.copy_(block.weight[:1] * torch.cos(3 * middles).view(-1, 1, 1))
        block.bias.copy_(torch.sin(middles)[:, None])
    x = rows(4, 6)
    fine = block.resampled(400)
    assert fine.layers == 400 and fine.h == pytest.approx(0.005) and fine.weight.shape[0] == 400
    assert ((fine(x) - block(x)).norm() / block(x).norm()).item() < 0.05
    torch.testing.assert_close(block.resampled(40)(x), block(x))
    assert block.layers == 40
    shared = make(name, layers=4, shared=True).resampled(8)
    assert shared.weight.shape[0] == 1 and len(list(shared.trajectory(x))) == 9
    with pytest.raises(tw.OptionError, match="layers"):
        block.resampled(0)


# The report -----------------------------------------------------------------------------------------


def diagonal(*entries):
    layer = nn.Linear(len(entries), len(entries), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor(entries, dtype=torch.float64)))
    return layer


def test_stability_of_known_linear_layers():
    report = tw.stability([diagonal(2.0, 0.5, 1.0), diagonal(3.0, 3.0, 3.0)], rows(5, 3))
    assert report.layers == ("Linear", "Linear")
    torch.testing.assert_close(report.radius, torch.tensor([[2.0] * 5, [3.0] * 5], dtype=torch.float64))
    found = report.eigenvalues[0][0].real.sort().values
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    x = rows(5, 3)
    expected = torch.pdist(3 * x @ torch.diag(torch.tensor([2.0, 0.5, 1.0]).double())) / torch.pdist(x)
    torch.testing.assert_close(report.distance[-1], expected)
    assert report.distance.shape == (3, 10) and report.energy_drift is None
    torch.testing.assert_close(report.gradient[1], torch.full((5,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(report.gradient[2], torch.ones(5, dtype=torch.float64))


def test_stability_estimates_the_radius_of_large_layers():
    block = make("antisymmetric", features=70, h=0.3)
    x = rows(3, 70)
    few, all_ = tw.stability(block, x, exact=10), tw.stability(block, x, exact=70)
    assert few.eigenvalues == (None,) and all_.eigenvalues[0].shape == (3, 70)
    torch.testing.assert_close(few.radius, all_.radius, rtol=0.02, atol=0)
    # The layer's Jacobian is I + h D A: all real parts are 1 for an antisymmetric A.
    torch.testing.assert_close(all_.eigenvalues[0].real, torch.ones(3, 70, dtype=torch.float64))


def test_stability_opens_chains_and_leaves_the_modules_as_they_were():
    chain = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), make("verlet", layers=3).float()).train()
    report = tw.stability(chain, torch.randn(4, 4))
    assert report.layers == ("Linear", "Dropout", *["Verlet"] * 3)
    assert bool(report.radius[0].isnan().all()) and report.eigenvalues[0] is None
    torch.testing.assert_close(report.radius[1], torch.ones(4))  # dropout is off
    assert chain.training and chain[1].training
    assert all(p.grad is None for p in chain.parameters())


def test_stability_sees_an_augmented_start_and_unequal_layers():
    block = make("verlet", features=3, augment=3, layers=200, h=0.05)
    report = tw.stability(block, rows(4, 3))
    assert report.energy_drift.shape == (201, 4) and 0 < report.worst_drift < 0.1
    assert bool(report.radius[0].isnan().all()) and not bool(report.radius[1:].isnan().any())


def test_stability_prints_a_table():
    text = str(tw.stability(make("verlet", layers=100), rows(4, 6)))
    lines = text.splitlines()
    assert len(lines) == 2 + 11 and "energy drift" in lines[0] and "100: Verlet" in lines[-1]
    assert str(tw.stability(nn.Identity(), rows(1, 6))).splitlines()[-1].split()[3:6] == ["-", "-", "-"]


def test_stability_keeps_broken_rows_apart():
    x = rows(4, 6)
    x[2] = math.nan
    report = tw.stability(make("verlet", layers=2), x)
    assert report.radius.isnan().any(dim=0).tolist() == [False, False, True, False]
    assert math.isnan(report.worst_drift)


@pytest.mark.parametrize(
    ("chain", "x", "options", "error", "message"),
    [
        ([], rows(2, 3), {}, tw.OptionError, "non-empty sequence"),
        ([3], rows(2, 3), {}, tw.OptionError, "sequence of modules"),
        (nn.Identity(), rows(3), {}, tw.MapError, "at least two axes"),
        (nn.Identity(), torch.ones(2, 3, dtype=torch.int64), {}, tw.MapError, "floating-point"),
        (nn.Flatten(0), rows(2, 3), {}, tw.MapError, "Layer 0 .Flatten."),
        (nn.Identity(), rows(2, 3), {"rows": 0}, tw.OptionError, "rows"),
    ],
)
def test_stability_refuses_what_it_cannot_look_at(chain, x, options, error, message):
    with pytest.raises(error, match=message):
        tw.stability(chain, x, **options)


# With wormholes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_propagator_is_the_body_of_a_wormhole(name, kernel):
    body = make(name, layers=3, h=0.1, kernel_size=kernel).float()
    x = rows(4, 6, 4, 4).float() if kernel else rows(4, 6).float()
    block = tw.blocks.get("wormhole")(body, x, tol=1e-6, max_iter=100).eval()
    with torch.no_grad():
        assert torch.equal(block(x), body(x))
        block.feedback.policy = tw.policy("always")
        z = block(x)
        again = body(x + block.feedback.message(z, x.shape))
        torch.testing.assert_close(z, again, rtol=1e-4, atol=1e-4)
        assert not torch.equal(z, body(x))


def test_reversible_layers_in_a_wormhole_have_the_same_gradients():
    x, grads = rows(4, 6), []
    for reversible in (False, True):
        body = make("verlet", layers=5, reversible=reversible)
        torch.manual_seed(1)
        block = tw.blocks.get("wormhole")(body, x, policy=tw.policy("always"), tol=1e-10, max_iter=200)
        block.double().train()(x).square().sum().backward()
        grads.append(body.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-8)


def test_the_classes_are_what_the_names_say():
    assert [tw.blocks.get(name) for name in NAMES] == [Euler, Antisymmetric, Verlet]
    assert [tw.blocks.owner(name) for name in NAMES] == ["twnn_plugin"] * 3


def test_the_documented_example_prints_what_the_page_shows(capsys):
    text = (Path(__file__).parents[1] / "docs" / "propagation.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", text, re.DOTALL).groups()
    exec(compile(code, "docs/propagation.md", "exec"), {})
    found = capsys.readouterr().out.split()
    assert len(found) == len(shown.split())
    for mine, theirs in zip(found, shown.split(), strict=True):
        if set(mine) == {"-"}:
            continue  # the rule is as long as the figures are wide
        try:
            assert float(mine) == pytest.approx(float(theirs), rel=0.02, abs=1e-4)
        except ValueError:
            assert mine == theirs


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_propagator_is_the_message_path_of_a_wormhole(name, kernel):
    path = make(name, layers=3, h=0.3, kernel_size=kernel).float()
    x = rows(4, 6, 4, 4).float() if kernel else rows(4, 6).float()
    body = nn.Conv2d(6, 6, 3, padding=1) if kernel else nn.Linear(6, 6)
    block = tw.blocks.get("wormhole")(body, x, message=path, tol=1e-6, max_iter=100).eval()
    with torch.no_grad():
        assert torch.equal(block(x), body(x))
        block.feedback.policy = tw.policy("always")
        z = block(x)
        plain = tw.blocks.get("wormhole")(body, x)
        plain.feedback.message.load_state_dict(block.feedback.message.state_dict(), strict=False)
        again = body(x + plain.feedback.message(path(z), x.shape))
    torch.testing.assert_close(z, again, rtol=1e-4, atol=1e-4)
    block.train()(x).square().sum().backward()
    assert float(path.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        (nn.Linear(6, 5), {}, tw.MapError, "same shape"),
        (nn.Sequential(nn.Linear(6, 6), nn.Dropout()), {}, tw.OptionError, "A Dropout on the message's path"),
        (nn.BatchNorm1d(6), {}, tw.OptionError, "A BatchNorm1d"),
        (nn.Tanh(), {"contraction": 0.5}, tw.OptionError, "contraction"),
        (3, {}, tw.OptionError, "name of a block"),
    ],
)
def test_a_message_path_that_cannot_be_is_refused(path, options, error, message):
    with pytest.raises(error, match=message):
        tw.blocks.get("wormhole")(nn.Linear(6, 6), torch.randn(4, 6), message=path, **options)
