"""Seeing that the modules of a model's spans are still where they were when the wormholes were attached.

And that the hooks on them are those that were there, or such as do no harm.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import transforms
from ..blocks.companion import PerThread
from ..errors import AttachError
from .span import AttachedGroup, ReplayedGroup
from .wiring import Placed, versions

__all__ = ["Intact", "guard"]

_RECORD = attrgetter("_modules")
_RENEWING = threading.Lock()
"""Held while hooks are put in their places."""
_DISTRIBUTED = dist.is_available()  # looked up at each pass it shows in what a closed wormhole costs


class Intact:
    """The hook of a model, before each pass: a module that was replaced has taken a span's hooks with it.

    The wormhole would never act again, and nothing would say so. An object, because closures cannot be
    pickled.

    Args:
        model: the model.
        groups: its wormholes.
    """

    def __init__(self, model: nn.Module, groups: Sequence[AttachedGroup]):
        self.model, self.groups = model, tuple(groups)
        self.passes = [group.passes for group in groups]
        self.steps: list[tuple[nn.Module, str, nn.Module]] = []
        """Parent, name and child, from the model down to each module that is looked after."""
        self.spans: list[tuple[str, str]] = []
        """For each of these the child's path and the span that needs it, for messages."""
        self.chains: list[_Chain] = []
        """The containers that spans go through."""
        self.watches: list[_Watch] = []
        """The hooks that are looked after."""
        self.quick: tuple[Any, ...] = ()
        """All of these side by side, for :meth:`look`."""
        self.survey()

    def survey(self) -> None:
        """Take the model as it is now for what it was when the wormholes were attached.

        Raises:
            KeyError: a module of a span is no longer part of the model.
        """
        model = self.model
        paths = {module: path for path, module in reversed(list(model.named_modules()))}
        self.steps, self.spans, self.chains = [], [], []
        known: set[tuple[int, str]] = set()
        kept = {(type(watch), id(watch.module), watch.ahead): watch for watch in self.watches}
        self.watches = []
        for group in self.groups:
            modules = group.program.modules()
            for module in dict.fromkeys((modules[0], modules[-1], *modules)):
                parent, path = model, ""
                names = paths[module].split(".")
                if module not in (modules[0], modules[-1]):
                    # Those in between are missed when they are not called (see ReplayedGroup and Rerun), but
                    # in a new container there may be something beside them.
                    names.pop()
                for name in names:
                    child = parent.get_submodule(name)
                    path = f"{path}.{name}" if path else name
                    if (id(parent), name) not in known:
                        known.add((id(parent), name))
                        self.steps.append((parent, name, child))
                        self.spans.append((path, group.name))
                    parent = child
            if isinstance(group, ReplayedGroup):  # where the forward is run again, so are all of its hooks
                named = [paths[module] for module in modules]
                self.chains += _chains(model, group.name, named)
                for watch in _watches(model, group, named):
                    self.watches.append(kept.get((type(watch), id(watch.module), watch.ahead), watch))
        self.quick = (
            *([step[place] for step in self.steps] for place in range(3)),
            [chain.container for chain in self.chains],
            [chain.children for chain in self.chains],
            [watch.hooks for watch in self.watches],
            [watch.keys for watch in self.watches],
        )

    def __call__(self, model: nn.Module, args: Any) -> None:
        if transforms.exporting():  # which has stand-ins for the modules; export has looked before
            return
        if torch.compiler.is_dynamo_compiling():  # a graph has no hooks: see ReplayedGroup
            self._in_place()
        else:
            self.look()
        for passes in self.passes:
            passes.now.begun = True

    @property
    def begun(self) -> bool:
        """Whether the model's own pass has begun, which this was called for, and not come to a span yet."""
        for passes in self.passes:  # noqa: SIM110 - a pass spends less time on a loop than on a generator
            if not passes.now.begun:
                return False
        return True

    def look(self) -> None:
        """Raise if a module is not where it was, and see to hooks that have come since the last pass."""
        parents, names, children, containers, chained, hooks, keys = self.quick
        # Without a loop of our own and by the modules' records, which takes a fifth of the time: all of it is
        # part of what a closed wormhole costs. Modules are compared by identity.
        if [*map(dict.get, map(_RECORD, parents), names)] != children:
            self._refuse()
        if [*map(list, map(dict.values, map(_RECORD, containers)))] != chained:
            for chain in self.chains:
                chain.check()
        kinds = _sharding()
        if kinds:
            self._check_whole(kinds)
        if [*map(list, hooks)] != keys:
            with _RENEWING:
                for watch in self.watches:
                    watch.renew()  # which another thread may have done meanwhile

    def stale(self) -> None:
        """Raise if hooks have come since the last pass that was not compiled."""
        for watch in self.watches:
            if [*watch.hooks] != watch.keys and watch.late():
                raise AttachError(
                    f"{watch.path!r}, of span {watch.group.name!r}, was given a hook after its wormhole was "
                    "attached, which a compiled model cannot see to. Register it before attaching, or make a "
                    "pass with the model as it is, and compile it then."
                )

    def _in_place(self) -> None:
        for parent, name, child in self.steps:
            if getattr(parent, name, None) is not child:
                self._refuse()
        for chain in self.chains:
            chain.check()

    def _check_whole(self, kinds: tuple[type, ...]) -> None:
        """Raise if a part of a span gathers its weights from other processes whenever it is called."""
        inside = [(group.name, module) for group in self.groups for module in group.program.modules()]
        around = [(chain.span, chain.container) for chain in self.chains if chain.path]
        found = [(span, inner) for span, module in inside for inner in module.modules()]
        for span, module in [*found, *around]:
            if isinstance(module, kinds):
                raise AttachError(
                    f"A {type(module).__name__} of span {span!r} is sharded by itself (FSDP), so that "
                    "processes would wait for each other at each evaluation, and they iterate for different "
                    "times. Shard the model as a whole, fully_shard(model), and by themselves only modules "
                    "outside of spans."
                )

    def _refuse(self) -> None:
        for (parent, name, child), (path, span) in zip(self.steps, self.spans, strict=True):
            if getattr(parent, name, None) is child:
                continue
            raise AttachError(
                f"{path!r}, a {type(child).__name__} of span {span!r}, was removed or replaced after its "
                "wormhole was attached (by timm's reparameterize_model, say), so that the wormhole could not "
                "act. Do that to the plain model first, attach then, and load the weights of the wormholes."
            )


def _sharding() -> tuple[type, ...]:
    """The classes of modules that are sharded over processes; none where there are no such modules."""
    if not _DISTRIBUTED or not dist.is_initialized():
        return ()
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)


class _Chain:
    """Sees that nothing was put between the modules of a span: replays call those that they know.

    Args:
        path: of a container of modules of the span, for messages.
        container: the container.
        span: the name of the span.
        first: the child that the span begins in; None: it begins before the container.
        last: the child that it ends in; None: it goes on behind the container.
    """

    def __init__(
        self, path: str, container: _Container, span: str, first: nn.Module | None, last: nn.Module | None
    ):
        self.path, self.container, self.span = path, container, span
        self.first, self.last = first, last
        self.children = _children(container)

    def check(self) -> None:
        """Raise if there is a module that was not there."""
        now = _children(self.container)
        same = len(now) == len(self.children)
        # One by one: a compiler follows this, and not a comparison of lists of modules.
        for child, known in zip(now, self.children):  # noqa: B905 - their number is looked at
            if child is not known:
                same = False
        if not same:
            self._look(now)

    def _look(self, now: list[nn.Module]) -> None:
        known = {id(child) for child in self.children}
        places = {id(child): place for place, child in enumerate(now)}
        begin = 0 if self.first is None else places[id(self.first)]
        end = len(now) - 1 if self.last is None else places[id(self.last)]
        for child in now[begin : end + 1]:
            if id(child) not in known:
                where = f"{self.path!r}, inside of span" if self.path else "the model, inside of span"
                raise AttachError(
                    f"A {type(child).__name__} was put into {where} {self.span!r}, after its wormhole was "
                    "attached, so that the equation would be solved without it. Do that to the plain model "
                    "first, attach then, and load the weights of the wormholes."
                )


_Container = nn.Sequential | nn.ModuleList | nn.ModuleDict


def _children(container: _Container) -> list[nn.Module]:
    return list(container.values() if isinstance(container, nn.ModuleDict) else container)


def _chains(model: nn.Module, span: str, paths: Sequence[str]) -> Iterator[_Chain]:
    """The containers of the modules of a span, which have these paths in the order of their calls."""
    for path in dict.fromkeys(around for inner in paths for around in ["", *_around(inner)]):
        container = model.get_submodule(path)
        if not isinstance(container, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        prefix = f"{path}." if path else ""
        inside = [
            end.removeprefix(prefix) if end.startswith(prefix) else None for end in (paths[0], paths[-1])
        ]
        first, last = (None if end is None else container.get_submodule(end.split(".")[0]) for end in inside)
        yield _Chain(path, container, span, first, last)


class _Watch(ABC):
    """Looks after the hooks of one module, before its calls or behind them.

    Args:
        group: whose span needs it.
        path: of the module, for messages.
        module: the module.
        ahead: whether it is the hooks before its calls.
    """

    def __init__(self, group: ReplayedGroup, path: str, module: nn.Module, ahead: bool):
        self.group, self.path, self.module, self.ahead = group, path, module, ahead
        # torch tells in no public way that there are hooks.
        self.hooks: dict[int, Any] = module._forward_pre_hooks if ahead else module._forward_hooks
        self.keys = [*self.hooks]
        self.known = frozenset(self.keys)

    def late(self) -> list[int]:
        """The places among all hooks of those that have come since, but for our own."""
        found = enumerate(self.hooks.items())
        return [place for place, (key, hook) in found if key not in self.known and not _ours(hook)]

    def renew(self) -> None:
        """See to hooks that have come or gone."""
        if [*self.hooks] == self.keys:
            return
        if self.late():
            self.arrange()
        self.keys[:] = self.hooks  # the same list: the model's look has it, too

    @abstractmethod
    def arrange(self) -> None:
        """Some have come."""


class _InPlace(_Watch):
    """Keeps a hook of ours before all that have come since, or behind them.

    What it notes is then what replays are given, or what they return.
    """

    def __init__(self, group: ReplayedGroup, path: str, placed: Placed):
        super().__init__(group, path, placed.module, placed.ahead)
        self.placed = placed

    def arrange(self) -> None:
        mine, late = [*self.hooks].index(self.placed.place), self.late()
        if late[0] < mine if self.ahead else late[-1] > mine:
            self.placed.moved(prepend=self.ahead)


class _Exit(_Watch):
    """Behind a span's last call: hooks that come later may look at the settled value and not change it.

    In each replay they would act as well, so that they would act on the solution of their own equation once
    more.
    """

    def __init__(self, group: ReplayedGroup, path: str):
        super().__init__(group, path, group.exit.module, False)
        self.check: Placed | None = None

    def arrange(self) -> None:
        if self.check is not None:
            self.check.moved(prepend=False)
        elif self.late()[-1] > [*self.hooks].index(self.group.exit.place):
            self.check, self.group.guarded = Placed.behind(self.module, self._check), True

    def _check(self, module: nn.Module, args: Any, output: Any) -> None:
        now = self.group.passes.now
        if now.replaying or now.left is None:
            return
        left, now.left = now.left, None
        if not _unchanged(left, output):
            raise AttachError(
                f"A forward hook on {self.path!r}, where span {self.group.name!r} ends, was registered after "
                "the wormhole was attached and changes what the module returns. It would act in every replay "
                "and once more on the solution. Register it before attaching, or on a module behind the span."
            )


class _Noted(PerThread):
    """What a thread's pass gave to a module's hooks, or None."""

    def __init__(self) -> None:
        self.value: list[Any] | None = None


class _Crossed(_Watch):
    """On a container that a span leaves or enters between two of its calls, and that replays so pass by.

    Hooks may look at what goes through, in the open-loop pass. If one changes it, the replays are not what
    the model computes.
    """

    def __init__(self, group: ReplayedGroup, path: str, module: nn.Module, ahead: bool):
        super().__init__(group, path, module, ahead)
        self.noted = _Noted()
        self.pair: tuple[Placed, Placed] | None = None

    def arrange(self) -> None:
        if self.pair is None:
            register = Placed.before if self.ahead else Placed.behind
            note, check = (self._given, self._gone_in) if self.ahead else (self._note, self._check)
            self.pair = register(self.module, note, prepend=True), register(self.module, check)
        else:
            for placed, prepend in zip(self.pair, (True, False), strict=True):
                placed.moved(prepend)

    def _given(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._note(module, args, (args, kwargs))

    def _gone_in(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._check(module, args, (args, kwargs))

    def _note(self, module: nn.Module, args: Any, value: Any) -> None:
        now = self.group.passes.now
        inside = now.open_loop is not None and not now.replaying
        self.noted.value = versions(value) if inside else None

    def _check(self, module: nn.Module, args: Any, value: Any) -> None:
        noted, self.noted.value = self.noted.value, None
        if noted is not None and not _unchanged(noted, value):
            what = "is given" if self.ahead else "returns"
            raise AttachError(
                f"A hook on {self.path!r}, inside of span {self.group.name!r}, was registered after the "
                f"wormhole was attached and changes what the module {what}. Replays call the modules inside "
                "of it, not the module itself, so that the hook would be left out. Register it before "
                "attaching, or on a module inside of it."
            )


def _unchanged(before: Sequence[tuple[Any, int]], value: Any) -> bool:
    after = versions(value)
    pairs = zip(before, after)  # noqa: B905 - their number is looked at
    return len(before) == len(after) and all(a is b and m == n for (a, m), (b, n) in pairs)


def _ours(hook: Any) -> bool:
    """Whether a hook is this library's own: some come and go with each pass."""
    name = getattr(getattr(hook, "__self__", hook), "__module__", None) or ""
    return name.partition(".")[0] == __name__.partition(".")[0]


def _watches(model: nn.Module, group: ReplayedGroup, paths: Sequence[str]) -> Iterator[_Watch]:
    """What is looked after for a group whose modules, in the order of their calls, have these paths."""
    names = {id(node.module[0]): node.path for node in group.program.nodes}
    for placed in (group.entrance, *group.catches):
        yield _InPlace(group, names[id(placed.module)], placed)
    yield _Exit(group, paths[-1])
    found: dict[tuple[str, bool], None] = {}
    for before, after in pairwise(paths):
        left, entered = _around(before), _around(after)
        found.update({(path, False): None for path in left if path not in entered})
        found.update({(path, True): None for path in entered if path not in left})
    for path, ahead in found:
        yield _Crossed(group, path, model.get_submodule(path), ahead)


def _around(path: str) -> list[str]:
    """The paths of the containers of a module, but for the model."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def guard(model: nn.Module, groups: Sequence[AttachedGroup]) -> Intact:
    """Let each pass through a model begin with a look at the modules of its spans."""
    made = Intact(model, groups)
    for group in groups:
        group.look, group.stale = made.look, made.stale
    model.register_forward_pre_hook(made)
    return made
