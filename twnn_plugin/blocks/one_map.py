"""Making a span one fixed map while it is iterated: batch statistics and random draws stand still.

In training, batch normalisation depends on the batch and dropout on the random state, so that two
applications of a module are two different maps and there is no fixed point to find. While a span is
replayed, its batch normalisations use the statistics of the open-loop pass (kept in the graph, or the
gradients would be wrong), and its random draws are those of one recorded pass, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm  # the documented common base of BatchNorm layers
from torch.overrides import TorchFunctionMode

from ..errors import AttachError
from .draws import random_state, same

__all__ = ["OneMap"]

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
_UNSUPPORTED = {F.alpha_dropout, F.feature_alpha_dropout, F.rrelu}


class OneMap:
    """Keeps the statistics and the draws of a span for as long as it is iterated.

    Args:
        modules: the modules of the span; their batch normalisations are watched in training.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.norms = tuple(m for module in modules for m in module.modules() if isinstance(m, _BatchNorm))
        self.inputs: dict[int, Tensor] = {}
        self.watching = False
        for norm in self.norms:
            norm.register_forward_pre_hook(self._keep_input)

    def _keep_input(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if self.watching and norm.training:
            if id(norm) in self.inputs:
                raise AttachError(
                    "A BatchNorm layer of this span runs twice in one pass, so that it has no single "
                    "statistics to iterate with. Choose a span that uses each layer once, or model.eval()."
                )
            self.inputs[id(norm)] = args[0]

    def open_loop(self, active: bool) -> None:
        """Start (or stop) to watch the open-loop pass."""
        self.watching = active
        if active:
            self.inputs = {}

    def needed(self, drew: bool) -> bool:
        """Whether replays must be intercepted: batch statistics were used, or random numbers drawn."""
        return bool(self.inputs) or drew

    def statistics(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Biased variance and mean of each watched BatchNorm's input, with their graph.

        Keyed by the identity of the layer's running mean, or of its weight, as ``F.batch_norm`` sees
        them.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for norm in self.norms:
            value = self.inputs.get(id(norm))
            key = norm.running_mean if norm.running_mean is not None else norm.weight
            if value is None:
                continue
            if key is None:
                raise AttachError("A BatchNorm without statistics and without weights cannot be iterated.")
            axes = [0, *range(2, value.dim())]
            statistics = torch.promote_types(value.dtype, torch.float32)
            found[id(key)] = torch.var_mean(value.to(statistics), dim=axes, correction=0)
        self.inputs = {}
        return found

    def counters(self) -> list[Tensor]:
        """The layers' batch counters."""
        return [norm.num_batches_tracked for norm in self.norms if norm.num_batches_tracked is not None]

    # Copies and pickles hold no activations.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": {}, "watching": False}


class Frozen(TorchFunctionMode):
    """Intercepts batch normalisation and random draws in replays of a span.

    Args:
        statistics: see :meth:`OneMap.statistics`.
        counters: the batch counters of the normalisations; replays do not count.
        entry: (B, ...) the span's input in the recorded pass.
    """

    def __init__(
        self, statistics: dict[int, tuple[Tensor, Tensor]], counters: Iterable[Tensor], entry: Tensor
    ):
        super().__init__()
        self.statistics, self.batch, self.device = statistics, entry.shape[0], entry.device
        self.counters = {id(counter) for counter in counters}
        self.checked = False
        self.draws: list[Tensor] = []
        self.cursor = 0
        self.recording = False
        self.rows: Tensor | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within this, draws are made and kept."""
        self.recording, self.draws, self.rows = True, [], None
        with self:
            yield
        self.recording = False

    @contextmanager
    def replay(self, rows: Tensor | None) -> Iterator[None]:
        """Within this, the kept draws are used again, for the given rows of the recorded batch."""
        self.cursor, self.rows = 0, rows
        before = None if self.checked else random_state(self.device)
        with self:
            yield
        if before is not None and not same(before, random_state(self.device)):
            raise AttachError(
                "A module of this span draws random numbers in a way that cannot be held fixed while the "
                "span is iterated (only dropout, drop-path and attention dropout can). Choose another "
                "span, or switch that module off."
            )
        self.checked = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func in _DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func is torch.Tensor.add_ and id(args[0]) in self.counters:
            return args[0]
        if func is torch.Tensor.bernoulli_:
            return self._bernoulli(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in _UNSUPPORTED and kwargs.get("training", args[2] if len(args) > 2 else False):
            raise AttachError(
                f"{func.__name__} draws in a way that cannot be held fixed while a span is iterated. Use "
                "nn.Dropout, or model.eval()."
            )
        return func(*args, **kwargs)

    def _draw(self, make: Callable[[], Tensor]) -> Tensor:
        if self.recording:
            drawn = make()
            self.draws.append(drawn)
            return drawn
        drawn = self.draws[self.cursor]
        self.cursor += 1
        if self.rows is None or drawn.shape[0] == self.rows.numel() == self.batch:
            return drawn if self.rows is None else drawn[self.rows]
        if drawn.shape[0] % self.batch:
            return drawn  # one draw for the whole batch
        share = drawn.shape[0] // self.batch  # windows or heads folded into the batch
        return drawn.view(self.batch, share, *drawn.shape[1:])[self.rows].flatten(0, 1)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        known = self.statistics.get(id(running_mean if running_mean is not None else weight))
        if not training or known is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        var, mean = known
        scale = torch.rsqrt(var + eps)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale
        shift = shift if bias is None else shift + bias
        shape = [1, -1] + [1] * (input.dim() - 2)
        return (input * scale.view(shape) + shift.view(shape)).to(input.dtype)

    def _dropout(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or p == 0:
            return func(input, p, training, inplace)
        return input * self._draw(lambda: func(torch.ones_like(input), p, True))

    def _bernoulli(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.copy_(self._draw(lambda: tensor.bernoulli_(*args, **kwargs).clone()))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p == 0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if is_causal or enable_gqa:
            raise AttachError(
                "Attention with dropout and is_causal or enable_gqa cannot be held fixed while a span is "
                "iterated. Set the attention dropout to 0."
            )
        scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            blocked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if blocked else scores + attn_mask
        weights = scores.softmax(dim=-1)
        return weights * self._draw(lambda: F.dropout(torch.ones_like(weights), dropout_p, True)) @ value
