"""Jacobian regularisation: values and gradients against autograd on the dense Jacobian."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import twnn_plugin as tw
from tests import problems
from twnn_plugin.certificates import spectral_radius
from twnn_plugin.errors import MapError, OptionError
from twnn_plugin.regularise import jacobian_frobenius, spectral_penalty

DOUBLE = torch.float64


def dense(problem: problems.Problem, z: Tensor) -> Tensor:
    """(B, D, D) Jacobians with a graph, one row at a time."""
    rows = []
    for i in range(z.shape[0]):
        one = [c[i : i + 1] for c in problem.context]
        rows.append(
            torch.autograd.functional.jacobian(
                lambda v, one=one: problem.f(v[None], *one)[0], z[i], create_graph=True
            )
        )
    return torch.stack(rows)


def frobenius(jacobian: Tensor) -> Tensor:
    return jacobian.square().sum(dim=(1, 2)) / jacobian.shape[1]


def point(problem: problems.Problem) -> Tensor:
    return torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)


@pytest.mark.parametrize("make", problems.ALL)
def test_the_exact_norm_and_its_gradient(make):
    problem = make()
    z = point(problem)
    mine = jacobian_frobenius(problem.f, z, *problem.context, samples="exact")
    true = frobenius(dense(problem, z)).mean()
    torch.testing.assert_close(mine, true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, problem.parameters), torch.autograd.grad(true, problem.parameters)
    )


@pytest.mark.parametrize("make", problems.ALL)
def test_the_estimate_and_its_gradient_are_right_on_average(make):
    problem = make()
    z = point(problem)
    generator = torch.Generator().manual_seed(0)
    mine = jacobian_frobenius(problem.f, z, *problem.context, samples=2000, generator=generator)
    true = frobenius(dense(problem, z)).mean()
    assert float(mine.detach()) == pytest.approx(float(true.detach()), rel=0.03)
    (got,) = torch.autograd.grad(mine, problem.parameters)
    (expected,) = torch.autograd.grad(true, problem.parameters)
    assert problems.relative(got, expected) < 0.05


def test_the_gradient_reaches_weights_and_context_and_passes_gradcheck():
    w, x = torch.randn(3, 3, dtype=DOUBLE, requires_grad=True), torch.randn(2, 3, dtype=DOUBLE)
    z = torch.randn(2, 3, dtype=DOUBLE)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return jacobian_frobenius(lambda z, x: torch.tanh(z @ w + x), z, x, samples="exact")

    assert torch.autograd.gradcheck(loss, (w, x.requires_grad_()))

    def seeded(w: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return jacobian_frobenius(lambda z, x: torch.tanh(z @ w + x), z, x, generator=generator)

    assert torch.autograd.gradcheck(seeded, (w,))


def test_the_gradient_flows_through_the_solution_if_asked():
    """Against finite differences of the whole: solve, then penalise."""
    problem = problems.vector(batch=2, size=4)
    (w,) = problem.parameters
    x = problem.context[0]

    def total(w: Tensor, through: bool) -> Tensor:
        f = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
        solution = tw.fix(f, problem.z0, x, tol=1e-13, max_iter=500)
        return jacobian_frobenius(f, solution.value, x, samples="exact", through_solution=through)

    (through,) = torch.autograd.grad(total(w, True), w)
    (direct,) = torch.autograd.grad(total(w, False), w)
    step = torch.zeros_like(w)
    step[1, 2] = 1e-5
    with torch.no_grad():
        slope = (total(w + step, True) - total(w - step, True)) / 2e-5
    torch.testing.assert_close(through[1, 2], slope, rtol=1e-5, atol=0)
    assert abs(float(direct[1, 2] - slope)) > 1e-3 * abs(float(slope))


@pytest.mark.parametrize("measure", ["lipschitz", "radius"])
@pytest.mark.parametrize("make", problems.ALL)
def test_the_spectral_penalty_and_its_gradient(make, measure):
    problem = make()
    z = point(problem)
    jacobian = dense(problem, z)
    if measure == "lipschitz":
        figure = torch.linalg.matrix_norm(jacobian, 2)
    else:
        figure = torch.linalg.eigvals(jacobian).abs().amax(dim=1)
    true = (figure - 0.1).clamp_min(0).square().mean()
    mine = spectral_penalty(problem.f, z, *problem.context, target=0.1, measure=measure)
    torch.testing.assert_close(mine, true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, problem.parameters), torch.autograd.grad(true, problem.parameters)
    )


def test_the_penalty_sees_a_complex_pair():
    angle = torch.tensor(1.0, dtype=DOUBLE)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    w = (1.2 * rotation).requires_grad_()
    penalty = spectral_penalty(lambda z: z @ w, torch.ones(1, 2, dtype=DOUBLE), measure="radius")
    torch.testing.assert_close(penalty, torch.tensor(0.3**2, dtype=DOUBLE))
    (gradient,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(gradient, 2 * 0.3 * rotation / 2)  # |l| = sqrt(det w)


def test_maps_within_the_target_are_left_alone():
    w = (0.5 * torch.eye(3)).requires_grad_()
    for measure in ("lipschitz", "radius"):
        penalty = spectral_penalty(lambda z: z @ w, torch.ones(2, 3), measure=measure)
        assert float(penalty.detach()) == 0.0
        assert torch.autograd.grad(penalty, w)[0].abs().max() == 0.0


def test_a_defective_eigenvalue_gives_a_finite_gradient():
    w = torch.tensor([[1.1, 1.0], [0.0, 1.1]], dtype=DOUBLE, requires_grad=True)
    penalty = spectral_penalty(lambda z: z @ w, torch.ones(1, 2, dtype=DOUBLE), measure="radius")
    assert torch.autograd.grad(penalty, w)[0].isfinite().all()


def step_to(loss_of, cell: nn.Module, steps: int) -> None:
    optimiser = torch.optim.Adam(cell.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of().backward()
        optimiser.step()


@pytest.mark.parametrize(
    "penalty",
    [
        lambda f, z, x: jacobian_frobenius(f, z, x),
        lambda f, z, x: jacobian_frobenius(f, z, x, through_solution=True),
        lambda f, z, x: spectral_penalty(f, z, x, target=0.5),
        lambda f, z, x: spectral_penalty(f, z, x, target=0.5, measure="radius"),
    ],
    ids=["frobenius", "frobenius through z", "lipschitz", "radius"],
)
def test_training_with_it_lowers_the_radius(penalty):
    torch.manual_seed(0)
    cell, x = nn.Linear(12, 12), torch.randn(16, 12)
    nn.init.orthogonal_(cell.weight, gain=1.0)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(cell(z) + 0.3 * x)

    def solve() -> Tensor:
        return tw.fix(f, torch.zeros(16, 12), x, tol=1e-4, max_iter=200).value

    before = spectral_radius(f, solve(), x).value.mean()
    step_to(lambda: penalty(f, solve(), x), cell, 40)
    assert spectral_radius(f, solve(), x).value.mean() < 0.8 * before


def attention(fused: bool, weight: Tensor, heads: int = 2):
    """One layer of attention as a map of (B, L, C)."""

    def f(z: Tensor) -> Tensor:
        q, k, v = (z @ weight).view(*z.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        if fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1) @ v
        return out.transpose(1, 2).reshape(z.shape)

    return f


@pytest.mark.parametrize(
    "penalty",
    [
        lambda f, z: jacobian_frobenius(f, z, samples="exact"),
        lambda f, z: jacobian_frobenius(f, z, samples="exact", through_solution=True),
        lambda f, z: spectral_penalty(f, z, target=0.1),
        lambda f, z: spectral_penalty(f, z, target=0.1, measure="radius"),
    ],
    ids=["frobenius", "frobenius through z", "lipschitz", "radius"],
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_fused_attention_is_penalised_like_any_other(penalty, dtype):
    torch.manual_seed(0)
    weight = torch.randn(8, 24, dtype=dtype, requires_grad=True)
    z = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    before = torch.backends.cuda.flash_sdp_enabled()
    found = [penalty(attention(fused, weight), z) for fused in (True, False)]
    grads = [torch.autograd.grad(value, weight)[0] for value in found]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3 if dtype == torch.float32 else 1e-7, atol=1e-4)
    assert bool(grads[0].any()) and before and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_penalty_of_a_transformer_is_that_of_its_attention_unfused(precision):
    torch.manual_seed(0)
    model = timm.create_model(
        "twnn_vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2, jacobian=0.1, policy="always"
    ).train()
    x, losses, grads = torch.randn(2, 3, 32, 32), [], []
    for fused in (True, False):
        for block in model.blocks:
            block.attn.fused_attn = fused
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            model(x)
            losses.append(model.auxiliary_loss())
        losses[-1].backward()
        grads.append(model.blocks[1].attn.qkv.weight.grad.clone())
    assert problems.relative(losses[0], losses[1]) < (1e-3 if precision is None else 0.05)
    assert problems.relative(grads[0], grads[1]) < (1e-3 if precision is None else 0.1)
    assert bool(grads[0].any())


def test_reductions_states_and_edges():
    w = 0.3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0))

    def whole(z: Tensor) -> Tensor:
        return torch.tanh(z @ w)

    def parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
        out = whole(torch.cat([state["a"], state["b"].flatten(1)], dim=1))
        return {"a": out[:, :3], "b": out[:, 3:].view(-1, 2, 1)}

    z = torch.randn(4, 5)
    rows = jacobian_frobenius(whole, z, samples="exact", reduction="none")
    assert rows.shape == (4,)
    torch.testing.assert_close(rows.mean(), jacobian_frobenius(whole, z, samples="exact"))
    state = {"a": z[:, :3], "b": z[:, 3:].view(4, 2, 1)}
    torch.testing.assert_close(
        jacobian_frobenius(parts, state, samples="exact", reduction="none"),
        rows,  # type: ignore[arg-type]
    )
    assert spectral_penalty(whole, z, target=0.0, reduction="none").shape == (4,)
    for empty in (torch.zeros(0, 5), torch.zeros(3, 0)):
        assert float(jacobian_frobenius(lambda z: z, empty)) == 0.0
        assert float(spectral_penalty(lambda z: z, empty)) == 0.0
    assert float(jacobian_frobenius(torch.ones_like, z)) == 0.0
    assert float(spectral_penalty(torch.ones_like, z)) == 0.0


def test_without_a_generator_training_gets_fresh_noise_and_with_one_it_is_repeatable():
    f, z = (lambda z: torch.tanh(z @ torch.ones(6, 6) * 0.1)), torch.randn(3, 6)
    assert not torch.equal(jacobian_frobenius(f, z), jacobian_frobenius(f, z))
    drawn = [jacobian_frobenius(f, z, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, z: jacobian_frobenius(f, z, samples=0), "samples must be"),
        (lambda f, z: jacobian_frobenius(f, z, samples="all"), "samples must be"),
        (lambda f, z: jacobian_frobenius(f, z, reduction="sum"), "reduction must be"),
        (lambda f, z: spectral_penalty(f, z, measure="radios"), "Did you mean 'radius'"),
        (lambda f, z: spectral_penalty(f, z, target=-1.0), "target must be"),
        (lambda f, z: spectral_penalty(f, z, iterations=0), "iterations must be"),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(OptionError, match=message):
        call(lambda z: 0.5 * z, torch.ones(2, 3))


def test_a_context_that_does_not_fit_is_refused():
    with pytest.raises(MapError, match="2 rows"):
        jacobian_frobenius(lambda z, x: z + x, torch.ones(2, 3), torch.ones(3, 3))
