"""What a model with wormholes does differently when timm's tools call on it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import AttachError
from .. import timm_adapter
from ..closed_head import CLOSED_HEAD, ClosedHead
from ..intact import guard
from ..span import AttachedGroup, spans
from ..trace import candidates
from . import checkpointing
from .intermediates import settled_taps

__all__ = ["Manners", "adopt"]

_GROUP = 12  # parameters in a group of layers, where timm divides a model by itself


class Manners:
    """Methods that stand in front of a model's own, on one instance.

    Args:
        model: the model, wormholes attached.
        child: name of the child that holds the wormholes.
        stages: paths of its stages, in order, as ``feature_info`` has them.
    """

    def __init__(self, model: nn.Module, child: str, stages: Sequence[str]):
        self.model = model
        self.child = child
        self.stages = tuple(stages)
        self.intact = guard(model, self._groups())

    def own(self, name: str) -> Callable[..., Any] | None:
        """The method of the model's class that is stood in for, bound; None if it has none."""
        method = getattr(type(self.model), name, None)
        return None if method is None else method.__get__(self.model)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the model's blocks again in the backward pass instead of keeping their activations.

        Inside of spans and outside of them, in the open-loop pass and in differentiated evaluations alike. No
        solve is repeated; each product of a backward solve computes the span's blocks once more. Running
        statistics are counted once a forward pass.
        """
        holder = self.model.get_submodule(self.child)
        heads = [child for child in self.model.children() if isinstance(child, ClosedHead)]
        answered = [classifier for head in heads for classifier in head.hooked]
        checkpointing.switch(checkpointing.blocks(self.model, (holder, *heads), answered), enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, the wormholes' included.

        Of these every scale, bias and norm, that is all of at most one axis.
        """
        own = self.own("no_weight_decay")
        holder = self.model.get_submodule(self.child)
        mine = {f"{self.child}.{name}" for name, p in holder.named_parameters() if p.dim() <= 1}
        return mine | set(own() if own is not None else ())

    def group_matcher(self, coarse: bool = False) -> Any:
        """Groups for layer decay: those of the plain model, the wormholes in the last one.

        Without a classifier, which timm has in a group of its own, that is the backbone's last.

        Args:
            coarse: as in timm.

        Returns:
            What timm takes: its own patterns, or a function of the name of a parameter or module.
        """
        own = self.own("group_matcher")
        if own is None:
            return self._divided()
        matcher = own(coarse=coarse)
        groups = timm_adapter.groups(self.model, matcher)
        children = (self.child, CLOSED_HEAD)
        added = {name: group for name, group in groups.items() if name.split(".")[0] in children}
        last = max((group for name, group in groups.items() if name not in added), default=0)
        if all(group <= last for group in added.values()):
            return matcher
        groups.update(dict.fromkeys(added, last))
        return lambda name: groups.get(name, last)

    def _divided(self) -> Callable[[str], int]:
        """Groups for a model whose class has none, as timm makes them.

        Twelve parameters are a group, and the classifier's are the last.

        Returns:
            The group of a parameter or module by its name.
        """
        added = tuple(f"{name}." for name in (self.child, CLOSED_HEAD))
        names = [name for name, _ in self.model.named_parameters() if not name.startswith(added)]
        declared: Any = getattr(self.model, "pretrained_cfg", None) or {}
        head = declared.get("classifier")
        heads = tuple(head) if isinstance(head, (tuple, list)) else (head or "",)
        trunk = [name for name in names if not name.startswith(heads)]
        groups = {name: place // _GROUP for place, name in enumerate(trunk)}
        behind = len(trunk) + _GROUP - 1
        groups.update({name: behind // _GROUP for name in names if name not in groups})
        last = max(groups.values(), default=0)

        def group(name: str) -> int:
            inside = [place for known, place in groups.items() if known.startswith(f"{name}.")]
            return groups.get(name, min(inside, default=last))

        return group

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm; as before any pass, the spans are looked after."""
        if torch.compiler.is_dynamo_compiling() or not self.intact.begun:  # else the pass itself has done so
            self.intact(self.model, args)
            head = getattr(self.model, CLOSED_HEAD, None)
            if isinstance(head, ClosedHead) and not torch.compiler.is_dynamo_compiling():
                head.pass_by_hand()
        # Not a bound method: where a compiler leaves its graph, it would find this one by that name.
        own: Any = getattr(type(self.model), "forward_features")  # noqa: B009
        return own(self.model, *args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Features of the model's stages, as in timm; those inside of a span at its fixed point.

        With open rows the spans are evaluated once more, at the solution. Where ``stop_early`` would stop
        inside of a span, the pass goes on to its end.
        """
        # A compiler cannot follow a pass whose modules answer from memory: it leaves its graph for it.
        gather = _intermediates_outside if torch.compiler.is_compiling() else Manners._intermediates
        return gather(self, *args, **kwargs)

    def _intermediates(self, *args: Any, **kwargs: Any) -> Any:
        own = self.own("forward_intermediates")
        assert own is not None
        self.intact(self.model, args)
        given = inspect.signature(own).bind(*args, **kwargs)
        if given.arguments.get("stop_early") and self._inside(given.arguments.get("indices")):
            given.arguments["stop_early"] = False
        return self._settled(lambda: own(*given.args, **given.kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The features of a model made with ``features_only``; those inside of a span at its fixed point."""
        gather = _features_outside if torch.compiler.is_compiling() else Manners._features
        return gather(self, *args, **kwargs)

    def _features(self, *args: Any, **kwargs: Any) -> Any:
        own = self.own("forward")
        assert own is not None
        return self._settled(lambda: own(*args, **kwargs))

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        """In place of ``forward_intermediates`` where spans of both modes would have to be gathered from."""
        raise AttachError(
            "This model has spans that are replayed and one for which the forward is run again, whose "
            "activations cannot be gathered settled in one pass. Attach wormholes of one mode; "
            "twnn_plugin.spans(model) says which each has."
        )

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """Remove the layers behind the last wanted one, as in timm.

        Raises:
            AttachError: a wormhole's span would lose a part; the model is as it was.
        """
        own = self.own("prune_intermediate_layers")
        assert own is not None
        for group in self._groups():
            lost = self._lost(group, args, kwargs)
            if lost:
                raise AttachError(
                    f"Pruning would remove {lost!r}, a part of span {group.name!r}. Keep the stages up to "
                    "the end of the span, or attach the wormhole to the pruned model."
                )
        found = own(*args, **kwargs)
        self.intact.survey()  # timm puts what is left into containers of its own making
        return found

    def _lost(self, group: AttachedGroup, args: Any, kwargs: Any) -> str | None:
        """The path of a module of the group that pruning removes; found on a copy that shares the weights."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
        twin = copy.deepcopy(self.model, memo)
        type(self.model).prune_intermediate_layers(twin, *args, **kwargs)  # pyright: ignore
        left = {id(module) for module in twin.modules()}
        paths = {id(module): path for path, module in self.model.named_modules()}
        gone = [m for m in group.program.modules() if id(memo.get(id(m))) not in left]
        return paths[id(gone[0])] if gone else None

    def _groups(self) -> list[AttachedGroup]:
        return list(dict.fromkeys(span.group for span in spans(self.model)))

    def _settled(self, run: Callable[[], Any]) -> Any:
        nodes = list(candidates(self.model, self.stages).values())
        return settled_taps(self.model, self._groups(), nodes, run)

    def _inside(self, indices: int | Sequence[int] | None) -> bool:
        """Whether the last wanted stage lies inside of a span, before its end."""
        count = len(self.stages)
        if indices is None or isinstance(indices, int):
            return False  # the last stages are wanted: nothing is left to stop for
        last = self.stages[max(index % count for index in indices)]
        paths = {id(module): path for path, module in self.model.named_modules()}
        for group in self._groups():
            *inner, end = [paths[id(module)] for module in group.program.modules()]
            if any(_within(path, last) for path in inner) and not _within(end, last):
                return True
        return False


_intermediates_outside: Callable[..., Any] = torch.compiler.disable(Manners._intermediates)  # type: ignore[call-arg]
_features_outside: Callable[..., Any] = torch.compiler.disable(Manners._features)  # type: ignore[call-arg]


def _within(path: str, stage: str) -> bool:
    return path == stage or path.startswith(stage + ".") or stage.startswith(path + ".")


def adopt(
    model: nn.Module, child: str, stages: Sequence[str], checkpoint: bool = False, features: bool = False
) -> None:
    """Give a model the manners that timm's tools expect, wormholes included.

    Args:
        model: the model, wormholes attached.
        child: name of the child that holds them.
        stages: paths of its stages, in order.
        checkpoint: whether it checkpointed before.
        features: whether its output is a list of features (``features_only``).
    """
    manners = Manners(model, child, stages)
    names = ["set_grad_checkpointing", "no_weight_decay", "group_matcher"]
    standing = ("forward_features", "forward_intermediates", "prune_intermediate_layers")
    names += [n for n in standing if hasattr(type(model), n)]
    for name in names + ["forward"] * features:
        if name not in vars(model):
            setattr(model, name, getattr(manners, name))
        elif name != "forward_features" and len({span.mode for span in spans(model)}) > 1:
            setattr(
                model, name, manners.refuse
            )  # a span that is run again gathers by itself, for itself alone
    if checkpoint:
        manners.set_grad_checkpointing(True)
