"""States as the user writes them (tensor, tuple, dict) and as solvers see them: one (B, D) matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import MapError
from .types import State

__all__ = ["Layout", "check_dense", "outside_inference"]

_HALF = (torch.float16, torch.bfloat16)


def _parts(state: State, what: str) -> tuple[tuple[str, ...] | None, str, list[Tensor]]:
    if isinstance(state, Tensor):
        return None, "tensor", [state]
    if isinstance(state, dict):
        keys, kind, parts = tuple(state), "dict", list(state.values())
    elif isinstance(state, (tuple, list)):
        keys, kind, parts = None, "tuple", list(state)
    else:
        keys, kind, parts = None, type(state).__name__, []
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise MapError(f"{what} must be a tensor, or a non-empty tuple or dict of tensors; got {kind}.")
    return keys, kind, parts


def check_dense(tensor: Tensor, what: str) -> None:
    """Raise :class:`MapError` for a sparse or nested tensor, which has no rows that could be gathered."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        way = "torch.nested.to_padded_tensor" if tensor.is_nested else "to_dense()"
        raise MapError(f"{what} must be dense; got {kind}. Make it dense with {way}.")


def outside_inference(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that may be differentiated through; to be called outside that mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _check_devices(parts: Sequence[Tensor], what: str) -> None:
    devices = {str(part.device) for part in parts}
    if len(devices) > 1:
        raise MapError(f"{what} must be on one device; got {', '.join(sorted(devices))}.")


def _structure(kind: str, parts: Sequence[Any]) -> str:
    return f"a {kind}" if kind == "tensor" else f"a {kind} of {len(parts)}"


def _described(kind: str, keys: Sequence[str] | None, parts: Sequence[str]) -> str:
    if keys is not None:
        parts = [f"{key!r}: {part}" for key, part in zip(keys, parts, strict=True)]
    return f"a {kind} {'' if kind == 'tensor' else 'of '}{', '.join(parts)}"


def _told(state: Any) -> str:
    """What a user gave, in the words of :func:`_described`."""
    try:
        keys, kind, parts = _parts(state, "")
    except MapError:
        return f"something of type {type(state).__name__}"
    dense = ["" if part.layout is torch.strided else f" {part.layout}" for part in parts]
    told = [f"{tuple(p.shape)} {p.dtype}{d} on {p.device}" for p, d in zip(parts, dense, strict=True)]
    return _described(kind, keys, told)


@dataclass(frozen=True)
class Layout:
    """How a state is laid out in a row of the matrix that solvers work on.

    The matrix is float64 if any part is, else float32: half-precision states are solved for in
    float32 and rounded each time ``f`` sees them, so that histories keep their digits.

    Attributes:
        named: the class of a named tuple.
    """

    kind: str
    keys: tuple[str, ...] | None
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    named: type | None = None

    @cached_property
    def plain(self) -> bool:
        """Whether a state is its matrix, in its dtype."""
        return self.flat and self.dtypes[0] is self.dtype

    @cached_property
    def flat(self) -> bool:
        """Whether a state is its matrix: one tensor (B, D) of the matrix' dtype or another."""
        return self.kind == "tensor" and len(self.shapes[0]) == 1

    def parts(self, stop: str) -> tuple[int, ...]:
        """Widths of the parts that must each settle: a norm over all would not see the small ones.

        () for a state of one part, and where sizes are not compared with the state's. Parts without entries
        have nothing to settle, and are left out; the others still make up the matrix.
        """
        widths = tuple(size for size in self.sizes if size)
        return widths if len(widths) > 1 and stop == "rel" else ()

    @cached_property
    def half(self) -> float:
        """The coarsest rounding of a part kept in half precision, or in less; 0 where there is none."""
        kinds = [torch.finfo(dtype) for dtype in self.dtypes]
        return max((kind.eps for kind in kinds if kind.bits < 32), default=0.0)

    def rounded(self, matrix: Tensor) -> Tensor:
        """What ``f`` is given of a (b, D) matrix, and what a user gets of it."""
        parts = matrix.split(list(self.sizes), dim=1)
        rounded = [part.to(dtype).to(self.dtype) for part, dtype in zip(parts, self.dtypes, strict=True)]
        return rounded[0] if len(rounded) == 1 else torch.cat(rounded, dim=1)

    @staticmethod
    def of(state: State, what: str = "z0") -> tuple[Layout, Tensor]:
        """The layout of a state and its (B, D) matrix.

        Raises:
            MapError: not a tensor, tuple or dict of dense floating-point tensors with one batch size on one
                device.
        """
        keys, kind, parts = _parts(state, what)
        for part in parts:
            check_dense(part, what)
            if part.dim() == 0:
                raise MapError(f"{what} needs a batch as its first axis; got a scalar tensor.")
            if not part.is_floating_point():
                raise MapError(f"{what} must be of a floating-point dtype; got {part.dtype}.")
        batches = {part.shape[0] for part in parts}
        if len(batches) > 1:
            raise MapError(f"The parts of {what} must have one batch size; got {sorted(batches)}.")
        _check_devices(parts, f"The parts of {what}")
        if parts and parts[0].is_meta:
            raise MapError(f"{what} must hold numbers; got a tensor on the meta device, which has none.")
        dtypes = tuple(part.dtype for part in parts)
        work = torch.float64 if torch.float64 in dtypes else torch.float32
        shapes = tuple(part.shape[1:] for part in parts)
        named = type(state) if isinstance(state, tuple) and hasattr(state, "_fields") else None
        layout = Layout(kind, keys, shapes, dtypes, tuple(s.numel() for s in shapes), work, named)
        return layout, layout._matrix(parts)

    def _matrix(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            part = parts[0]
            return part.reshape(part.shape[0], self.sizes[0]).to(self.dtype)
        flat = [p.reshape(p.shape[0], s).to(self.dtype) for p, s in zip(parts, self.sizes, strict=True)]
        return torch.cat(flat, dim=1)

    def unpack(self, matrix: Tensor) -> State:
        """A (b, D) matrix as a state of b rows."""
        if self.plain:
            return matrix
        b = matrix.shape[0]
        if self.kind == "tensor":
            state = matrix.view(b, *self.shapes[0])
            return state if self.dtypes[0] is self.dtype else state.to(self.dtypes[0])
        columns = matrix.split(list(self.sizes), dim=1)
        parts = [
            column.reshape(b, *shape).to(dtype)
            for column, shape, dtype in zip(columns, self.shapes, self.dtypes, strict=True)
        ]
        if self.keys is not None:
            return dict(zip(self.keys, parts, strict=True))
        return tuple(parts) if self.named is None else self.named(*parts)

    def pack(self, state: State, rows: int) -> Tensor:
        """What ``f`` returned for ``rows`` rows, checked, as a (rows, D) matrix.

        Whether it is on the device of ``z0`` shows where the two meet; see
        :func:`~twnn_plugin.solvers.base.check_place`.

        Raises:
            MapError: the structure, shapes or dtypes are not those of ``z0``, or its parts cannot be put
                side by side.
        """
        try:
            if (  # what nearly every f returns, with as few operations as there can be
                isinstance(state, Tensor)
                and self.kind == "tensor"
                and state.dtype is self.dtype
                and state.shape == (rows, *self.shapes[0])
            ):
                return state if self.flat else state.reshape(rows, self.sizes[0])
            return self._matrix(self._checked(state, rows))
        except RuntimeError:  # looked at only now, since a loop comes here at every evaluation
            parts = _parts(state, "What f returns")[2]
            for part in parts:
                check_dense(part, "What f returns")
            _check_devices(parts, "The parts of what f returns")
            raise

    def match(self, state: State, like: Tensor, what: str) -> Tensor:
        """A state that does not come from ``f``, checked as :meth:`pack` does, as a (b, D) matrix.

        Args:
            state: of the structure of ``z0``.
            like: (b, D) the states that it must match.
            what: its name in messages.

        Raises:
            MapError: it is not of this structure, these shapes and dtypes, on this device.
        """
        rows = like.shape[0]
        try:
            matrix = self.pack(state, rows)
        except MapError:
            matrix = None
        if matrix is None or matrix.device != like.device or matrix.layout is not torch.strided:
            parts = zip(self.shapes, self.dtypes, strict=True)
            wanted = [f"{(rows, *shape)} {dtype} on {like.device}" for shape, dtype in parts]
            raise MapError(
                f"{what} must match the state, {_described(self.kind, self.keys, wanted)}; got "
                f"{_told(state)}."
            )
        return matrix

    def _checked(self, state: State, rows: int) -> list[Tensor]:
        """The parts of what ``f`` returned, in the order of ``z0``."""
        keys, kind, parts = _parts(state, "What f returns")
        if keys is not None and self.keys is not None:
            if set(keys) != set(self.keys):
                raise MapError(f"f must return the keys of z0, {list(self.keys)}; it returned {list(keys)}.")
            named = dict(zip(keys, parts, strict=True))
            parts = [named[key] for key in self.keys]
        elif kind != self.kind or len(parts) != len(self.shapes):
            raise MapError(
                f"f must return a state of the structure of z0, {_structure(self.kind, self.shapes)}; it "
                f"returned {_structure(kind, parts)}."
            )
        for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True):
            if part.shape != (rows, *shape):
                raise MapError(
                    f"f must keep the shape of the state: it was given {(rows, *shape)} and returned "
                    f"{tuple(part.shape)}. If f closes over a tensor that has one row per sample, pass it "
                    "to fix as context: fix(f, z0, x), f(z, x)."
                )
            # Under autocast a layer returns the autocast dtype whatever it was given.
            autocast = part.dtype in _HALF and torch.is_autocast_enabled(part.device.type)
            if part.dtype != dtype and not autocast:
                raise MapError(f"f must keep the dtype of the state, {dtype}; it returned {part.dtype}.")
        return parts
