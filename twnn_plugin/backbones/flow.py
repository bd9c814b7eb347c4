"""Which module a tensor comes from: one pass of a model read as a graph of its module calls.

The pass runs in eval mode without gradients, on the meta device where the model allows it
(:mod:`.shadow`), where it costs no arithmetic. What the model computes between its modules is seen by a
dispatch mode, which follows every tensor through its storage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..modes import evaluating
from ..trees import leaves, rebuild

__all__ = ["Call", "Flow", "Place", "Use", "follow", "leaf_at", "rows_per_sample", "with_leaf"]

Place = tuple[int, int]
"""(call, position among the leaves of its output)."""


@dataclass(frozen=True)
class Use:
    """A tensor at the place where it is used.

    Attributes:
        direct: the output that it is, unchanged; None if it is none.
        origins: the outputs that it was computed from, without passing through another call.
        shape: its shape.
    """

    direct: Place | None
    origins: frozenset[Place]
    shape: torch.Size

    def places(self) -> frozenset[Place]:
        """The outputs that it is or was computed from."""
        return self.origins if self.direct is None else frozenset({self.direct})

    def calls(self) -> set[int]:
        """The calls that it comes from."""
        return {place[0] for place in self.places()}


@dataclass
class Call:
    """One call of one module.

    Attributes:
        path: where the module is in the model.
        module: the module.
        inputs: for each leaf of (args, kwargs): a Use for a tensor, the value itself for the rest.
        outputs: for each leaf of the output: its shape, or None if it is no tensor.
        real: for each leaf of the output: whether it is a tensor of real numbers.
        in_place: positions of the inputs that the call changes.
        nested: whether there are lists or dicts among the arguments.
    """

    path: str
    module: nn.Module
    inputs: list[Any]
    outputs: list[torch.Size | None] = field(default_factory=list)
    real: list[bool] = field(default_factory=list)
    in_place: set[int] = field(default_factory=set)
    nested: bool = False


@dataclass
class Flow:
    """One pass of a model.

    Attributes:
        calls: the calls, in their order.
        result: the tensors that the model returned.
        changed: outputs that were changed in place after they were made.
        batch: samples in the pass.
    """

    calls: list[Call]
    result: list[Use]
    changed: set[Place]
    batch: int

    @property
    def paths(self) -> list[str]:
        """The paths that were called, each once."""
        return list(dict.fromkeys(call.path for call in self.calls))

    def same_calls(self, other: Flow) -> bool:
        """Whether the other pass called the same modules with the same structure of arguments."""
        return len(self.calls) == len(other.calls) and all(
            a.path == b.path and len(a.inputs) == len(b.inputs) and len(a.outputs) == len(b.outputs)
            for a, b in zip(self.calls, other.calls, strict=True)
        )


def rows_per_sample(shape: Sequence[int], same: Sequence[int], batch: int, other: int) -> int:
    """How many rows of a tensor belong to each sample; 0 for one that does not depend on the batch.

    Args:
        shape: its shape in a pass with ``batch`` samples.
        same: its shape in a pass with ``other`` samples.
        batch: the one size.
        other: the other.

    Raises:
        ValueError: its samples are not along its first axis.
    """
    if tuple(shape) == tuple(same):
        return 0
    whole = len(shape) == len(same) and shape[0] % batch == 0 and tuple(shape[1:]) == tuple(same[1:])
    if whole and shape[0] // batch * other == same[0]:
        return shape[0] // batch
    raise ValueError(f"{tuple(shape)} for {batch} samples and {tuple(same)} for {other}.")


def leaf_at(tree: Any, position: int) -> Any:
    """One leaf of nested tuples, lists and dicts."""
    first = tree
    while position == 0 and isinstance(first, (tuple, list)) and first:
        first = first[0]
    if position == 0 and isinstance(first, Tensor):  # nearly always, and in every pass
        return first
    return next(itertools.islice(leaves(tree), position, None))


def with_leaf(tree: Any, position: int, value: Any) -> Any:
    """The same with one leaf replaced."""
    places = itertools.count()
    return rebuild(tree, lambda leaf: value if next(places) == position else leaf)


class _Follower(TorchDispatchMode):
    """Follows tensors between calls by their storages, which views share.

    Args:
        proved: whether what is read off the pass is proved on values afterwards.
    """

    def __init__(self, proved: bool) -> None:
        super().__init__()
        self.proved = proved
        self.depth = 0
        self.calls: list[Call] = []
        self.origins: dict[int, frozenset[Place]] = {}
        self.made: dict[int, tuple[Place, int]] = {}  # tensor -> (place, version of its storage)
        self.versions: dict[int, int] = {}
        self.holders: dict[int, list[Place]] = {}  # storage -> outputs that live in it
        self.changed: set[Place] = set()
        self.kept: list[Any] = []  # alive, so that no identity is given twice
        self.entered: list[Any] = []  # the present call's inputs
        self.given: dict[int, list[int]] = {}  # storage -> positions among the present call's inputs

    def storage(self, value: Tensor) -> int:
        held = value.untyped_storage()
        if id(held) not in self.versions:
            self.versions[id(held)] = 0
            self.kept.append(held)
        return id(held)

    def use(self, value: Tensor) -> Use:
        key = self.storage(value)
        place, version = self.made.get(id(value), (None, 0))
        direct = place if place is not None and version == self.versions[key] else None
        return Use(direct, self.origins.get(key, frozenset()), value.shape)

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        given = list(leaves((args, kwargs)))
        self.kept.append(given)
        self.entered = given
        self.given = {}
        for position, value in enumerate(given):
            if isinstance(value, Tensor):
                self.given.setdefault(self.storage(value), []).append(position)
        inputs = [self.use(value) if isinstance(value, Tensor) else value for value in given]
        nested = any(isinstance(value, (list, dict)) for value in (*args, *kwargs.values()))
        self.calls.append(Call(path, module, inputs, nested=nested))

    def leave(self, output: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        call, index = self.calls[-1], len(self.calls) - 1
        self.kept.append(output)
        fresh: set[int] = set()
        for position, value in enumerate(leaves(output)):
            call.outputs.append(value.shape if isinstance(value, Tensor) else None)
            call.real.append(isinstance(value, Tensor) and value.is_floating_point())
            if not isinstance(value, Tensor):
                continue
            key, place = self.storage(value), (index, position)
            # What is handed on as it is (by Identity, or Dropout in eval mode) is this call's from here on,
            # for what the model computes of it as for the next module. Whether the model goes by the call, to
            # what it was given, is seen by the proof.
            handed = self.proved and key not in fresh and any(value is given for given in self.entered)
            shared = not handed and (key in self.given or key in fresh)
            self.origins[key] = (self.origins.get(key, frozenset()) if shared else frozenset()) | {place}
            self.made[id(value)] = (place, self.versions[key])
            self.holders.setdefault(key, []).append(place)
            fresh.add(key)

    def write(self, value: Tensor) -> None:
        key = self.storage(value)
        self.changed.update(self.holders.get(key, ()))
        if self.depth:
            self.calls[-1].in_place.update(self.given.get(key, ()))
        else:
            self.versions[key] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = list(_written(func, args, kwargs))
        for value in written:
            self.write(value)
        if self.depth:
            return result
        read = [self.storage(v) for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
        union: frozenset[Place] = frozenset().union(*(self.origins.get(key, frozenset()) for key in read))
        if union:
            for value in [*written, *leaves(result)]:
                if isinstance(value, Tensor):
                    key = self.storage(value)
                    self.origins[key] = self.origins.get(key, frozenset()) | union
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an ATen operator writes into: its first for ``add_``, ``out`` for ``add.out``."""
    name = str(func).split(".")[1]
    if name.endswith("_") and not name.endswith("__"):
        yield from (v for v in leaves(args[:1]) if isinstance(v, Tensor))
    yield from (v for v in leaves(kwargs.get("out")) if isinstance(v, Tensor))


@contextmanager
def _hooked(nodes: Mapping[str, nn.Module], follower: _Follower) -> Iterator[None]:
    def enter(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: follower.enter(path, module, args, kwargs)

    handles = []
    try:
        for path, module in nodes.items():
            handles.append(module.register_forward_pre_hook(enter(path), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(lambda m, args, output: follower.leave(output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def follow(
    run: Callable[[], Any], model: nn.Module, nodes: Mapping[str, nn.Module], batch: int, proved: bool = False
) -> Flow:
    """Follow one pass.

    Args:
        run: runs ``model`` on a batch.
        model: the model.
        nodes: the modules whose calls make the graph, by path; none of them inside another.
        batch: samples that ``run`` gives it.
        proved: whether what is read off the pass is proved on values afterwards.
    """
    follower = _Follower(proved)
    with evaluating(model), _hooked(nodes, follower), follower:
        result = run()
    uses = [follower.use(value) for value in leaves(result) if isinstance(value, Tensor)]
    return Flow(follower.calls, uses, follower.changed, batch)
