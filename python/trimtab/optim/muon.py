"""Muon, and the split of a model between it and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    DEFAULT_NS_STEPS,
    EPS,
    _adjust_lr,
    _zeropower_via_newtonschulz,
    muon,
)
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import shards
from .adam import AdamW
from .base import StepOptions
from .matrix import MatrixStep, batches

SMALL = 1 << 14  # elements of a matrix whose copies cost less than operations on it alone


class Muon(MatrixStep, torch.optim.Muon):
    """``torch.optim.Muon`` with the options of :class:`StepOptions`.

    Matrices of one shape go through Newton-Schulz together: as torch's bits wherever torch.bmm rounds a
    product as torch.mm does, which it does but for single elements of small matrices; there they are
    one bfloat16 rounding of the direction apart. A matrix alone has torch's bits. Of DTensors every
    process gathers the directions and makes the products of all. (With bfloat16
    parameters and without Nesterov torch 2.13 overwrites its momentum; this does not.)

    Momentum whose singular values Newton-Schulz iterations bring near 1 (Jordan,
    https://kellerjordan.github.io/posts/muon/). For matrices only; see :func:`split_muon`.
    """

    rule = "Muon"
    numbers = ("lr", "weight_decay", "momentum")
    flags = ("nesterov",)
    counts_steps = False
    all_state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (DEFAULT_A, DEFAULT_B, DEFAULT_C),
        eps: float = EPS,
        ns_steps: int = DEFAULT_NS_STEPS,
        adjust_lr_fn: str | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Muon.__init__(
            self,
            params,
            lr,
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
        )
        if options.get("state_dtype") is not None:
            raise ValueError("Muon: its momentum has the gradient's dtype, no state_dtype")
        self._setup(options)

    def _update(self, group: dict[str, Any], grads: dict[Tensor, Tensor]) -> None:
        for param, grad in grads.items():
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = shards.like(torch.zeros_like(grad), param)
        sharded = shards.any_sharded([group])
        for params in batches(grads, shards.is_sharded) if sharded else batches(grads):
            own = [grads[param] for param in params]
            buffers = [self.state[param]["momentum_buffer"] for param in params]
            if sharded:
                buffers = [
                    shards.piece(*pair, "Muon: momentum_buffer") for pair in zip(buffers, params)
                ]
            # torch's own would normalize a bfloat16 buffer itself in place of a copy.
            spoils = not group["nesterov"] and buffers[0].dtype == torch.bfloat16
            if len(params) > 1 or spoils or sharded:
                _step_together(group, params, own, buffers)
                continue
            muon(
                params,
                own,
                buffers,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                ns_coefficients=group["ns_coefficients"],
                eps=group["eps"],
                ns_steps=group["ns_steps"],
                adjust_lr_fn=group["adjust_lr_fn"],
                has_complex=False,
            )


def _step_together(
    group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]
) -> None:
    """torch's muon for several matrices of one shape."""
    lr = float(group["lr"])
    decay = 1 - lr * group["weight_decay"]
    step = -_adjust_lr(lr, group["adjust_lr_fn"], params[0].shape)
    numbers = group["ns_coefficients"], group["ns_steps"], group["eps"]
    wide = params[0].dtype == buffers[0].dtype == torch.float32
    if wide and params[0].numel() <= SMALL and not shards.is_sharded(params[0]):
        # One on top of the other: a copy costs less than an operation on each of many small ones.
        grad = torch.stack(grads)
        buffer = torch.stack(buffers).lerp_(grad, 1 - group["momentum"])
        torch._foreach_copy_(buffers, buffer.unbind())
        update = grad.lerp_(buffer, group["momentum"]) if group["nesterov"] else buffer
        update = orthogonalize(update, *numbers)
        param = torch.stack(params).mul_(decay).add_(update, alpha=step)
        torch._foreach_copy_(params, param.unbind())
        return
    # In 16 bits torch rounds the last elements of a tensor, which fill no vector, otherwise.
    torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
    pieces = [shards.local(param) for param in params]
    if shards.is_sharded(params[0]):
        updates = _orthogonalize_whole(group, params, grads, buffers)
    else:
        update = torch.stack(buffers)
        if group["nesterov"]:
            update = torch.stack(grads).lerp_(update, group["momentum"])
        updates = list(orthogonalize(update, *numbers))
    torch._foreach_mul_(pieces, decay)
    torch._foreach_add_(pieces, updates, alpha=step)


def _orthogonalize_whole(
    group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]
) -> list[Tensor]:
    """Of DTensors: each process gathers the directions, in bfloat16, and keeps its piece."""
    updates = [
        grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        for grad, buffer in zip(grads, buffers)
    ]
    whole = [shards.whole(update.bfloat16(), p) for update, p in zip(updates, params)]
    numbers = group["ns_coefficients"], group["ns_steps"], group["eps"]
    if len(whole) > 1:
        found = list(orthogonalize(torch.stack(whole), *numbers))
    else:  # torch's own, as for a matrix that is alone in one process
        found = [_zeropower_via_newtonschulz(whole[0].clone(), *numbers)]
    return [shards.local(shards.cut(matrix, param)) for matrix, param in zip(found, params)]


def orthogonalize(
    x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The bfloat16 Newton-Schulz iteration of torch.optim.Muon, of each matrix of ``x`` [B, M, N]."""
    if steps >= 100:
        raise ValueError(f"Muon: expected ns_steps below 100, got {steps}")
    if len(coefficients) != 3:
        raise ValueError(f"Muon: expected three ns_coefficients, got {len(coefficients)}")
    a, b, c = coefficients
    x = x.bfloat16()
    x = x.div(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=eps))
    wide = x if x.shape[1] <= x.shape[2] else x.transpose(1, 2)
    for _ in range(steps):
        gram = wide @ wide.transpose(1, 2)
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.transpose(1, 2)


def split_muon(
    model: nn.Module,
    muon: dict[str, Any] | None = None,
    adamw: dict[str, Any] | None = None,
    exclude: Iterable[nn.Parameter] = (),
) -> tuple[Muon, AdamW]:
    """Muon for the matrices of a model, AdamW for everything else.

    Embeddings are looked up, not multiplied, and go to AdamW with vectors, scalars and convolutions;
    so does what ``exclude`` names, which should be the output layer (Jordan; Liu et al.,
    https://arxiv.org/abs/2502.16982).

    Args:
        model: its parameters that require a gradient are split
        muon, adamw: keywords of the two optimizers
        exclude: matrices that go to AdamW all the same

    Raises:
        ValueError: one of the two would have no parameter.
    """
    out = {id(param) for param in exclude}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            out.add(id(module.weight))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() == 2 and id(p) not in out]
    taken = {id(p) for _, p in matrices}
    others = [(name, p) for name, p in named if id(p) not in taken]
    if not matrices or not others:
        raise ValueError(
            f"split_muon: expected matrices and other parameters, got {len(matrices)} and "
            f"{len(others)}; take Muon or AdamW alone"
        )
    return Muon(matrices, **(muon or {})), AdamW(others, **(adamw or {}))
