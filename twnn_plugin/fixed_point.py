"""``fix``: solve ``z = f(z, *context)`` and carry the derivatives of the solution."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Never

import torch
from torch import Tensor

from . import adjoints, observe, solvers, transforms
from .adjoints import Adjoint, Call
from .errors import (
    ConvergenceWarning,
    FixedPointError,
    MapError,
    OptionError,
    UnknownNameError,
    nearest,
)
from .solvers import Control, Solver, linear
from .solvers.base import is_number
from .solvers.measure import kinds
from .state import Layout, check_dense, outside_inference
from .types import AdjointReport, Iteration, Solution, State, Status, describe

__all__ = ["check_control", "fix", "run"]

STOPS = ("rel", "abs")
NORMS = ("l2", "max")


def fix(
    f: Callable[..., State],
    z0: State,
    *context: Tensor,
    solver: str | Solver = "anderson",
    adjoint: str | Adjoint = "implicit",
    tol: float = 1e-4,
    max_iter: int = 50,
    stop: str = "rel",
    norm: str = "l2",
    throw: bool = False,
    coupled: bool = False,
    callback: Callable[[Iteration], None] | None = None,
    check_every: int | None = None,
    cuda_graphs: bool = False,
    **unknown: Never,
) -> Solution:
    """Solve the fixed-point equation ``z = f(z, *context)`` for every row of a batch.

    The iterate-to-fixed-point operator of Habiba & Pearlmutter (2021), equations 3 and 7, with
    its derivatives (equation 8 by default), of any order, in either mode and under ``torch.func`` with
    the adjoints ``"implicit"`` and ``"ad_fixed_point"``. Rows are independent: each has its own
    status, steps and residual, and leaves the batch when it is done, forward and backward, provided
    that what differs between rows is passed as context.

    Args:
        f: ``f(z, *context) -> z_next``, of the same structure, shapes and dtypes. Parameters and
            other tensors that it closes over get gradients without being listed; tensors with one
            row per sample must be context. It must be deterministic, and stay the same function until the
            last backward pass (``docs/derivatives.md``: what may change in between).
        z0: starting state: a floating-point tensor (B, ...), or a tuple or dict of them.
        *context: tensors (B, ...) handed to ``f``, gathered as rows leave. Without context no row
            leaves; finished rows are evaluated to the end and ignored.
        solver: registered name, ``tw.solver(name, ...)`` or an instance.
        adjoint: registered name, ``tw.adjoint(name, ...)`` or an instance.
        tol: a row has converged when its residual is at most this. > 0.
        max_iter: evaluations of ``f`` per row at most. >= 1.
        stop: ``"rel"``: residual ``||f(z) - z|| / (||f(z)|| + 1e-9)``, of a tuple or dict that of every
            tensor in it, whatever their units; ``"abs"``: ``||f(z) - z||``.
        norm: per row, ``"l2"``, or ``"max"``: the largest change at any position against the rms
            state, which long inputs need.
        throw: raise instead of warning when rows fail.
        coupled: the rows of ``f`` influence each other: none leaves before all have converged.
        callback: called with an :class:`~twnn_plugin.types.Iteration` after each evaluation.
        check_every: evaluations between two looks of the host at which rows are done, >= 1; ``None``: 1 on
            the CPU, 5 on an accelerator. Results do not depend on it; rows are evaluated for at most
            that many steps in vain, and a GPU is not held up at every step.
        cuda_graphs: replay the evaluations between two looks as CUDA graphs. For small states, where the
            launches of kernels are the time, and solves of many such stretches: the first of each kind and
            batch size is run as it is, the second captured. ``f`` must be capturable: no host
            synchronisation, no shapes that depend on values.
        **unknown: no other option exists; any raises, with the nearest name.

    Returns:
        A :class:`~twnn_plugin.types.Solution`.

    Raises:
        OptionError: an option does not exist or is out of range, such as a ``tol`` that ``stop="abs"`` could
            not tell from zero in the state's dtype.
        UnknownNameError: no such solver or adjoint; the message has the nearest name.
        MapError: ``f`` changes structure, shape, dtype or device, a context tensor has another batch size, or
            a tensor is sparse, or the state is on the meta device.
        TransformError: the adjoint does not go with ``torch.func`` or forward-mode AD.
        FixedPointError: with ``throw=True``, rows did not converge; it holds the solution.

    Example:
        >>> import torch, twnn_plugin as tw
        >>> w = torch.nn.Parameter(0.1 * torch.randn(8, 8))
        >>> x = torch.randn(4, 8)
        >>> solution = tw.fix(lambda z, x: torch.tanh(z @ w + x), torch.zeros(4, 8), x)
        >>> solution.value.sum().backward()
    """
    if unknown:
        raise _unknown(unknown)
    control = check_control(tol, max_iter, stop, norm, coupled, callback, check_every, cuda_graphs)
    if not isinstance(throw, bool):
        raise OptionError(f"throw must be True or False; got {throw!r}.")
    if not callable(f):
        raise MapError(f"f must be a function of (z, *context); got {f!r}.")
    method, derivative = _solver(solver), adjoints.registry.resolve(adjoint)
    work = _outside if torch.compiler.is_compiling() else _fix
    return work(f, z0, context, control, method, derivative, throw)


def _unknown(given: Mapping[str, object]) -> OptionError:
    parameters = inspect.signature(fix).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    name = next(iter(given))
    return OptionError(f"fix has no option {name!r}.{nearest(name, known)} Its options: {', '.join(known)}.")


def _solver(solver: str | Solver) -> Solver:
    try:
        return solvers.registry.resolve(solver)
    except UnknownNameError as error:
        if solver not in linear.registry.names():
            raise
        raise UnknownNameError(
            f"{solver!r} solves linear equations only: use it for the derivative, "
            f"adjoint=tw.adjoint('implicit', solver={solver!r}). {error}"
        ) from None


def _fix(
    f: Callable[..., State],
    z0: State,
    context: tuple[Tensor, ...],
    control: Control,
    solver: Solver,
    adjoint: Adjoint,
    throw: bool,
) -> Solution:
    solution, status = _run(f, z0, context, control, solver, adjoint)
    if not kinds(status) <= {int(Status.converged)}:
        failed = torch.nonzero(status != int(Status.converged)).flatten().tolist()
        message = f"{len(failed)} of {status.numel()} rows did not converge. {describe(status)}"
        if throw:
            raise FixedPointError(message, solution, failed)
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return solution


# A solve takes as many steps as its data need: a compiled model leaves its graph for it.
_outside: Callable[..., Solution] = torch.compiler.disable(_fix)  # type: ignore[call-arg]


def run(
    f: Callable[..., State],
    z0: State,
    context: tuple[Tensor, ...],
    control: Control,
    solver: Solver,
    adjoint: Adjoint,
    settled: Tensor | None = None,
) -> Solution:
    """``fix`` for blocks: everything is resolved, nothing is warned about or raised.

    Args:
        f: as in :func:`fix`.
        z0: as in :func:`fix`.
        context: as in :func:`fix`.
        control: the stopping rule, from :func:`check_control`.
        solver: an instance.
        adjoint: an instance.
        settled: (B,) bool of rows for which ``f`` is constant in the state and ``z0`` its value; see
            :class:`~twnn_plugin.adjoints.equation.Call`.
    """
    work = _run_outside if torch.compiler.is_compiling() else _run
    return work(f, z0, context, control, solver, adjoint, settled)[0]


def _run(
    f: Callable[..., State],
    z0: State,
    context: tuple[Tensor, ...],
    control: Control,
    solver: Solver,
    adjoint: Adjoint,
    settled: Tensor | None = None,
) -> tuple[Solution, Tensor]:
    """The solution, and its statuses as a plain tensor, which can be looked at under ``vmap``, too."""
    layout, start = Layout.of(z0)
    for index, tensor in enumerate(context):
        if isinstance(tensor, Tensor):
            check_dense(tensor, f"Context {index}")
        if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.shape[0] != start.shape[0]:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise MapError(
                f"Context {index} must be a tensor with {start.shape[0]} rows, one per sample of z0; got "
                f"{got}. What all rows share belongs into f itself."
            )
    if torch.is_grad_enabled():  # features may be made in inference mode; autograd saves no such tensor
        start, context = outside_inference(start), tuple(outside_inference(c) for c in context)
    parts = layout.parts(control.stop)
    if parts:
        control = replace(control, parts=parts)
    coarse = max(layout.half, _autocast_rounding(start.device.type))
    if coarse:
        control = replace(control, coarse=coarse, seen=layout if layout.half else None)
    watch = observe.watch(control, start, solver, adjoint) if observe.listeners() else None
    if watch is not None and watch.callback is not None:  # whoever watches iterates sees each of them
        control = replace(control, callback=watch.callback, check_every=None, cuda_graphs=False)
    call = Call(f, layout, start, context, solver, control, settled)
    reports: list[AdjointReport] = []
    outcome = adjoint.run_transformed(call, reports) if transforms.active() else adjoint.run(call, reports)
    value = layout.unpack(outcome.value)
    solution = Solution(value, outcome.status, outcome.steps, outcome.residual, call.evaluations, reports)
    if watch is not None:
        watch.finished(solution)
    return solution, outcome.status if call.plain is None else call.plain.status


def _autocast_rounding(device: str) -> float:
    if not torch.is_autocast_enabled(device):
        return 0.0
    return torch.finfo(torch.get_autocast_dtype(device)).eps


_run_outside: Callable[..., tuple[Solution, Tensor]] = torch.compiler.disable(_run)  # type: ignore[call-arg]


def check_control(
    tol: float,
    max_iter: int,
    stop: str,
    norm: str,
    coupled: bool = False,
    callback: Callable[[Iteration], None] | None = None,
    check_every: int | None = None,
    cuda_graphs: bool = False,
) -> Control:
    """The stopping rule, checked; options as in :func:`fix`.

    Raises:
        OptionError: ``tol`` is not a positive number, ``max_iter`` is not a whole number >= 1,
            ``stop`` or ``norm`` is unknown, or a switch is neither True nor False.
    """
    if not is_number(tol) or not 0 < tol < math.inf:
        raise OptionError(f"tol must be a positive number; got {tol!r:.40}.")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise OptionError(f"max_iter must be a whole number, at least 1; got {max_iter!r}.")
    for name, switch in (("coupled", coupled), ("cuda_graphs", cuda_graphs)):
        if not isinstance(switch, bool):
            raise OptionError(f"{name} must be True or False; got {switch!r}.")
    if callback is not None and not callable(callback):
        raise OptionError(f"callback must be a function of an Iteration, or None; got {callback!r}.")
    for name, value, known in (("stop", stop, STOPS), ("norm", norm, NORMS)):
        if value not in known:
            raise OptionError(f"{name} must be one of {known}; got {value!r}.{nearest(str(value), known)}")
    return Control(
        tol=float(tol),
        max_iter=max_iter,
        stop=stop,
        norm=norm,
        coupled=coupled,
        callback=callback,
        check_every=check_every,
        cuda_graphs=cuda_graphs,
    )
