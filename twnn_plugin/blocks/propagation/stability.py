"""What layers do to signals and gradients: eigenvalues, distances, energy, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...certificates import spectral_radius
from ...certificates.linear import Jacobian
from ...errors import MapError, OptionError
from .base import Propagator, whole

__all__ = ["StabilityReport", "stability"]

_SHOWN = 11
_PAIRS_OF = 64  # rows whose distances are taken: 2016 pairs


@dataclass(frozen=True)
class StabilityReport:
    """What :func:`stability` found, for N layers; ``str()`` gives a table.

    Attributes:
        layers: (N) names.
        radius: (N, r) spectral radius of each layer's Jacobian at the first r rows; NaN where a layer
            changes the shape.
        eigenvalues: for each layer the (r, D) complex eigenvalues, or None where D is large or the layer
            changes the shape; there ``radius`` is an estimate.
        distance: (N + 1, P) distances of all pairs of rows, divided by those of the input.
        size: (N + 1, B) norms of the states.
        gradient: (N + 1, B) norms of a random unit cotangent of the output, pulled back to each state;
            at N it is 1.
        energy_drift: (N + 1, B) growth of the energy, less 1; None unless all layers have one. With
            unequal layers, the product of what each layer does to the energy that itself conserves. NaN
            where an energy is not positive.
    """

    layers: tuple[str, ...]
    radius: Tensor
    eigenvalues: tuple[Tensor | None, ...]
    distance: Tensor
    size: Tensor
    gradient: Tensor
    energy_drift: Tensor | None

    @property
    def worst_drift(self) -> float:
        """Largest absolute energy drift over layers and rows; NaN where it is not known."""
        drift = self.energy_drift
        return float("nan") if drift is None or drift.isnan().any() else float(drift.abs().amax())

    def __str__(self) -> str:
        last = len(self.layers)
        shown = sorted({round(k * last / (_SHOWN - 1)) for k in range(_SHOWN)}) if last >= _SHOWN else None
        head = ("after", "radius", "distance: least", "median", "largest", "size", "gradient", "energy drift")
        rows = [head, *(self._line(k) for k in shown or range(last + 1))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def _line(self, k: int) -> tuple[str, ...]:
        pairs = self.distance[k]
        spread = [pairs.amin(), pairs.median(), pairs.amax()] if pairs.numel() else [None] * 3
        drift = None if self.energy_drift is None else _furthest(self.energy_drift[k])
        radius = self.radius[k - 1].amax() if k else None
        name = f"{k}: {self.layers[k - 1]}" if k else "0: input"
        figures = (radius, *spread, self.size[k].median(), self.gradient[k].median(), drift)
        return (name, *(_figure(f) for f in figures))


def stability(
    chain: nn.Module | Sequence[nn.Module],
    x: Tensor,
    *,
    rows: int = 8,
    exact: int = 64,
    iterations: int = 40,
    generator: torch.Generator | None = None,
) -> StabilityReport:
    """Whether a chain of layers keeps apart what differs, keeps signals bounded, and lets gradients through.

    Layer by layer: the eigenvalues of the layer's Jacobian at the states that it meets (all of them for
    states of up to ``exact`` entries, else the spectral radius by Arnoldi's method), the distances between
    the rows of ``x``, the norm of a gradient on its way back, and the energy of the Hamiltonian and
    antisymmetric propagators. Modules are put into eval mode meanwhile; no gradient reaches the parameters.

    Args:
        chain: a propagator, an ``nn.Sequential`` or a sequence of modules, each from one tensor to one;
            propagators in it are opened into their layers. Any other module counts as one layer.
        x: (B, ...) inputs, B >= 2 for distances; those of the first 64 rows are taken.
        rows: rows at which eigenvalues are taken, >= 1.
        exact: entries of a state up to which all eigenvalues are worked out, >= 0.
        iterations: of Arnoldi's method, >= 1.
        generator: of random directions; None: a fixed seed, so that calls are repeatable.

    Returns:
        A :class:`StabilityReport`.

    Raises:
        OptionError: an option out of range, or an empty chain.
        MapError: a layer does not map a tensor to a tensor with as many rows, or ``x`` is no batch.
    """
    whole("rows", rows)
    whole("exact", exact, least=0)
    whole("iterations", iterations)
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.shape[0] or not x.is_floating_point():
        got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise MapError(f"stability takes floating-point inputs (B, ...) of at least two axes; got {got}.")
    modules = _modules(chain)
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module, _ in modes:
            module.training = False
        return _measure(_opened(modules), x.detach(), rows, exact, iterations, generator)
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class _Layer:
    """One layer as a function, and its energy if it has one."""

    name: str
    apply: Callable[[Tensor], Tensor]
    energy: Callable[[Tensor], Tensor | None]


def _modules(chain: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    parts = [chain] if isinstance(chain, nn.Module) and not isinstance(chain, nn.ModuleList) else list(chain)  # type: ignore[arg-type]
    if not parts or not all(isinstance(part, nn.Module) for part in parts):
        raise OptionError(f"stability takes a module or a non-empty sequence of modules; got {chain!r}.")
    found: list[nn.Module] = []
    for part in parts:
        found += _modules(list(part)) if isinstance(part, nn.Sequential) and len(part) else [part]
    return found


def _opened(modules: list[nn.Module]) -> list[_Layer]:
    layers: list[_Layer] = []
    for module in modules:
        if not isinstance(module, Propagator):
            layers.append(_Layer(type(module).__name__, module, lambda state: None))
            continue
        with torch.no_grad():
            operators = module.operators()
        for index, operator in enumerate(operators):
            layers.append(
                _Layer(
                    type(module).__name__,
                    lambda state, m=module, o=operator, first=not index: m.advance(
                        m.enter(state) if first else state, o
                    ),
                    lambda state, m=module, o=operator, first=not index: m.energy(
                        m.enter(state) if first and state.shape[m.axis] == m.features else state, o
                    ),
                )
            )
    return layers


def _measure(
    layers: list[_Layer], x: Tensor, rows: int, exact: int, iterations: int, generator: torch.Generator | None
) -> StabilityReport:
    """Run the chain once with a graph, then look at each layer by itself."""
    states = _states(layers, x)
    gradient = _gradients(states, generator)
    states = [state.detach() for state in states]
    spectra = [
        _spectrum(layer.apply, state[:rows], after, exact, iterations, generator)
        for layer, state, after in zip(layers, states, states[1:], strict=False)
    ]
    start = _distances(states[0])
    return StabilityReport(
        tuple(layer.name for layer in layers),
        torch.stack([radius for _, radius in spectra]),
        tuple(values for values, _ in spectra),
        torch.stack([_distances(state) / start for state in states]),
        torch.stack([torch.linalg.vector_norm(state.flatten(1), dim=1) for state in states]),
        gradient,
        _drift(layers, states),
    )


def _states(layers: list[_Layer], x: Tensor) -> list[Tensor]:
    states = [x.clone().requires_grad_()]
    with torch.enable_grad():
        for index, layer in enumerate(layers):
            out = layer.apply(states[-1])
            if not isinstance(out, Tensor) or out.dim() < 2 or out.shape[0] != x.shape[0]:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise MapError(
                    f"Layer {index} ({layer.name}) must return one tensor (B, ...) with {x.shape[0]} rows; "
                    f"it returned {got}."
                )
            states.append(out)
    return states


def _gradients(states: list[Tensor], generator: torch.Generator | None) -> Tensor:
    """(N + 1, B) norms of a unit cotangent of the last state at each state."""
    last = states[-1].detach()
    if generator is None:
        generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(last.shape, generator=generator, dtype=torch.float64, device=generator.device)
    cotangent = drawn.to(last)
    cotangent = cotangent / _norms(cotangent).reshape(-1, *[1] * (last.dim() - 1))
    if not states[-1].requires_grad:  # a constant layer
        found = [torch.zeros_like(state) for state in states[:-1]]
    else:
        found = list(torch.autograd.grad(states[-1], states[:-1], cotangent, materialize_grads=True))
    return torch.stack([_norms(g) for g in [*found, cotangent]])


def _norms(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value.flatten(1), dim=1)


def _spectrum(
    apply: Callable[[Tensor], Tensor],
    state: Tensor,
    after: Tensor,
    exact: int,
    iterations: int,
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor]:
    """Eigenvalues (r, D) or None, and spectral radii (r,), of a layer's Jacobian."""
    count, size = state.shape[0], state[0].numel()
    if after.shape[1:] != state.shape[1:]:
        return None, state.new_full((count,), float("nan"))
    if size > exact:
        return None, spectral_radius(apply, state, iterations=iterations, generator=generator).value
    jacobian = Jacobian(apply, state)
    unit = torch.eye(size, dtype=state.dtype, device=state.device)
    matrix = torch.stack([jacobian.pull(e.expand(count, size)) for e in unit], dim=1)
    broken = ~torch.isfinite(matrix).all(dim=(1, 2))[:, None]
    safe = torch.where(broken[..., None], 0.0, matrix)
    values = torch.where(broken, float("nan"), torch.linalg.eigvals(safe))
    return values, values.abs().amax(dim=1)


def _distances(state: Tensor) -> Tensor:
    """(P,) distances of the pairs of rows; by differences, as equal rows must be at distance zero."""
    flat = state[:_PAIRS_OF].flatten(1)
    i, j = torch.triu_indices(flat.shape[0], flat.shape[0], offset=1, device=flat.device)
    return torch.linalg.vector_norm(flat[i] - flat[j], dim=1)


@torch.no_grad()
def _drift(layers: list[_Layer], states: list[Tensor]) -> Tensor | None:
    total = states[0].new_ones(states[0].shape[0])
    drift = [total - 1]
    for layer, before, after in zip(layers, states, states[1:], strict=False):
        start, end = layer.energy(before), layer.energy(after)
        if start is None or end is None:
            return None
        total = total * torch.where((start > 0) & (end > 0), end / start, float("nan"))
        drift.append(total - 1)
    return torch.stack(drift)


def _furthest(values: Tensor) -> Tensor:
    """The entry of largest modulus; NaN if any is."""
    return values[values.abs().argmax()]  # argmax takes NaN for the largest


def _figure(value: Tensor | None) -> str:
    return "-" if value is None else f"{float(value):.3g}"
