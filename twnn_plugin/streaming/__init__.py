"""Continuous batching: a stream of batches whose solves share their evaluations."""

from .report import StreamReport
from .stream import Stream, stream

__all__ = ["Stream", "StreamReport", "stream"]
