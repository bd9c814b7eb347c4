"""Weights that cannot make a map expand: norm constraints as parametrisations.

Each constraint is a ``torch.nn.utils.parametrize`` parametrisation: the module keeps an unconstrained
tensor and works out its weight from it at every access, so the constraint holds before, during and after
any optimiser step. A solve uses the weight many times: put :func:`cached` around it, and the weight is
worked out once. Constrained modules can be copied, pickled and saved.

The bounds are upper bounds, not estimates from below as the power iteration of
``torch.nn.utils.parametrizations.spectral_norm`` is. With a 1-Lipschitz activation (tanh, relu, sigmoid; gelu
and silu are not) a cell such as ``tanh(W z + x)`` is then a contraction with the given rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations, parametrize

from .errors import OptionError, nearest
from .solvers.base import is_number

__all__ = ["cached", "contractive", "norm_bound", "orthogonal", "remove"]

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
M = TypeVar("M", nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = ("l2", "max")
_MAPS = ("cayley", "matrix_exp")
_SQUARINGS = 6  # leaves a bound of at most n^(1 / 2^7) times the norm: 5 % too much for n = 512
_GRID = 8  # frequencies per tap and axis; what lies between them is at most 1 / cos(pi / 16) larger


def contractive(module: M, rate: float = 0.9, norm: str = "l2") -> M:
    """Constrain a linear or convolution layer to expand no vector by more than ``rate``.

    The weight becomes ``V min(1, rate / bound(V))`` of an unconstrained V (as in Gouk et al. 2021,
    "Regularisation of neural networks by enforcing Lipschitz continuity", but with a bound where they
    estimate); weights within the bound stay as they are. What ``bound`` is:

    - ``norm="l2"``, linear: Gram iteration (Delattre et al. 2023, "Efficient bound of Lipschitz constant for
      convolutional layers by Gram iteration"): ``||V|| <= ||(V^T V)^(2^(k-1))||_F^(1 / 2^k)``, here with
      k = 6: above the norm by 5 % at most for 512 features.
    - ``norm="l2"``, convolution: the largest norm of its C_out x C_in transfer matrices over all frequencies.
      It bounds the operator for every input size, stride, dilation and amount of zero padding, which only
      leave out rows and columns of the convolution on an unbounded grid, and for circular padding, which
      samples the frequencies. Taken by Gram iteration at 8 (taps - 1) frequencies an axis and divided by
      ``cos(pi / 16)`` for each axis, to cover what lies between them: a trigonometric polynomial of degree
      d falls off from its maximum no faster than ``cos(d t)`` (M. Riesz 1914). It lies above the norm on a
      small image, and further above with strides, which it does not take into account.
    - ``norm="max"``: each output's sum of absolute weights is scaled to at most ``rate``: a contraction in
      the largest absolute entry, with any padding; a sufficient condition for well-posedness (El Ghaoui
      et al. 2021, "Implicit deep learning").

    Rounding in the weight's dtype is allowed for. Autocast rounds the weight again, by up to 0.4 % of its
    Frobenius norm for bfloat16, after the constraint.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, changed in place; its bias is
            left alone.
        rate: > 0; a contraction needs less than 1.
        norm: ``"l2"`` or ``"max"``.

    Returns:
        The module.

    Raises:
        OptionError: another kind of module, an option out of range, a padding that the bound does not
            cover, or a weight that is parametrised already or, in a lazy module, not there yet.
    """
    _check(module, rate)
    _check_norm(norm)
    _check_padding(module, norm)
    bounded = _Bounded(float(rate), norm, _groups(module))
    parametrize.register_parametrization(module, "weight", bounded)
    return _own_class(module)


def orthogonal(module: M, rate: float = 0.9, orthogonal_map: str = "cayley") -> M:
    """Make a layer's weight ``rate`` times an orthogonal matrix of an unconstrained tensor.

    The orthogonal over-parameterisation of Mathur & Plis (2023), equation 6. The formula itself is missing
    from the text that is in circulation; the words around it are "where Q is the orthogonal matrix and
    ... is the over-parameterized representation". Reconstructed here as ``W = rate * Q(V)``, with
    Q from ``torch.nn.utils.parametrizations.orthogonal``. All singular values of W are equal to ``rate``, so
    ``I - J^T``, which the backward solve inverts, has condition ``(1 + rate) / (1 - rate)`` at most.

    A layer with more outputs than inputs has orthonormal columns, one with fewer orthonormal rows. A
    convolution's kernel is orthogonal as a matrix of C_out rows and C_in * taps columns (each group by
    itself); as any position of the input is read by up to ``taps`` positions of the output (fewer with
    strides), the matrix is divided by the root of that number, which makes ``rate`` a bound, and in general
    not an attained one. This is not an orthogonal convolution.

    Starts from the orthogonal matrix nearest to the present weight. With n the larger side of the matrix,
    each access costs an n x n linear solve, or a matrix exponential, whose rounding grows with V: 2e-4 in
    float32 where the entries of V are of the order of 1000. torch's third map, Householder, is left
    out: it truncates a diagonal of -1 to whole numbers, so one step of AdamW, whose weight decay moves
    it, makes the weight zero.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` in float32 or float64, changed in
            place.
        rate: > 0; a contraction needs less than 1.
        orthogonal_map: ``"cayley"`` or ``"matrix_exp"``.

    Returns:
        The module.

    Raises:
        OptionError: as for :func:`contractive`.
    """
    _check(module, rate)
    _check_padding(module, "l2")
    if orthogonal_map not in _MAPS:
        hint = nearest(str(orthogonal_map), _MAPS)
        raise OptionError(f"orthogonal_map must be one of {_MAPS}; got {orthogonal_map!r}.{hint}")
    weight = module.weight
    if weight.dtype not in (torch.float32, torch.float64):
        raise OptionError(f"orthogonal takes weights in float32 or float64; got {weight.dtype}.")
    shape, groups = tuple(weight.shape), _groups(module)
    with torch.no_grad():
        matrix = weight.reshape(groups, shape[0] // groups, -1)
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        start = (left @ right).to(weight.dtype)
    scale = rate / math.sqrt(_overlap(module))
    # The kernel as matrices, torch's map on these, and back.
    parametrize.register_parametrization(module, "weight", _Folded(groups, shape), unsafe=True)
    parametrizations.orthogonal(module, "weight", orthogonal_map)
    parametrize.register_parametrization(module, "weight", _Unfolded(scale, groups, shape), unsafe=True)
    with torch.no_grad():
        module.weight = scale * start.reshape(shape)  # type: ignore[assignment]
    return _own_class(module)


@contextmanager
def cached(*modules: nn.Module) -> Iterator[None]:
    """Work the weights of all constrained layers out once, now, and use them for the whole of the block.

    Use it instead of ``torch.nn.utils.parametrize.cached``: that keeps what the first access makes, and in
    ``fix`` the first access is made without a graph, so that the weight would silently get no gradient.
    Do not step an optimiser inside.

    Args:
        *modules: modules that hold the layers, at any depth.

    Raises:
        OptionError: something else than a module.

    Example:
        >>> import torch, twnn_plugin as tw
        >>> cell = tw.contractive(torch.nn.Linear(8, 8), 0.9)
        >>> with tw.constraints.cached(cell):
        ...     solution = tw.fix(lambda z, x: torch.tanh(cell(z) + x), torch.zeros(4, 8), torch.ones(4, 8))
        ...     solution.value.sum().backward()
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise OptionError(f"cached takes modules that hold layers; got a {type(module).__name__}.")
    with parametrize.cached():
        for module in modules:
            for layer in module.modules():
                if parametrize.is_parametrized(layer):
                    for name in layer.parametrizations:  # type: ignore[union-attr]
                        getattr(layer, name)
        yield


def norm_bound(module: Layer, norm: str = "l2") -> Tensor:
    """An upper bound on what the layer (its bias aside) makes of a vector's norm; a scalar with a gradient.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, constrained or not.
        norm: ``"l2"`` or ``"max"``, see :func:`contractive`.

    Raises:
        OptionError: another kind of module or norm, a lazy module without a weight, or a padding that the
            bound does not cover.
    """
    _check_kind(module)
    _check_norm(norm)
    _check_padding(module, norm)
    weight = module.weight
    return _l2_bound(weight, _groups(module)) if norm == "l2" else _row_sums(weight).amax()


def remove(module: M, keep: bool = True) -> M:
    """Take the constraint off; the weight is a plain parameter again.

    Args:
        module: as given to :func:`contractive` or :func:`orthogonal`.
        keep: leave the constrained weight in place; otherwise the unconstrained one behind it, which
            only :func:`contractive` has.

    Returns:
        The module.

    Raises:
        OptionError: the weight is not constrained, or ``keep=False`` after :func:`orthogonal`.
    """
    if not parametrize.is_parametrized(module, "weight"):
        raise OptionError(f"The weight of this {type(module).__name__} is not constrained.")
    if not keep and isinstance(module.parametrizations["weight"][0], _Folded):  # type: ignore[index]
        raise OptionError("Behind an orthogonal weight there is no other to go back to: use keep=True.")
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=keep)
    return module


class _Bounded(nn.Module):
    """``V -> V min(1, rate / bound(V))``."""

    def __init__(self, rate: float, norm: str, groups: int):
        super().__init__()
        self.rate, self.norm, self.groups = rate, norm, groups

    def forward(self, v: Tensor) -> Tensor:
        if self.norm == "l2":
            bound = _l2_bound(v, self.groups)
        else:
            bound = _row_sums(v).reshape(-1, *[1] * (v.dim() - 1))
        factor = self.rate / bound.clamp_min(self.rate)
        return (v.to(factor.dtype) * factor).to(v.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

    def extra_repr(self) -> str:
        return f"rate={self.rate}, norm={self.norm!r}"


class _Folded(nn.Module):
    """A kernel as ``groups`` matrices of C_out / groups rows."""

    def __init__(self, groups: int, shape: tuple[int, ...]):
        super().__init__()
        self.groups, self.shape = groups, shape

    def forward(self, v: Tensor) -> Tensor:
        return v.reshape(self.groups, self.shape[0] // self.groups, -1)

    def right_inverse(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.shape)


class _Unfolded(nn.Module):
    """Matrices as a kernel again, scaled."""

    def __init__(self, scale: float, groups: int, shape: tuple[int, ...]):
        super().__init__()
        self.scale, self.groups, self.shape = scale, groups, shape

    def forward(self, q: Tensor) -> Tensor:
        return self.scale * q.reshape(self.shape)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.reshape(self.groups, self.shape[0] // self.groups, -1) / self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}"


def _l2_bound(weight: Tensor, groups: int) -> Tensor:
    """An upper bound on the operator norm of a linear layer's or convolution's weight, a scalar."""
    taps = weight.shape[2:]
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(weight.device.type, enabled=False):
        matrices = work.reshape(groups, 1, weight.shape[0] // groups, *weight.shape[1:])
        slack = 1.0
        if taps:
            grid = [_GRID * (k - 1) if k > 1 else 1 for k in taps]
            axes = tuple(range(-len(taps), 0))
            transfer = torch.fft.rfftn(matrices, s=grid, dim=axes).flatten(-len(taps))
            matrices = transfer.movedim(-1, 1).flatten(1, 2)
            slack = math.cos(math.pi / (2 * _GRID)) ** sum(k > 1 for k in taps)
        bound = _gram_bound(matrices).amax() / slack
    rank = min(weight.shape[0], weight[0].numel())
    rounding = 8 * weight[0].numel() * torch.finfo(work.dtype).eps
    rounding += math.sqrt(rank) * torch.finfo(weight.dtype).eps
    return bound * (1 + rounding)


def _gram_bound(matrices: Tensor) -> Tensor:
    """Upper bounds on the spectral norms of a batch (..., m, n) of real or complex matrices."""
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mT  # of the same norms
    log = 0.0
    for _ in range(_SQUARINGS):
        size = _frobenius(matrices)
        matrices = matrices / size[..., None, None]
        matrices = matrices.mH @ matrices
        log = 2 * (log + size.log())
    return ((log + _frobenius(matrices).log()) / 2**_SQUARINGS).exp()


def _frobenius(matrices: Tensor) -> Tensor:
    square = torch.view_as_real(matrices) if matrices.is_complex() else matrices
    square = square.square().flatten(matrices.dim() - 2).sum(dim=-1)
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _row_sums(weight: Tensor) -> Tensor:
    """(C_out,) sums of absolute weights, raised by what rounding may hide."""
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    sums = work.abs().flatten(1).sum(dim=1)
    count = weight[0].numel()
    return sums * (1 + count * torch.finfo(work.dtype).eps + 2 * torch.finfo(weight.dtype).eps)


def _groups(module: Layer) -> int:
    return 1 if isinstance(module, nn.Linear) else module.groups


def _overlap(module: Layer) -> int:
    """How many positions of the output read one position of the input, at most."""
    if isinstance(module, nn.Linear):
        return 1
    count = 1
    for k, stride, dilation in zip(module.kernel_size, module.stride, module.dilation, strict=True):
        # Taps that a position can reach lie stride / gcd(stride, dilation) apart; not so around a torus.
        apart = 1 if module.padding_mode == "circular" else stride // math.gcd(stride, dilation)
        count *= math.ceil(k / apart)
    return count


def _check_kind(module: Any) -> None:
    if not isinstance(module, _KINDS):
        known = ", ".join(f"nn.{kind.__name__}" for kind in _KINDS)
        raise OptionError(f"A norm constraint takes {known}; got a {type(module).__name__}.")
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise OptionError(
            f"The weight of this {type(module).__name__} does not exist yet: call the module with an example "
            "first, or say how many inputs it has."
        )


def _check(module: Any, rate: float) -> None:
    _check_kind(module)
    if not is_number(rate) or not 0 < rate < math.inf:
        raise OptionError(f"rate must be a positive number, below 1 for a contraction; got {rate!r:.40}.")
    if parametrize.is_parametrized(module, "weight"):
        raise OptionError(
            f"The weight of this {type(module).__name__} is parametrised already; take that off with "
            "twnn_plugin.constraints.remove first."
        )


def _check_norm(norm: str) -> None:
    if norm not in _NORMS:
        raise OptionError(f"norm must be one of {_NORMS}; got {norm!r}.{nearest(str(norm), _NORMS)}")


def _check_padding(module: Layer, norm: str) -> None:
    if isinstance(module, nn.Linear) or norm == "max":
        return
    if module.padding_mode not in ("zeros", "circular"):
        raise OptionError(
            f"The l2 bound holds for padding_mode 'zeros' and 'circular'; got {module.padding_mode!r}, which "
            "repeats entries and can expand them. Use one of these, or contractive(norm='max')."
        )
    if module.padding_mode == "circular" and not isinstance(module.padding, str):
        for k, dilation, padding in zip(module.kernel_size, module.dilation, module.padding, strict=True):
            if 2 * padding > dilation * (k - 1):
                raise OptionError(
                    f"Circular padding of {padding} makes the output larger than the input, which repeats "
                    f"entries and is not covered by the l2 bound; use at most {dilation * (k - 1) // 2}."
                )


def _own_class(module: M) -> M:
    """Let the module be copied and pickled.

    torch gives a parametrised module a class of its own that refuses to be pickled, and that its copies
    share: taking the parametrisation off one then breaks the others. Both are put right by making
    each copy from the plain module and its parametrisations.
    """
    own: Any = type(module)
    own.__reduce_ex__ = _reduce
    own.__deepcopy__ = _deepcopy
    return module


def _reduce(module: nn.Module, protocol: Any) -> tuple[Callable[..., nn.Module], tuple[Any, ...]]:
    state = dict(module.__dict__)
    children = dict(module._modules)
    lists = children.pop("parametrizations")
    assert isinstance(lists, nn.ModuleDict)
    state["_modules"] = children
    return _rebuild, (parametrize.type_before_parametrizations(module), state, dict(lists.items()))


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    build, parts = _reduce(module, None)
    made = memo[id(module)] = build(*copy.deepcopy(parts, memo))
    return made


def _rebuild(kind: Any, state: dict[str, Any], lists: dict[str, Any]) -> Any:
    module = kind.__new__(kind)
    module.__setstate__(state)
    for name, chain in lists.items():
        with torch.no_grad():
            module.register_parameter(name, nn.Parameter(chain()))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
        module.parametrizations[name] = chain
    return _own_class(module)
