"""``stream``: inference with the active batch of every solve kept full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.given import check_flag
from ..errors import OptionError
from ..trees import rebuild
from .engine import Engine
from .report import StreamReport

__all__ = ["Stream", "stream"]


def stream(
    model: nn.Module,
    iterable: Iterable[Any],
    batch_size: int | None = None,
    *,
    batched: bool = True,
    in_flight: int = 8,
    records: bool = True,
) -> Stream:
    """Run a model over batches with continuous batching inside its solves.

    Batch by batch, a solve ends when its slowest row does, and the rows that are left keep the device half
    idle. Here passes over several batches are under way at a time: each halts where it solves, the rows of
    all of them share one active batch per solve, rows that have settled leave it, and rows that wait take
    their places. Outputs come in order and are those of ``model(images)`` batch by batch, as far as kernels
    round alike in other batch sizes; steps and statuses of each sample are the same.

    It pays where an evaluation for few rows costs as much as one for many: where the map is many small
    kernels. For a map of a handful of operators the bookkeeping costs more than it saves, and on a CPU a
    small batch is mostly cheap already (docs/scaling.md). Nothing has been measured on an accelerator. It
    changes nothing for samples whose wormholes are closed, and works with any model that solves by
    :func:`twnn_plugin.fix` or by wormholes, several of them included. Solves whose rows cannot share a batch
    (solvers that run their own loop, such as ``"auto"``, ``"newton_krylov"`` and torchdeq's; coupled rows; a
    map that closes over something new in each pass) are made on the spot, in a batch of their own; the report
    says which and why.

    Nothing is recorded for gradients. Inference mode, autocast, the default device and the CUDA stream are
    those in force when the iteration begins. Passes run in threads, one at a time, and overlap: a forward
    must not leave anything on its modules for later in the same pass.

    Args:
        model: in eval mode, on the device of the images.
        iterable: of batches as a ``DataLoader`` gives them: a tensor (B, ...), or a tuple or list that begins
            with one, such as ``(images, targets)``. With ``batched=False`` of samples without the batch
            axis, which are put together ``batch_size`` at a time, those of one shape in a row.
        batch_size: rows in the active batch of a solve at most; None: as many as the first batch has.
        batched: whether the iterable gives batches.
        in_flight: batches under way, or waiting for their turn to be put out, at most. Memory grows with
            it; the fill does, too, as long as it is less than hard rows need steps over mean steps.
        records: keep steps, statuses and residuals of every sample, and the fill at each evaluation, for
            the report. Say False for streams without end.

    Returns:
        An iterator over the model's outputs, one for each item: for a tensor what the model returns, for
        ``(images, *rest)`` the tuple ``(output, *rest)``. Its ``report`` tells what happened. Leaving the
        loop early, ``close()`` or an error ends its threads; the model stays usable.

    Raises:
        OptionError: the model is in training mode, or an option has an impossible value. What a forward, the
            iterable or a solve raises comes out when its turn comes.

    Example:
        >>> import torch, twnn_plugin as tw
        >>> model = tw.blocks.get("fpi")(torch.nn.Linear(8, 8), torch.randn(2, 8)).eval()
        >>> outputs = tw.stream(model, torch.randn(10, 4, 8))  # ten batches of four
        >>> len(list(outputs)), outputs.report.samples
        (10, 40)
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"stream takes an nn.Module; got a {type(model).__name__}.")
    for name, module in model.named_modules():
        if module.training:
            where = f"its module {name!r}" if name else "it"
            raise OptionError(
                f"stream takes a model in eval mode; {where} is in training mode, where batches have "
                "statistics and draws of their own. Call model.eval() first."
            )
    check_flag("batched", batched)
    check_flag("records", records)
    if batch_size is not None or not batched:
        _check_whole("batch_size", batch_size)
    _check_whole("in_flight", in_flight)
    if not isinstance(iterable, Iterable):
        raise OptionError(f"stream takes an iterable of batches; got a {type(iterable).__name__}.")
    items = _batches(iterable) if batched else _groups(iterable, batch_size or 1)
    return Stream(Engine(model, items, batch_size, in_flight, records), batched)


def _check_whole(option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{option} must be a whole number, at least 1; got {value!r}.")


class Stream(Iterator[Any]):
    """The outputs of :func:`stream`, in order; also a context manager that closes it."""

    def __init__(self, engine: Engine, batched: bool):
        self._engine = engine
        # A function of its own, so that a stream that nobody holds any more is closed at once.
        self._outputs = _whole(engine) if batched else _rows(engine)

    def __next__(self) -> Any:
        return next(self._outputs)

    def close(self) -> None:
        """End the passes that are under way; further outputs are not to be had."""
        self._outputs.close()
        self._engine.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def report(self) -> StreamReport:
        """What happened so far, for the outputs that were taken."""
        return self._engine.summary()


Item = tuple[Tensor, Any]


def _split(item: Any, what: str) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The tensor of an item, and what comes with it; None: the item is the tensor."""
    if isinstance(item, Tensor):
        images, rest = item, None
    elif isinstance(item, (tuple, list)) and item and isinstance(item[0], Tensor):
        images, rest = item[0], tuple(item[1:])
    else:
        raise OptionError(
            f"stream takes {what}: a tensor, or a tuple or list that begins with one; got a "
            f"{type(item).__name__}. Rearrange it: stream(model, ((x['image'], x) for x in loader))."
        )
    return images, rest


def _batches(iterable: Iterable[Any]) -> Iterator[Item]:
    for item in iterable:
        images, rest = _split(item, "batches")
        if images.dim() == 0:
            raise OptionError("stream takes batches (B, ...); got a scalar tensor.")
        yield images, rest


def _groups(iterable: Iterable[Any], size: int) -> Iterator[Item]:
    """Samples of one shape in a row, ``size`` at a time, with what came with each."""
    group: list[tuple[Tensor, Any]] = []
    for item in iterable:
        sample, rest = _split(item, "samples")
        if group and (len(group) == size or sample.shape != group[0][0].shape):
            yield torch.stack([s for s, _ in group]), [r for _, r in group]
            group = []
        group.append((sample, rest))
    if group:
        yield torch.stack([s for s, _ in group]), [r for _, r in group]


def _whole(engine: Engine) -> Any:
    for output, rest in engine.outputs():
        yield output if rest is None else (output, *rest)


def _rows(engine: Engine) -> Any:
    for output, rests in engine.outputs():
        for row, rest in enumerate(rests):
            mine = rebuild(output, lambda leaf, row=row: leaf[row] if isinstance(leaf, Tensor) else leaf)
            yield mine if rest is None else (mine, *rest)
