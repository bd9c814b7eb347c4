"""Named factories with owners: one :class:`Registry` for each kind of plugin."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .errors import DuplicateNameError, OptionError, UnknownNameError, nearest

__all__ = ["Entry", "Registry", "check_options"]

T = TypeVar("T")
Factory = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        name: what users type.
        factory: class or function that makes the object from keyword options.
        owner: the plugin or package that registered it.
    """

    name: str
    factory: Factory
    owner: str

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        doc = inspect.getdoc(self.factory) or ""
        return doc.strip().splitlines()[0] if doc.strip() else ""


def check_options(what: str, factory: Factory, options: Mapping[str, Any]) -> None:
    """Raise :class:`OptionError` if ``factory`` has no parameter of a given name."""
    if not options:
        return  # names are resolved at every solve, and reading a signature takes a tenth of a millisecond
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise OptionError(
                f"{what} has no option {option!r}.{nearest(option, known)} Its options: {listed}."
            )


def _missing(factory: Factory, options: Mapping[str, Any]) -> list[str]:
    """The options that a factory cannot do without and was not given."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind in named and parameter.default is parameter.empty and name not in options
    ]


class Registry(Generic[T]):
    """Names of one kind (solvers, gates, ...), each with a factory and an owner.

    Args:
        kind: singular noun used in messages, such as ``"solver"``.
        base: what a factory returns; :meth:`resolve` lets instances of it pass.
    """

    def __init__(self, kind: str, base: type[T]):
        self.kind = kind
        self.base = base
        self.before_lookup: Callable[[], None] | None = None
        """Called before every lookup: plugins that could not be loaded yet get their chance."""
        self._entries: dict[str, Entry] = {}

    def names(self) -> list[str]:
        """All registered names, sorted."""
        if self.before_lookup is not None:
            self.before_lookup()
        return sorted(self._entries)

    def entries(self) -> list[Entry]:
        """All entries, sorted by name."""
        return [self._entries[name] for name in self.names()]

    def entry(self, name: str) -> Entry:
        """The entry of ``name``; :class:`UnknownNameError` with the nearest name if there is none."""
        if self.before_lookup is not None:
            self.before_lookup()
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            known = ", ".join(self.names()) or "none"
            hint = nearest(name, self._entries) if isinstance(name, str) else ""
            raise UnknownNameError(f"Unknown {self.kind} {name!r}.{hint} Registered: {known}.") from None

    def get(self, name: str) -> Factory:
        """The factory registered as ``name``."""
        return self.entry(name).factory

    def owner(self, name: str) -> str:
        """Who registered ``name``."""
        return self.entry(name).owner

    def register(
        self, name: str, factory: Factory, replace: bool = False, *, owner: str | None = None
    ) -> Factory:
        """Register ``factory`` as ``name``.

        Args:
            name: non-empty string without white space.
            factory: callable that takes keyword options and returns a ``base``.
            replace: allow taking over a name that somebody else registered.
            owner: shown in listings; by default the top-level package of the factory.

        Raises:
            DuplicateNameError: the name is taken and ``replace`` is false.
            TypeError: the factory is not callable.
            ValueError: the name is empty or has white space in it.
        """
        if not isinstance(name, str) or not name or any(c.isspace() for c in name):
            raise ValueError(f"A {self.kind} name is a non-empty string without white space, not {name!r}.")
        if not callable(factory):
            raise TypeError(
                f"The factory of {self.kind} {name!r} must be callable, not a {type(factory).__name__}."
            )
        made: Any = factory
        while isinstance(made, functools.partial):
            made = made.func
        module: str = getattr(made, "__module__", None) or "user"
        owner = owner or module.split(".")[0]
        taken = self._entries.get(name)
        if taken is not None and not replace:
            raise DuplicateNameError(
                f"{self.kind.capitalize()} {name!r} of {owner!r} is already registered by {taken.owner!r}. "
                "Choose another name, or pass replace=True to take it over."
            )
        self._entries[name] = Entry(name, factory, owner)
        return factory

    def snapshot(self) -> dict[str, Entry]:
        """A copy of the entries, for :meth:`restore`."""
        return dict(self._entries)

    def restore(self, entries: Mapping[str, Entry]) -> None:
        """Put the entries of a :meth:`snapshot` back."""
        self._entries = dict(entries)

    def make(self, name: str, /, **options: Any) -> T:
        """Make the object registered as ``name`` with the given options.

        Raises:
            UnknownNameError: there is no such name.
            OptionError: an option does not exist, or one that the factory needs is missing.
            TypeError: the factory returned something else.
        """
        factory = self.get(name)
        check_options(f"{self.kind.capitalize()} {name!r}", factory, options)
        try:
            made = factory(**options)
        except TypeError as error:
            missing = _missing(factory, options)
            if not missing:
                raise
            raise OptionError(
                f"{self.kind.capitalize()} {name!r} (owner {self.owner(name)!r}) has options without a "
                f"default, which must be given: {', '.join(missing)}."
            ) from error
        if not isinstance(made, self.base):
            raise TypeError(
                f"The factory of {self.kind} {name!r} (owner {self.owner(name)!r}) returned a "
                f"{type(made).__name__}; it must return a {self.base.__name__}."
            )
        return made

    def resolve(self, value: str | T) -> T:
        """A registered name or an instance, as an instance."""
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            return self.make(value)
        article = "An" if self.kind[0] in "aeiou" else "A"
        if isinstance(value, type) and issubclass(value, self.base):
            got = f"a type, the class {value.__name__} itself: give an instance, {value.__name__}()"
        else:
            got = f"a {type(value).__name__}"
        raise OptionError(
            f"{article} {self.kind} is given as a registered name, as tw.{self.kind}(name, ...), or as a "
            f"{self.base.__name__}; got {got}. Registered: {', '.join(self.names())}."
        )
