"""A model of timm taken apart: what comes before its stages, the stages, and what answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Split", "split", "stem", "stem_multiply_adds"]


@dataclass(frozen=True)
class Split:
    """The parts of a model whose stages are called one after the other.

    Attributes:
        layers: by name and in order, from the first stage to the last; modules between stages are among them.
        stages: the names of the stages.
        head: from the last stage's output to the logits.
        example: (2, ...) an input of the first stage.
        channels_last: whether 4-axis activations are (B, H, W, C).
    """

    layers: dict[str, nn.Module]
    stages: tuple[str, ...]
    head: nn.Module
    example: Tensor
    channels_last: bool


class _Tail(nn.Module):
    """Modules in a row, then the model's own ``forward_head``.

    Args:
        model: whose head it is.
        modules: between the last stage and ``forward_head``.
        used: those that ``forward_head`` calls, so that they can be found by who looks for norms and the
            like.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], used: Sequence[nn.Module]):
        super().__init__()
        self.chain, self.used = nn.ModuleList(modules), nn.ModuleList(used)
        self.owner = (model,)  # in a tuple: the model is no part of its own head
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        for module in self.chain:
            x = module(x)
        owner: Any = self.owner[0]
        if self.apart and owner.training != self.training:
            owner.training = self.training  # nothing else tells a copy of the model, which is nobody's child
        return owner.forward_head(x)

    def separate(self) -> nn.Module:
        """The same head with weights of its own.

        It answers by a copy of the model of which only the head's modules are new: all others, and the
        weights that the model itself holds, are the model's own.
        """
        model = self.owner[0]
        own = list(self.modules())
        mine = {id(part) for part in (*own, *self.parameters(), *self.buffers())}
        kept: dict[int, Any] = {}  # what deepcopy takes for copied already
        for module in model.modules():
            if not any(id(part) in mine for part in module.modules()):
                kept[id(module)] = module
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if id(tensor) not in mine:
                    kept[id(tensor)] = tensor
        made = copy.deepcopy(self, kept)
        made.apart = made.owner[0] is not model
        return made


@dataclass
class _Call:
    """One call of a module in a traced pass: its path, its only input (or None), its output, its nesting."""

    path: str
    given: Tensor | None
    out: Any
    begin: int
    end: int


class _Reached(Exception):
    """The pass has come to the first stage."""

    def __init__(self, value: Tensor):
        super().__init__("the first stage")
        self.value = value


def stem(model: nn.Module, first: nn.Module, images: Tensor) -> Tensor:
    """The input of the first stage: the model's own forward pass up to there."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    handle = first.register_forward_pre_hook(stop, prepend=True)
    whole: Any = model
    try:
        whole.forward_features(images)
    except _Reached as reached:
        return reached.value
    finally:
        handle.remove()
    raise AssertionError("a traced model has passed its first stage by")


def stem_multiply_adds(model: nn.Module, first: nn.Module, images: Tensor) -> int:
    """Multiply-adds of :func:`stem` for one image of the shape of those in ``images`` (B, C, H, W)."""
    from twnn_plugin.blocks.count import counting  # importing twnn_plugin imports this module
    from twnn_plugin.modes import evaluating

    one = images.detach().new_zeros(1, *images.shape[1:])
    with evaluating(model), counting() as counter:
        stem(model, first, one)
    return counter.get_total_flops() // 2


def split(model: nn.Module) -> Split:
    """Take a model apart, and prove on an example that the parts make up the model.

    Args:
        model: in timm's manners: ``forward_features``, ``forward_head``, ``feature_info``.

    Raises:
        AttachError: it cannot be taken apart; the message says where.
    """
    from twnn_plugin.backbones.attach import find_backbone  # importing twnn_plugin imports this module
    from twnn_plugin.errors import AttachError
    from twnn_plugin.modes import evaluating

    backbone = find_backbone(model)
    whole: Any = model
    for needed in ("forward_features", "forward_head"):
        if not callable(getattr(model, needed, None)):
            raise AttachError(f"{type(model).__name__} has no {needed}: it cannot be made a DynaLay model.")
    modules = dict(model.named_modules())
    weighty = [s.name for s in backbone.stages(model) if any(True for _ in modules[s.name].parameters())]
    with evaluating(model):
        images, calls, features = _traced(model, backbone, weighty)
        path = _route(model, calls, weighty, features)
        inside = _calls_of(model, lambda: whole.forward_head(features))
        layers = {name: modules[name] for name in path[: path.index(weighty[-1]) + 1]}
        rest = [modules[name] for name in path[len(layers) :]]
        head = _Tail(model, rest, _outermost(modules, inside))
        example = stem(model, modules[weighty[0]], images)
        value = example
        for layer in layers.values():
            value = layer(value)
        if not torch.equal(torch.nan_to_num(head(value)), torch.nan_to_num(whole(images))):
            raise AttachError(
                f"The stages of this {type(model).__name__}, called one after the other, do not give what it "
                "gives: it computes something of its own between them, so that no agent can pick among them. "
                "Attach a wormhole instead: tw.attach(model), or a 'twnn_' model."
            )
    return Split(layers, tuple(weighty), head, example.detach(), backbone.channels_last(model))


def _traced(model: nn.Module, backbone: Any, stages: Sequence[str]) -> tuple[Tensor, list[_Call], Tensor]:
    """An input that the model runs with, the calls of its features, and these."""
    from twnn_plugin.errors import AttachError

    if not stages:
        raise AttachError(f"This {type(model).__name__} has no stages with weights to iterate.")
    whole: Any = model
    error: Exception | None = None
    for (images,) in backbone.examples(model, (2,)):
        found: list[Any] = []
        try:
            calls = _calls_of(
                model, lambda images=images, found=found: found.append(whole.forward_features(images))
            )
        except (RuntimeError, AssertionError, ValueError) as problem:  # too small an image, as a rule
            error = problem
            continue
        if isinstance(found[0], Tensor):
            return images, calls, found[0]
        raise AttachError(f"forward_features of {type(model).__name__} gives a {type(found[0]).__name__}.")
    raise AttachError(f"No input was found that {type(model).__name__} runs with: {error}")


def _calls_of(model: nn.Module, run: Any) -> list[_Call]:
    """What ``run`` calls, in the order in which the calls end."""
    calls: list[_Call] = []
    begins: list[int] = []
    clock = iter(range(1 << 30))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begins.append(next(clock))

    def leave(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        only = args[0] if len(args) == 1 and isinstance(args[0], Tensor) and not kwargs else None
        calls.append(_Call(path, only, out, begins.pop(), next(clock)))

    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(
                module.register_forward_hook(
                    lambda m, a, k, out, path=path: leave(path, a, k, out), with_kwargs=True
                )
            )
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _route(model: nn.Module, calls: Sequence[_Call], stages: Sequence[str], features: Tensor) -> list[str]:
    """The modules from the first stage to the features, each given what the one before returned."""
    from twnn_plugin.errors import AttachError

    def fail(reason: str) -> AttachError:
        return AttachError(
            f"An agent picks among stages that are called one after the other; in this "
            f"{type(model).__name__} "
            f"{reason}. Attach a wormhole instead: tw.attach(model), or a 'twnn_' model."
        )

    first = [call for call in calls if call.path == stages[0]]
    if len(first) != 1 or first[0].given is None:
        raise fail(f"{stages[0]!r} is called {len(first)} times, or with more than one tensor")
    path, value, here = [stages[0]], first[0].out, first[0].end
    while value is not features:
        following = [call for call in calls if call.given is value and call.begin > here]
        # A container is given the same tensor as its first child; take the one that holds no further stage.
        whole = [c for c in following if not any(s != c.path and s.startswith(f"{c.path}.") for s in stages)]
        if not whole:
            raise fail(f"what {path[-1]!r} returns goes on through something that is no module")
        call = max(whole, key=lambda c: c.end - c.begin)
        if not isinstance(call.out, Tensor):
            raise fail(f"{call.path!r} returns a {type(call.out).__name__}")
        path.append(call.path)
        value, here = call.out, call.end
    missing = [name for name in stages if name not in path]
    if missing or len(set(path)) != len(path):
        raise fail(f"{', '.join(missing) or 'a module'} is not called once on the way")
    return path


def _outermost(modules: dict[str, nn.Module], calls: Sequence[_Call]) -> list[nn.Module]:
    """The modules that were called, without those inside of others of them."""
    paths = list(dict.fromkeys(call.path for call in calls))
    return [modules[p] for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
