"""A progress bar on a terminal, and silence anywhere else."""

from __future__ import annotations

from typing import Any

__all__ = ["Bar"]


class Bar:
    """A bar over ``total`` steps; leaves no trace when it is done.

    Args:
        console: a ``rich`` console, or ``None`` for silence.
        title: what is going on.
        total: number of steps.
    """

    def __init__(self, console: Any, title: str, total: int):
        self._progress: Any = None
        if console is not None and console.is_terminal:
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            )
            self._progress = progress.Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, steps: int = 1) -> None:
        """``steps`` more are done."""
        if self._progress is not None:
            self._progress.advance(self._task, steps)

    def describe(self, title: str) -> None:
        """Say something else in front of the bar."""
        if self._progress is not None:
            self._progress.update(self._task, description=title)
