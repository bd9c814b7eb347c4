"""What a function reaches besides its arguments, as it was: backward passes evaluate functions again."""

from __future__ import annotations

import builtins
import dis
import functools
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Held", "Reaching"]

_DEPTH = 3  # functions that a function calls, and those that these call
_ABSENT = object()
_LOOKED_INTO = (nn.Module, list, tuple, Mapping, types.FunctionType, types.MethodType, functools.partial)


class Reaching(ABC):
    """An object of ours that is no module, and whose methods a map calls."""

    @abstractmethod
    def reached(self) -> Iterable[Any]:
        """The modules and functions that the map uses through it."""


class Held:
    """A function in the surroundings that it had when this was made.

    A loop variable that a lambda closes over has another value when ``backward()`` runs, and so have the
    parameters of a module once ``torch.func.functional_call`` has returned. Where they differ they are put
    back for the time of a call: variables of enclosing functions and of the function's own module, and the
    parameters and buffers of the ``nn.Module`` found there, of bound methods, of ``functools.partial`` and of
    what a :class:`Reaching` names. Other things that a function reads, such as attributes of an object, are
    as they are now.

    Args:
        function: as the user gave it.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._variables: list[_Variable] = []
        self._modules: dict[int, nn.Module] = {}
        self._seen: dict[int, Any] = {}
        self._look(function, _DEPTH)
        self._seen.clear()
        self._tensors = self._now()

    def __call__(self, *arguments: Any) -> Any:
        changed = [variable for variable in self._variables if variable.changed()]
        others = self._others()
        if not changed and not others:
            return self.function(*arguments)
        with ExitStack() as stack:
            for variable in changed:
                stack.enter_context(variable.put_back())
            if not others:
                return self.function(*arguments)
            holder = _Holder(list(self._modules.values()))
            return functional_call(holder, others, (self.function, arguments), tie_weights=False)

    def learned(self) -> list[Tensor]:
        """The tensors among what it held that want gradients."""
        variables = [variable.held for variable in self._variables]
        tensors = [*self._tensors.values(), *(held for held in variables if isinstance(held, Tensor))]
        return [tensor for tensor in tensors if tensor.requires_grad and tensor.is_leaf]

    def _others(self) -> dict[str, Tensor]:
        """Of the parameters and buffers those that are other tensors now."""
        now = self._now()
        return {name: held for name, held in self._tensors.items() if now.get(name) is not held}

    def _now(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are now, by their names in a :class:`_Holder`."""
        found: dict[str, Tensor] = {}
        for place, module in enumerate(self._modules.values()):
            found.update(module.named_parameters(f"held.{place}", remove_duplicate=False))
            found.update(module.named_buffers(f"held.{place}", remove_duplicate=False))
        return found

    def _look(self, found: Any, depth: int) -> None:
        """Find what ``found`` reaches."""
        if id(found) in self._seen:
            return
        self._seen[id(found)] = found
        if isinstance(found, nn.Module):
            self._modules[id(found)] = found
        elif isinstance(found, (list, tuple, Mapping)):
            for item in found.values() if isinstance(found, Mapping) else found:
                if isinstance(item, _LOOKED_INTO):
                    self._look(item, depth)
        elif depth and isinstance(found, types.MethodType):
            self._look([found.__self__], depth)
            self._look(found.__func__, depth)
        elif depth and isinstance(found, functools.partial):
            self._look([*found.args, *found.keywords.values()], depth)
            self._look(found.func, depth)
        elif depth and isinstance(found, types.FunctionType):
            for variable in _variables(found):
                self._variables.append(variable)
                self._look(variable.held, depth - 1)
            self._look([*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()], depth - 1)
        elif depth and isinstance(found, Reaching):
            for item in found.reached():
                self._look(item, _DEPTH)


class _Holder(nn.Module):
    """Modules under one roof, which ``functional_call`` asks for."""

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


class _Variable:
    """A variable of an enclosing function or of a module, and what it was.

    Args:
        where: the cell, or the module's names.
        name: among these.
        held: what it was.
    """

    def __init__(self, where: types.CellType | dict[str, Any], name: str, held: Any):
        self.where, self.name, self.held = where, name, held

    def now(self) -> Any:
        """What it is."""
        if isinstance(self.where, dict):
            return self.where.get(self.name, _ABSENT)
        return _content(self.where)

    def changed(self) -> bool:
        """Whether it is something else now."""
        return self.now() is not self.held

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """It is what it was for as long as this is open."""
        now = self.now()
        self._set(self.held)
        try:
            yield
        finally:
            self._set(now)

    def _set(self, value: Any) -> None:
        if isinstance(self.where, dict):
            if value is _ABSENT:
                self.where.pop(self.name, None)
            else:
                self.where[self.name] = value
        elif value is _ABSENT:
            del self.where.cell_contents
        else:
            self.where.cell_contents = value


def _variables(function: types.FunctionType) -> Iterator[_Variable]:
    """The variables that a function reads and does not write: a counter of calls goes on counting."""
    names, written = _names(function.__code__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        held = _content(cell)
        if held is not _ABSENT and name not in written:
            yield _Variable(cell, name, held)
    for name in names:
        held = function.__globals__.get(name, _ABSENT)
        if held is not _ABSENT and not isinstance(held, (types.ModuleType, type)):
            yield _Variable(function.__globals__, name, held)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names outside of it that a function reads and does not write, and all that it writes."""
    read: set[str] = set()
    written: set[str] = set()
    for inner in code.co_consts:  # functions and comprehensions in it
        if isinstance(inner, types.CodeType):
            names, stored = _names(inner)
            read.update(names)
            written.update(stored - set(code.co_cellvars))  # which are this function's own
    for instruction in dis.get_instructions(code):
        shared = instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
        if shared or instruction.opname == "STORE_GLOBAL":
            written.add(instruction.argval)
        elif instruction.opname == "LOAD_GLOBAL" and not hasattr(builtins, instruction.argval):
            read.add(instruction.argval)
    return tuple(sorted(read - written)), frozenset(written)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _ABSENT
