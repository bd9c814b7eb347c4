"""Norm constraints: the guarantee against dense operators, through training, copying and saving."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import twnn_plugin as tw
from twnn_plugin.certificates import contraction_rate
from twnn_plugin.constraints import cached, contractive, norm_bound, orthogonal, remove
from twnn_plugin.errors import OptionError

CONVOLUTIONS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, padding=1, padding_mode="circular"),
    dict(kernel_size=3, padding="same", groups=2),
    dict(kernel_size=5, padding=2, stride=2),
    dict(kernel_size=4, padding=3),
    dict(kernel_size=2, stride=2),
    dict(kernel_size=(1, 3)),
    dict(kernel_size=3, dilation=2, padding=3, stride=2),
    dict(kernel_size=1),
]


def operator(module: nn.Module, *shape: int) -> Tensor:
    """The dense matrix of a layer without its bias, for inputs of a shape, in float64."""
    exact = copy.deepcopy(module).double()
    size = torch.Size(shape).numel()
    with torch.no_grad():
        exact.bias = None  # type: ignore[assignment]
        inputs = torch.eye(size, dtype=torch.float64).view(size, *shape)
        return exact(inputs).flatten(1).T


def l2(module: nn.Module, *shape: int) -> float:
    return float(torch.linalg.matrix_norm(operator(module, *shape), 2))


def largest_row_sum(module: nn.Module, *shape: int) -> float:
    return float(operator(module, *shape).abs().sum(dim=1).max())


def scaled(module: nn.Module, scale: float) -> nn.Module:
    with torch.no_grad():
        module.weight.mul_(scale)  # type: ignore[operator]
    return module


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 40),
    log_scale=st.floats(-6, 6),
    seed=st.integers(0, 10**6),
)
def test_a_linear_bound_is_a_bound_and_tight(rows, columns, rank, log_scale, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows)
    factors = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(10**log_scale * factors[0] @ factors[1])
    true = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    assert true <= float(norm_bound(layer).detach()) <= 1.05 * true
    contractive(layer, 0.9)
    norm = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    assert norm <= 0.9
    assert norm == pytest.approx(min(true, 0.9), rel=0.05)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_is_bounded_at_any_input_size(options):
    torch.manual_seed(0)
    layer = scaled(nn.Conv2d(4, 4, **options), 20.0)
    bound = float(norm_bound(layer).detach())
    sizes = [(4, 8, 8), (4, 7, 10)]
    norms = [l2(layer, *size) for size in sizes]
    assert max(norms) <= bound
    if layer.stride == (1, 1) and layer.dilation == (1, 1):
        assert bound <= 1.25 * max(norms)  # the bound is that of an unbounded image
    contractive(layer, 0.8)
    assert max(l2(layer, *size) for size in sizes) <= 0.8
    ortho = orthogonal(nn.Conv2d(4, 4, **options), 0.8)
    assert max(l2(ortho, *size) for size in sizes) <= 0.8 * (1 + 1e-5)


def test_the_worst_frequency_may_lie_between_the_grid():
    """A kernel tuned to a frequency that no grid point has; the slack must cover it."""
    grid = torch.arange(16) / 16
    for frequency in (0.3, (0.5 + 3) / 16, 0.21):
        assert (grid - frequency).abs().min() > 1e-3
        layer = nn.Conv1d(2, 2, 3, padding=1, bias=False)
        with torch.no_grad():
            phase = 2 * torch.pi * frequency * torch.arange(-1, 2)
            layer.weight[0, 0], layer.weight[0, 1] = phase.cos(), phase.sin()
            layer.weight[1, 0], layer.weight[1, 1] = -phase.sin(), phase.cos()
        true = l2(layer, 2, 200)
        assert true <= float(norm_bound(layer).detach()) <= 1.05 * true


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_one_and_three_dimensions(kind):
    torch.manual_seed(0)
    shape = (3, 12) if kind is nn.Conv1d else (3, 4, 4, 4)
    layer = contractive(scaled(kind(3, 3, 3, padding=1), 20.0), 0.9)
    assert 0.6 < l2(layer, *shape) <= 0.9
    assert l2(orthogonal(kind(3, 3, 3, padding=1), 0.9), *shape) <= 0.9 * (1 + 1e-5)


@pytest.mark.parametrize(
    "options", [*CONVOLUTIONS, dict(kernel_size=3, padding=1, padding_mode="reflect")], ids=str
)
def test_the_max_norm_constraint(options):
    layer = contractive(scaled(nn.Conv2d(4, 4, **options), 20.0), 0.7, norm="max")
    assert largest_row_sum(layer, 4, 6, 6) <= 0.7
    linear = scaled(nn.Linear(5, 3), 20.0)
    assert float(norm_bound(linear, "max").detach()) == pytest.approx(largest_row_sum(linear, 5), rel=1e-5)
    assert largest_row_sum(contractive(linear, 0.7, norm="max"), 5) == pytest.approx(0.7, rel=1e-5)


def test_weights_within_the_bound_are_left_as_they_are():
    for norm in ("l2", "max"):
        layer = scaled(nn.Linear(6, 6), 0.01)
        before = layer.weight.detach().clone()
        assert torch.equal(contractive(layer, 0.9, norm=norm).weight, before)


def test_a_zero_weight_stays_zero_with_a_finite_gradient():
    for norm in ("l2", "max"):
        for layer in (nn.Linear(3, 3), nn.Conv2d(2, 2, 3)):
            contractive(scaled(layer, 0.0), 0.9, norm=norm)
            layer.weight.sum().backward()
            assert layer.weight.abs().max() == 0
            assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_the_gradient_passes_through_the_bound():
    torch.manual_seed(0)
    layer = contractive(nn.Linear(4, 3).double(), 0.3)
    chain = layer.parametrizations.weight[0]
    assert torch.autograd.gradcheck(chain, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    conv = contractive(nn.Conv1d(2, 2, 3).double(), 0.3)
    chain = conv.parametrizations.weight[0]
    assert torch.autograd.gradcheck(chain, torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (4, 6), (1, 5)])
@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley"])
def test_all_singular_values_of_an_orthogonal_layer_are_the_rate(shape, orthogonal_map):
    layer = orthogonal(nn.Linear(*shape), 0.9, orthogonal_map)
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight), torch.full((min(shape),), 0.9))


def test_an_orthogonal_layer_starts_from_the_nearest_matrix():
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    left, _, right = torch.linalg.svd(layer.weight.detach())
    torch.testing.assert_close(orthogonal(layer, 0.5).weight, 0.5 * left @ right, rtol=1e-4, atol=1e-6)


CELLS = {
    "contractive linear": lambda: contractive(scaled(nn.Linear(8, 8), 5.0), 0.9),
    "contractive max": lambda: contractive(scaled(nn.Linear(8, 8), 5.0), 0.9, norm="max"),
    "contractive conv": lambda: contractive(scaled(nn.Conv2d(2, 2, 3, padding=1), 5.0), 0.9),
    "orthogonal linear": lambda: orthogonal(nn.Linear(8, 8), 0.9),
    "orthogonal wide": lambda: orthogonal(nn.Linear(8, 4), 0.9, "matrix_exp"),
    "orthogonal conv": lambda: orthogonal(nn.Conv2d(2, 2, 3, padding=1), 0.9),
}
SHAPES = {"contractive conv": (2, 5, 5), "orthogonal conv": (2, 5, 5)}


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", CELLS)
def test_the_guarantee_holds_at_every_step_of_rough_training(name, optimiser):
    """Fifty steps along random gradients, each as large as the weights."""
    torch.manual_seed(1)
    layer, shape = CELLS[name](), SHAPES.get(name, (8,))
    measure = largest_row_sum if name.endswith("max") else l2
    steps = optimiser(layer.parameters(), lr=3.0, weight_decay=0.01)
    moved = layer.weight.detach().clone()
    for _ in range(50):
        steps.zero_grad()
        out = layer(torch.randn(4, *shape))
        (out * torch.randn_like(out)).mean().backward()
        steps.step()
        assert measure(layer, *shape) <= 0.9 * (1 + 1e-5)
    assert not torch.allclose(layer.weight, moved, atol=0.05)
    if name.startswith("orthogonal linear"):
        torch.testing.assert_close(
            torch.linalg.svdvals(layer.weight), torch.full((8,), 0.9), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("name", ["contractive linear", "contractive max", "orthogonal linear"])
def test_a_tanh_cell_is_a_contraction_and_plain_iteration_settles(name):
    torch.manual_seed(0)
    cell, x = CELLS[name](), torch.randn(6, 8)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(cell(z) + x)

    solution = tw.fix(f, torch.zeros(6, 8), x, solver="picard", tol=1e-5, max_iter=200)
    assert solution.converged.all()
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    order = float("inf") if name.endswith("max") else 2
    shrunk = torch.linalg.vector_norm(f(a, x) - f(b, x), order, dim=1)
    assert (shrunk <= 0.9 * (1 + 1e-5) * torch.linalg.vector_norm(a - b, order, dim=1)).all()
    if order == 2:
        assert (contraction_rate(f, solution.value, x).value <= 0.9 * (1 + 1e-5)).all()


def test_within_cached_the_weight_is_worked_out_once_and_gets_its_gradient():
    torch.manual_seed(0)
    cell, x, calls = CELLS["contractive linear"](), torch.randn(6, 8), []
    cell.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))

    def solve() -> tuple[int, Tensor]:
        cell.zero_grad()
        calls.clear()
        value = tw.fix(lambda z, x: torch.tanh(cell(z) + x), torch.zeros(6, 8), x, max_iter=200).value
        value.sum().backward()
        return len(calls), cell.parametrizations.weight.original.grad.clone()

    plain, expected = solve()
    with cached(nn.Sequential(cell)):
        once, gradient = solve()
    assert plain > 5 and once == 0  # the one access was on entering
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", CELLS)
def test_copies_pickles_and_state_dicts(name):
    torch.manual_seed(0)
    layer, x = CELLS[name](), torch.randn(3, *SHAPES.get(name, (8,)))
    expected = layer(x)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stored, weights_only=False),
        pickle.loads(pickle.dumps(copy.deepcopy(nn.Sequential(layer))))[0],
    ]
    loaded = CELLS[name]()
    assert not torch.equal(loaded(x), expected)
    loaded.load_state_dict(layer.state_dict())
    for made in (*copies, loaded):
        assert torch.equal(made(x), expected)
        assert parametrize.is_parametrized(made, "weight")
        assert {n for n, _ in made.named_parameters()} == {n for n, _ in layer.named_parameters()}
        made(x).sum().backward()
        assert layer.parametrizations.weight.original.grad is None  # nothing is shared
    # Taking the constraint off a copy leaves the original and the other copies alone.
    remove(copies[0])
    remove(copies[1])
    assert torch.equal(layer(x), expected) and torch.equal(copies[2](x), expected)
    assert parametrize.is_parametrized(layer, "weight")


@pytest.mark.parametrize("name", CELLS)
def test_removing_leaves_a_plain_module(name):
    torch.manual_seed(0)
    layer, x = CELLS[name](), torch.randn(3, *SHAPES.get(name, (8,)))
    expected, kind = layer(x).detach(), parametrize.type_before_parametrizations(layer)
    assert remove(layer) is layer
    assert type(layer) is kind
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    assert torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert type(pickle.loads(pickle.dumps(layer))) is kind


def test_removing_may_give_the_unconstrained_weight_back():
    layer = scaled(nn.Linear(4, 4), 10.0)
    before = layer.weight.detach().clone()
    optimised = layer.weight
    assert contractive(layer, 0.9).parametrizations.weight.original is optimised  # optimisers stay valid
    assert torch.equal(remove(layer, keep=False).weight, before)
    with pytest.raises(OptionError, match="no other to go back to"):
        remove(orthogonal(nn.Linear(4, 4)), keep=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_the_bound_after_rounding(dtype):
    torch.manual_seed(0)
    layer = contractive(scaled(nn.Linear(32, 32), 20.0).to(dtype), 0.9)
    assert layer.weight.dtype == dtype
    assert 0.8 < float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) <= 0.9


def test_the_bound_is_not_computed_in_the_autocast_dtype():
    layer = contractive(scaled(nn.Linear(32, 32), 20.0), 0.9)
    expected = layer.weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: contractive(nn.LayerNorm(3)), "takes nn.Linear, .* got a LayerNorm"),
        (lambda: contractive(nn.ConvTranspose2d(2, 2, 3)), "got a ConvTranspose2d"),
        (lambda: norm_bound(nn.ReLU()), "got a ReLU"),
        (lambda: contractive(nn.Linear(2, 2), 0.0), "rate must be a positive number"),
        (lambda: orthogonal(nn.Linear(2, 2), float("inf")), "rate must be a positive number"),
        (lambda: contractive(nn.Linear(2, 2), True), "rate must be a positive number"),
        (lambda: contractive(nn.Linear(2, 2), norm="maxx"), "Did you mean 'max'"),
        (lambda: orthogonal(nn.Linear(2, 2), 0.9, "householder"), "orthogonal_map must be one of"),
        (lambda: contractive(contractive(nn.Linear(2, 2))), "parametrised already"),
        (lambda: orthogonal(contractive(nn.Linear(2, 2))), "parametrised already"),
        (lambda: orthogonal(nn.Linear(2, 2).bfloat16()), "float32 or float64"),
        (lambda: contractive(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), "repeats entries"),
        (lambda: norm_bound(nn.Conv2d(2, 2, 3, padding=2, padding_mode="circular")), "at most 1"),
        (lambda: remove(nn.Linear(2, 2)), "is not constrained"),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(OptionError, match=message):
        call()
