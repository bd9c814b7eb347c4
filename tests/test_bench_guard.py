"""A fixed set of solves, and what each may cost in operations and rows: a slow-down shows on any machine.

Counts are of torch operations that reach kernels (views left out) and of rows evaluated. They say nothing
about seconds, and do not move with the machine. Rows may differ by an evaluation or two where rounding moves
a row across its tolerance; operations have a margin of a tenth, so that small changes of bookkeeping pass. A
change that saves work may lower the figures here; one that raises them needs a reason.

The first figures are without the compiled kernels, which every machine can do; those with them come after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import twnn_plugin as tw
from benchmarks.harness import Counts, Executed, counted
from tests import problems
from tests.methods import NATIVE
from tests.streams import Mixed, mixed_batches
from twnn_plugin import kernels
from twnn_plugin.blocks import SolveSettings
from twnn_plugin.policies.constant import AlwaysPolicy, NeverPolicy
from twnn_plugin.selection import LayerSelection, selection_of
from twnn_plugin.sequence import RecurrentStack

pytestmark = pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")

ROWS, OPERATIONS = 0.06, 0.10


class Cost(NamedTuple):
    """Rows evaluated (products included), and operations."""

    rows: int
    operations: int


def solve(solver: str) -> Cost:
    """Rows of very different difficulty, without gradients."""
    p = problems.mixed()
    with torch.no_grad(), Executed() as executed:
        solution = tw.fix(p.f, p.z0, *p.context, solver=solver, tol=1e-6, max_iter=400)
    assert bool(solution.converged.all())
    return Cost(solution.evaluations, executed.operations.total())


def differentiate(adjoint: str) -> Cost:
    """Forward and backward of rows that are alike."""
    p = problems.vector()
    solver = adjoint if adjoint in tw.solvers.names() else "picard"
    counts = Counts()
    x = p.context[0].clone().requires_grad_()
    w = p.parameters[0].detach().clone().requires_grad_()
    f = counted(lambda z, x: torch.tanh(z @ w + x), counts)
    with Executed() as executed:
        solution = tw.fix(f, p.z0, x, solver=solver, adjoint=adjoint, tol=1e-6, max_iter=200)
        torch.autograd.grad(solution.value.sum(), [x, w])
    return Cost(counts.rows + counts.product_rows, executed.operations.total())


def network(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("twnn_resnet8_cifar", num_classes=5, max_iter=6, tol=1e-12, **options).eval()


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def plain_operations() -> int:
    torch.manual_seed(0)
    plain = timm.create_model("resnet8_cifar", num_classes=5).eval()
    with torch.no_grad(), Executed() as executed:
        plain(IMAGES)
    return executed.operations.total()


def wormhole(policy: str, train: bool, **options: object) -> Cost:
    """What a wormhole adds to the plain network's operations, forward, and backward in training."""
    model = network(policy=policy, solver="picard", **options).train(train)
    with torch.set_grad_enabled(train):
        model(IMAGES)  # the first pass sets things up
        with Executed() as executed:
            logits = model(IMAGES)
            if train:
                F.cross_entropy(logits, torch.arange(4)).backward()
    (record,) = tw.report(model)
    return Cost(record.evaluations, executed.operations.total() - (0 if train else plain_operations()))


class Layers(nn.Module):
    """Three layers of equal width and a head, of which a policy picks."""

    def __init__(self, policy: tw.policies.Policy):
        super().__init__()
        torch.manual_seed(2)
        self.parts = nn.ModuleDict(
            {f"layer{k}": nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for k in range(1, 4)}
        )
        layers = dict(self.parts.items())
        settings = SolveSettings(solver="picard", tol=1e-3, max_iter=10)
        self.selection = LayerSelection(
            layers, nn.Linear(8, 5), torch.zeros(2, 8), policy, max_choices=1, settings=settings
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.selection(x)


def select(policy: tw.policies.Policy) -> Cost:
    """Layers picked for eight samples in eval mode: rows of the solves, and of what is computed again."""
    model = Layers(policy).eval()
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(x)
        with Executed() as executed:
            model(x)
    selection = selection_of(model)
    assert selection is not None and selection.last is not None
    return Cost(int(sum(selection.last.rows)), executed.operations.total())


def streamed() -> Cost:
    """Continuous batching: rows, and evaluations in place of operations."""
    model = Mixed(solver="picard").eval()
    stream = tw.stream(model, mixed_batches(100, 8), 8)
    with torch.no_grad():
        list(stream)
    return Cost(sum(stream.report.fill), stream.report.evaluations)


def recurrent(window: int | None) -> Cost:
    """A wormhole through time, ten steps back over a hundred."""
    torch.manual_seed(4)
    options = {"wormholes": "layer0[t-10]->layer0", "gate": "always", "gate_over": "state"}
    stack = RecurrentStack("gru", 4, 8, **options, window=window, solver="picard", tol=1e-6).eval()
    x = torch.randn(2, 100, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        stack(x)
        with Executed() as executed:
            stack(x)
    (record,) = tw.report(stack)
    return Cost(record.evaluations, executed.operations.total())


SOLVES = {
    "ad_fixed_point": Cost(220, 855),
    "anderson": Cost(108, 615),
    "auto": Cost(105, 1353),
    "broyden": Cost(105, 1138),
    "newton_krylov": Cost(136, 3932),
    "picard": Cost(220, 855),
}
GRADIENTS = {
    "ad_fixed_point": Cost(366, 1409),
    "checkpointed": Cost(478, 1140),  # 1116 with torch 2.15, 1247 with 2.11
    "implicit": Cost(232, 1356),
    "one_step": Cost(168, 763),
    "phantom": Cost(204, 794),
    "unrolled": Cost(317, 987),
}
OTHERS: dict[str, tuple[Callable[[], Cost], Cost]] = {
    "wormhole, closed": (lambda: wormhole("never", False), Cost(0, 12)),
    "wormhole, open": (lambda: wormhole("always", False), Cost(24, 291)),
    "wormhole, closed, training": (lambda: wormhole("never", True), Cost(4, 429)),
    "wormhole, open, training": (lambda: wormhole("always", True), Cost(32, 1189)),
    "wormhole, open, unrolled": (lambda: wormhole("always", True, adjoint="unrolled"), Cost(24, 1497)),
    "selection, no layer": (lambda: select(NeverPolicy()), Cost(0, 92)),
    "selection, every layer": (lambda: select(AlwaysPolicy()), Cost(101, 560)),
    "stream": (streamed, Cost(871, 122)),
    "recurrent, iterated": (lambda: recurrent(None), Cost(12, 10653)),
    "recurrent, window by window": (lambda: recurrent(10), Cost(20, 1976)),
}
COMPILED = {
    "solver anderson": 123,
    "solver picard": 226,
    "adjoint ad_fixed_point": 320,
    "adjoint implicit": 277,
    "wormhole, open": 217,
    "wormhole, open, training": 1097,
    "selection, every layer": 356,
}
CASES: dict[str, tuple[Callable[[], Cost], Cost]] = {
    **{f"solver {name}": (lambda name=name: solve(name), cost) for name, cost in SOLVES.items()},
    **{f"adjoint {name}": (lambda name=name: differentiate(name), cost) for name, cost in GRADIENTS.items()},
    **OTHERS,
}


def test_the_set_is_complete():
    assert set(SOLVES) == set(NATIVE)
    assert set(GRADIENTS) == set(tw.adjoints.names())


@pytest.mark.parametrize("name", CASES)
def test_no_case_costs_more_than_it_did(name):
    run, known = CASES[name]
    with kernels.disabled():
        cost = run()
    assert abs(cost.rows - known.rows) <= ROWS * known.rows, cost
    assert 0 < cost.operations <= (1 + OPERATIONS) * known.operations, cost


@pytest.mark.skipif(not kernels.available(), reason=f"compiled kernels: {kernels.describe()}")
@pytest.mark.parametrize("name", COMPILED)
def test_no_case_costs_more_than_it_did_by_the_kernels(name):
    run, known = CASES[name]
    cost = run()
    assert abs(cost.rows - known.rows) <= ROWS * known.rows, cost
    assert 0 < cost.operations <= (1 + OPERATIONS) * COMPILED[name], cost


def test_a_slower_solver_is_caught(monkeypatch):
    """One needless evaluation an iteration, or one needless copy of the state, is more than the margin."""
    p = problems.mixed()
    run, known = CASES["solver picard"]
    fix = tw.fix

    def wasteful(f, z0, *context, **options):
        return fix(lambda z, *c: f(z, *c) + 0 * f(z, *c), z0, *context, **options)

    monkeypatch.setattr(tw, "fix", wasteful)
    with kernels.disabled():
        assert run().operations > (1 + OPERATIONS) * known.operations
    with torch.no_grad():
        slow = fix(p.f, p.z0, *p.context, solver=tw.solver("picard", damping=0.4), tol=1e-6, max_iter=400)
    assert slow.evaluations > (1 + ROWS) * known.rows


def test_multiply_adds_are_those_that_ran():
    """A closed wormhole executes the plain network's, an open one its replays' beside them."""
    counts = []
    for model in (copy.deepcopy(network(policy="never")), network(policy="always", solver="picard")):
        with torch.no_grad(), Executed() as executed:
            model(IMAGES)
        counts.append(executed.multiply_adds)
    (record,) = tw.report(model)
    assert counts[1] - counts[0] == pytest.approx(record.multiply_adds, rel=0.02)
    with torch.no_grad(), Executed() as executed:
        torch.randn(3, 4) @ torch.randn(4, 5)
    assert executed.multiply_adds == 60 and executed.operations["mm"] == 1
