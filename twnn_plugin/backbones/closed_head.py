"""A classifier of its own for the samples whose wormholes stay closed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..blocks import Feedback
from ..blocks.companion import Companion
from ..errors import AttachError, OptionError, nearest
from ..trees import rebuild
from .survey import run

__all__ = [
    "CLOSED_HEAD",
    "ClosedHead",
    "add_closed_head",
    "check_closed_head",
    "check_options",
    "check_weight",
    "closed_logits",
    "closed_loss",
]

CLOSED_HEAD = "closed_head"
"""Name of the child module that holds it."""


@runtime_checkable
class _Classifies(Protocol):
    """What timm's models have."""

    def get_classifier(self) -> Any: ...


class ClosedHead(nn.Module):
    """Copies of a model's classifiers that answer for the samples that were not iterated.

    One head for both would have to serve two kinds of features: where the loss is on the open output
    alone, the closed one loses ten points and more. A fresh closed head is a copy, so that the closed network
    is still the plain one, bit by bit; a plain checkpoint loads into both heads.

    In training the open-loop value of every sample goes through the rest of the network beside the settled
    one, so that there are closed logits for all samples (:func:`closed_logits`).

    Args:
        model: the model; its classifiers get hooks.
        paths: of the classifiers.
        parts: the wormholes.
        weight: of the closed logits' loss.
        where: as they were named: True, or the path of one.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        parts: Sequence[Feedback],
        weight: float,
        where: bool | str = True,
    ):
        super().__init__()
        self.paths, self.weight, self.where = tuple(paths), weight, where
        self.parts = tuple(parts)  # in a tuple: they are the model's children already
        self.heads = nn.ModuleList(copy.deepcopy(model.get_submodule(path)) for path in self.paths)
        self.companion = Companion()
        self.logits: list[Tensor | None] = [None] * len(self.paths)
        self.by_hand = False  # whether the last pass of training was not one of the model's own
        for part in self.parts:
            part.companion = self.companion
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)
        self.hooked: tuple[nn.Module, ...] = ()  # the classifiers; in a tuple for the same reason
        self._hook(model)
        model.register_load_state_dict_pre_hook(self._copy_missing)

    def forward(self, value: Any) -> Any:
        """Identity: containers that run all their children in order are not disturbed."""
        return value

    def renew(self, model: nn.Module) -> None:
        """Copy the classifiers anew, after they were replaced (``reset_classifier``).

        A model without a classifier returns features, of which there is but one version; the closed head is
        empty until there is a classifier again.

        Raises:
            AttachError: there are some classifiers, but not as many as there were.
        """
        classifiers = [m for m in _classifiers(model, self.where) if not isinstance(m, nn.Identity)]
        if classifiers and len(classifiers) != len(self.paths):
            raise AttachError(
                f"The model had {len(self.paths)} classifier(s) when its closed head was added and has "
                f"{len(classifiers)} now; the closed head cannot follow."
            )
        if classifiers:
            self.paths = tuple(_path(model, classifier) for classifier in classifiers)
        self.heads = nn.ModuleList(copy.deepcopy(classifier) for classifier in classifiers)
        self._hook(model)

    def _hook(self, model: nn.Module) -> None:
        self.hooked = tuple(model.get_submodule(path) for path in self.paths) if len(self.heads) else ()
        for place, classifier in enumerate(self.hooked):
            classifier.register_forward_hook(_Answer(self, place))

    def _begin(self, model: nn.Module, args: Any) -> None:
        self.companion.begin(len(self.heads) > 0 and self.training and torch.is_grad_enabled())
        self.logits = [None] * len(self.heads)
        self.by_hand = False

    def pass_by_hand(self) -> None:
        """Called where stages are called one by one: there are no closed logits of such a pass."""
        self.logits = [None] * len(self.heads)
        self.by_hand = self.training and torch.is_grad_enabled()

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self.companion.begin(False)

    def answer(self, place: int, features: Tensor, output: Tensor) -> Tensor:
        """The logits: the open head's for settled samples, the closed one's for all others."""
        closed, rows = self.heads[place](features), self.companion.rows
        if rows is not None:
            self.logits[place] = closed[rows:]
            output, closed = output[:rows], closed[:rows]
        settled = self._settled(output.shape[0]).to(output.device)
        return torch.where(settled.view(-1, *[1] * (output.dim() - 1)), output, closed)

    def _settled(self, rows: int) -> Tensor:
        """(B,) bool: samples that were iterated somewhere and did not fall back."""
        settled = torch.zeros(rows, dtype=torch.bool, device="cpu")
        for part in self.parts:
            known, mine = self.companion.settled.get(part.span, (0, None))
            if known != rows:
                if part.last is None:
                    continue
                raise AttachError(
                    f"The head was given {rows} samples, the last pass of this thread through the wormholes "
                    f"had {known}: the closed head cannot tell which of them are settled. Call the model, or "
                    "forward_head right after forward_features."
                )
            if mine is not None:
                settled = settled.to(mine.device) | mine
        return settled

    def _copy_missing(self, model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Let a plain backbone's checkpoint load strictly, into both heads."""
        mine = f"{prefix}{CLOSED_HEAD}."
        if any(key.startswith(mine) for key in state):
            return
        for place, head in enumerate(self.heads):
            path = self.paths[place]
            for name, value in head.state_dict().items():
                state[f"{mine}heads.{place}.{name}"] = state.get(f"{prefix}{path}.{name}", value)

    # Copies and pickles hold no activations.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "logits": [None] * len(self.heads)}


class _Answer:
    """The hook of one classifier; an object, because closures cannot be pickled."""

    def __init__(self, head: ClosedHead, place: int):
        self.head, self.place = head, place

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.head.answer(self.place, args[0], output)


class _Renewing:
    """In place of ``reset_classifier``: the closed head follows."""

    def __init__(self, model: nn.Module, head: ClosedHead, reset: Callable[..., Any]):
        self.model, self.head, self.reset = model, head, reset

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.reset(*args, **kwargs)
        self.head.renew(self.model)


def check_closed_head(model: nn.Module, where: bool | str, example: Any, result: Any, end: nn.Module) -> None:
    """Refuse a closed head that cannot be; nothing is changed.

    Args:
        model: the model before any wormhole, in eval mode.
        where: True: what ``get_classifier`` returns; a path: the module that gives the logits.
        example: an input.
        result: what the model makes of it.
        end: the module behind which the first wormhole's settled value goes on.

    Raises:
        AttachError: the model has no classifier, or what lies behind the wormholes cannot take two versions
            of each sample in one batch.
        OptionError: ``where`` names no module.
    """
    if not _classifiers(model, where):
        raise AttachError(
            f"This {type(model).__name__} has no classifier to copy for a closed head (num_classes=0?). Name "
            "the module that gives the logits: closed_head='path.of.it'."
        )
    reason = "it answers differently then"
    handle = end.register_forward_hook(lambda module, args, output: rebuild(output, _twice))
    try:
        both = run(model, example)
        if all(_alike(half, result) for half in both.chunk(2)):
            return
    except (RuntimeError, TypeError, AttributeError) as error:  # whatever the rest of the model trips over
        reason = str(error).strip().split("\n")[0]
    finally:
        handle.remove()
    raise AttachError(
        "A closed head needs both the settled and the open-loop value of each sample to go through the rest "
        f"of the model in one batch, which this one does not allow: {reason}. End the wormhole at the last "
        "stage, or leave closed_head out."
    )


def _alike(half: Tensor, result: Tensor) -> bool:
    """Whether half of a batch is answered as the whole is; without values, whether it has that shape."""
    if half.is_meta:
        return half.shape == result.shape
    return torch.allclose(half, result, rtol=1e-3, atol=1e-4)


def _twice(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def add_closed_head(
    model: nn.Module, parts: Sequence[Feedback], where: bool | str, weight: float
) -> ClosedHead:
    """Give a model with wormholes a closed head, which :func:`check_closed_head` has let pass."""
    paths = [_path(model, classifier) for classifier in _classifiers(model, where)]
    head = ClosedHead(model, paths, parts, float(weight), where)
    model.add_module(CLOSED_HEAD, head.train(model.training))
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is not None:
        model.reset_classifier = _Renewing(model, head, reset)  # pyright: ignore[reportArgumentType]
    return head


def check_options(where: Any, weight: Any) -> None:
    """Raise :class:`OptionError` unless these can be ``closed_head`` and ``closed_weight`` of some model."""
    if not isinstance(where, bool) and not (isinstance(where, str) and where):
        raise OptionError(
            "closed_head is True, False, or the path of the module that gives the logits, such as 'head.fc'; "
            f"got {where!r}."
        )
    if weight is None:
        return
    check_weight(weight)
    if where is False:
        raise OptionError(
            f"closed_weight={weight!r} is the weight of a closed head's loss, and there is none: give "
            "closed_head=True, too."
        )


def check_weight(weight: Any) -> None:
    """Raise unless ``weight`` can be a loss's."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise OptionError(f"closed_weight is the weight of a loss, at least 0; got {weight!r}.")


def closed_logits(model: nn.Module) -> Tensor | None:
    """The closed network's logits (B, K) for every sample of the last training pass, with their graph.

    Returns:
        None if the model has no closed head (or no classifier), or the last pass was not one of training. To
        see the closed network in eval mode, configure ``policy="never"``.

    Raises:
        AttachError: the last pass was one of training by ``forward_features`` and ``forward_head``, in which
            the closed head answers but is taught nothing; or there are several models with a closed head.
    """
    head = _head(model)
    if head is not None and head.by_hand:
        raise AttachError(
            "There are no closed logits of a pass by forward_features() and forward_head(): the open-loop "
            "value of each sample goes through the rest of the network beside the settled one where "
            "the model itself is called. Call model(images) in training."
        )
    if head is None or not head.logits or any(logits is None for logits in head.logits):
        return None
    logits = [value.flatten(1) for value in head.logits if value is not None]
    return torch.stack(logits).mean(dim=0) if len(logits) > 1 else logits[0]


def closed_loss(model: nn.Module, criterion: Callable[[Tensor, Any], Tensor], targets: Any) -> Tensor | None:
    """The weighted loss of the closed network, to be added to that of the model's output.

    Args:
        model: a model that has just made a training pass.
        criterion: of (logits, targets), such as the one used on the output.
        targets: of the batch.

    Returns:
        A scalar; None where :func:`closed_logits` has nothing.
    """
    logits, head = closed_logits(model), _head(model)
    if logits is None or head is None:
        return None
    return head.weight * criterion(logits, targets)


def _head(model: nn.Module) -> ClosedHead | None:
    heads = closed_heads(model)
    if len(heads) > 1:
        raise AttachError(
            f"This {type(model).__name__} holds {len(heads)} models with closed heads, each of which has "
            "logits of its own: ask them one by one."
        )
    return heads[0] if heads else None


def closed_heads(model: nn.Module) -> list[ClosedHead]:
    """Those of all models in a module."""
    return [m for m in model.modules() if isinstance(m, ClosedHead)]


def _classifiers(model: nn.Module, where: bool | str) -> list[nn.Module]:
    if isinstance(where, str):
        known = dict(model.named_modules())
        if where not in known or not where:
            raise OptionError(
                f"closed_head names the module that gives the logits; there is no {where!r}."
                f"{nearest(where, known)}"
            )
        return [known[where]]
    found = model.get_classifier() if isinstance(model, _Classifies) else ()
    modules = found if isinstance(found, (tuple, list)) else (found,)
    return [m for m in modules if isinstance(m, nn.Module) and not isinstance(m, nn.Identity)]


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)
