"""Proof, when wormholes are attached, that their map is what the model computes: a few runs of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..trees import leaves, rebuild
from .flow import leaf_at, with_leaf
from .plan import Refusal
from .survey import Survey, run, run_for_real
from .wiring import Arguments, Wiring, snapshot

__all__ = ["Perturbation", "check_reach", "check_rows", "check_wiring", "perturbed", "same"]


class _Enough(Exception):
    """Ends a pass whose rest is not needed."""


@dataclass(frozen=True)
class Perturbation:
    """What a check adds at the targets, and what the model makes of it.

    Attributes:
        entry: (B, ...) the unchanged input of the group's first call.
        signals: for each wormhole, like the first input of its target.
        states: for each, its source's output in the changed pass.
        result: what the model returned in the changed pass; None if it was ended before.
    """

    entry: Tensor
    signals: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    result: Any


def check_wiring(model: nn.Module, seen: Survey, wiring: Wiring) -> None:
    """Refuse calls whose replay is not what the model computes.

    Args:
        model: the model, in eval mode.
        seen: its survey.
        wiring: the calls.

    Raises:
        Refusal: (a) the replay reacts to a change of the targets' inputs other than the model does, (b) a row
            of it depends on the others, or (c) something inside the span is used outside.
    """
    given: list[Arguments] = []
    outputs: list[Any] = []
    with ExitStack() as stack:
        for node in wiring.nodes:
            module = node.module[0]
            hook = module.register_forward_pre_hook(
                lambda module, args, kwargs: given.append(snapshot(args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
        end = (
            wiring.nodes[-1].module[0].register_forward_hook(lambda m, args, out: outputs.append(_copy(out)))
        )
        stack.callback(end.remove)
        result = run_for_real(model, seen.examples[0])
        seen_here, out = given[: len(wiring.nodes)], outputs[0]
        changed = _changed(model, seen, wiring)
        shared, rows = wiring.template(seen_here), wiring.constants(seen_here)
        # With the hooks still on, as they will be: some of torch's own modules compute otherwise without.
        states, _ = wiring.replay(changed.entry, changed.signals, shared, rows)
    if not all(same(a, b) for a, b in zip(states, changed.states, strict=True)):
        raise Refusal(
            "the model answers a change of its input otherwise than its modules do, one after another."
        )
    check_rows(lambda e, s, r: wiring.replay(e, s, shared, r)[0], changed, rows, seen.flow.batch)
    if not same(_poisoned(model, seen, wiring, out), result):
        raise Refusal(
            "the model uses activations from inside it elsewhere, which would stay open-loop ones.",
            leaks=True,
        )


def _changed(model: nn.Module, seen: Survey, wiring: Wiring) -> Perturbation:
    """The model's own pass with something added at each target of the wiring, which must arrive."""
    targets = [next(i for i, n in enumerate(wiring.nodes) if w in n.messages) for w in range(wiring.states)]
    sources = [
        next((i, leaf) for i, n in enumerate(wiring.nodes) for v, leaf in n.states if v == w)
        for w in range(wiring.states)
    ]
    inputs = [(target, wiring.nodes[target].entry) for target in targets]
    modules = [node.module[0] for node in wiring.nodes]

    def go() -> Any:
        return run(model, seen.examples[0])

    inside = [call for call in seen.flow.calls if any(call.module is module for module in modules)]
    if any(sum(shape is not None for shape in call.outputs) > 1 for call in inside):
        check_reach(go, modules, inputs, sources)  # of one tensor there is nothing to mistake
    return perturbed(go, modules, inputs, sources, whole=False)


def perturbed(
    go: Callable[[], Any],
    modules: Sequence[nn.Module],
    targets: Sequence[tuple[int, int]],
    sources: Sequence[tuple[int, int]],
    whole: bool,
) -> Perturbation:
    """The model's own pass with something added at the targets.

    Args:
        go: makes the pass.
        modules: the modules of the group, in the order of their calls, each called once.
        targets: for each wormhole, (which module, which leaf of its arguments) the message enters.
        sources: for each, (which module, which leaf of its output) the state is.
        whole: whether the pass is made to its end.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    entries: list[Tensor] = []
    signals: list[Any] = [None] * len(targets)
    states: list[Any] = [None] * len(sources)

    def enter(index: int, place: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            value = leaf_at((args, kwargs), place)
            if index == 0:
                entries.append(value.clone())
            for wormhole in (w for w, target in enumerate(targets) if target == (index, place)):
                noise = torch.randn(value.shape, generator=generator, device="cpu").to(value)
                # Mostly down, so that an activation that works in place shows: it cuts the new negatives off.
                signals[wormhole] = (0.5 * noise - 0.5) * value.abs().mean()
                value = value + signals[wormhole]
            return with_leaf((args, kwargs), place, value)

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = list(leaves(output))
            for wormhole, (source, leaf) in enumerate(sources):
                if source == index:
                    states[wormhole] = found[leaf].clone()
            if index == len(modules) - 1 and not whole:
                raise _Enough

        return hook

    result = None
    with ExitStack() as stack:
        for index, place in dict.fromkeys(targets):
            hook = modules[index].register_forward_pre_hook(enter(index, place), with_kwargs=True)
            stack.callback(hook.remove)
        for index in {len(modules) - 1, *(source for source, _ in sources)}:
            stack.callback(modules[index].register_forward_hook(leave(index)).remove)
        with suppress(_Enough):
            result = go()
    return Perturbation(entries[0], tuple(signals), tuple(states), result)


def check_reach(
    go: Callable[[], Any],
    modules: Sequence[nn.Module],
    targets: Sequence[tuple[int, int]],
    sources: Sequence[tuple[int, int]],
) -> None:
    """Refuse a wormhole that could change nothing: a tensor may go through a call without being used there.

    NaN follows every path, through weights that are zero, too.

    Args:
        go: makes the model's pass.
        modules: the modules of the group, in the order of their calls.
        targets: for each wormhole, (which module, which leaf of its arguments) the message enters.
        sources: for each, (which module, which leaf of its output) the state is.

    Raises:
        Refusal: what is added at a target does not reach the source, or a source not the model's result.
    """
    for (target, place), (source, leaf) in zip(targets, sources, strict=True):
        arrived: list[Tensor] = []

        def enter(module: nn.Module, args: Any, kwargs: Any, place: int = place) -> Any:
            return with_leaf((args, kwargs), place, _nan(leaf_at((args, kwargs), place)))

        def leave(
            module: nn.Module, args: Any, out: Any, leaf: int = leaf, to: list[Tensor] = arrived
        ) -> None:
            to.append(leaf_at(out, leaf))
            raise _Enough

        def spoil(module: nn.Module, args: Any, out: Any, leaf: int = leaf) -> Any:
            return with_leaf(out, leaf, _nan(leaf_at(out, leaf)))

        with ExitStack() as stack, suppress(_Enough):
            stack.callback(modules[target].register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(modules[source].register_forward_hook(leave).remove)
            go()
        if not any(_has_nan(value) for value in arrived):
            raise Refusal(
                "what is added to the first tensor that its target is given does not reach the first that "
                "its source returns: it is not used on the way."
            )
        with ExitStack() as stack:
            stack.callback(modules[source].register_forward_hook(spoil).remove)
            result = go()
        if not any(_has_nan(value) for value in leaves(result)):
            raise Refusal("the model's result does not depend on the first tensor that its source returns.")


def _nan(value: Tensor) -> Tensor:
    return torch.full_like(value, float("nan"))


def _has_nan(value: Any) -> bool:
    return _floating(value) and bool(value.isnan().any())


def check_rows(
    replay: Callable[..., Sequence[Tensor]], changed: Perturbation, rows: Sequence[Tensor], batch: int
) -> None:
    """Refuse a map of which one sample alone gives something else than among others.

    Args:
        replay: of (entry, signals, row-wise constants).
        changed: what to give it.
        rows: the row-wise constants.
        batch: how many samples there are.

    Raises:
        Refusal: samples depend on one another.
    """
    last = slice(batch - 1, batch)
    try:
        alone = replay(changed.entry[last], [s[last] for s in changed.signals], [r[last] for r in rows])
    except RuntimeError as error:
        raise Refusal(
            f"it cannot be replayed for one sample: {str(error).strip().splitlines()[0]}"
        ) from error
    for state, whole in zip(alone, changed.states, strict=True):
        expected = whole[last]
        if not torch.isfinite(expected).all():
            continue  # weights of this size tell nothing
        tolerance = 20 * torch.finfo(expected.dtype).eps ** 0.5 * float(expected.norm())
        if state.shape != expected.shape or not float((state - expected).norm()) <= tolerance:
            raise Refusal("a sample comes out otherwise alone than among others, so that rows cannot leave.")


def _poisoned(model: nn.Module, seen: Survey, wiring: Wiring, out: Any) -> Any:
    """What the model returns when everything inside the span is NaN and its output is restored."""
    modules = wiring.modules()

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        if module is modules[-1]:
            return out
        return rebuild(output, lambda v: torch.full_like(v, float("nan")) if _floating(v) else v)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(poison).remove)
        return run(model, seen.examples[0])


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _copy(output: Any) -> Any:
    return rebuild(output, lambda v: v.clone() if isinstance(v, Tensor) else v)


def same(a: Any, b: Any) -> bool:
    """Whether two nested results are equal to the bit, NaN where NaN is."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a is b or bool(a == b)
