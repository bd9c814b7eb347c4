"""What is given wrongly is refused in the words of whoever gave it, and what is merely unusual works."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin import kernels
from twnn_plugin.certificates import contraction_rate, gradient_error, observed_rate, spectral_radius
from twnn_plugin.constraints import cached, norm_bound
from twnn_plugin.errors import ConvergenceWarning, MapError, OptionError
from twnn_plugin.solvers import auto
from twnn_plugin.solvers.base import Control
from twnn_plugin.solvers.kelley_rows import AutoRows
from twnn_plugin.state import Layout
from twnn_plugin.types import Iteration, Status

PAGE = Path(__file__).resolve().parents[1] / "docs" / "choosing.md"
SOLVERS = tw.solvers.registry.names()
OWN = [name for name in SOLVERS if not name.startswith("torchdeq.")]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def settling(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * torch.tanh(z) + x


@pytest.fixture
def solved() -> tuple[tw.Solution, Tensor]:
    x = drawn(4, 3)
    return tw.fix(settling, torch.zeros_like(x), x), x


# Parts without entries ------------------------------------------------------------------------------


def with_empty(z: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return settling(z[0], x[:, :2]), z[1], 0.3 * z[2] + x[:, 2:]


def starts(x: Tensor) -> tuple[Tensor, ...]:
    return x.new_zeros(4, 2), x.new_zeros(4, 0), x.new_zeros(4, 1)


@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("solver", OWN)
def test_a_part_of_width_zero_settles_with_the_others(solver, every):
    x = drawn(4, 3)
    solution = tw.fix(
        with_empty, starts(x), x, solver=solver, norm="max", tol=1e-9, max_iter=200, check_every=every
    )
    assert bool(solution.converged.all())
    assert [tuple(part.shape) for part in solution.value] == [(4, 2), (4, 0), (4, 1)]
    torch.testing.assert_close(solution.value[2], x[:, 2:] / 0.7)
    assert bool((tw.certify(with_empty, solution, x, norm="max").residual <= 1e-9).all())


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point"])
def test_derivatives_of_a_state_with_a_part_of_width_zero(adjoint):
    def last(x: Tensor) -> Tensor:
        solution = tw.fix(with_empty, starts(x), x, norm="max", tol=1e-10, max_iter=200, adjoint=adjoint)
        return solution.value[2]

    x = drawn(4, 3).requires_grad_()
    (grad,) = torch.autograd.grad(last(x).sum(), x)
    torch.testing.assert_close(grad[:, 2], torch.full((4,), 1 / 0.7, dtype=x.dtype))
    x = x.detach()
    tangent = torch.func.jvp(last, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.full((4, 1), 1 / 0.7, dtype=x.dtype))


def test_parts_leave_out_what_has_no_entries():
    def parts(*widths: int) -> tuple[int, ...]:
        return Layout.of(tuple(torch.zeros(2, width) for width in widths))[0].parts("rel")

    assert parts(2, 0, 1) == (2, 1)
    assert parts(2, 0) == parts(0, 0) == parts(3) == ()
    assert Control(1e-3, 5, parts=(2, 0, 1)).parts == (2, 1)


# Options of fix -------------------------------------------------------------------------------------


def test_an_unknown_option_names_the_nearest():
    options: dict[str, Any] = {"maxiter": 5}
    with pytest.raises(OptionError, match=r"no option 'maxiter'\. Did you mean 'max_iter'\?") as info:
        tw.fix(settling, torch.zeros(4, 3), torch.zeros(4, 3), **options)
    assert isinstance(info.value, TypeError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 10**400}, "tol must be a positive number"),
        ({"tol": -(10**400)}, "tol must be a positive number"),
        ({"cuda_graphs": "no"}, "cuda_graphs must be True or False; got 'no'"),
        ({"cuda_graphs": 0}, "cuda_graphs must be True or False; got 0"),
        ({"cuda_graphs": None}, "cuda_graphs must be True or False; got None"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        tw.fix(settling, torch.zeros(4, 3), torch.zeros(4, 3), **options)


@pytest.mark.parametrize(("norm", "tol"), [("l2", 1e-28), ("max", 1e-40)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tolerance_that_the_dtype_cannot_measure(solver, norm, tol):
    z0 = torch.full((4, 3), 1e-23)
    with pytest.raises(OptionError, match=r"cannot be measured in torch\.float32.*stop='rel'"):
        tw.fix(lambda z: 0.5 * z, z0, stop="abs", norm=norm, tol=tol, solver=solver)
    solution = tw.fix(lambda z: 0.5 * z, z0.double(), stop="abs", norm=norm, tol=1e-28, max_iter=200)
    assert bool((solution.residual > 0).all())


def test_the_largest_entry_can_be_measured_where_squares_underflow():
    z0 = torch.full((4, 3), 1e-23)
    solution = tw.fix(lambda z: 0.5 * z, z0, stop="abs", norm="max", tol=1e-28, solver="picard")
    assert bool(solution.converged.all())
    assert bool((solution.residual > 0).all())


@pytest.mark.parametrize(
    ("solver", "option", "value"),
    [
        ("anderson", "lam", "x"),
        ("anderson", "lam", float("inf")),
        ("anderson", "lam", float("nan")),
        ("anderson", "lam", True),
        ("anderson", "lam", 10**400),
        ("broyden", "ls", "no"),
        ("broyden", "ls", 1),
        ("broyden", "LBFGS_thres", True),
    ],
)
def test_options_of_torchdeq_out_of_range(solver, option, value):
    with pytest.raises(OptionError, match=f"Option {option} of solver 'torchdeq.{solver}' must be"):
        tw.solver(f"torchdeq.{solver}", **{option: value})


# What a callback is shown ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_callback_was_shown_stays_as_it_was(solver):
    seen: list[tuple[Tensor, Tensor]] = []

    def look(iteration: Iteration) -> None:
        seen.append((iteration.value, iteration.value.clone()))

    x = drawn(4, 3)
    with torch.no_grad():
        tw.fix(settling, 0 * x, x, solver=solver, tol=1e-9, max_iter=100, callback=look)
    assert len(seen) > 2
    assert all(torch.equal(kept, then) for kept, then in seen)


# Certificates, regularisers and constraints ---------------------------------------------------------

WEIGHT = nn.Parameter(torch.ones(3))
COTANGENTS = [
    (3, "The cotangent must match the state, a tensor .* got something of type int"),
    (torch.zeros(4, 2), r"The cotangent must match the state, .* got a tensor \(4, 2\)"),
    (torch.zeros(4, 3), r"\(4, 3\) torch.float64 .* got a tensor \(4, 3\) torch.float32"),
    ({"a": drawn(4, 3)}, "The cotangent must match the state, .* got a dict of 'a'"),
    (drawn(4, 3).to_sparse(), "The cotangent must match the state, .* torch.sparse_coo"),
    (drawn(4, 3).to("meta"), "The cotangent must match the state, .* on cpu; .* on meta"),
    (lambda z: z.detach().sum(), "loss has no graph"),
    (lambda z: WEIGHT.sum(), "loss does not depend on the state"),
    (lambda z: 3.0, "must return a loss; got a float"),
]


@pytest.mark.parametrize(("cotangent", "message"), COTANGENTS)
@pytest.mark.parametrize("measured", [gradient_error, tw.certify])
def test_a_cotangent_that_does_not_fit(solved, measured, cotangent, message):
    solution, x = solved
    with pytest.raises(MapError, match=message):
        measured(settling, solution, x, cotangent=cotangent)


@pytest.mark.parametrize("residual", ["x", torch.zeros(3), [1, 2], torch.tensor(True), object()])
def test_an_adjoint_residual_that_does_not_fit(solved, residual):
    solution, x = solved
    with pytest.raises(OptionError, match=r"adjoint_residual must be a number, or a tensor of shape \(4,\)"):
        gradient_error(settling, solution, x, adjoint_residual=residual)


def test_an_adjoint_residual_for_each_row_or_for_all(solved):
    solution, x = solved
    given: tuple[Any, ...] = (0.1, torch.tensor(0.1), torch.tensor([0.1]), torch.full((4,), 0.1), [0.1] * 4)
    errors = [gradient_error(settling, solution, x, adjoint_residual=r).adjoint for r in given]
    assert all(torch.allclose(error, errors[0], rtol=1e-6) for error in errors)


def test_a_gradient_error_in_inference_mode():
    layer = nn.Linear(3, 3)
    x = drawn(4, 3, dtype=torch.float32)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(layer(z)) + x

    def loss(z: Any) -> Tensor:
        return z.square().sum()

    solution = tw.fix(f, torch.zeros_like(x), x, tol=1e-2)
    outside = gradient_error(f, solution, x, cotangent=loss)
    with torch.inference_mode():
        inside = gradient_error(f, solution, x, cotangent=loss)
    assert float(outside.weights) > 0
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a.clone(), b)


def calls(solution: tw.Solution, *context: Tensor) -> list[Callable[..., Any]]:
    z = solution.value
    return [
        lambda f, **options: tw.certify(f, solution, *context, **options),
        lambda f, **options: gradient_error(f, solution, *context, **options),
        lambda f, **options: spectral_radius(f, z, *context, **options),
        lambda f, **options: contraction_rate(f, z, *context, **options),
        lambda f, **options: tw.jacobian_frobenius(f, z, *context, **options),
        lambda f, **options: tw.spectral_penalty(f, z, *context, **options),
    ]


@pytest.mark.parametrize("which", range(6))
def test_what_every_measure_refuses(solved, which):
    solution, x = solved
    call = calls(solution, x)[which]
    with pytest.raises(OptionError, match=r"generator must be a torch\.Generator"):
        call(settling, generator=3)
    with pytest.raises(MapError, match="f must be a function"):
        call(3)
    with pytest.raises(MapError, match=r"does not take a state and 0 context tensors .* Pass the context"):
        calls(solution)[which](settling)
    with pytest.raises(MapError, match=r"Context 0 must be dense; got layout torch\.sparse_coo"):
        calls(solution, x.to_sparse())[which](settling)
    with pytest.raises(MapError, match=r"on the device of z0, cpu; it returned .* on meta"):
        call(lambda z, x: z.to("meta"))


def test_a_module_without_its_context(solved):
    class Cell(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return settling(z, x)

    solution, x = solved
    assert float(tw.certify(Cell(), solution, x).residual.max()) < 1e-4
    with pytest.raises(MapError, match="does not take a state and 0 context tensors"):
        tw.certify(Cell(), solution)


def test_a_type_error_of_f_itself_is_not_explained_away(solved):
    solution, x = solved

    def f(z: Tensor, x: Tensor) -> Tensor:
        raise TypeError("its own")

    with pytest.raises(TypeError, match="its own") as info:
        tw.certify(f, solution, x)
    assert not isinstance(info.value, MapError)


@pytest.mark.parametrize("trace", [5, [0.5, 0.25], torch.zeros(3), torch.zeros(3, 2, dtype=torch.long)])
def test_a_trace_that_is_none(trace):
    with pytest.raises(OptionError, match=r"observed_rate takes a \(B, K\) floating-point trace"):
        observed_rate(trace)


def test_cached_takes_modules():
    three: Any = 3
    layer = tw.contractive(nn.Linear(3, 3))
    with pytest.raises(OptionError, match="takes modules that hold layers; got a int"), cached(layer, three):
        pass


@pytest.mark.parametrize("constrain", [tw.contractive, tw.orthogonal, norm_bound])
def test_a_lazy_layer_has_no_weight_to_constrain(constrain):
    for layer in (nn.LazyLinear(3), nn.LazyConv2d(3, 1)):
        with pytest.raises(OptionError, match=f"weight of this {type(layer).__name__} does not exist yet"):
            constrain(layer)
    layer = nn.LazyLinear(3)
    layer(torch.zeros(1, 3))
    constrain(layer)


# Devices and layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        (torch.zeros(4, 3).to_sparse(), r"z0 must be dense; got layout torch\.sparse_coo"),
        ((torch.zeros(4, 3), torch.zeros(4, 3).to_sparse()), "z0 must be dense"),
        (
            (torch.zeros(4, 3), torch.zeros(4, 3, device="meta")),
            "z0 must be on one device; got cpu, meta",
        ),
    ],
)
def test_a_start_that_is_no_matrix(z0, message):
    with pytest.raises(MapError, match=message):
        tw.fix(lambda z: z, z0)


def test_nested_and_sparse_tensors_are_refused():
    x = torch.zeros(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: nested tensors are a prototype
        ragged = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])
    with pytest.raises(MapError, match="z0 must be dense; got a nested tensor"):
        tw.fix(settling, ragged, x)
    with pytest.raises(MapError, match="Context 0 must be dense; got a nested tensor"):
        tw.fix(settling, x, ragged)
    with pytest.raises(MapError, match=r"Context 0 must be dense; got layout torch\.sparse_coo"):
        tw.fix(settling, x, x.to_sparse())


@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_to_another_device(solver, every):
    with pytest.raises(MapError, match=r"on the device of z0, cpu; it returned .* on meta"):
        tw.fix(lambda z: z.to("meta"), torch.zeros(4, 3), solver=solver, check_every=every)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda z: (z[0], z[1].to("meta")), "parts of what f returns must be on one device; got cpu, meta"),
        (lambda z: (z[0].to("meta"), z[1].to("meta")), "device of z0, cpu; it returned .* on meta"),
        (lambda z: (z[0], z[1].to_sparse()), "What f returns must be dense"),
    ],
)
def test_a_map_of_parts_to_other_places(f, message):
    with pytest.raises(MapError, match=message):
        tw.fix(f, (torch.zeros(4, 3), torch.zeros(4, 2)))


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_a_map_to_a_sparse_state(shape):
    with pytest.raises(MapError, match="dense"):
        tw.fix(lambda z: z.to_sparse(), torch.zeros(shape))


def test_a_runtime_error_of_f_itself_is_not_explained_away():
    def f(z: Tensor) -> Tensor:
        raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        tw.fix(f, torch.zeros(4, 3))


# Coupled rows, one of them NaN ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("solver", ["picard", "ad_fixed_point", "auto", "broyden"])
def test_one_broken_row_does_not_make_the_coupled_others_diverge(solver, every, bad):
    def f(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(z + z.nan_to_num(0.0, 0.0).mean(0, keepdim=True)) + x

    x = torch.tensor([[bad] * 3, [0.3] * 3, [0.5] * 3, [0.4, 0.2, 0.6]])
    with torch.no_grad(), pytest.warns(ConvergenceWarning):
        solution = tw.fix(
            f, torch.zeros(4, 3), x, coupled=True, solver=solver, check_every=every, tol=1e-5, max_iter=200
        )
        change = (f(solution.value, x) - solution.value)[1:].norm(dim=1)
    assert solution.status.tolist() == [int(Status.non_finite)] + 3 * [int(Status.converged)]
    assert bool((change < 1e-4).all())


# Memory ---------------------------------------------------------------------------------------------


def kept(tree: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes of the memory that a tree of tensors holds on to, by address."""
    if isinstance(tree, Tensor):
        storage = tree.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(tree, tuple):
        for branch in tree:
            kept(branch, found)
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("memory", [5, 20])
def test_what_auto_keeps_is_what_the_page_says(monkeypatch, memory, compiled):
    if compiled and not kernels.available():
        pytest.skip(f"compiled kernels: {kernels.describe()}")
    width = 20_000  # against which the tables are nothing
    most = {False: 0.0, True: 0.0}
    steps = AutoRows if compiled else auto._Steps
    step = steps.step

    def watched(self, problem, z, fz, r, state):
        z_next, state = step(self, problem, z, fz, r, state)
        states = sum(kept(state, {}).values()) / (z.numel() * z.element_size())
        newton = state.newton is not None
        most[newton] = max(most[newton], states)
        return z_next, state

    monkeypatch.setattr(steps, "step", watched)
    slope = torch.linspace(-3, 3, width)
    x = drawn(2, width, dtype=torch.float32)
    with torch.no_grad(), pytest.warns(ConvergenceWarning):
        solver = tw.solver("auto", memory=memory)
        with contextlib.nullcontext() if compiled else kernels.disabled():
            tw.fix(lambda z, x: slope * z + x, 0 * x, x, solver=solver, tol=1e-9, max_iter=250)
    assert round(most[False]) == memory + (1 if compiled else 5)
    assert round(most[True]) == 3 * memory + (6 if compiled else 10)
    page = PAGE.read_text()
    assert "`memory + 1` states kept, for the whole batch `3 * memory + 6` once" in page
    assert "without compiled kernels four more" in page
