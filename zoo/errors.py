"""Errors of the zoo: mistakes of the caller, each with one line that says what to do.

No import of torch here, so that the command line can name them without paying for it.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "DataError", "TrainingError", "ZooError"]


class ZooError(Exception):
    """Base of the errors below; the command line prints them as one line, without a traceback."""


class DataError(ZooError, FileNotFoundError):
    """A data set is missing, incomplete or unreadable; the message says where it was looked for."""

    def __str__(self) -> str:  # OSError formats errno and file name; the message is a sentence
        return str(self.args[0]) if self.args else ""


class ConfigError(ZooError, ValueError):
    """A setting that does not exist, is out of range, or contradicts another one."""


class CheckpointError(ZooError, ValueError):
    """A checkpoint that is missing, corrupt, or belongs to another run."""


class TrainingError(ZooError, RuntimeError):
    """Training cannot go on (the loss is not finite); earlier checkpoints are untouched."""
