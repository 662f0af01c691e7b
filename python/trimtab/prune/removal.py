"""Layers made smaller, and models made to fit a checkpoint of a pruned one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.sparse_weight import SparseWeight
from . import state
from .attention import PrunedMultiheadAttention
from .checks import expect, expect_model
from .state import SUFFIX
from .undo import Undo


class PrunedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm that has lost features, and still normalizes as if they were there, as zeros.

    With n features left of N (``dense_features``, a buffer): mean = sum(x) / N,
    var = (sum((x - mean)^2) + (N - n) mean^2) / N.
    """

    dense_features: Any

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = self.dense_features.to(wide.dtype)
        mean = wide.sum(-1, keepdim=True) / count
        centred = wide - mean
        square = centred.square().sum(-1, keepdim=True)
        var = (square + (count - x.shape[-1]) * mean.square()) / count
        out = (centred * torch.rsqrt(var + self.eps)).to(x.dtype)
        if self.weight is not None:
            out = out * self.weight
        return out if self.bias is None else out + self.bias


def keep_(module: nn.Module, key: str, dim: int, keep: Tensor) -> None:
    """Leaves positions ``keep`` (int64) of a dimension of a parameter or buffer, and of its mask."""
    for name in (key, key + SUFFIX):
        for table in (module._parameters, module._buffers):
            old = table.get(name)
            if old is None:
                continue
            with torch.inference_mode(False):  # whatever mode it runs in, it can be trained later
                new = old.detach().index_select(dim, keep.to(old.device)).contiguous()
                if table is module._parameters:
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
            table[name] = new  # type: ignore[assignment]


def become_layer_norm_(module: Any) -> None:
    """Before features are taken away."""
    if not isinstance(module, PrunedLayerNorm):
        count = module.normalized_shape[0]
        module.__class__ = PrunedLayerNorm
        device = None if module.weight is None else module.weight.device
        module.register_buffer("dense_features", torch.tensor(count, device=device))


def become_attention_(module: Any) -> None:
    """Before heads or features are taken away."""
    if not isinstance(module, PrunedMultiheadAttention):
        head_dim = torch.tensor(module.head_dim, device=module.out_proj.weight.device)
        del module.head_dim
        module.__class__ = PrunedMultiheadAttention
        module._qkv_same_embed_dim = False  # keeps torch's fused encoder layer away
        module.register_buffer("head_dim", head_dim)


def fit_(module: Any) -> None:
    """Numbers of features, channels, groups and heads from the weights as they are now."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        depthwise = 1 < module.groups == module.in_channels == module.out_channels
        module.out_channels = module.weight.shape[0]
        if depthwise:
            module.groups = module.out_channels
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        like = module.running_mean if module.weight is None else module.weight
        if like is not None:
            module.num_features = len(like)
    elif isinstance(module, nn.LayerNorm):
        if module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, PrunedMultiheadAttention):
        weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
        module.embed_dim = weight.shape[1]
        module.kdim = (
            weight.shape[1] if module.k_proj_weight is None else module.k_proj_weight.shape[1]
        )
        module.vdim = (
            weight.shape[1] if module.v_proj_weight is None else module.v_proj_weight.shape[1]
        )
        module.num_heads = module.out_proj.weight.shape[1] // int(module.head_dim)


def load_state_dict_(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, assign: bool = False
) -> None:
    """Loads the checkpoint of a pruned model into a model as it is built: masks, smaller layers.

    The shapes are those of the checkpoint's tensors; ``torch.save(model.state_dict(), ...)`` and
    ``torch.load(..., weights_only=True)`` are all that is needed. ``assign`` as in
    nn.Module.load_state_dict: True takes the tensors themselves, which a model on meta needs.

    Raises:
        ValueError: a mask that is not a bool of its parameter's shape, or prunes a weight that isn't
            zero; a tensor of another number of dimensions, or larger than the model's.
        RuntimeError: missing and unexpected keys, as from load_state_dict. The model is then as it was.
    """
    expect_model("load_state_dict_", model)
    given = isinstance(state_dict, Mapping)
    expect("load_state_dict_", "a state_dict (a dict of tensors)", given, state_dict)
    with Undo() as undo:
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            undo.save(module)
            if isinstance(module, SparseWeight):
                continue  # takes whatever fits its format
            if isinstance(module, nn.LayerNorm) and f"{prefix}dense_features" in state_dict:
                become_layer_norm_(module)
            if isinstance(module, nn.MultiheadAttention) and f"{prefix}head_dim" in state_dict:
                become_attention_(module)
            _resize(module, prefix, state_dict)
            _take_masks(module, prefix, state_dict)
        model.load_state_dict(state_dict, assign=assign)
        for module in model.modules():
            if not isinstance(module, SparseWeight):
                fit_(module)
    state._changes += 1


def _resize(module: nn.Module, prefix: str, state_dict: Mapping[str, Tensor]) -> None:
    for table in (module._parameters, module._buffers):
        for key, old in table.items():
            given = state_dict.get(prefix + key)
            if old is None or given is None or given.shape == old.shape:
                continue
            if given.dim() != old.dim():
                raise ValueError(
                    f"load_state_dict_: {prefix}{key}: expected {old.dim()} dimensions, got "
                    f"{list(given.shape)}"
                )
            if any(size > own for size, own in zip(given.shape, old.shape)):
                raise ValueError(
                    f"load_state_dict_: {prefix}{key}: expected at most {list(old.shape)}, got "
                    f"{list(given.shape)}, which no pruning leaves"
                )
            new = torch.empty(given.shape, dtype=old.dtype, device=old.device)
            if table is module._parameters:
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            table[key] = new  # type: ignore[assignment]


def _take_masks(module: nn.Module, prefix: str, state_dict: Mapping[str, Tensor]) -> None:
    for key in list(module._parameters):
        weight, mask = state_dict.get(prefix + key), state_dict.get(prefix + key + SUFFIX)
        module._buffers.pop(key + SUFFIX, None)
        if mask is None or weight is None:
            continue
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"load_state_dict_: {prefix}{key}{SUFFIX}: expected bool {list(weight.shape)}, got "
                f"{mask.dtype} {list(mask.shape)}"
            )
        if bool(weight[~mask].count_nonzero()):
            raise ValueError(
                f"load_state_dict_: {prefix}{key}: its mask prunes a weight that isn't 0"
            )
        own = module._parameters[key]
        assert own is not None
        module.register_buffer(key + SUFFIX, mask.clone().to(own.device))
