"""Solvers and adjoints with one fault each, which the conformance suite must find."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from twnn_plugin.adjoints import Adjoint
from twnn_plugin.solvers import Outcome, StepSolver, WholeSolver
from twnn_plugin.solvers.driver import drive
from twnn_plugin.solvers.picard import Picard
from twnn_plugin.types import AdjointReport, Status


class Plain(StepSolver):
    """Plain iteration: sound."""

    def step(self, problem, z, fz, r, state):
        return fz, None

    def __eq__(self, other):
        return type(self) is type(other)


class ClaimsConvergence(WholeSolver):
    def solve(self, problem, z, control):
        outcome = drive(Picard(), problem, z, control)
        return replace(outcome, status=torch.zeros_like(outcome.status))


class HidesNonFinite(WholeSolver):
    def solve(self, problem, z, control):
        outcome = drive(Picard(), problem, z, control)
        lost = outcome.status == int(Status.non_finite)
        return replace(outcome, status=outcome.status.masked_fill(lost, int(Status.max_iter)))


class IgnoresMaxIter(WholeSolver):
    def solve(self, problem, z, control):
        return drive(Picard(), problem, z, replace(control, max_iter=4 * control.max_iter))


class ReturnsTheGuess(WholeSolver):
    """torchdeq's anderson for max_iter <= 2."""

    def solve(self, problem, z, control):
        if control.max_iter > 2:
            return drive(Picard(), problem, z, control)
        problem.evaluate(z)
        one = torch.ones(len(z), dtype=torch.long)
        return Outcome(z.clone(), one * int(Status.max_iter), one, 1e8 * one.double())


class NoCallback(WholeSolver):
    def solve(self, problem, z, control):
        return drive(Picard(), problem, z, replace(control, callback=None))


class KeepsEverybody(WholeSolver):
    def solve(self, problem, z, control):
        problem.can_leave = False
        return drive(Picard(), problem, z, control)


class Miscounts(WholeSolver):
    def solve(self, problem, z, control):
        outcome = drive(Picard(), problem, z, control)
        problem.evaluations = int(outcome.steps.sum())
        return outcome


class StopsWithTheWorstRow(WholeSolver):
    """One decision for the batch: finished rows go on being iterated."""

    def solve(self, problem, z, control):
        step = 0
        while step < control.max_iter:
            step += 1
            fz = problem.evaluate(z)
            residual = (fz - z).norm(dim=1) / (fz.norm(dim=1) + 1e-9)
            if bool((residual <= control.tol).all()):
                break
            z = fz
        status = torch.where(residual <= control.tol, int(Status.converged), int(Status.max_iter))
        return Outcome(z, status, torch.full_like(status, step), residual)


class LooksAtTheBatch(Plain):
    def step(self, problem, z, fz, r, state):
        return fz + 1e-3 * r.mean(0), None


class WritesInPlace(Plain):
    def step(self, problem, z, fz, r, state):
        return z.add_(r), None


class Detaches(Plain):
    def step(self, problem, z, fz, r, state):
        return fz.detach(), None


class DividesByZero(Plain):
    """The branch that is not taken has a NaN derivative."""

    def step(self, problem, z, fz, r, state):
        zero = (r - r).sum(1, keepdim=True)
        ratio = (r * r).sum(1, keepdim=True) / zero
        return z + torch.where(torch.isfinite(ratio), ratio, 1.0).clamp(max=1.0) * r, None


class Draws(Plain):
    def step(self, problem, z, fz, r, state):
        return z + (0.5 + 0.5 * torch.rand_like(r)) * r, None


class SinglePrecision(Plain):
    def step(self, problem, z, fz, r, state):
        return fz.float().to(fz.dtype), None


class NeedsFloat64(Plain):
    def step(self, problem, z, fz, r, state):
        return z + torch.einsum("bd,de->be", r, torch.eye(r.shape[1], dtype=torch.float64)), None


class Hoards(Plain):
    def init(self, z):
        return ()

    def step(self, problem, z, fz, r, state):
        return fz, (*state, r)


class StaysOld(Plain):
    """Rows that start anew go on with the step size of those that were there."""

    def init(self, z):
        return z.new_full((len(z), 1), 0.5)

    def renew(self, state, rows, z):
        return state

    def step(self, problem, z, fz, r, state):
        return z + state * r, 1 - 0.9 * (1 - state)


class OtherwiseCompiled(Plain):
    """What it gives to be taken instead of its steps stands still."""

    def compiled(self):
        return Picard(damping=1e-3)


class EvaluatesTwice(Plain):
    def step(self, problem, z, fz, r, state):
        return problem.evaluate(fz), None


class Remembers(Plain):
    """The last call's result leaks into the next one."""

    last = None

    def init(self, z):
        self.last, last = z.sum() + 1, self.last
        return 0.0 if last is None else 1e-3

    def step(self, problem, z, fz, r, state):
        return z + (1 - state) * r, state


@dataclass(frozen=True)
class AcceptsAnything(StepSolver):
    damping: float = 1.0

    def step(self, problem, z, fz, r, state):
        return z + self.damping * r, None


class LetsCoupledRowsGo(WholeSolver):
    def solve(self, problem, z, control):
        return drive(Picard(), problem, z, replace(control, coupled=False))


class LooksAtTheWholeState(WholeSolver):
    """One norm over all tensors of a state, whatever their units."""

    def solve(self, problem, z, control):
        return drive(Picard(), problem, z, replace(control, parts=()))


class FloorsTheTolerance(WholeSolver):
    def solve(self, problem, z, control):
        return drive(Picard(), problem, z, replace(control, tol=max(control.tol, 1e-9)))


class Clamps(Plain):
    """Takes states for those of a bounded activation."""

    def step(self, problem, z, fz, r, state):
        return fz.clamp(-100, 100), None


class GivesUpEarly(WholeSolver):
    def solve(self, problem, z, control):
        return drive(Picard(), problem, z, replace(control, max_iter=(control.max_iter + 1) // 2))


class TakesTheLastForTooLate(WholeSolver):
    """What converges in the last evaluation is called out of evaluations."""

    def solve(self, problem, z, control):
        outcome = drive(Picard(), problem, z, control)
        late = (outcome.steps == control.max_iter) & (outcome.status == int(Status.converged))
        return replace(outcome, status=outcome.status.masked_fill(late, int(Status.max_iter)))


class ReportsFloats(WholeSolver):
    def solve(self, problem, z, control):
        outcome = drive(Picard(), problem, z, control)
        return replace(outcome, status=outcome.status.double(), steps=outcome.steps.double())


class ShowsItsBuffer(WholeSolver):
    """What the callback was shown is written over in the next step."""

    def solve(self, problem, z, control):
        buffers = {}

        def show(seen):
            buffer = buffers.setdefault(seen.value.shape, torch.empty_like(seen.value))
            control.callback(replace(seen, value=buffer.copy_(seen.value)))

        callback = None if control.callback is None else show
        return drive(Picard(), problem, z, replace(control, callback=callback))


class SwallowsErrors(WholeSolver):
    def solve(self, problem, z, control):
        try:
            return drive(Picard(), problem, z, control)
        except Exception:
            status = torch.full((len(z),), int(Status.non_finite))
            return Outcome(z.clone(), status, torch.ones_like(status), torch.full((len(z),), math.inf))


class SeedsTheWorld(Plain):
    def init(self, z):
        torch.manual_seed(0)


class SwitchesGradientsOff(WholeSolver):
    def solve(self, problem, z, control):
        torch.set_grad_enabled(False)
        return drive(Picard(), problem, z, control)


class KeepsTheProblem(WholeSolver):
    def solve(self, problem, z, control):
        self.last = problem
        return drive(Picard(), problem, z, control)


class LeavesAutocast(WholeSolver):
    def solve(self, problem, z, control):
        with torch.autocast("cpu", enabled=False):
            return drive(Picard(), problem, z, control)


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, fz):
        return z + 0.9 * (fz - z)

    @staticmethod
    def backward(ctx, g):
        return 0.1 * g.detach(), 0.9 * g.detach()


class FirstOrderOnly(Plain):
    """Its step has a backward that is no function for autograd, and does not say so."""

    def step(self, problem, z, fz, r, state):
        return _Averaged.apply(z, fz), None


class IgnoresTheIncomingGradient(WholeSolver):
    """Takes the residual relative to the state where the caller says what to."""

    def solve(self, problem, z, control):
        return drive(Picard(), problem, z, replace(control, scale=None))


SOLVERS = {
    ClaimsConvergence: ("converged_means_converged", "throw"),
    HidesNonFinite: ("statuses",),
    IgnoresMaxIter: ("budget",),
    ReturnsTheGuess: ("few_evaluations",),
    NoCallback: ("callback", "frozen_rows"),
    StaysOld: ("rows_that_start_anew",),
    OtherwiseCompiled: ("kernels_change_nothing",),
    KeepsEverybody: ("rows_leave",),
    Miscounts: ("rows_leave",),
    StopsWithTheWorstRow: ("neighbours", "frozen_rows"),
    LooksAtTheBatch: ("neighbours",),
    WritesInPlace: ("inputs_are_left_alone", "backward_solve"),
    Detaches: ("unrolled_gradient",),
    DividesByZero: ("unrolled_gradient",),
    Draws: ("deterministic", "copies", "grad_modes"),
    SinglePrecision: ("solves_contractions", "structures", "shapes"),
    NeedsFloat64: ("dtypes", "autocast"),
    Hoards: ("bounded_memory",),
    EvaluatesTwice: ("budget",),
    Remembers: ("deterministic",),
    AcceptsAnything: ("options",),
    LetsCoupledRowsGo: ("coupled_rows",),
    LooksAtTheWholeState: ("every_part_settles", "structures"),
    FloorsTheTolerance: ("tight_tolerances",),
    Clamps: ("large_states",),
    GivesUpEarly: ("budget_is_used",),
    TakesTheLastForTooLate: ("budget_is_used",),
    ReportsFloats: ("reports_are_integers",),
    ShowsItsBuffer: ("what_the_callback_sees",),
    SwallowsErrors: ("errors_pass",),
    SeedsTheWorld: ("settings",),
    SwitchesGradientsOff: ("settings",),
    KeepsTheProblem: ("nothing_is_kept",),
    LeavesAutocast: ("autocast_reaches_f",),
    FirstOrderOnly: ("unrolled_second_derivative",),
    IgnoresTheIncomingGradient: ("backward_tolerance",),
}
"""Each broken solver with the checks that must find it."""


class Hooked(Adjoint):
    """The implicit gradient by a hook, as torchdeq does it: a plain backward iteration.

    Its parts can be broken one by one.
    """

    exact = True
    products = 400
    tol = 1e-12

    def run(self, call, reports):
        with torch.no_grad():
            outcome = call.solve()
        if not torch.is_grad_enabled() or not len(outcome.value):
            return outcome
        good = torch.isfinite(outcome.value).all(dim=1) if self.leaves_out_broken_rows() else slice(None)
        z = outcome.value[good].detach().requires_grad_()
        context = tuple(c[good] for c in call.context)
        fz = call.layout.pack(call.f(call.layout.unpack(z), *context), len(z))
        if not fz.requires_grad or fz.grad_fn is None or not self.wanted(fz, z):
            return outcome
        value = _Pulled.apply(fz, z, lambda g: self.pull(fz, z, g, reports))
        if len(value) == len(outcome.value):
            return replace(outcome, value=self.value(value, call))
        whole = outcome.value.clone()
        whole[good] = self.value(value, call)
        return replace(outcome, value=whole)

    def leaves_out_broken_rows(self):
        return True

    def wanted(self, fz, z):
        # Without the state's share, does anything want a gradient?
        with torch.enable_grad():
            seen, stack = set(), [fz.grad_fn]
        leaves = []
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            stack += [parent for parent, _ in node.next_functions]
        return any(leaf is not z for leaf in leaves)

    def value(self, value, call):
        return value

    def small_enough(self, change, g):
        tol = max(self.tol, 4 * torch.finfo(g.dtype).eps)
        return bool((change.norm(dim=1) <= tol * g.norm(dim=1)).all())

    def pull(self, fz, z, g, reports):
        u, steps = g, 0
        while steps < self.products:
            steps += 1
            (product,) = torch.autograd.grad(fz, z, u, retain_graph=True)
            u, change = product + g, product + g - u
            if self.small_enough(change, g):
                break
        self.report(reports, g, steps, change.norm(dim=1) / g.norm(dim=1).clamp_min(1e-300))
        return u

    def report(self, reports, g, steps, residual):
        status = torch.where(residual <= 1e-6, int(Status.converged), int(Status.max_iter))
        reports.append(
            AdjointReport("hooked", True, status, torch.full_like(status, steps), residual, steps * len(g))
        )

    def __eq__(self, other):
        return type(self) is type(other)


class _Pulled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fz, z, pull):
        ctx.pull = pull
        return z.detach().clone()

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return ctx.pull(g), None, None


class OneStepInDisguise(Hooked):
    """Says that it is exact."""

    def pull(self, fz, z, g, reports):
        self.report(reports, g, 1, torch.zeros(len(g)))
        return g


class AbsoluteTolerance(Hooked):
    def small_enough(self, change, g):
        return float(change.abs().max()) < max(1e-9, torch.finfo(g.dtype).eps)


class PoisonedByNaN(Hooked):
    def leaves_out_broken_rows(self):
        return False


class NoReport(Hooked):
    def report(self, reports, g, steps, residual):
        pass


class ClaimsBackwardConvergence(Hooked):
    products = 3

    def report(self, reports, g, steps, residual):
        super().report(reports, g, steps, torch.zeros_like(residual))


class MeanOfTheBatch(Hooked):
    def pull(self, fz, z, g, reports):
        u = super().pull(fz, z, g, reports)
        return u + 1e-3 * u.mean(0)


class WritesIntoTheGradient(Hooked):
    def pull(self, fz, z, g, reports):
        return super().pull(fz, z, g.mul_(2.0), reports) / 2.0


class AnotherValue(Hooked):
    def value(self, value, call):
        return value + 1e-6


class ThroughTheLoopInDisguise(Hooked):
    def run(self, call, reports):
        return call.solve()


class ForgetsTheWeights(Hooked):
    """Sees what it is given and not what f closes over."""

    def run(self, call, reports):
        with torch.no_grad():
            outcome = call.solve()
        if not torch.is_grad_enabled():
            return outcome
        z = outcome.value
        total = sum(c.sum() for c in call.context if c.requires_grad)
        return replace(outcome, value=z + 0 * total)


class GrowsGradients(Hooked):
    """A dtype of its own."""

    def pull(self, fz, z, g, reports):
        u = super().pull(fz, z, g, reports)
        return u * (1.5 if g.dtype == torch.float32 else 1.0)


class LosesTheGraph(Hooked):
    def run(self, call, reports):
        with torch.no_grad():
            return call.solve()


@dataclass(frozen=True)
class TakesAnyTolerance(Adjoint):
    tol: float = 1e-3

    exact = True

    def run(self, call, reports):
        return call.solve()


class ChoosesTheSolver(Hooked):
    """Solves forward by plain iteration, whatever was asked for."""

    def run(self, call, reports):
        return super().run(replace(call, solver=Picard()), reports)


class SolvesTightly(Hooked):
    """Solves forward to its own tolerance."""

    def run(self, call, reports):
        return super().run(replace(call, control=replace(call.control, tol=1e-13)), reports)


class KnowsItsLastCall(Hooked):
    """The backward pass of every call looks at the newest one."""

    def pull(self, fz, z, g, reports):
        return super().pull(*self.last, g, reports)

    def wanted(self, fz, z):
        self.last = fz, z
        return super().wanted(fz, z)


class NormOfTheBatch(Hooked):
    def small_enough(self, change, g):
        return bool(change.norm() <= max(self.tol, 4 * torch.finfo(g.dtype).eps) * g.norm())


class CastsContext(Hooked):
    def run(self, call, reports):
        return super().run(replace(call, context=tuple(c.to(call.z0.dtype) for c in call.context)), reports)


class TakesTwiceForOnce(Hooked):
    """Of a tensor that is context twice, one place gets its gradient."""

    def run(self, call, reports):
        seen, context = set(), []
        for tensor in call.context:
            context.append(tensor.detach() if id(tensor) in seen else tensor)
            seen.add(id(tensor))
        return super().run(replace(call, context=tuple(context)), reports)


class FillsGrad(Hooked):
    def pull(self, fz, z, g, reports):
        u = super().pull(fz, z, g, reports)
        with torch.enable_grad():
            fz.backward(u, retain_graph=True)
        return u


class NeedsADenseGradient(Hooked):
    def pull(self, fz, z, g, reports):
        return super().pull(fz, z, g.view(-1).view(g.shape), reports)


class DividesByTheGradient(Hooked):
    def pull(self, fz, z, g, reports):
        size = g.norm(dim=1, keepdim=True)
        return super().pull(fz, z, g / size, reports) * size


class CountsOneProduct(Hooked):
    def report(self, reports, g, steps, residual):
        super().report(reports, g, 1, residual)


class ReportsBeforeItRan(Hooked):
    def run(self, call, reports):
        self.report(reports, call.z0, 1, torch.zeros(len(call.z0)))
        return super().run(call, [])


class MixesUpItsReport(Hooked):
    tol = 1e-4

    def report(self, reports, g, steps, residual):
        super().report(reports, g, steps, residual.flip(0))


class GivesTheGuessForAnError(Hooked):
    def run(self, call, reports):
        try:
            return super().run(call, reports)
        except Exception:
            status = torch.full((len(call.z0),), int(Status.non_finite))
            return Outcome(call.z0, status, status, torch.full((len(call.z0),), math.inf))


class KeepsItsCalls(Hooked):
    def run(self, call, reports):
        self.call = call
        return super().run(call, reports)


ADJOINTS = {
    OneStepInDisguise: ("gradients", "converged_means_right"),
    AbsoluteTolerance: ("tolerance_is_relative",),
    PoisonedByNaN: ("broken_rows_stay_out",),
    NoReport: ("report",),
    ClaimsBackwardConvergence: ("converged_means_right",),
    MeanOfTheBatch: ("neighbours_of_gradients",),
    WritesIntoTheGradient: ("gradients_leave_inputs_alone", "backward_twice"),
    AnotherValue: ("value",),
    ThroughTheLoopInDisguise: ("memory", "initial_state"),
    ForgetsTheWeights: ("every_input_gets_its_gradient",),
    GrowsGradients: ("gradient_dtypes",),
    LosesTheGraph: ("empty_and_single", "value"),
    TakesAnyTolerance: ("adjoint_options",),
    ChoosesTheSolver: ("forward_solve",),
    SolvesTightly: ("forward_solve",),
    KnowsItsLastCall: ("calls_do_not_mix",),
    NormOfTheBatch: ("tolerance_of_rows",),
    CastsContext: ("contexts_of_any_kind",),
    TakesTwiceForOnce: ("contexts_of_any_kind",),
    FillsGrad: ("only_asked_gradients",),
    NeedsADenseGradient: ("any_incoming_gradient",),
    DividesByTheGradient: ("any_incoming_gradient",),
    CountsOneProduct: ("counted_products",),
    ReportsBeforeItRan: ("counted_products",),
    MixesUpItsReport: ("reported_residuals",),
    GivesTheGuessForAnError: ("errors_pass_through",),
    KeepsItsCalls: ("nothing_stays_behind",),
    # Wrong without a word, as torchdeq's are:
    Hooked: ("second_derivatives", "third_derivatives", "gradient_penalty"),
}
"""Each broken adjoint with the checks that must find it."""
