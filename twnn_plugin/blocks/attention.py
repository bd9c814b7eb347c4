"""Attention with dropout whose mask is given: the fused kernels draw theirs out of sight."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention", "multihead"]

Mask = Callable[[Tensor, float], Tensor]


def attention(
    mask: Mask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``, written out where there is dropout.

    ``mask`` makes, of (weights, p), what the weights are multiplied with; everything else is as there.
    """
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~before, float("-inf"))
    if attn_mask is not None:
        blocked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if blocked else scores + attn_mask
    weights = scores.softmax(dim=-1)
    return weights * mask(weights, dropout_p) @ value


_MULTIHEAD = inspect.signature(F.multi_head_attention_forward)


def multihead(mask: Mask, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward``, which ``nn.MultiheadAttention`` calls, written out for dropout.

    Extra keys (``bias_k``, ``add_zero_attn``, ``static_k``) are left to the function itself.
    """
    call = _MULTIHEAD.bind(*args, **kwargs)
    call.apply_defaults()
    a = call.arguments
    extra = a["bias_k"] is not None or a["add_zero_attn"] or a["static_k"] is not None
    if not a["training"] or a["dropout_p"] == 0 or extra or a["query"].dim() != 3:
        return F.multi_head_attention_forward(*args, **kwargs)
    heads, (length, batch, width) = a["num_heads"], a["query"].shape
    q, k, v = (value.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for value in _projected(a))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, L, S)
    if a["attn_mask"] is not None:
        given = a["attn_mask"]
        scores = _blocked(scores, given if given.dim() == 2 else given.view(batch, heads, *given.shape[1:]))
    if a["key_padding_mask"] is not None:
        scores = _blocked(scores, a["key_padding_mask"][:, None, None])
    weights = scores.softmax(dim=-1)
    weights = weights * mask(weights, a["dropout_p"])
    out = (weights @ v).permute(2, 0, 1, 3).reshape(length, batch, width)
    out = F.linear(out, a["out_proj_weight"], a["out_proj_bias"])
    if not a["need_weights"]:
        return out, None
    return out, weights.mean(dim=1) if a["average_attn_weights"] else weights


def _projected(a: dict[str, Any]) -> list[Tensor]:
    """Queries, keys and values, (L, B, E) each."""
    if a["use_separate_proj_weight"]:
        weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    else:
        weights = list(a["in_proj_weight"].chunk(3))
    biases = [None] * 3 if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    values = (a["query"], a["key"], a["value"])
    return [F.linear(x, w, b) for x, w, b in zip(values, weights, biases, strict=True)]


def _blocked(scores: Tensor, given: Tensor) -> Tensor:
    """Scores under a mask that is true where attention is not allowed, or is to be added."""
    return scores.masked_fill(given, float("-inf")) if given.dtype == torch.bool else scores + given
