"""`fix` is closed under AD: any order, either mode, every torch.func transform, right or refused."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import timm
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import twnn_plugin as tw
from tests.problems import relative

f64 = torch.float64
CLOSED = ["implicit", "ad_fixed_point"]
TIGHT = {"tol": 1e-13, "max_iter": 400}


def data():
    generator = torch.Generator().manual_seed(3)
    w = 0.25 * torch.randn(4, 4, generator=generator, dtype=f64)
    x = torch.randn(3, 4, generator=generator, dtype=f64)
    return w, x


def solve(w, x, adjoint="implicit", **options):
    """The weights closed over, the input as context."""

    def f(z, x):
        return torch.tanh(z @ w + x)

    return tw.fix(f, torch.zeros(3, 4, dtype=f64), x, adjoint=adjoint, **{**TIGHT, **options}).value


def unroll(w, x):
    z = torch.zeros(3, 4, dtype=f64)
    for _ in range(150):
        z = torch.tanh(z @ w + x)
    return z


def agree(mine, reference, bound=1e-10):
    flat = lambda out: out if isinstance(out, tuple) else (out,)  # noqa: E731
    for a, b in zip(flat(mine), flat(reference), strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < bound


def loss(value):
    def of(w, x):
        return value(w, x).pow(3).sum()

    return of


MANY = torch.stack([data()[0], 0.3 * data()[0], -data()[0]])
INPUTS = torch.stack([data()[1], 2 * data()[1], -data()[1]])

TRANSFORMS = {
    "grad": lambda f, w, x: grad(loss(f), (0, 1))(w, x),
    "vjp": lambda f, w, x: vjp(f, w, x)[1](x),
    "jvp": lambda f, w, x: jvp(f, (w, x), (w.T, x.flip(0)))[1],
    "jacrev": lambda f, w, x: jacrev(f, (0, 1))(w, x),
    "jacfwd": lambda f, w, x: jacfwd(f, (0, 1))(w, x),
    "hessian of weights": lambda f, w, x: hessian(loss(f))(w, x),
    "hessian of context": lambda f, w, x: hessian(loss(f), 1)(w, x),
    "grad of grad": lambda f, w, x: grad(lambda w: grad(loss(f))(w, x).pow(2).sum())(w),
    "jvp of grad": lambda f, w, x: jvp(lambda w: grad(loss(f))(w, x), (w,), (w.T,))[1],
    "grad of jvp": lambda f, w, x: grad(lambda w: jvp(lambda x: f(w, x), (x,), (x,))[1].pow(2).sum())(w),
    "jvp of jvp": lambda f, w, x: jvp(lambda w: jvp(lambda w: f(w, x), (w,), (w,))[1], (w,), (w.T,))[1],
    "jacfwd of jacfwd": lambda f, w, x: jacfwd(jacfwd(loss(f), 1), 1)(w, x),
    "third order": lambda f, w, x: jacrev(hessian(loss(f), 1), 1)(w, x),
    "vmap over weights": lambda f, w, x: vmap(lambda w: f(w, x))(MANY),
    "vmap over context": lambda f, w, x: vmap(lambda x: f(w, x))(INPUTS),
    "vmap over both, axes 0 and 1": lambda f, w, x: vmap(f, (0, 1))(MANY, INPUTS.transpose(0, 1)),
    "vmap of grad": lambda f, w, x: vmap(grad(loss(f), (0, 1)))(MANY, INPUTS),
    "grad of vmap": lambda f, w, x: grad(lambda many: vmap(loss(f))(many, INPUTS).sum())(MANY),
    "vmap of jvp, tangents mapped": lambda f, w, x: vmap(lambda t: jvp(lambda w: f(w, x), (w,), (t,))[1])(
        MANY
    ),
    "vmap of hessian": lambda f, w, x: vmap(hessian(loss(f), 1))(MANY, INPUTS),
    "vmap of vmap": lambda f, w, x: vmap(lambda w: vmap(lambda x: f(w * x.mean(), x))(INPUTS))(MANY),
}


@pytest.mark.parametrize("adjoint", CLOSED)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_agree_with_unrolling_to_machine_precision(name, adjoint):
    w, x = data()
    transform = TRANSFORMS[name]
    agree(transform(lambda w, x: solve(w, x, adjoint), w, x), transform(unroll, w, x))


@pytest.mark.parametrize("adjoint", CLOSED)
def test_gradcheck_of_every_kind(adjoint):
    w, x = (tensor.requires_grad_() for tensor in data())

    def value(w, x):
        return solve(w, x[:2].repeat(2, 1)[:3], adjoint)

    assert torch.autograd.gradcheck(value, (w, x), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(value, (w, x), check_fwd_over_rev=True)


@pytest.mark.parametrize("solver", ["gcr", "gmres", "bicgstab", "neumann", "auto", "anderson", "picard"])
def test_second_derivatives_by_every_adjoint_solver(solver):
    w, x = data()
    adjoint = tw.adjoint("implicit", solver=solver)
    w.requires_grad_()
    (first,) = torch.autograd.grad(loss(lambda w, x: solve(w, x, adjoint))(w, x), w, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), w)
    assert relative(second, grad(lambda w: grad(loss(unroll))(w, x).pow(2).sum())(w.detach())) < 1e-9


def test_backward_with_create_graph_fills_grads_as_without_it():
    w, x = data()
    w.requires_grad_()
    with warnings.catch_warnings():  # torch warns of the cycle that the last line breaks
        warnings.simplefilter("ignore")
        loss(solve)(w, x).backward(create_graph=True)
    assert w.grad is not None and relative(w.grad.detach(), grad(loss(unroll))(w.detach(), x)) < 1e-10
    w.grad = None


def test_forward_mode_by_dual_tensors():
    w, x = data()
    with forward_ad.dual_level():
        dual = solve(forward_ad.make_dual(w, w.T), x)
        primal, tangent = forward_ad.unpack_dual(dual)
    expected = jvp(lambda w: unroll(w, x), (w,), (w.T,))
    assert relative(primal, expected[0]) < 1e-11 and relative(tangent, expected[1]) < 1e-10


def test_the_joint_forward_transform_waits_for_the_tangent():
    # The primal settles at once (it starts at its fixed point); the tangent takes its own time.
    a = torch.full((1, 1), 0.9, dtype=f64)
    adjoint = tw.adjoint("ad_fixed_point")

    def f(z, x):
        return a * z + 0 * x

    def value(x):
        return tw.fix(lambda z, x: a * z + x, torch.zeros(1, 1, dtype=f64), x, solver="ad_fixed_point",
                      adjoint=adjoint, tol=1e-10, max_iter=500).value  # fmt: skip

    x = torch.zeros(1, 1, dtype=f64)
    assert abs(float(jvp(value, (x,), (torch.ones_like(x),))[1]) - 10.0) < 1e-7


def test_context_and_closed_over_tensors_of_higher_levels_together():
    w, x = data()
    b = torch.linspace(-1, 1, 4, dtype=f64)

    def nested(b):
        # Closed over: a plain tensor, one of this level, and one of the level inside.
        return grad(
            lambda s: tw.fix(lambda z, x: torch.tanh(s * (z @ w) + x + b), 0 * x, x, **TIGHT).value.sum()
        )(torch.tensor(0.7, dtype=f64))

    def reference(b):
        def inner(s):
            z = 0 * x
            for _ in range(150):
                z = torch.tanh(s * (z @ w) + x + b)
            return z.sum()

        return grad(inner)(torch.tensor(0.7, dtype=f64))

    agree(jacrev(nested)(b), jacrev(reference)(b))
    agree(jacfwd(nested)(b), jacfwd(reference)(b))


def test_tuple_and_dict_states():
    w, x = data()

    def both(w, x, kind):
        def f(state, x):
            a, b = (state["a"], state["b"]) if kind is dict else state
            new = torch.tanh(b @ w + x), 0.5 * a[:, :2]
            return (
                {"a": new[0], "b": torch.cat([new[1], new[1]], 1)}
                if kind is dict
                else (
                    new[0],
                    torch.cat([new[1], new[1]], 1),
                )
            )

        zeros = torch.zeros(3, 4, dtype=f64)
        z0 = {"a": zeros, "b": zeros} if kind is dict else (zeros, zeros)
        value = tw.fix(f, z0, x, **TIGHT).value
        return (value["a"] + value["b"] if kind is dict else value[0] + value[1]).pow(2).sum()

    def reference(w, x):
        a = b = torch.zeros(3, 4, dtype=f64)
        for _ in range(200):
            a, b = torch.tanh(b @ w + x), 0.5 * a[:, :2].repeat(1, 2)
        return (a + b).pow(2).sum()

    for kind in (dict, tuple):
        agree(hessian(lambda w, kind=kind: both(w, x, kind))(w), hessian(lambda w: reference(w, x))(w))


def test_modules_by_functional_call_and_as_an_ensemble():
    torch.manual_seed(0)
    cells = [torch.nn.Linear(4, 4).double() for _ in range(3)]
    x = data()[1]
    with torch.no_grad():
        for cell in cells:
            cell.weight *= 0.5
    parameters, _ = stack_module_state(cells)

    def value(parameters, x):
        cell = lambda z: functional_call(cells[0], parameters, z)  # noqa: E731
        return tw.fix(
            lambda z, x: torch.tanh(cell(z) + x), torch.zeros(3, 4, dtype=f64), x, **TIGHT
        ).value.sum()

    together = vmap(grad(value), (0, None))(parameters, x)
    for i, cell in enumerate(cells):
        solution = tw.fix(
            lambda z, x, cell=cell: torch.tanh(cell(z) + x), torch.zeros(3, 4, dtype=f64), x, **TIGHT
        )
        solution.value.sum().backward()
        assert cell.weight.grad is not None
        assert relative(together["weight"][i].detach(), cell.weight.grad) < 1e-10


def test_a_fix_inside_a_fix():
    w, x = data()

    def inner(w, y):
        return tw.fix(lambda u, y: torch.tanh(0.5 * (u @ w) + y), torch.zeros_like(y), y, **TIGHT).value

    def value(w, x):
        return tw.fix(lambda z, x: 0.4 * inner(w, z + x), torch.zeros(3, 4, dtype=f64), x, **TIGHT).value

    def reference(w, x):
        z = torch.zeros(3, 4, dtype=f64)
        for _ in range(60):
            u = torch.zeros(3, 4, dtype=f64)
            for _ in range(60):
                u = torch.tanh(0.5 * (u @ w) + z + x)
            z = 0.4 * u
        return z

    agree(grad(loss(value), (0, 1))(w, x), grad(loss(reference), (0, 1))(w, x))
    leaf = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(value)(leaf, x), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert relative(second, grad(lambda w: grad(loss(reference))(w, x).sum())(w)) < 1e-9


def test_initial_state_has_a_gradient_of_zeros():
    w, x = data()

    def value(z0):
        return tw.fix(lambda z, x: torch.tanh(z @ w + x), z0, x, **TIGHT).value.sum()

    assert torch.equal(grad(value)(0.1 * x), torch.zeros_like(x))
    z0 = (0.1 * x).requires_grad_()
    assert torch.equal(torch.autograd.grad(value(z0), z0)[0], torch.zeros_like(x))


def test_rows_leave_and_are_reported_under_vmap():
    rate = torch.tensor([[0.05], [0.5], [0.95]], dtype=f64)
    x = data()[1]
    seen = []

    def one(scale):
        solution = tw.fix(lambda z, x, r: torch.tanh(r * z + x), torch.zeros(3, 4, dtype=f64), scale * x,
                          rate, tol=1e-10, max_iter=500, solver="picard")  # fmt: skip
        seen.append(solution.evaluations)
        return solution.steps, solution.status

    steps, status = vmap(one)(torch.tensor([0.1, 1.0], dtype=f64))
    assert steps.shape == (2, 3) and bool((status == 0).all())
    for i, scale in enumerate((0.1, 1.0)):
        alone = tw.fix(lambda z, x, r: torch.tanh(r * z + x), torch.zeros(3, 4, dtype=f64), scale * x,
                       rate, tol=1e-10, max_iter=500, solver="picard")  # fmt: skip
        assert torch.equal(steps[i], alone.steps)
    assert seen[0] < 6 * int(steps.max())


def test_callbacks_and_observers_see_the_solve_inside_a_transform():
    w, x = data()
    trace = tw.Trace()
    grad(lambda w: solve(w, x, callback=trace).sum())(w)
    assert trace.residual.shape[0] == 3 and float(trace.residual[:, -1].nan_to_num().max()) < 1e-12
    tw.register_plugin(trace, "inside transforms")
    try:
        vmap(lambda x: solve(w, x))(INPUTS)
    finally:
        tw.unregister_plugin("inside transforms")
    assert trace.residual.shape[0] == 9  # the rows of all instances


def test_failures_warn_and_throw_under_vmap():
    x = torch.ones(2, 3, 1, dtype=f64)

    def one(x, **options):
        return tw.fix(lambda z, x: 2 * z + x, 0 * x, x, solver="picard", tol=1e-6, **options).value

    with pytest.warns(tw.ConvergenceWarning, match="6 of 6 rows"):
        vmap(one)(x)
    with pytest.raises(tw.FixedPointError, match="6 of 6 rows"):
        vmap(lambda x: one(x, throw=True))(x)


def test_a_row_with_nan_poisons_nothing_in_any_mode():
    w, x = data()
    x[1] = float("nan")

    def value(w):
        with pytest.warns(tw.ConvergenceWarning):
            out = tw.fix(lambda z, x: torch.tanh(z @ w + x), torch.zeros(3, 4, dtype=f64), x, **TIGHT).value
        return out[torch.tensor([0, 2])].pow(2).sum()

    good = x[torch.tensor([0, 2])]

    def reference(w):
        z = torch.zeros(2, 4, dtype=f64)
        for _ in range(150):
            z = torch.tanh(z @ w + good)
        return z.pow(2).sum()

    agree(grad(value)(w), grad(reference)(w))
    agree(jacfwd(value)(w), jacfwd(reference)(w))
    agree(hessian(value)(w), hessian(reference)(w))
    leaf = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    agree(second, grad(lambda w: grad(reference)(w).sum())(w))


class Square(torch.autograd.Function):
    """A function with its own derivative."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize(
    "f",
    [
        lambda z, x, w: torch.tanh(0.1 * Square.apply(z) @ w + x),
        lambda z, x, w: torch.tanh(0.1 * (z @ Square.apply(w)) + x),
        lambda z, x, w: Square.apply(torch.tanh(0.1 * z @ w + x)),
    ],
    ids=["inside", "of a closed-over tensor", "last"],
)
def test_custom_functions_are_converted(f):
    w, x = data()

    def value(w):
        return tw.fix(lambda z, x: f(z, x, w), torch.zeros(3, 4, dtype=f64), x, **TIGHT).value.sum()

    leaf = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)

    def unrolled(w):
        z = torch.zeros(3, 4, dtype=f64)
        for _ in range(200):
            z = f(z, x, w)
        return z.sum()

    agree(grad(value)(w), grad(unrolled)(w))  # inside torch.func a custom Function is seen
    other = w.clone().requires_grad_()
    assert relative(first.detach(), torch.autograd.grad(unrolled(other), other)[0]) < 1e-9
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert relative(second, grad(lambda w: grad(unrolled)(w).sum())(w)) < 1e-9


def test_what_torch_functions_do_not_see_is_refused():
    w, x = data()

    def f(z, x, w):
        with torch._C.DisableTorchFunction():  # stands for code in another language
            product = z @ w
        return torch.tanh(product + x)

    def value(w):
        return tw.fix(lambda z, x: f(z, x, w), torch.zeros(3, 4, dtype=f64), x, **TIGHT).value.sum()

    with pytest.raises(tw.MapError, match="torch functions do not see"):
        grad(value)(w)
    leaf = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    assert relative(first.detach(), grad(lambda w: unroll(w, x).sum())(w)) < 1e-9
    with pytest.raises(RuntimeError, match="torch functions do not see"):
        torch.autograd.grad(first.sum(), leaf)


def test_a_tensor_that_f_makes_once_and_keeps():
    w, x = data()
    cache = {}

    def f(z, x):
        if "bias" not in cache:
            cache["bias"] = torch.linspace(0, 1, 4, dtype=f64)
        return torch.tanh(z @ w + x + cache["bias"])

    leaf = x.clone().requires_grad_()
    value = tw.fix(f, 0 * x, leaf, **TIGHT).value
    (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    cache.clear()

    def reference(x):
        z = 0 * x
        for _ in range(150):
            z = torch.tanh(z @ w + x + torch.linspace(0, 1, 4, dtype=f64))
        return z.sum()

    assert relative(second, grad(lambda x: grad(reference)(x).sum())(x)) < 1e-9


@pytest.mark.parametrize("adjoint", ["one_step", "phantom"])
def test_approximate_adjoints_refuse_what_they_have_no_derivative_for(adjoint):
    w, x = data()
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(solve(w, leaf, adjoint).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="approximates the first derivative"):
        torch.autograd.grad(first.sum(), leaf)
    with pytest.raises(tw.TransformError, match="implicit"):
        grad(lambda x: solve(w, x, adjoint).sum())(x)


@pytest.mark.parametrize("name", ["grad", "jvp", "jacrev", "hessian of context"])
def test_unrolled_goes_through_transforms_by_itself(name):
    w, x = data()
    transform = TRANSFORMS[name]
    if name == "jacrev":
        with pytest.raises(RuntimeError):
            vmap(lambda x: solve(w, x, "unrolled"))(INPUTS)
    agree(transform(lambda w, x: solve(w, x, "unrolled"), w, x), transform(unroll, w, x), 1e-8)


def test_a_solution_is_freed_without_the_garbage_collector():
    w, x = data()
    w.requires_grad_()

    def f(z, x):
        return torch.tanh(z @ w + x)

    gc.disable()
    try:
        for second in (False, True):
            solution = tw.fix(f, torch.zeros(3, 4, dtype=f64), x, **TIGHT)
            (g,) = torch.autograd.grad(solution.value.sum(), w, create_graph=second)
            watch = weakref.ref(solution.value)
            del solution, g
            assert watch() is None
    finally:
        gc.enable()


def test_warm_start_saves_products_where_the_same_rows_come_again():
    w, x = data()
    w = (3.2 * w).requires_grad_()
    spent = {}
    for warm in (False, True):
        adjoint = tw.adjoint("implicit", solver="picard", warm_start=warm, max_iter=500)
        for _ in range(2):
            solution = tw.fix(
                lambda z, x: torch.tanh(z @ w + x), 0 * x, x, adjoint=adjoint, tol=1e-10, max_iter=500
            )
            (g,) = torch.autograd.grad(solution.value.pow(2).sum(), w)
        assert solution.adjoint is not None and bool((solution.adjoint.status == 0).all())
        spent[warm] = int(solution.adjoint.steps.max()), g
    assert spent[True][0] <= 3 < spent[False][0]
    assert relative(spent[True][1], spent[False][1]) < 1e-8


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_gradient_penalty_through_a_wormhole_network(mode):
    torch.manual_seed(0)
    options = {"num_classes": 4, "policy": "always", "tol": 1e-7, "max_iter": 300, "solver": "picard"}
    model = getattr(timm.create_model("twnn_resnet8_cifar", **options).double(), mode)()
    x = torch.randn(2, 3, 16, 16, dtype=f64, requires_grad=True)
    found = {}
    for adjoint in ("implicit", "unrolled"):
        tw.configure(model, adjoint=adjoint)
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        seconds = torch.autograd.grad(g.square().sum(), list(model.parameters()), allow_unused=True)
        found[adjoint] = torch.cat([second.flatten() for second in seconds if second is not None])
    assert relative(found["implicit"], found["unrolled"]) < 1e-4


def test_one_tensor_as_context_twice():
    w, x = data()

    def value(x):
        return (
            tw.fix(lambda z, a, b: torch.tanh(z @ w + a * b + 2 * a), 0 * x, x, x, **TIGHT).value.pow(2).sum()
        )

    def reference(x):
        z = 0 * x
        for _ in range(150):
            z = torch.tanh(z @ w + x * x + 2 * x)
        return z.pow(2).sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    agree(first.detach(), grad(reference)(x))
    agree(second, grad(lambda x: grad(reference)(x).sum())(x))
    agree(hessian(value)(x), hessian(reference)(x))


@pytest.mark.parametrize("mapped", ["context", "weight"])
def test_steps_that_are_recorded_cannot_be_mapped_over(mapped):
    def value(x, w):
        return tw.fix(lambda z, x: 0.2 * z @ w + x, torch.zeros(2, 2), x, adjoint="unrolled").value

    x, w = torch.ones(3, 2, 2), torch.eye(2).expand(3, 2, 2)
    dims = (0, None) if mapped == "context" else (None, 0)
    with pytest.raises(tw.TransformError, match="cannot map over adjoint='unrolled'"):
        vmap(value, dims)(*(t if dim == 0 else t[0] for t, dim in zip((x, w), dims, strict=True)))
