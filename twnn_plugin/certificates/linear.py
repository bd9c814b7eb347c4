"""Products with the Jacobian of a map, row by row, and the Krylov methods that live on them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..adjoints.linear import units_of
from ..errors import MapError, OptionError
from ..solvers.base import check_place
from ..state import Layout, check_dense, outside_inference
from ..types import State

__all__ = [
    "Jacobian",
    "Krylov",
    "Product",
    "check_context",
    "check_generator",
    "evaluated",
    "plain_attention",
    "probe",
    "solve_shifted",
]

Product = Callable[[Tensor], Tensor]

_BREAKDOWN = 64.0  # ulps of the newest direction that are left when a Krylov space is invariant
_LOOK = 10  # products between looks at the residual


class Jacobian:
    """``J = df/dz`` at given states, for products with it; every row has its own D x D block.

    ``f`` is evaluated once, with a graph that all products reuse. ``J v`` is taken by two reverse
    passes (the pull-back is linear in its cotangent; its derivative is J), so that ``f`` needs no
    forward-mode formulas.

    Where a state has parts, each has a unit of its own, the rms of its entries in that row: norms and Krylov
    spaces over the plain row would see the part with the largest numbers only, and in float32 round the
    others away. In these units J is ``J[i, j] * unit[j] / unit[i]``, whose eigenvalues are the same.

    Attributes:
        units: (B, D) the unit of each entry, as the backward solve takes them; None for a state of one part.

    Args:
        f: ``f(z, *context)``, rows independent.
        z: state, batch first.
        context: tensors (B, ...) handed to ``f``.
        layout: that of ``z`` where it is known; then ``z`` is the (B, D) matrix.

    Raises:
        MapError: ``f`` changes structure, shape, dtype or device or takes another number of arguments, or a
            context tensor is not of B rows.
    """

    def __init__(
        self,
        f: Callable[..., State],
        z: State | Tensor,
        context: Sequence[Tensor] = (),
        layout: Layout | None = None,
    ):
        if layout is None:
            layout, matrix = Layout.of(z, "z")
        else:
            assert isinstance(z, Tensor)
            matrix = z
        check_context(context, matrix.shape[0])
        self.layout = layout
        # What was made in inference mode cannot be differentiated through; a copy made outside it can.
        with torch.inference_mode(False), torch.enable_grad():
            given = [outside_inference(c).detach() for c in context]
            self.context = [c.requires_grad_(c.is_floating_point()) for c in given]
            self.z = outside_inference(matrix).detach().requires_grad_()
            with plain_attention():  # J v is a second derivative
                self.fz = evaluated(f, layout, self.z, self.context)
            self.units = units_of(self.z.detach(), layout.sizes)
        self._push: tuple[Tensor, Tensor] | None = None

    @property
    def residual(self) -> Tensor:
        """(B, D) ``f(z) - z``."""
        return self.fz.detach() - self.z.detach()

    def pull(self, u: Tensor) -> Tensor:
        """``J^T u`` for a (B, D) matrix of cotangents."""
        return self._grad(self.fz, [self.z], u)[0].detach()

    def pull_context(self, u: Tensor) -> Tensor | None:
        """(B, K) ``(df/dcontext)^T u``, all floating-point context side by side; None without any."""
        floating = [c for c in self.context if c.requires_grad]
        if not floating:
            return None
        grads = self._grad(self.fz, floating, u)
        flat = [g.detach().reshape(g.shape[0], math.prod(g.shape[1:])) for g in grads]
        return torch.cat([g.to(u.dtype) for g in flat], dim=1)

    def push(self, v: Tensor) -> Tensor:
        """``J v`` for a (B, D) matrix of tangents."""
        if self._push is None:
            with torch.inference_mode(False), torch.enable_grad():
                w = torch.zeros_like(self.fz).requires_grad_()
                self._push = w, self._grad(self.fz, [self.z], w, create_graph=True)[0]
        w, pulled = self._push
        return self._grad(pulled, [w], v)[0].detach()

    def per_unit(self, v: Tensor) -> Tensor:
        """States and tangents (B, D) as multiples of their units; cotangents back from it."""
        return v if self.units is None else v / self.units

    def times_unit(self, u: Tensor) -> Tensor:
        """Cotangents (B, D), whose unit is the inverse, in the units; states and tangents back from it."""
        return u if self.units is None else self.units * u

    def pull_in_units(self, u: Tensor) -> Tensor:
        """:meth:`pull` of a (B, D) matrix of cotangents in the units."""
        return self.times_unit(self.pull(self.per_unit(u)))

    def push_in_units(self, v: Tensor) -> Tensor:
        """:meth:`push` of a (B, D) matrix of tangents in the units."""
        return self.per_unit(self.push(self.times_unit(v)))

    def solve(self, r: Tensor, steps: int) -> Tensor:
        """``(I - J)^-1 r`` for (B, D) tangents, by at most ``steps`` products; see :func:`solve_shifted`."""
        return self.times_unit(solve_shifted(self.push_in_units, self.per_unit(r), steps))

    def solve_transposed(self, g: Tensor, steps: int) -> Tensor:
        """``(I - J^T)^-1 g`` for (B, D) cotangents, by at most ``steps`` products."""
        return self.per_unit(solve_shifted(self.pull_in_units, self.times_unit(g), steps))

    @staticmethod
    def _grad(
        out: Tensor, into: list[Tensor], cotangent: Tensor, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        if not out.requires_grad:  # f is constant
            return tuple(torch.zeros_like(tensor) for tensor in into)
        with torch.inference_mode(False):
            return torch.autograd.grad(
                out,
                into,
                cotangent if create_graph else outside_inference(cotangent),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )


def plain_attention() -> AbstractContextManager[Any]:
    """Within this, attention is made of operations that can be differentiated twice, unlike fused kernels."""
    return sdpa_kernel(SDPBackend.MATH)


def check_context(context: Sequence[Tensor], batch: int) -> None:
    """Raise :class:`MapError` unless every context tensor has one row per sample."""
    for index, tensor in enumerate(context):
        if isinstance(tensor, Tensor):
            check_dense(tensor, f"Context {index}")
        if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.shape[0] != batch:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise MapError(
                f"Context {index} must be a tensor with {batch} rows, one per sample of z; got {got}."
            )


def check_generator(generator: torch.Generator | None) -> None:
    """Raise :class:`OptionError` unless it is a generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise OptionError(
            "generator must be a torch.Generator, such as torch.Generator().manual_seed(0), or None; got "
            f"{generator!r}."
        )


def evaluated(f: Callable[..., State], layout: Layout, z: Tensor, context: Sequence[Tensor]) -> Tensor:
    """``f(z, *context)`` as a (B, D) matrix.

    Raises:
        MapError: ``f`` cannot be called so, or returns another structure, shape, dtype or device.
    """
    if not callable(f):
        raise MapError(f"f must be a function of (z, *context); got {f!r}.")
    try:
        value = f(layout.unpack(z), *context)
    except TypeError as error:
        if not _takes(f, 1 + len(context)):
            raise MapError(
                f"f does not take a state and {len(context)} context tensors ({error}). Pass the context "
                "that fix was given, in its order."
            ) from error
        raise
    fz = layout.pack(value, z.shape[0])
    check_place(fz, z)
    return fz


def _takes(f: Callable[..., Any], arguments: int) -> bool:
    """Whether a function can be called with so many positional arguments; True where that is unknown."""
    try:
        signature = inspect.signature(f.forward if isinstance(f, nn.Module) else f)
    except (TypeError, ValueError):  # of what is not written in Python
        return True
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return False
    return True


def probe(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """One random direction for all rows, (1, D) expanded to (B, D).

    The same for all rows, so that a row's figure does not depend on its place in the batch; and without
    a generator from a fixed seed, so that it does not depend on what ran before.
    """
    if generator is None:
        generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(1, like.shape[1], generator=generator, dtype=torch.float64, device=generator.device)
    return drawn.to(device=like.device, dtype=like.dtype).expand_as(like)


class Krylov:
    """A growing Krylov space of every row of a batch, ``A V_k = V_(k+1) H`` (Saad 2011, algorithm 6.1).

    Arnoldi's method with classical Gram-Schmidt, applied twice. Where the space of a row becomes
    invariant, its further directions and columns are zero: they add eigenvalues zero and nothing else.

    Args:
        apply: the operator, of (B, D) matrices, rows independent.
        start: (B, D) first directions; a zero row stays zero.
        capacity: steps it may grow to, at most D.
    """

    def __init__(self, apply: Product, start: Tensor, capacity: int):
        self._apply = apply
        length = torch.linalg.vector_norm(start, dim=1)
        self.scale = length.double().cpu()
        self.steps, self.capacity = 0, capacity
        self.basis = start.new_zeros(capacity + 1, *start.shape)
        self._h = start.new_zeros(start.shape[0], capacity + 1, capacity)
        self.basis[0] = _unit(start, length)

    @property
    def h(self) -> Tensor:
        """(B, k + 1, k) float64 on the CPU, upper Hessenberg."""
        return self._h[:, : self.steps + 1, : self.steps].double().cpu()

    def grow(self, steps: int) -> None:
        """Go on to a space of this many steps."""
        floor = _BREAKDOWN * torch.finfo(self.basis.dtype).eps
        for j in range(self.steps, steps):
            w = self._apply(self.basis[j])
            before = torch.linalg.vector_norm(w, dim=1)
            for _ in range(2):
                share = torch.einsum("kbd,bd->bk", self.basis[: j + 1], w)
                w = w - torch.einsum("kbd,bk->bd", self.basis[: j + 1], share)
                self._h[:, : j + 1, j] += share
            rest = torch.linalg.vector_norm(w, dim=1)
            rest = torch.where(rest <= floor * before, 0.0, rest)  # keeps NaN
            self._h[:, j + 1, j] = rest
            self.basis[j + 1] = _unit(w, rest)
        self.steps = steps

    def combine(self, y: Tensor) -> Tensor:
        """``V_k y`` for real (B, k) coefficients, as (B, D)."""
        basis = self.basis[: y.shape[1]]
        return torch.einsum("kbd,bk->bd", basis, y.to(basis))


def solve_shifted(apply: Product, b: Tensor, steps: int) -> Tensor:
    """``x`` with ``x - A x = b`` for every row by GMRES from zero (Saad & Schultz 1986); (B, D).

    Goes on until the residual of every row is at its rounding floor, or for ``steps`` products. Rows with
    NaN or inf give NaN.
    """
    steps = min(steps, b.shape[1])
    space = Krylov(apply, b, steps)
    floor = _BREAKDOWN * torch.finfo(b.dtype).eps
    y = space.scale.new_zeros(b.shape[0], 0)
    while space.steps < steps:
        space.grow(min(space.steps + _LOOK, steps))
        y, rest = _least_squares(space)
        if bool((~(rest > floor * space.scale)).all()):  # NaN is done
            break
    return space.combine(y)


def _least_squares(space: Krylov) -> tuple[Tensor, Tensor]:
    """(B, k) coefficients with the least residual ``||b - (I - A) V y||``, and that residual, (B,)."""
    h = space.h
    shifted = torch.eye(*h.shape[1:], dtype=h.dtype, device=h.device) - h
    right = h.new_zeros(*h.shape[:2], 1)
    right[:, 0, 0] = space.scale
    broken = ~(torch.isfinite(shifted).all(dim=(1, 2)) & torch.isfinite(space.scale))[:, None, None]
    shifted, right = torch.where(broken, 0.0, shifted), torch.where(broken, 0.0, right)
    # "gelsd" copes with a singular I - A, for which there may be no solution.
    y = torch.linalg.lstsq(shifted, right, driver="gelsd").solution
    rest = torch.linalg.vector_norm(right - shifted @ y, dim=(1, 2))
    return torch.where(broken, float("nan"), y)[..., 0], rest


def _unit(v: Tensor, length: Tensor) -> Tensor:
    return torch.where((length > 0)[:, None], v / torch.where(length > 0, length, 1.0)[:, None], v * 0)
