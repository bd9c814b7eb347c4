"""Closure conversion: the tensors that a function uses without being given them, made arguments."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode

from .. import transforms
from ..errors import MapError
from ..trees import leaves, rebuild

__all__ = ["Capture", "Closed", "announce", "close", "substituted", "unwatched"]

_OPAQUE = (
    "This derivative needs f as a function of every tensor it uses, and {what}. Part of it may be code that "
    "torch functions do not see, such as a custom torch.autograd.Function or a scripted module, or a "
    "torch.func transform inside of f that is given more than what f computes, such as a weight: write that "
    "part with torch functions, or use adjoint='unrolled'."
)


_TWICE = (
    "A tensor of shape {shape} is given to fix as context and f closes over it, too. Under this derivative f "
    "must be a function of its arguments: use the context that f is given, and pass what rows share of it, "
    "such as its mean, as further context."
)


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _Threads(threading.local):
    """The modes that are entered, innermost last; like torch's own, each thread has its own."""

    def __init__(self) -> None:
        self.active: list[_Watch] = []


_threads = _Threads()


def _active() -> list[_Watch]:
    return _threads.active


class _Watch(TorchFunctionMode):
    """Knows, of every tensor, whether it was made since the mode was entered."""

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.given = tuple(given)
        self.asleep = False
        # Weak, so that watching keeps no intermediate result alive; an id alone may be used again.
        self.made: dict[int, weakref.ref[Tensor]] = {}
        self.depth = transforms.depth()
        self.within = _Within(self.given)
        for tensor in self.given:
            self.make(tensor)

    def __enter__(self) -> Any:
        announce(*self.given)
        self.depth = transforms.depth()
        _active().append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active().remove(self)
        super().__exit__(*error)

    def make(self, tensor: Tensor) -> None:
        self.made[id(tensor)] = weakref.ref(tensor)
        if transforms.depth() > self.depth:
            self.within.make(tensor)

    def knows(self, tensor: Tensor) -> bool:
        if self._has(tensor):
            return True
        # A transform that f makes wraps what it is given, and unwraps what it returns, out of sight. What
        # those around f have wrapped is another tensor than the one inside of it.
        while transforms.level_of(tensor) > self.depth:
            tensor = transforms.stripped(tensor)
            if self._has(tensor):
                return True
        return self.within.knows(tensor)

    def _has(self, tensor: Tensor) -> bool:
        reference = self.made.get(id(tensor))
        return reference is not None and reference() is tensor

    def _make_all(self, out: Any) -> None:
        if isinstance(out, Tensor):
            if not self.skips(out):
                self.make(out)
        elif isinstance(out, (tuple, list, dict)):
            for leaf in leaves(out):
                if isinstance(leaf, Tensor) and not self.skips(leaf):
                    self.make(leaf)

    def skips(self, tensor: Tensor) -> bool:
        """Whether what a function returned is not new: a captured tensor that it wrote to."""
        return False


class _Within:
    """The memory of what was made inside of transforms that the function itself makes.

    What they return is that memory in another tensor. It is kept alive: another tensor may otherwise be made
    where it was. Memory of what is given or closed over says nothing, since parts of it may be closed over,
    too.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        self.given = list(given)  # whose memory was not looked up yet: mostly nobody asks
        self.others: set[int] = set()
        self.made: dict[int, UntypedStorage] = {}

    def make(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor that was made."""
        self._settle()
        storage = _memory(tensor)
        if storage is not None and storage.data_ptr() not in self.others:
            self.made[storage.data_ptr()] = storage

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory that is kept."""
        if not self.made:
            return False
        self._settle()
        storage = _memory(tensor)
        return storage is not None and storage.data_ptr() in self.made

    def _settle(self) -> None:
        while self.given:
            storage = _memory(self.given.pop())
            if storage is not None:
                self.others.add(storage.data_ptr())
                self.made.pop(storage.data_ptr(), None)


def _memory(tensor: Tensor) -> UntypedStorage | None:
    """Where the numbers of a tensor lie; None: it has none, or lies in several places."""
    while transforms.wraps(tensor):
        tensor = transforms.stripped(tensor)
    if transforms.dead(tensor):
        return None
    if tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
        return None
    return tensor.untyped_storage()


class Capture(_Watch):
    """Notes the tensors that are used and were neither given nor made inside.

    Args:
        given: tensors that are known.
        every: note all of them; else only those that require a gradient.
    """

    def __init__(self, given: Iterable[Tensor], every: bool = False):
        super().__init__(given)
        self.every = every
        self.found: dict[int, Tensor] = {}

    def skips(self, tensor: Tensor) -> bool:
        return id(tensor) in self.found

    def _see(self, tensor: Tensor) -> None:
        if id(tensor) not in self.found and not self.knows(tensor) and (self.every or tensor.requires_grad):
            self.found[id(tensor)] = tensor
            self.within.given.append(tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if self.asleep:
            return func(*args, **(kwargs or {}))
        for argument in args:
            if isinstance(argument, Tensor):
                self._see(argument)
            elif isinstance(argument, (tuple, list, dict)):
                for leaf in leaves(argument):
                    if isinstance(leaf, Tensor):
                        self._see(leaf)
        if kwargs:
            for leaf in leaves(kwargs):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
            out = func(*args, **kwargs)
        else:
            out = func(*args)
        self._make_all(out)
        return out


class _Substitute(_Watch):
    """Puts other tensors in the place of captured ones."""

    def __init__(
        self,
        given: Iterable[Tensor],
        places: dict[int, Tensor],
        constants: dict[int, Tensor],
        originals: dict[int, Tensor],
    ):
        super().__init__((*given, *places.values()))
        self.places = places
        self.constants = constants
        self.within.given += constants.values()
        self.originals = originals

    def swap(self, leaf: Any) -> Any:
        """What stands for a captured tensor; anything else as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        other = self.places.get(id(leaf))
        if other is not None:
            return other
        if not self.knows(leaf) and id(leaf) not in self.constants:
            if id(leaf) in self.originals:
                raise MapError(_TWICE.format(shape=tuple(leaf.shape)))
            raise MapError(
                _OPAQUE.format(
                    what="f uses another tensor now than when it was first evaluated (was one replaced?)"
                )
            )
        return leaf

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if self.asleep:
            return func(*args, **(kwargs or {}))
        if func == _DATA:  # which takes off the outermost of the tensors that a transform wraps, and no more
            func = Tensor.detach
        out = func(*rebuild(tuple(args), self.swap), **rebuild(kwargs or {}, self.swap))
        self._make_all(out)
        return out


def announce(*tensors: Tensor) -> None:
    """Tell the watching modes of tensors that were made where they cannot see it."""
    for watch in _active():
        for tensor in tensors:
            watch.make(tensor)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Where everything is explicit, and what is made need not be followed."""
    awake = [watch for watch in _active() if not watch.asleep]
    for watch in awake:
        watch.asleep = True
    try:
        yield
    finally:
        for watch in awake:
            watch.asleep = False


def substituted(tensor: Tensor) -> Tensor:
    """What stands for ``tensor`` inside the functions that are being evaluated now."""
    for watch in reversed(_active()):
        if isinstance(watch, _Substitute) and not watch.asleep:
            tensor = watch.places.get(id(tensor), tensor)
    return tensor


class Closed:
    """A function of (z, *context, *captured) that depends on nothing else.

    Attributes:
        captured: the tensors it closed over, in the order of its last arguments.
        value: what it gave when it was closed, without a graph.
        originals: what it was closed at, the state left out.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        captured: Sequence[Tensor],
        constants: Sequence[Tensor],
        value: Tensor,
        originals: Sequence[Tensor],
    ):
        self.function = function
        self._originals = {id(tensor): tensor for tensor in originals}
        self.value = value
        self.captured = tuple(captured)
        self._constants = {id(tensor): tensor for tensor in constants}

    def __call__(self, *arguments: Tensor) -> Tensor:
        split = len(arguments) - len(self.captured)
        given, stand_ins = arguments[:split], arguments[split:]
        places = {id(old): new for old, new in zip(self.captured, stand_ins, strict=True)}
        with _Substitute(given, places, self._constants, self._originals) as stand_in:
            # What it returns may be what it closed over, as it is.
            return stand_in.swap(self.function(*given))


def close(function: Callable[..., Tensor], arguments: Sequence[Tensor], every: bool) -> Closed:
    """Evaluate ``function`` twice to find what it closes over, and make that its arguments.

    Twice, because a tensor that it makes out of sight is another object each time, while one that
    it closes over is the same.

    Args:
        function: of tensors, to a tensor.
        arguments: to evaluate it at.
        every: make all captured tensors arguments; else those that require a gradient.

    Raises:
        MapError: part of it happens out of sight of torch functions.
    """
    runs = []
    with torch.no_grad():
        for _ in range(2):
            with Capture(arguments, every=True) as capture:
                out = function(*arguments)
            if not capture.knows(out) and id(out) not in capture.found:
                raise MapError(_OPAQUE.format(what="it cannot be seen what f returns"))
            runs.append(capture)
    first, second = runs
    captured, constants = [], []
    for key, tensor in second.found.items():
        # What the first run made and the second one uses was made once and kept: a constant of f.
        if key not in first.found and not first.knows(tensor):
            raise MapError(_OPAQUE.format(what="it uses a tensor that it did not use before"))
        (captured if every or tensor.requires_grad else constants).append(tensor)
    return Closed(function, captured, constants, out, arguments[1:])
