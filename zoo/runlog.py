"""What a run writes beside its checkpoints: ``args.json``, ``metrics.jsonl`` and TensorBoard events.

``metrics.jsonl`` holds nothing that depends on the clock, so that a resumed run writes the same bytes
as one never killed; timings go to TensorBoard and into the checkpoint.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ["METRICS", "RunLog", "alone", "output_folder", "prepare_folder"]

METRICS = "metrics.jsonl"


def prepare_folder(output: Path, option: str = "--output") -> None:
    """Make the folder of a run and write a file into it as a test, so that a refusal comes before the work.

    Args:
        output: the folder, made with its parents if it is not there.
        option: what it was given with, for errors.

    Raises:
        ConfigError: it cannot be made or written to; what was made of it is removed again.
    """
    with output_folder(output, option):
        pass


@contextmanager
def output_folder(output: Path, option: str = "--output") -> Iterator[None]:
    """Inside, ``output`` exists and can be written to; work that fails leaves no empty folder behind.

    Args:
        output: the folder, made with its parents if it is not there.
        option: what it was given with, for errors.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        try:
            made = [folder for folder in (output, *output.parents) if not folder.exists()]
            output.mkdir(parents=True, exist_ok=True)
            _probe(output)
        except OSError as error:
            raise ConfigError(
                f"Cannot write to the folder {output}: {error.strerror or error}. Choose another {option}."
            ) from None
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()  # refuses a folder that holds anything
        raise


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Inside, no other run writes into ``output``; it is free again once this process ends, however it does.

    Two runs in one folder would each put their checkpoints in the place of the other's.

    Args:
        output: the folder, which exists.

    Raises:
        ConfigError: another process trains into it.
    """
    if fcntl is None:
        yield
        return
    path = output / ".lock"
    with path.open("w") as held:
        try:  # of this process alone: a forked worker that outlives it keeps nobody out
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"Another run is writing into the folder {output}. Wait until it has ended, or choose "
                "another --output."
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _probe(folder: Path) -> None:
    """Write a small file and remove it; OSError if that fails: permissions alone do not tell."""
    handle, path = tempfile.mkstemp(prefix=".probe-", dir=folder)
    try:
        os.write(handle, b"to see whether this folder can be written to")
    finally:
        os.close(handle)
        os.unlink(path)


class RunLog:
    """Writer of a run's records; closed by leaving its ``with`` block.

    Args:
        output: the run's folder, which exists.
        args: the settings, for ``args.json``.
        lines: how many lines of an earlier ``metrics.jsonl`` to keep: those the checkpoint knew of.
        updates: the update the run starts from; TensorBoard drops later points of a killed run.

    Raises:
        CheckpointError: here and later, the folder cannot be written to or is full.
    """

    def __init__(self, output: Path, args: Mapping[str, Any], lines: int = 0, updates: int = 0):
        self.output = output
        with _writing(output):
            aside = output / ".args.json.tmp"
            aside.write_text(json.dumps(dict(args), indent=2) + "\n", encoding="utf-8")
            os.replace(aside, output / "args.json")
            self.lines = _truncate(output / METRICS, lines)
            self._file = open(output / METRICS, "a", encoding="utf-8")  # noqa: SIM115
            self._events = _event_writer(output, updates)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # What ended the run is said, not that the last lines of its records are lost as well.
        with _writing(self.output) if kind is None else suppress(OSError):
            try:
                self._file.close()
            finally:
                if self._events is not None:
                    self._events.close()

    def write(self, record: Mapping[str, Any], **timings: float) -> None:
        """One line of ``metrics.jsonl``; numbers go to TensorBoard too, ``timings`` only there."""
        with _writing(self.output):
            self._file.write(json.dumps(dict(record)) + "\n")
            self._file.flush()
            self.lines += 1
            if self._events is not None:
                for name, value in {**record, **timings}.items():
                    if isinstance(value, int | float) and name not in ("step", "epoch"):
                        self._events.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Bring the lines to the disk, before a checkpoint that counts on them."""
        with _writing(self.output):
            os.fsync(self._file.fileno())


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """One line in place of a traceback where the disk refuses; TensorBoard's writer raises late, anywhere."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot write the records of the run into {output}: {error.strerror or error}. Make room, then "
            "go on from the last checkpoint (--resume auto)."
        ) from error


def _truncate(path: Path, lines: int) -> int:
    """Keep the first ``lines`` complete lines of ``path``; returns how many there are now."""
    kept = []
    if path.is_file():
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")][:lines]
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(b"".join(kept))
    os.replace(aside, path)
    return len(kept)


def _event_writer(output: Path, updates: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn("No TensorBoard event files: install tensorboard to get them.", stacklevel=3)
        return None
    return SummaryWriter(str(output), purge_step=updates)
