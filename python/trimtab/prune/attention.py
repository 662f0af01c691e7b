"""Attention whose heads are counted by its weights, not by its width.

nn.MultiheadAttention calls one function that takes head_dim to be embed_dim / num_heads and never
calls ``out_proj``. This one has as many heads as its weights have, and calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def refuse(op: str, name: str, module: nn.MultiheadAttention) -> None:
    """ValueError for what is not handled: bias_k, bias_v and add_zero_attn."""
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise ValueError(
            f"{op}: {name}: expected an attention without add_bias_kv and add_zero_attn"
        )


def projections(module: nn.MultiheadAttention) -> list[tuple[str, slice]]:
    """For query, key and value: the parameter that holds the weight, and its rows there."""
    if module.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [(name, slice(None)) for name in names]
    third = module.in_proj_weight.shape[0] // 3
    return [("in_proj_weight", slice(i * third, (i + 1) * third)) for i in range(3)]


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What nn.MultiheadAttention.forward computes, for ``module.num_heads`` heads of any size."""
    single = query.dim() == 2
    if single:
        query, key, value = query[None], key[None], value[None]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
    elif not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    heads = []
    rows = module.out_proj.in_features
    for i, (x, (name, part)) in enumerate(zip((query, key, value), projections(module))):
        bias = module.in_proj_bias
        own = None if bias is None else bias[i * rows : (i + 1) * rows]
        projected = F.linear(x, getattr(module, name)[part], own)
        heads.append(projected.unflatten(-1, (module.num_heads, -1)).transpose(1, 2))
    q, k, v = heads
    mask = _mask(module, q, k, key_padding_mask, attn_mask, is_causal)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = torch.softmax(logits if mask is None else logits + mask, dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if single:
        return out[0], None if weights is None else weights[0]
    return out if module.batch_first else out.transpose(0, 1), weights


def _mask(
    module: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Tensor | None:
    """All masks as one that is added to the logits [B, heads, L, S]."""
    total = None
    if causal and mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (q.shape[0], -1))
    if padding is not None:
        padding = padding[:, None, None, :]
    for part in (mask, padding):
        if part is None:
            continue
        if part.dtype == torch.bool:
            part = torch.zeros(part.shape, dtype=q.dtype, device=q.device).masked_fill_(
                part, -torch.inf
            )
        total = part.to(q.dtype) if total is None else total + part
    return total


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention that has lost heads: in_proj [3 h d, E], out_proj [E, h d].

    ``head_dim`` is a buffer, so that a checkpoint says how many heads its weights are.
    """

    head_dim: Any
    _qkv_same_embed_dim: bool

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return attend(self, *args, **kwargs)
