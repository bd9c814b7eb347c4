"""Finding plugins and loading them: the built-ins, installed distributions, the user's own objects.

Every plugin is checked on its own and loaded as a whole or not at all. An installed plugin that is
broken costs a warning, never the import of the package.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import pluggy

from . import adjoints, backbones, blocks, builtins, gates, hookspecs, observe, policies, solvers
from .errors import DuplicateNameError, OptionError, PluginWarning, UnknownNameError, nearest
from .hookspecs import PROJECT, Register
from .observe import Listener
from .registry import Entry, Registry
from .solvers import linear, torchdeq_bridge

__all__ = ["PluginHost", "failures", "load", "loaded", "register_plugin", "unregister_plugin"]

_DISABLE = "TWNN_DISABLE_PLUGINS"
_PATIENCE = 60.0  # seconds for which one plugin waits for another
_HOOK_PREFIX = "twnn_register_"
_PREFIXES = (_HOOK_PREFIX, "twnn_observe_")
_OBSERVERS = ("twnn_observe_iteration", "twnn_observe_solve")
_Displaced = dict[tuple[str, str], tuple[Entry, Entry | None]]  # (hook, name): its entry, the one before
_log = logging.getLogger(__name__)


class PluginHost:
    """Loads plugins into registries and knows what became of each.

    Args:
        registries: for each kind ``K``, the registry that the hook ``twnn_register_K`` fills.
        home: name and owner of the built-ins, whose names installed plugins may take over.
        announce: called with the plugins that observe solves whenever one comes or goes.
    """

    def __init__(
        self,
        registries: Mapping[str, Registry[Any]],
        home: str = PROJECT,
        announce: Callable[[list[Listener]], None] | None = None,
    ):
        self.home = home
        self._announce = announce
        self._displaced: dict[str, _Displaced] = {}
        self._registries = {_HOOK_PREFIX + kind: registry for kind, registry in registries.items()}
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._loaded: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._waiting: list[tuple[str, metadata.EntryPoint]] = []
        # A plugin that comes or goes puts the registries back as a whole: two at once would undo each other.
        # Not held while a plugin is imported, which waits for locks of Python's own.
        self._changing = threading.RLock()
        for registry in registries.values():
            registry.before_lookup = self._load_waiting

    def loaded(self) -> dict[str, str]:
        """Each loaded plugin's name and its owner, with the distribution's version if it has one."""
        return dict(self._loaded)

    def failures(self) -> dict[str, str]:
        """Each skipped plugin's name and the reason."""
        return dict(self._failures)

    def add(
        self,
        plugin: object,
        name: str,
        owner: str,
        version: str = "",
        guard: bool = False,
        before: dict[str, dict[str, Entry]] | None = None,
    ) -> None:
        """Load one plugin; if anything is wrong with it, raise and leave everything as it was.

        Args:
            plugin: module, class or other object with functions marked by ``hookimpl``.
            name: what the plugin is called in messages; not yet in use.
            owner: who owns the names it registers.
            version: of the distribution it comes from.
            guard: refuse ``replace=True`` for names owned by others than the built-ins, so that no
                order of loading decides between two plugins.
            before: the entries from before its module was imported, of each hook: what was registered since
                is the plugin's, too. By default, those of now.

        Raises:
            DuplicateNameError: the plugin, its name or a name it registers is there already.
            pluggy.PluginValidationError: a hook is misspelled or has a wrong signature.
            TypeError: the object implements no hook.
        """
        with self._alone():
            with self._all_or_nothing():
                before = self._entries() if before is None else before
                self._refuse_known(plugin, name)
                self._manager.register(plugin, name)
                self._check_hooks(plugin, name)
                others = [other for _, other in self._manager.list_name_plugin() if other is not plugin]
                for hook, registry in self._registries.items():
                    call = self._manager.subset_hook_caller(hook, others)
                    call(register=self._bind(registry, owner, guard))
                self._displaced[name] = {
                    (hook, key): (entry, before[hook].get(key))
                    for hook, entries in self._entries().items()
                    for key, entry in entries.items()
                    if before[hook].get(key) is not entry
                }
            self._loaded[name] = f"{owner} {version}".strip()
            self._failures.pop(name, None)
            self._tell()

    def remove(self, name: str) -> None:
        """Take a plugin out, with the names it registered; a name it had taken over is given back.

        Raises:
            UnknownNameError: no such plugin is loaded.
            OptionError: it is the built-ins.
        """
        with self._alone():
            if name not in self._loaded:
                known = [one for one in self._loaded if one != self.home]
                listed = ", ".join(known) or "none"
                raise UnknownNameError(
                    f"No plugin {name!r} is loaded.{nearest(str(name), known)} Loaded: {listed}."
                )
            if name == self.home:
                raise OptionError(
                    "The built-ins cannot be taken out; register replacements with replace=True."
                )
            self._manager.unregister(name=name)
            del self._loaded[name]
            for (hook, key), (entry, previous) in self._displaced.pop(name).items():
                self._put_back(hook, key, entry, previous)
            self._tell()

    def _put_back(self, hook: str, key: str, entry: Entry, previous: Entry | None) -> None:
        registry = self._registries[hook]
        entries = registry.snapshot()
        if entries.get(key) is entry:
            if previous is None:
                del entries[key]
            else:
                entries[key] = previous
            registry.restore(entries)
        # A later plugin that took the name over must give it back to whom it was before, in its turn.
        for displaced in self._displaced.values():
            held = displaced.get((hook, key))
            if held is not None and held[1] is entry:
                displaced[hook, key] = (held[0], previous)

    def observers(self) -> list[Listener]:
        """The plugins that implement an observer hook, in the order in which they were loaded."""
        found = []
        for name, plugin in self._manager.list_name_plugin():
            if plugin is None:
                continue
            others = [other for _, other in self._manager.list_name_plugin() if other is not plugin]
            implemented = {caller.name for caller in self._manager.get_hookcallers(plugin) or []}
            hear = [
                self._manager.subset_hook_caller(hook, others) if hook in implemented else None
                for hook in _OBSERVERS
            ]
            if any(hear):
                found.append(Listener(name, *hear))
        return found

    def _tell(self) -> None:
        if self._announce is not None:
            self._announce(self.observers())

    def _entries(self) -> dict[str, dict[str, Entry]]:
        return {hook: registry.snapshot() for hook, registry in self._registries.items()}

    def add_entry_points(self, found: Iterable[metadata.EntryPoint]) -> None:
        """Load installed plugins; each broken one is skipped with a :class:`PluginWarning`.

        A plugin whose own import is what imports this package is loaded at the first lookup of a
        name after that import is done.
        """
        points = sorted(
            {(point.name, *_distribution(point), point.value): point for point in found}.items(),
            key=lambda item: item[0],
        )
        uses = Counter([self.home, *(name for (name, *_), _ in points)])
        self._waiting += [
            (name if uses[name] == 1 else f"{name} ({owner})", point) for (name, owner, *_), point in points
        ]
        self._load_waiting()

    def _load_waiting(self) -> None:
        if not self._waiting:
            return
        ready = [(label, point) for label, point in self._waiting if not _half_imported(point)]
        self._waiting = [item for item in self._waiting if item not in ready]
        messages = []
        for label, point in ready:
            owner, version = _distribution(point)
            try:
                with self._all_or_nothing():
                    before = self._entries()
                    self.add(point.load(), label, owner, version, guard=True, before=before)
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:  # a panic of an extension module, for one, is no Exception
                _log.debug("plugin %r failed to load", label, exc_info=error)
                reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:") + "."
                self._failures[label] = reason
                messages.append(
                    f"Plugin {label!r} of {f'{owner} {version}'.strip()!r} was skipped. {reason} "
                    f"Fix or uninstall it, or set {_DISABLE}=1 to load the built-ins alone."
                )
        for message in messages:  # last, so that a filter that raises finds every plugin dealt with
            warnings.warn(message, PluginWarning, stacklevel=2)

    def _refuse_known(self, plugin: object, name: str) -> None:
        try:
            hash(plugin)
        except TypeError:
            raise TypeError(
                f"Plugin {name!r} is a {type(plugin).__name__}, which cannot be hashed; give a module, "
                "a class or an instance of a plain class."
            ) from None
        if self._manager.has_plugin(name):
            raise DuplicateNameError(
                f"A plugin {name!r} is already loaded (owner {self._loaded.get(name, name)!r}). Give this "
                f"one another name, or take that one out first: tw.unregister_plugin({name!r})."
            )
        if self._manager.is_registered(plugin):
            raise DuplicateNameError(
                f"Plugin {name!r} is the same object as plugin {self._manager.get_name(plugin)!r}, which "
                "is already loaded."
            )

    def _check_hooks(self, plugin: object, name: str) -> None:
        known = [*self._registries, *_OBSERVERS]
        for attribute in dir(plugin):
            if attribute.startswith(_PREFIXES) and not self._is_marked(plugin, attribute):
                raise pluggy.PluginValidationError(
                    plugin,
                    f"{attribute!r} of plugin {name!r} is not marked as a hook. "
                    f"Decorate it with @{PROJECT}.hookimpl.",
                )
        callers = self._manager.get_hookcallers(plugin) or []
        if not callers:
            raise TypeError(
                f"Plugin {name!r} ({type(plugin).__name__}) implements no hook: mark a function with "
                f"@{PROJECT}.hookimpl. The hooks: {', '.join(known)}."
            )
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            unknown = next(caller.name for caller in callers if not caller.has_spec())
            raise pluggy.PluginValidationError(
                plugin,
                f"Plugin {name!r} implements an unknown hook {unknown!r}.{nearest(unknown, known)} "
                f"The hooks: {', '.join(known)}.",
            ) from error
        self._check_called(plugin, name, callers)

    def _check_called(self, plugin: object, name: str, callers: list[pluggy.HookCaller]) -> None:
        for caller in callers:
            for hook in caller.get_hookimpls():
                fault = _fault(hook) if hook.plugin is plugin else ""
                if fault:
                    raise pluggy.PluginValidationError(plugin, f"{caller.name!r} of plugin {name!r} {fault}")

    def _is_marked(self, plugin: object, attribute: str) -> bool:
        return self._manager.parse_hookimpl_opts(plugin, attribute) is not None

    def _bind(self, registry: Registry[Any], owner: str, guard: bool) -> Register:
        def register(name: str, factory: Any, replace: bool = False) -> object:
            if guard and replace and name in registry.names():
                holder = registry.owner(name)
                if holder not in (self.home, owner):
                    raise DuplicateNameError(
                        f"{registry.kind.capitalize()} {name!r} of {owner!r} is already registered by "
                        f"{holder!r}, and one plugin cannot replace another's. Choose another name."
                    )
            return registry.register(name, factory, replace, owner=owner)

        return register

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within this, no other thread's plugin comes or goes."""
        if not self._changing.acquire(timeout=_PATIENCE):
            raise RuntimeError(
                f"Another thread has been loading a plugin for {_PATIENCE:.0f} seconds. A hook must not wait "
                "for a thread that registers a plugin."
            )
        try:
            yield
        finally:
            self._changing.release()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        entries = self._entries()
        names = {name for name, _ in self._manager.list_name_plugin()}
        loaded, displaced = dict(self._loaded), dict(self._displaced)
        try:
            yield
        except BaseException:
            for name, _ in self._manager.list_name_plugin():
                if name not in names:
                    self._manager.unregister(name=name)
            for hook, registry in self._registries.items():
                registry.restore(entries[hook])
            self._loaded, self._displaced = loaded, displaced
            self._tell()
            raise


def _distribution(point: metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that declares an entry point, whatever its metadata lack."""
    fallback = point.value.split(":")[0].split(".")[0].strip()
    if point.dist is None:
        return fallback, ""
    try:
        return point.dist.name or fallback, point.dist.version or ""
    except Exception:  # what a damaged METADATA file raises differs between versions of Python
        return fallback, ""


def _half_imported(point: metadata.EntryPoint) -> bool:
    """Whether a module of the plugin's package is being imported at this moment."""
    package = point.value.split(":")[0].split(".")[0].strip()
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name == package or name.startswith(package + ".")
    )


def _fault(hook: pluggy.HookImpl) -> str:
    """What would keep a hook from doing anything when it is called; empty: nothing."""
    function = hook.function
    wraps = hook.hookwrapper or hook.wrapper
    idle = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    if idle or (inspect.isgeneratorfunction(function) and not wraps):
        return (
            "is an async function or has a yield in it, so that calling it does nothing. Make it a plain "
            "function."
        )
    try:
        inspect.signature(function).bind(*hook.argnames)
    except TypeError as error:
        if isinstance(hook.plugin, type):
            kind = hook.plugin.__name__
            return f"is a method of the class {kind} itself, without a self: give an instance, {kind}()."
        return f"cannot be called with {', '.join(hook.argnames) or 'no arguments'}: {error}."
    return ""


def _disabled_by_environment() -> bool:
    return os.environ.get(_DISABLE, "").strip().lower() not in ("", "0", "false", "no", "off")


def _announce(listeners: list[Listener]) -> None:
    """What has to know when plugins come and go: who is told of solves, and torchdeq of new solvers."""
    observe.set_listeners(listeners)
    torchdeq_bridge.register_with_torchdeq()


_host = PluginHost(
    {
        "solvers": solvers.registry,
        "linear_solvers": linear.registry,
        "adjoints": adjoints.registry,
        "blocks": blocks.registry,
        "gates": gates.registry,
        "policies": policies.registry,
        "backbones": backbones.registry,
    },
    announce=_announce,
)
_looked_for_installed = False


def load(disable_external: bool | None = None) -> None:
    """Load the built-ins, then the installed plugins; what is loaded already is not loaded again.

    Args:
        disable_external: leave out the installed plugins. By default the environment variable
            ``TWNN_DISABLE_PLUGINS`` decides (``1`` or ``true`` leaves them out).
    """
    global _looked_for_installed
    if _host.home not in _host.loaded():
        _host.add(builtins, _host.home, owner=_host.home)
    if disable_external is None:
        disable_external = _disabled_by_environment()
    if not disable_external and not _looked_for_installed:
        _looked_for_installed = True
        _host.add_entry_points(metadata.entry_points(group=PROJECT))


def register_plugin(plugin: object, name: str | None = None) -> str:
    """Load a plugin made in this process.

    Args:
        plugin: module, class or other object with functions marked by ``tw.hookimpl``.
        name: what to call it, and the owner of the names it registers; by default the object's
            ``__name__`` or the name of its class.

    Returns:
        The plugin's name.

    Raises:
        DuplicateNameError: the plugin, its name or a name it registers is there already.
        pluggy.PluginValidationError: a hook is misspelled or has a wrong signature.
        OptionError: ``name`` is not a string.
        TypeError: the object implements no hook.

    Nothing stays behind of a plugin that fails.
    """
    if name is not None and not isinstance(name, str):
        raise OptionError(f"The name of a plugin must be a string; got {name!r:.40}.")
    chosen: str = name or getattr(plugin, "__name__", "") or type(plugin).__name__
    _host.add(plugin, chosen, owner=chosen)
    return chosen


def unregister_plugin(name: str) -> None:
    """Take a plugin out: its observers hear no more, its names go, one it took over is given back.

    What was made from its names before (a model's solver, say) goes on working.

    Args:
        name: what :func:`register_plugin` returned, or a name in :func:`loaded`.

    Raises:
        UnknownNameError: no such plugin is loaded.
        OptionError: it is the built-ins.
    """
    _host.remove(name)


def loaded() -> dict[str, str]:
    """Each loaded plugin's name and its owner, with the distribution's version if it has one."""
    return _host.loaded()


def failures() -> dict[str, str]:
    """Each installed plugin that was skipped, and the reason."""
    return _host.failures()
