"""``deq_*``: image classifiers on ``torchdeq.get_deq``, built as torchdeq recommends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .staged import StagedNet, build, cifar_cfg

__all__ = ["Cell", "DEQNet", "Equilibrium", "check_deq", "deq_small", "deq_tiny", "solve_deq"]

_SOLVERS = ("anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter")
_INFO = ("nstep", "abs_lowest", "rel_lowest")


class Cell(nn.Module):
    """The residual cell of the deep-implicit-layers tutorial (Kolter, Duvenaud & Johnson 2020, ch. 4).

    ``f(z, x) = norm3(relu(z + norm2(x + conv2(norm1(relu(conv1(z)))))))``, with group norms; ``x`` is
    the injected input.

    Args:
        width: channels of ``z`` and ``x``.
        inner: channels between the convolutions.
        groups: groups of the norms.
    """

    def __init__(self, width: int, inner: int, groups: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, inner)
        self.norm2 = nn.GroupNorm(groups, width)
        self.norm3 = nn.GroupNorm(groups, width)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Both (B, width, H, W), and so is the result."""
        y = self.norm1(F.relu(self.conv1(z)))
        return self.norm3(F.relu(z + self.norm2(x + self.conv2(y))))


def solve_deq(
    deq: Callable[..., tuple[list[Tensor], dict[str, Tensor]]], f: Callable[[Tensor], Tensor], z: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equilibrium of ``f`` from the state z on, as torchdeq finds it, and what it says of each row.

    torchdeq's solvers cannot take a batch of none, whose equilibrium it is itself.
    """
    if not z.shape[0]:
        return z, {key: z.new_zeros(0) for key in _INFO}
    states, info = deq(f, z)
    return states[-1], {key: info[key].detach() for key in _INFO}


class Equilibrium(nn.Module):
    """``z = cell(z, x)`` solved by torchdeq from ``z = 0``; returns ``z``.

    Weight norm on the cell's convolutions is refreshed before each solve (``torchdeq.reset_deq``).
    In eval mode torchdeq returns a detached state.

    Args:
        cell: the map.
        **options: of ``torchdeq.get_deq``, all of them spelled out by :class:`DEQNet`.
    """

    def __init__(self, cell: nn.Module, **options: Any):
        super().__init__()
        import torchdeq

        self.cell = cell
        torchdeq.apply_norm(self.cell, norm_type="weight_norm")
        self.deq = torchdeq.get_deq(**options)
        self.last_info: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Injection (B, C, H, W) to the equilibrium of the same shape."""
        import torchdeq

        torchdeq.reset_deq(self.cell)
        state, self.last_info = solve_deq(self.deq, lambda z: self.cell(z, x), torch.zeros_like(x))
        return state

    def __getstate__(self) -> dict[str, Any]:
        # The normalised weights are results of a computation, which can be neither copied nor pickled
        # while they hold its graph.
        import torchdeq

        with torch.no_grad():
            torchdeq.reset_deq(self.cell)
        return self.__dict__.copy()


class DEQNet(StagedNet):
    """A convolutional stem, one equilibrium layer and a linear classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        width: channels of the state.
        inner: channels within the cell.
        downsample: halvings of the image before the equilibrium layer.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling type.
        f_solver: torchdeq's name of the forward solver, or ``"twnn.<name>"`` for one of ours.
        b_solver: that of the backward solve, used with ``ift``.
        f_max_iter: evaluations in the forward solve at most.
        b_max_iter: likewise backward.
        f_tol: tolerance of the forward solve.
        b_tol: likewise backward.
        f_stop_mode: ``"rel"`` or ``"abs"``.
        b_stop_mode: likewise backward.
        ift: the implicit gradient; else the phantom gradient.
        grad: steps of the phantom gradient.
        tau: damping of the phantom gradient.
        core: ``"sliced"`` or ``"indexing"``.

    Attributes:
        last_info: torchdeq's ``nstep``, ``abs_lowest`` and ``rel_lowest``, (B,) each, of the newest
            forward solve.

    Raises:
        OptionError: a solver is unknown, or cannot be the backward solver.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 48,
        inner: int = 64,
        downsample: int = 1,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        f_solver: str = "fixed_point_iter",
        b_solver: str = "fixed_point_iter",
        f_max_iter: int = 24,
        b_max_iter: int = 24,
        f_tol: float = 1e-3,
        b_tol: float = 1e-3,
        f_stop_mode: str = "rel",
        b_stop_mode: str = "rel",
        ift: bool = True,
        grad: int = 1,
        tau: float = 1.0,
        core: str = "sliced",
    ):
        super().__init__(("stem", "layer1"), num_classes, in_chans, drop_rate)
        check_deq(f_solver, b_solver, ift, f_stop_mode, b_stop_mode)
        _check_core(core)
        self.stem = _stem(in_chans, width, downsample)
        self.layer1 = Equilibrium(
            Cell(width, inner),
            f_solver=f_solver,
            b_solver=b_solver,
            f_max_iter=f_max_iter,
            b_max_iter=b_max_iter,
            f_tol=f_tol,
            b_tol=b_tol,
            f_stop_mode=f_stop_mode,
            b_stop_mode=b_stop_mode,
            ift=ift,
            grad=grad,
            tau=tau,
            core=core,
        )
        self.feature_info = [
            {"num_chs": width, "reduction": 2**downsample, "module": name} for name in self.stages
        ]
        self._add_head(width, global_pool)

    @property
    def last_info(self) -> dict[str, Tensor]:
        """Statistics of the newest forward solve; empty before the first."""
        return self.layer1.last_info


def check_deq(f_solver: str, b_solver: str, ift: bool, *stop_modes: str) -> None:
    """Refuse options that ``torchdeq.get_deq`` would take and fail with later.

    Raises:
        OptionError: a solver is unknown, or cannot be the backward solver, or there is no such stop mode.
    """
    # Here rather than above: importing twnn_plugin imports this module.
    from twnn_plugin.errors import OptionError, nearest

    for option, name in (("f_solver", f_solver), ("b_solver", b_solver)):
        if not _is_solver(name):
            ours = _our_solvers()
            raise OptionError(
                f"Unknown {option} {name!r}.{nearest(str(name), (*_SOLVERS, *ours))} torchdeq's are "
                f"{', '.join(_SOLVERS)}; twnn_plugin's are {', '.join(ours)}."
            )
    if ift and b_solver == "simple_fixed_point_iter":
        raise OptionError(
            "b_solver='simple_fixed_point_iter' fails in torchdeq's implicit backward pass: use "
            "'fixed_point_iter', or ift=False for the phantom gradient."
        )
    for mode in stop_modes:
        if mode not in ("rel", "abs"):
            raise OptionError(f"f_stop_mode and b_stop_mode must be 'rel' or 'abs'; got {mode!r}.")


def _is_solver(name: str) -> bool:
    """Whether torchdeq knows a solver of this name."""
    import torchdeq.solver

    try:
        torchdeq.solver.get_solver(name)
    except (AssertionError, TypeError):
        return False
    return True


def _our_solvers() -> list[str]:
    """The names that our solvers have in torchdeq."""
    from twnn_plugin import solvers

    return [name for name in (f"twnn.{ours}" for ours in solvers.names()) if _is_solver(name)]


def _check_core(core: str) -> None:
    from twnn_plugin.errors import OptionError

    if core not in ("sliced", "indexing"):
        raise OptionError(f"core must be 'sliced' or 'indexing'; got {core!r}.")


def _stem(in_chans: int, width: int, downsample: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
    for _ in range(downsample):
        layers += [
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
        ]
    return nn.Sequential(*layers)


default_cfgs = generate_default_cfgs(
    {
        "deq_tiny.untrained": cifar_cfg(first_conv="stem.0", pool_size=(16, 16)),
        "deq_small.untrained": cifar_cfg(first_conv="stem.0", pool_size=(16, 16)),
    }
)


def _create(variant: str, pretrained: bool, /, **kwargs: Any) -> DEQNet:
    return build(DEQNet, variant, pretrained, feature_cfg={"out_indices": (0, 1)}, **kwargs)


@register_model
def deq_tiny(pretrained: bool = False, **kwargs: Any) -> DEQNet:
    """78 thousand parameters, as many as ``resnet8_cifar``; for digits.

    The defaults and the recipe that suits them (AdamW, one cycle of ``lr=1e-2``, weight decay 1e-2,
    batches of 64, gradients clipped at norm 1) come from a hand search on scikit-learn's digits over
    learning rates, solvers, tolerances, evaluations and gradients. Lower learning rates and phantom
    gradients did worse; solvers and tolerances made little difference. The demo measures the result.
    """
    return _create("deq_tiny", pretrained, **{"width": 48, "inner": 64, "downsample": 1, **kwargs})


@register_model
def deq_small(pretrained: bool = False, **kwargs: Any) -> DEQNet:
    """0.5 million parameters, for 32x32 images."""
    return _create("deq_small", pretrained, **{"width": 128, "inner": 160, "downsample": 1, **kwargs})
