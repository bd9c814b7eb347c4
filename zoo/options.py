"""Command-line options made from :class:`~zoo.config.TrainConfig`, and NAME=VALUE arguments."""

from __future__ import annotations

import ast
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from .config import SEED_MAX, TrainConfig
from .errors import ConfigError

__all__ = [
    "TASK_OPTIONS",
    "Numbers",
    "config_options",
    "expand_model_kwargs",
    "explicit_values",
    "parse_model_kwargs",
    "refuse_task_options",
    "task_options",
]

_PAIRS = ("model_kwargs", "policy_kwargs")
"""Settings that are given as several NAME=VALUE."""

TASK_OPTIONS = ("bits", "maze_size", "contour_length", "updates", "method", "samples", "seed")
"""Options of ``train`` and ``eval`` that belong to generated tasks (``--seed`` in ``eval`` alone)."""


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate ``command`` with one option a field of :class:`~zoo.config.TrainConfig`."""
    hints = get_type_hints(TrainConfig)
    for item in reversed(fields(TrainConfig)):  # decorators apply from the last to the first
        command = _option(item, hints[item.name])(command)
    return command


def task_options(training: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with the options of generated tasks.

    Args:
        training: those of ``twnn train``, otherwise those of ``twnn eval``.
    """
    other = "" if training else ", or what the checkpoint was trained on"
    size = [
        ("--bits", 1, f"twnn_prefix and its like: length of the strings (default: 32{other})."),
        ("--maze-size", 3, f"twnn_maze and its like: units a side, walls included (default: 9{other})."),
        ("--contour-length", 2, f"twnn_pathfinder and its like: dashes in a contour (default: 14{other})."),
    ]
    options = [click.option(flag, type=click.IntRange(min=least), help=help) for flag, least, help in size]
    if training:
        methods = click.Choice(("phantom", "unrolled", "progressive", "implicit", "plain"))
        options += [
            click.option(
                "--updates", type=click.IntRange(min=1), help="Generated tasks: updates of the weights."
            ),
            click.option("--method", type=methods, help="Generated tasks: how gradients are made."),
        ]
    else:
        options += [
            click.option(
                "--samples", type=click.IntRange(min=1), help="Generated tasks: how many (default: 1000)."
            ),
            click.option(
                "--seed", type=click.IntRange(0, SEED_MAX), help="Generated tasks: seed of the examples."
            ),
        ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def refuse_task_options(options: Mapping[str, Any], model: str | None, names: Iterable[str]) -> None:
    """``ConfigError`` if an option of generated tasks was given for a model of images and classes."""
    for name in names:
        if options.get(name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for models of tasks like twnn_prefix and twnn_maze; "
                f"the model is {model}."
            )


def _option(item: Field[Any], hint: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    flag = "--" + item.name.replace("_", "-")
    help = item.metadata["help"]
    default = None if item.default is MISSING else item.default
    kind = _plain_type(hint)
    if item.name in _PAIRS:
        return click.option(flag, multiple=True, metavar="NAME=VALUE...", help=help)
    if kind is bool:
        name = f"{flag}/--no-{flag[2:]}"
        return click.option(name, default=default, show_default=True, help=help)
    choices = item.metadata.get("choices")
    parameter_type = click.Choice(choices) if choices else Integers() if get_origin(kind) is tuple else kind
    shown = default is not None
    return click.option(flag, type=parameter_type, default=default, show_default=shown, help=help)


def _plain_type(hint: Any) -> Any:
    """``int`` for ``int | None``; other hints as they are."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return hint


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between: ``0,0.5,1``."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """The numbers; a usage error if some part is none, or none is given."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(part) for part in value.replace(",", " ").split())
        except ValueError:
            found = ()
        if not found or not all(math.isfinite(number) for number in found):
            self.fail(f"{value!r} is not a list of numbers such as 0,0.5,1.", param, ctx)
        return found


class Integers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between: ``90,180``."""

    name = "integers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers; a usage error if some part is none."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.replace(",", " ").split())
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 90,180.", param, ctx)


def explicit_values(ctx: click.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that the user typed, without the defaults."""
    typed = ParameterSource.COMMANDLINE
    return {name: value for name, value in options.items() if ctx.get_parameter_source(name) is typed}


def expand_model_kwargs(args: Iterable[str]) -> list[str]:
    """``--model-kwargs a=1 b=2`` as ``--model-kwargs a=1 --model-kwargs b=2``, and so for a policy's."""
    flags = ["--" + name.replace("_", "-") for name in _PAIRS]
    expanded: list[str] = []
    inside: str | None = None
    for arg in args:
        if arg.startswith("-"):
            inside = arg if arg in flags else None
            if inside is None:
                expanded.append(arg)
        elif inside is not None:
            expanded += [inside, arg]
        else:
            expanded.append(arg)
    return expanded


def parse_model_kwargs(pairs: Iterable[str], flag: str = "--model-kwargs") -> dict[str, Any]:
    """NAME=VALUE strings as a dict; a value that reads as a Python literal becomes one.

    Args:
        pairs: the strings.
        flag: the option they were given with, for errors.

    Raises:
        ConfigError: a string without ``=`` or without a name.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found or not name.isidentifier():
            raise ConfigError(f"{flag} takes NAME=VALUE, such as img_size=32; got {pair!r}.")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        parsed[name] = value
    return parsed
