"""What ``fix`` does where a function, a batch or an option is out of the ordinary."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import twnn_plugin as tw
from twnn_plugin import kernels
from twnn_plugin.errors import ConvergenceWarning, MapError, OptionError
from twnn_plugin.types import Status

f64 = torch.float64
EXACT = ("implicit", "ad_fixed_point")
ALL = (*EXACT, "one_step", "phantom", "unrolled", "checkpointed")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def far(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


# Rows that hear of each other, under the transforms of torch.func -----------------------------------


def through_the_mean(z: Tensor, x: Tensor) -> Tensor:
    return 0.3 * torch.tanh(z) + 0.45 * z.mean(0, keepdim=True) + x


def coupled(adjoint: str):
    def solved(at: Tensor) -> Tensor:
        return tw.fix(
            through_the_mean,
            torch.zeros_like(at),
            at,
            coupled=True,
            tol=1e-12,
            max_iter=400,
            adjoint=adjoint,
        ).value

    return solved


def closing_over(adjoint: str, positional: bool):
    x = drawn(4, 3)

    def f(z: Tensor, w: Tensor) -> Tensor:
        if positional:  # the map of a row depends on where it is in the batch
            return torch.tanh(z @ w) * torch.linspace(0.1, 0.5, z.shape[0], dtype=f64)[:, None] + x.sum(0)
        return torch.tanh(z @ w + x)

    def solved(at: Tensor) -> Tensor:
        options = {"tol": 1e-12, "max_iter": 300, "adjoint": adjoint}
        return tw.fix(lambda z: f(z, at), torch.zeros_like(x), **options).value

    return solved


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("case", ["coupled", "closed over", "by position"])
def test_instances_of_a_batch_are_not_taken_for_further_rows(adjoint, case):
    if case == "coupled":
        solved, at = coupled(adjoint), drawn(4, 3)
    else:
        solved, at = closing_over(adjoint, case == "by position"), 0.3 * drawn(3, 3, seed=1)
    expected = plain_jacobian(solved, at)
    assert far(jacrev(solved)(at), expected) < 1e-10
    assert far(jacfwd(solved)(at), expected) < 1e-10

    def loss(at: Tensor) -> Tensor:
        return (solved(at) ** 3).sum()

    assert far(hessian(loss)(at), plain_hessian(loss, at)) < 1e-9
    many = torch.stack([at, 0.5 * at, -at])
    assert far(vmap(solved)(many), torch.stack([solved(one) for one in many])) < 1e-9


# A solve in a solve -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", EXACT)
def test_second_derivatives_of_a_solve_in_a_solve(adjoint):
    w, x, v = 0.3 * drawn(2, 2), drawn(3, 2, seed=1), drawn(2, 2, seed=2)
    options = {"tol": 1e-12, "max_iter": 200, "adjoint": adjoint}

    def loss(w: Tensor) -> Tensor:
        def outer(z: Tensor, x: Tensor) -> Tensor:
            inner = tw.fix(lambda y, z: 0.3 * torch.tanh(y @ w) + z, torch.zeros_like(z), z, **options)
            return 0.5 * torch.tanh(inner.value + x)

        return (tw.fix(outer, torch.zeros_like(x), x, **options).value ** 3).sum()

    def unrolled(w: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(50):
            y = torch.zeros_like(z)
            for _ in range(30):
                y = 0.3 * torch.tanh(y @ w) + z
            z = 0.5 * torch.tanh(y + x)
        return (z**3).sum()

    expected = hessian(unrolled)(w)
    for found in (hessian(loss)(w), jacfwd(jacfwd(loss))(w)):
        assert far(found, expected) < 1e-9
    along = torch.einsum("abcd,cd->ab", expected, v)
    assert far(grad(lambda w: (grad(loss)(w) * v).sum())(w), along) < 1e-9
    assert far(grad(lambda w: jvp(loss, (w,), (v,))[1])(w), along) < 1e-9


# Functions that are not what they should be ---------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["implicit", "phantom", "one_step"])
@pytest.mark.parametrize("context", [True, False])
def test_rows_that_move_others_after_these_were_done_are_found_out(adjoint, context):
    x = drawn(6, 8).float() * torch.tensor([0.0, 0, 0, 0, 0, 5])[:, None]
    w = torch.ones(8, requires_grad=True)
    options = {"solver": "picard", "max_iter": 300, "adjoint": adjoint}
    with pytest.warns(ConvergenceWarning, match="influence each other"):
        if context:
            solved = tw.fix(lambda z, x: w * through_the_mean(z, x), torch.zeros(6, 8), x, **options)
        else:
            solved = tw.fix(lambda z: w * through_the_mean(z, x), torch.zeros(6, 8), **options)
    assert (solved.status == int(Status.stagnated)).any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_function_that_writes_to_its_state_is_refused(mode):
    with mode(), pytest.raises(MapError, match=r"z = z\.clone\(\)"):
        tw.fix(lambda z, x: z.mul_(0.5).add_(x), torch.zeros(4, 8), torch.ones(4, 8))
    with mode():
        solved = tw.fix(lambda z, x: z.clone().mul_(0.5).add_(x), torch.zeros(4, 8), torch.ones(4, 8))
    torch.testing.assert_close(solved.value, torch.full((4, 8), 2.0), rtol=1e-3, atol=0)


def test_a_result_is_nobody_elses_memory():
    x, z0 = torch.ones(4, 3), torch.full((4, 3), 2.0)
    with torch.no_grad():
        tw.fix(lambda z, x: x, torch.zeros(4, 3), x).value.zero_()
        tw.fix(lambda z, x: 0.5 * z + x, z0, x).value.zero_()
    assert bool((x == 1).all()) and bool((z0 == 2).all())


# States -----------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


def test_named_tuples_stay_what_they_are():
    x = torch.ones(4, 3)
    start = Pair(torch.zeros(4, 3), torch.zeros(4, 3))
    solved = tw.fix(lambda z, x: Pair(0.5 * z.h + x, 0.2 * z.c + z.h), start, x)
    assert isinstance(solved.value, Pair)
    torch.testing.assert_close(solved.value.h, 2 * x, rtol=1e-3, atol=0)


def test_keys_may_come_in_any_order_and_must_be_the_same():
    x, start = torch.ones(4, 3), {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}
    solved = tw.fix(lambda z, x: {"b": 0.5 * z["b"] + x, "a": 0.2 * z["a"]}, start, x)
    torch.testing.assert_close(solved.value["b"], 2 * x, rtol=1e-3, atol=0)
    assert list(solved.value) == ["a", "b"]
    with pytest.raises(MapError, match=r"keys of z0, \['a', 'b'\]; it returned \['a', 'c'\]"):
        tw.fix(lambda z, x: {"a": z["a"], "c": z["b"]}, start, x)
    with pytest.raises(MapError, match="a tuple of 2; it returned a tuple of 1"):
        tw.fix(lambda z, x: (z[0],), (x, x), x)


@pytest.mark.parametrize("norm", ["l2", "max"])
def test_the_small_part_of_a_state_must_settle_too(norm):
    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.1 * z[0] + 1e4 * x, 0.95 * z[1] + 1e-4 * x

    start = (torch.zeros(2, 4), torch.zeros(2, 4))
    solved = tw.fix(f, start, torch.ones(2, 4), norm=norm, tol=1e-3, solver="picard", max_iter=500)
    torch.testing.assert_close(solved.value[1], torch.full((2, 4), 2e-3), rtol=0.03, atol=0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("solver", ["picard", "anderson", "auto", "newton_krylov"])
def test_a_part_too_large_for_its_norm_is_not_at_rest(solver, check_every, compiled):
    """Beside a norm that is infinite every change is small, and the other part would decide alone."""

    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), 1e25 * x - z[1]

    start = (torch.ones(2, 4), torch.zeros(2, 4))
    with contextlib.nullcontext() if compiled else kernels.disabled(), pytest.warns(ConvergenceWarning):
        solved = tw.fix(f, start, torch.ones(2, 4), norm="max", solver=solver, check_every=check_every)
    assert bool((solved.status == Status.non_finite).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("check_every", [1, 4])
def test_a_half_precision_row_reported_converged_is_within_the_tolerance(dtype, solver, check_every):
    w = (0.5 * drawn(32, 32) / 32**0.5).to(dtype)
    x = drawn(200, 32, seed=1).to(dtype)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    tol = 3e-3 if dtype is torch.bfloat16 else 4e-4
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solved = tw.fix(
            f, torch.zeros_like(x), x, solver=solver, tol=tol, max_iter=60, check_every=check_every
        )
    z, fz = solved.value.float(), f(solved.value, x).float()
    residual = (fz - z).norm(dim=1) / fz.norm(dim=1)
    assert solved.converged.any()
    assert float(residual[solved.converged].max()) <= tol * 1.001


def test_half_precision_that_cannot_meet_the_tolerance_stagnates():
    w = (0.5 * drawn(32, 32) / 32**0.5).bfloat16()
    x = drawn(40, 32, seed=1).bfloat16()
    with pytest.warns(ConvergenceWarning, match="stagnated"):
        solved = tw.fix(
            lambda z, x: torch.tanh(z @ w + x),
            torch.zeros_like(x),
            x,
            tol=1e-6,
            max_iter=400,
            solver="picard",
        )
    failed = ~solved.converged
    assert failed.any() and bool((solved.status[failed] == int(Status.stagnated)).all())
    assert int(solved.steps.max()) < 100


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("start", [0.0, 0.5, -1.0])
def test_anderson_does_not_build_on_rounding_where_all_entries_are_alike(recorded, start):
    # All differences lie along one direction: what is left of the second one is rounding.
    for width in (6, 12, 33):
        with torch.set_grad_enabled(recorded):
            solved = tw.fix(torch.cos, torch.full((2, width), start), tol=1e-6, adjoint="unrolled")
        assert bool(solved.converged.all())
        torch.testing.assert_close(solved.value, torch.full((2, width), 0.7390851))
        assert int(solved.steps.max()) < 15


# Gradients where there is little to differentiate ------------------------------------------------------


@pytest.mark.parametrize("adjoint", ALL)
@pytest.mark.parametrize("case", ["empty", "not finite", "solved already"])
def test_weights_always_get_a_gradient(adjoint, case):
    w = (0.4 * drawn(3, 3)).requires_grad_()
    x = drawn(4, 3, seed=1)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    x = {"empty": x[:0], "not finite": x[:1] * float("nan"), "solved already": x}[case]
    start = torch.zeros_like(x)
    if case == "solved already":
        start = tw.fix(f, start, x, tol=1e-9, max_iter=200).value.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solved = tw.fix(f, start, x, adjoint=adjoint, tol=1e-3)
    (found,) = torch.autograd.grad(solved.value.nansum(), w)
    assert bool(torch.isfinite(found).all())
    assert (float(found.norm()) > 0) == (case == "solved already")


def test_a_phantom_gradient_of_the_start_is_zero():
    z0 = torch.zeros(4, 3, requires_grad=True)
    solved = tw.fix(lambda z, x: 0.5 * torch.tanh(z) + x, z0, torch.ones(4, 3), adjoint="phantom")
    (found,) = torch.autograd.grad(solved.value.sum(), z0)
    assert not found.any()


@pytest.mark.parametrize("adjoint", ["unrolled", "checkpointed"])
def test_newton_krylov_unrolled(adjoint):
    w, x = 0.4 * drawn(3, 3), drawn(8, 3, seed=1)
    x[1] = 0  # its state, and every difference of it, is zero

    def loss(w: Tensor, **options: Any) -> Tensor:
        solved = tw.fix(
            lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), x, tol=1e-10, max_iter=200, **options
        )
        return (solved.value**3).sum()

    expected = plain_hessian(loss, w)
    assert far(plain_hessian(lambda w: loss(w, solver="newton_krylov", adjoint=adjoint), w), expected) < 1e-6


@pytest.mark.parametrize("solver", ["anderson", "newton_krylov", "broyden"])
def test_three_levels_through_the_iterates(solver):
    w, x = 0.15 * drawn(3, 3), drawn(8, 3, seed=1)

    def along(**options: Any):
        def loss(w: Tensor) -> Tensor:
            f = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
            return (tw.fix(f, torch.zeros_like(x), x, tol=1e-13, max_iter=200, **options).value ** 3).sum()

        return grad(lambda w: jvp(grad(loss), (w,), (w,))[1].square().sum())(w)

    assert far(along(solver=solver, adjoint="unrolled"), along()) < 1e-5


def test_a_warm_start_when_rows_leave_the_backward_solve():
    w = drawn(16, 16, seed=2)
    w = w / torch.linalg.matrix_norm(w, 2)
    for seed in range(8):
        x = drawn(10, 16, seed=seed).requires_grad_()
        scale = torch.rand(10, 1, generator=torch.Generator().manual_seed(seed), dtype=f64) ** 3
        warm = tw.adjoint("implicit", warm_start=True, tol=1e-8)
        for k in range(3):
            found = []
            for adjoint in (warm, tw.adjoint("implicit", tol=1e-8)):
                solved = tw.fix(
                    lambda z, x, s: torch.tanh(s * (z @ w) + x),
                    torch.zeros_like(x),
                    x,
                    scale * (1 - 0.01 * k),
                    adjoint=adjoint,
                    tol=1e-8,
                    max_iter=500,
                )
                found.append(torch.autograd.grad(solved.value.sum(), x)[0])
            assert far(*found) < 1e-6


# Certificates and constraints --------------------------------------------------------------------------


def test_certificates_in_inference_mode():
    w, x = 0.4 * drawn(3, 3), drawn(8, 3, seed=1)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    def figures() -> tuple[Tensor, ...]:
        z = tw.fix(f, torch.zeros_like(x), x, tol=1e-9).value
        torch.manual_seed(0)
        norm = tw.jacobian_frobenius(f, z, x)
        return tw.spectral_radius(f, z, x).value, tw.contraction_rate(f, z, x).value, norm

    with torch.no_grad():
        expected = figures()
    with torch.inference_mode():
        found = figures()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert bool((a > 0).all())


def test_the_certificate_of_an_empty_batch():
    x = torch.zeros(0, 3)
    f = lambda z, x: 0.5 * torch.tanh(z) + x  # noqa: E731
    with torch.no_grad():
        certificate = tw.certify(f, tw.fix(f, x, x), x)
    assert certificate.residual.shape == (0,)


@pytest.mark.parametrize(
    "layer", [torch.nn.Conv1d(8, 3, 1), torch.nn.Conv2d(16, 4, 3), torch.nn.Conv3d(6, 2, 3)]
)
def test_contractive_convolutions_with_fewer_channels_out(layer):
    layer = tw.contractive(layer)
    x = torch.randn(2, layer.in_channels, *[6] * len(layer.kernel_size))
    change = torch.randn_like(x)
    moved = (layer(x + change) - layer(x)).flatten(1).norm(dim=1)
    assert bool((moved <= change.flatten(1).norm(dim=1)).all())


# Options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.solver("picard", damping="a"),
        lambda: tw.solver("picard", damping=True),
        lambda: tw.solver("anderson", damping=None),
        lambda: tw.solver("newton_krylov", forcing="a"),
        lambda: tw.adjoint("phantom", damping="a"),
        lambda: tw.adjoint("implicit", tol="a"),
        lambda: tw.adjoint("implicit", tol=float("inf")),
        lambda: tw.adjoint("implicit", warm_start="yes"),
        lambda: tw.solver("torchdeq.anderson", tau="a"),
    ],
)
def test_options_of_the_wrong_kind(make):
    with pytest.raises(OptionError, match="must be"):
        make()


@pytest.mark.parametrize(
    "option", [{"tol": True}, {"tol": "a"}, {"coupled": "no"}, {"throw": "false"}, {"callback": 5}]
)
def test_options_of_fix_of_the_wrong_kind(option):
    x = torch.ones(2, 3)
    with pytest.raises(OptionError, match="must be"):
        tw.fix(lambda z, x: 0.5 * z + x, x, x, **option)


def test_what_is_no_function_is_refused():
    with pytest.raises(MapError, match="f must be a function"):
        tw.fix(None, torch.ones(2, 3))  # type: ignore[arg-type]


# Unrolled steps under torch.func --------------------------------------------------------------------


def steps_of(adjoint: str, w: Tensor, x: Tensor, start: Tensor, every: int | None = None) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return tw.fix(
            lambda z, c: torch.tanh(z @ w) + c,
            start,
            x,
            adjoint=adjoint,
            solver="picard",
            tol=1e-12,
            max_iter=300,
            check_every=every,
        ).value


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("kind", ["at once", "later"])
def test_unrolled_under_torch_func_leaves_broken_rows_out(kind, every):
    w, x = 0.2 * drawn(3, 3), drawn(4, 3, seed=1)
    x[1] = float("nan") if kind == "at once" else 1e200

    def loss(w: Tensor) -> Tensor:
        def f(z: Tensor, c: Tensor) -> Tensor:
            return torch.tanh(z @ w) + c + z * c * 1e-3 * (c > 1e100)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solved = tw.fix(f, torch.zeros(4, 3, dtype=f64), x, adjoint="unrolled", check_every=every)
        return solved.value[[0, 2, 3]].sin().sum()

    at = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(at), at)
    assert bool(torch.isfinite(expected).all())
    torch.testing.assert_close(grad(loss)(w), expected)
    torch.testing.assert_close(jacfwd(loss)(w), expected)


@pytest.mark.parametrize("start", [torch.zeros_like, lambda x: torch.zeros(x.shape, dtype=f64)])
def test_unrolled_under_torch_func_has_the_derivative_of_rows_at_rest(start):
    """One row begins at its solution, no step is made of it, and it is not a constant for that."""
    w, x = 0.2 * drawn(3, 3), drawn(3, 3, seed=1)
    x[1] = 0.0

    def solve(x: Tensor) -> Tensor:
        return steps_of("unrolled", w, x, start(x))

    expected = plain_jacobian(solve, x)
    assert float(expected[1, :, 1].norm()) > 1.0
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(solve)(x), expected)
    tangent = drawn(3, 3, seed=2)
    twice = jvp(grad(lambda x: solve(x).sin().sum()), (x,), (tangent,))[1]
    curved = plain_hessian(lambda x: solve(x).sin().sum(), x)
    torch.testing.assert_close(twice, torch.einsum("abij,ij->ab", curved, tangent))


def test_unrolled_under_torch_func_leaves_the_derivative_of_the_start_to_it():
    w, nothing = 0.2 * drawn(3, 3), torch.zeros(2, 3, dtype=f64)
    for derivative in (jacrev, jacfwd):
        found = derivative(lambda start: steps_of("unrolled", w, nothing, start))(nothing)
        torch.testing.assert_close(found.view(6, 6), torch.eye(6, dtype=f64))


class Doubled(torch.autograd.Function):
    """A function of Python in ``f``: torch shows its node of the graph in another way than its own."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point", "unrolled", "checkpointed", "phantom"])
def test_a_function_of_python_within_f(adjoint):
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    weight = torch.tensor([0.1, -0.2], dtype=torch.float64, requires_grad=True)

    def gradient(double):
        solution = tw.fix(
            lambda z, x: torch.tanh(double(weight * z)) + x,
            torch.zeros_like(x),
            x,
            solver="ad_fixed_point" if adjoint == "ad_fixed_point" else "picard",
            adjoint=adjoint,
            tol=1e-10,
        )
        return torch.autograd.grad(solution.value.sin().sum(), weight)[0]

    torch.testing.assert_close(gradient(Doubled.apply), gradient(lambda y: 2 * y))


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point"])
def test_forward_derivatives_through_running_statistics(adjoint):
    """torch differentiates a batch normalisation in eval mode, but not with respect to what it keeps."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.BatchNorm1d(4).double().eval()
    norm.running_mean.normal_(generator=generator)
    weight = 0.3 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    x, t = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    solver = "ad_fixed_point" if adjoint == "ad_fixed_point" else "anderson"

    def solve(x, weight=weight):
        f = lambda z, x: torch.tanh(norm(z @ weight) + x)  # noqa: E731
        return tw.fix(f, torch.zeros_like(x), x, solver=solver, adjoint=adjoint, tol=1e-12).value

    backward = jacrev(solve)(x)
    torch.testing.assert_close(jacfwd(solve)(x), backward)
    torch.testing.assert_close(jvp(solve, (x,), (t,))[1], torch.einsum("aibj,bj->ai", backward, t))
    by_weight = jacrev(lambda w: solve(x, w).sin().sum())(weight)
    torch.testing.assert_close(jacfwd(lambda w: solve(x, w).sin().sum())(weight), by_weight)
    twice = hessian(lambda row: solve(row[None]).sin().sum())(x[0])
    torch.testing.assert_close(twice, jacrev(jacrev(lambda row: solve(row[None]).sin().sum()))(x[0]))
