"""A network whose layers are iterated by choice: rows are grouped by what they chose."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Feedback, Report, SolveSettings
from ..blocks.anchor import anchored
from ..blocks.message import pool
from ..blocks.one_map import OneMap
from ..errors import MapError, OptionError, UnknownNameError, nearest
from ..policies import Policy
from .connection import Connection
from .costs import Costs, count, probe
from .protocols import Separable
from .record import SelectionRecord, SelectionReport
from .sweep import Sweeps

__all__ = ["LayerSelection", "selection_of"]


class LayerSelection(nn.Module):
    """Layers in a row and a head, of which a policy picks layers to iterate, sample by sample.

    DynaLay (Mathur & Plis 2023). After the open-loop pass the policy looks at the activations of all layers.
    Each sample picks a layer, which is iterated to its fixed point ``z = layer(h + message(z))`` (a
    fixed-point-iterative layer, the self-loop wormhole), and the layers after it are computed again; or it
    picks none (NOP) and is done. Then it decides again. Samples are grouped by their choice: no layer is
    evaluated for a sample that did not choose it or a layer before it.

    The layers and the head belong to the caller's model; the connections and the policy to this module.

    Args:
        layers: modules of one tensor by name, in the order in which they are called.
        head: module from the last layer's output to logits (b, K, ...).
        example: (B, ...) an input of the first layer, to learn the shapes from.
        policy: who iterates what.
        iterated: names of the layers that can be iterated; None: all.
        max_choices: decisions a sample may make before it is cut off, >= 1.
        channels_last: whether 4-axis activations are (B, H, W, C).
        settings: how a layer is solved for; None: tol=1e-3, max_iter=30.
        connection: how the connections are built.
        open_head: whether samples that iterated are answered by a head of their own, which starts as a copy
            of ``head``; ``head`` then answers NOP alone. See :func:`~twnn_plugin.selection.closed_loss`.

    Attributes:
        last: what was done in the last forward pass.

    Raises:
        OptionError: an impossible option, or a policy for single spans.
        UnknownNameError: ``iterated`` names no layer.
        MapError: a layer does not map a tensor to a tensor of the same batch size, or cannot be iterated.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        head: nn.Module,
        example: Tensor,
        policy: Policy,
        iterated: Sequence[str] | None = None,
        max_choices: int = 3,
        channels_last: bool = False,
        settings: SolveSettings | None = None,
        connection: Connection | None = None,
        open_head: bool = False,
    ):
        super().__init__()
        names = tuple(layers)
        chosen = names if iterated is None else tuple(iterated)
        for name in chosen:
            if name not in names:
                raise UnknownNameError(
                    f"Unknown layer {name!r}.{nearest(name, list(names))} Layers: {', '.join(names)}."
                )
        if not chosen or len(set(chosen)) != len(chosen):
            raise OptionError(f"A selection needs layers, each named once; got {chosen!r} of {names!r}.")
        self.max_choices = _checked(max_choices)
        _check_selects(policy)
        # In a tuple, so that they do not become children of this module.
        self.modules_in_order = (*(layers[name] for name in names), head)
        self.names = names
        self.iterated = tuple(name for name in names if name in chosen)
        self.places = tuple(names.index(name) for name in self.iterated)
        self.one_maps = tuple(OneMap([module]) for module in self.modules_in_order)
        self.connections = nn.ModuleList()
        build = (connection or Connection()).build
        solve = settings if settings is not None else SolveSettings()
        shapes = probe(self.modules_in_order, names, example)
        for name, place in zip(self.iterated, self.places, strict=True):
            self.connections.append(_built(build, name, shapes[place : place + 2], solve, channels_last))
        self.layouts = tuple(c.out_layout for c in self.feedbacks)
        widths = [
            pool(shapes[p + 1], layout).shape[1] for p, layout in zip(self.places, self.layouts, strict=True)
        ]
        self.widths = tuple(widths)
        policy.bind(self.iterated, widths)
        self.policy = policy.to(example.device)
        self.open_head = _separate(head).train(self.training) if open_head else None
        self.last: SelectionRecord | None = None
        self._costs: dict[tuple[torch.Size, int], Costs] = {}

    @property
    def feedbacks(self) -> list[Feedback]:
        """The connections, one for each layer that can be iterated."""
        return [c for c in self.connections if isinstance(c, Feedback)]

    def forward(self, x: Tensor, before: int = 0) -> Tensor:
        """Through the layers and the head; ``last`` tells what was done.

        Args:
            x: (B, ...) inputs of the first layer.
            before: multiply-adds that a sample took before them, such as those of a stem: they belong to the
                network's cost.

        Returns:
            (B, K, ...) logits.
        """
        work = Sweeps(self, x, before)
        logits = work.run()
        self.last = work.record()
        if self.training and torch.is_grad_enabled():
            # The layers and the head, too: with an open head, the other one may answer for nobody.
            others = [p for module in self.modules_in_order for p in module.parameters()]
            logits = anchored(logits, dict.fromkeys([*self.parameters(), *others]))
        return logits

    def costs(self, x: Tensor, before: int = 0) -> Costs:
        """Multiply-adds of each part for one sample of this shape, and of what went before."""
        key = (x.shape[1:], before)
        if key not in self._costs:
            self._costs[key] = count(self.modules_in_order, self.feedbacks, self.places, x, before)
        return self._costs[key]

    def configure(
        self, policy: Policy | None = None, max_choices: int | None = None, **settings: Any
    ) -> None:
        """Change who chooses and how layers are solved for; the weights stay.

        Args:
            policy: the new one; None: it stays.
            max_choices: decisions a sample may make; None: it stays.
            **settings: those of :class:`~twnn_plugin.blocks.SolveSettings`.

        Raises:
            OptionError: an impossible value, or a policy made for another network or for single spans.
                Nothing has changed then.
        """
        changed = [feedback.settings.changed(**settings) for feedback in self.feedbacks]
        choices = self.max_choices if max_choices is None else _checked(max_choices)
        if policy is not None:
            _check_selects(policy)
            policy.bind(self.iterated, self.widths)
            self.policy = policy.to(next(self.parameters()).device)
            policy.train(self.training)
        self.max_choices = choices
        for feedback, new in zip(self.feedbacks, changed, strict=True):
            feedback.settings = new

    def set_head(self, head: nn.Module) -> None:
        """Give both paths a new head, such as one with another number of classes."""
        self.modules_in_order = (*self.modules_in_order[:-1], head)
        self.one_maps = (*self.one_maps[:-1], OneMap([head]))
        if self.open_head is not None:
            self.open_head = _separate(head).train(self.training)
        self.last = None
        self._costs.clear()

    def auxiliary_loss(self) -> Tensor | None:
        """Jacobian penalties of the last pass in training, to be added to the loss; None: there are none."""
        found = [loss for c in self.feedbacks if (loss := c.auxiliary_loss()) is not None]
        return sum(found[1:], found[0]) if found else None

    def report(self) -> Report:
        """One record for each layer that can be iterated; it prints with the shares of each choice."""
        return SelectionReport(self.last)

    # Copies and pickles hold no activations.
    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "last": None}


def _checked(choices: Any) -> int:
    if isinstance(choices, bool) or not isinstance(choices, int) or choices < 1:
        raise OptionError(f"max_choices must be a whole number >= 1; got {choices!r}.")
    return choices


def _check_selects(policy: Policy) -> None:
    """Refuse a policy that has no answer to which layer to iterate."""
    if type(policy).select is Policy.select:
        raise OptionError(
            f"Policy {type(policy).__name__} decides about single spans, and cannot pick among layers. Use "
            "one that does, such as 'dynalay', 'entropy', 'always', 'never' or 'random'."
        )


def _separate(head: nn.Module) -> nn.Module:
    return head.separate() if isinstance(head, Separable) else copy.deepcopy(head)


def _built(
    build: Callable[..., Feedback],
    name: str,
    ends: Sequence[Tensor],
    settings: SolveSettings,
    channels_last: bool,
) -> Feedback:
    if not ends[0].is_floating_point():
        raise MapError(
            f"Layer {name!r} cannot be iterated: what comes back is added to its input, and that is "
            f"{ends[0].dtype}. Name the layers that can be, without this one, in iterated."
        )
    try:
        return build(name, *ends, settings, channels_last)
    except (OptionError, UnknownNameError):
        raise
    except ValueError as error:
        raise MapError(f"Layer {name!r} cannot be iterated: {error}") from error


def selection_of(model: nn.Module) -> LayerSelection | None:
    """The selection in a model, or the model itself if it is one; None: it has none."""
    return next((module for module in model.modules() if isinstance(module, LayerSelection)), None)
