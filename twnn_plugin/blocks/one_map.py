"""Making a span one fixed map while it is iterated: batch statistics and random draws stand still.

In training, batch normalisation depends on the batch and dropout on the random state, so that two
applications of a module are two different maps and there is no fixed point to find. While a span is
replayed, its batch normalisations use the statistics of the open-loop pass (kept in the graph, or the
gradients would be wrong), and its random draws are those of one recorded pass, row by row.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the documented common base of BatchNorm layers
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from ..errors import AttachError
from .companion import PerThread
from .frozen import PRESENT, Frozen, Moments, Place
from .moments import moments

__all__ = ["Bookmark", "Frozen", "OneMap", "bookmark"]


_STEADY = frozenset(
    {
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Identity),
        *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Sequential, nn.ModuleList),
    }
)
"""Modules, of exactly these classes, that compute the same in training mode as in eval mode."""


_HOOKS = threading.Lock()
"""Held while normalisations are begun or ceased to be listened to."""


class _Heard(PerThread):
    """What one thread's pass was heard of.

    Attributes:
        found: the moments of each watched normalisation, call by call.
        watching: whether a pass is watched.
        repeating: whether a part of it is computed once more.
        first: what the normalisation was given with which the pass began, until a hook tells of that, too.
    """

    def __init__(self) -> None:
        self.found: dict[int, list[Moments]] = {}
        self.first: Tensor | None = None
        self.watching = False
        self.repeating = False


class OneMap:
    """Keeps the statistics and the draws of a span for as long as it is iterated.

    Args:
        modules: the modules of the span; their batch normalisations are watched.

    Attributes:
        functional: whether the span normalises batches by calls of ``F.batch_norm`` that no layer makes;
            None before a pass was looked at.
        counts: whether it has running statistics besides those of its BatchNorm layers.
        holders: the threads in which the normalisations are held in eval mode at the moment.
        looked: whether a replay with gradients was looked at: see :mod:`~twnn_plugin.blocks.recomputing`.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.modules = tuple(modules)
        self.norms: tuple[_BatchNorm, ...] = ()
        self.hooks: list[RemovableHandle] = []
        self.inside: tuple[nn.Module, ...] = ()
        self.fickle: tuple[nn.Module, ...] = ()
        self.heard = _Heard()
        self.functional: bool | None = None
        self.counts = False
        self.looked = False
        self.holders: list[int] = []
        self._look()

    def _look(self) -> None:
        """Find the normalisations: they may have been replaced, as ``convert_sync_batchnorm`` does."""
        self.inside = tuple(dict.fromkeys(m for module in self.modules for m in module.modules()))
        self.fickle = tuple(m for m in self.inside if type(m) not in _STEADY)
        norms = tuple(m for m in self.inside if isinstance(m, _BatchNorm))
        if norms != self.norms:
            self.deafen()
            self.norms = norms

    def listen(self) -> None:
        """Hear of each call of a normalisation, from now on."""
        if self.hooks:
            return
        with _HOOKS:
            if not self.hooks:
                self.hooks = [n.register_forward_pre_hook(self._watch, with_kwargs=True) for n in self.norms]

    def deafen(self) -> None:
        """Hear of none: a hook costs something on every call, and a pass in eval mode has no use for any.

        Whatever needs them calls :meth:`listen` itself: a watched pass, a replay that is held fixed, or a
        part of either that is computed again.
        """
        with _HOOKS:
            hooks, self.hooks = self.hooks, []
        for hook in hooks:
            hook.remove()

    def stirs(self, training: bool) -> bool:
        """Whether a pass may depend on the batch or on random numbers.

        In training, and where a part of the span is in training mode or normalises by batches in eval mode.
        """
        if training:
            return True
        # Loops, since a pass spends less time on them than on generators.
        for module in self.fickle:
            if module.training:
                return True
        for norm in self.norms:  # noqa: SIM110
            # The flag is an attribute; to find a buffer takes a module several times as long.
            if not norm.track_running_stats and _by_batch(norm):
                return True
        return False

    @property
    def watching(self) -> bool:
        """Whether a pass of this thread is watched."""
        return self.heard.watching

    def untold(self) -> str | None:
        """The type of a normalisation by batches whose flag says otherwise; None: there is none."""
        return next((type(norm).__name__ for norm in self.norms if _by_batch(norm)), None)

    def _watch(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        assert isinstance(norm, _BatchNorm)
        heard = self.heard
        if heard.watching:
            # A hook that is removed while its module is called gets no keywords; then nothing watches.
            given = args[0] if args or kwargs is None else kwargs["input"]
            if heard.first is None or given is not heard.first:
                self._hear(norm, given)
            else:
                heard.first = None  # heard of already
        for frozen in reversed(PRESENT.held):
            if id(norm) in frozen.statistics:
                if frozen.is_heard_by(self.listen):
                    frozen.enter_layer(norm)
                break

    def _hear(self, norm: _BatchNorm, given: Tensor) -> None:
        """Note the moments of what a normalisation is given."""
        if self.holders:
            self._check_alone()
        if _by_batch(norm):
            # Here and not at the end of the pass, so that a part of it which is computed again in the
            # backward pass, to save memory, owns what the statistics keep.
            found = moments(norm, given)
            if not self.heard.repeating:
                self.heard.found.setdefault(id(norm), []).append(found)

    def hear_first(self, norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hear of the call with which a watched pass begins, where it is a normalisation's.

        Its hooks may have been called before, and those that are new are not called for it.
        """
        if self.heard.watching:
            given = args[0] if args else kwargs["input"]
            self.heard.first = given
            self._hear(norm, given)

    def _check_alone(self) -> None:
        """Raise if another thread has put the normalisations of this thread's pass into eval mode."""
        if self.heard.repeating or all(holder == threading.get_ident() for holder in self.holders):
            return
        raise AttachError(
            "Two threads train one model at once: while the span of one is iterated, its batch "
            "normalisations stand still, and the other's pass would go by their running statistics. Give "
            "each thread a copy of the model (copy.deepcopy), or let one train at a time."
        )

    def open_loop(self, active: bool) -> None:
        """Start (or stop) to watch the open-loop pass."""
        self.heard.watching, self.heard.first = active, None
        if active:
            self._look()
            self.listen()
            self.heard.found = {}
            PRESENT.watching.add(self)
        else:
            PRESENT.watching.discard(self)

    def check_outermost(self) -> None:
        """Refuse to be iterated within the replay of another span that holds the same normalisations.

        Raises:
            AttachError: it would be.
        """
        mine = {id(norm) for norm in self.norms}
        if any(mine & frozen.statistics.keys() for frozen in PRESENT.held):
            raise AttachError(
                "A wormhole whose body normalises by batches lies within the span of another, which holds "
                "its statistics only while it is replayed: the backward pass would normalise by others. Let "
                "the outer span end before it or begin behind it, or normalise sample by sample (GroupNorm)."
            )

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Within this, a part of a watched pass is computed once more; nothing new is noted."""
        self.listen()
        heard = self.heard
        before = heard.watching, heard.repeating
        heard.watching = heard.repeating = True
        try:
            yield
        finally:
            heard.watching, heard.repeating = before

    def needed(self, drew: bool) -> bool:
        """Whether replays must be intercepted.

        Where batch statistics were used, random numbers drawn, or something would count on, and once to see.
        """
        seen = bool(self.heard.found) or drew or self.counts
        return seen or self.functional is not False or bool(self.held())

    def statistics(self) -> dict[int, list[Moments]]:
        """The moments of what each watched BatchNorm was given, call by call, with their graph.

        Keyed by the identity of the layer.
        """
        found, self.heard.found = self.heard.found, {}
        return found

    def held(self) -> list[nn.Module]:
        """What is put into eval mode within replays: see :class:`~twnn_plugin.blocks.frozen.Frozen`."""
        parametrised = [m for p in self.inside if isinstance(p, ParametrizationList) for m in p.modules()]
        return [m for m in dict.fromkeys([*self.norms, *parametrised]) if m.training]

    def buffers(self) -> list[tuple[Tensor, int]]:
        """The buffers and their versions, but for those of the normalisations."""
        others = (m for m in self.inside if not isinstance(m, _BatchNorm))
        return [(b, b._version) for m in others for b in m.buffers(recurse=False)]

    def check_unchanged(self, before: list[tuple[Tensor, int]]) -> None:
        """Raise if a replay has left a trace in a buffer."""
        after = self.buffers()
        if len(after) == len(before) and all(
            a is b and m == n for (a, m), (b, n) in zip(after, before, strict=True)
        ):
            return
        raise AttachError(
            "A module of this span changes a buffer of its own each time that it runs in training (running "
            "statistics that are no BatchNorm's or InstanceNorm's?), so that iterating would count one batch "
            "many times. Choose another span, or put that module into eval mode."
        )


def _by_batch(norm: _BatchNorm) -> bool:
    """Whether a normalisation uses the statistics of the batch at hand."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


@dataclass(frozen=True)
class Bookmark:
    """A place in a pass, from which a part of it can be computed once more and come out the same.

    Attributes:
        watching: whose open-loop pass it lies in.
        held: what stands still there, and how far each replay has come.
    """

    watching: tuple[OneMap, ...]
    held: tuple[tuple[Frozen, Place], ...]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within this, things are as they were at this place."""
        with ExitStack() as stack:
            for one_map in self.watching:
                stack.enter_context(one_map.repeated())
            for frozen, place in self.held:
                stack.enter_context(frozen.repeated(place))
            yield


def bookmark() -> Bookmark:
    """The present place, for gradient checkpointing."""
    return Bookmark(tuple(PRESENT.watching), tuple((f, f.place()) for f in PRESENT.held))
