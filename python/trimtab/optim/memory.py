"""States and parameters in fewer bytes: 8-bit states, and masters beside bf16 parameters.

An 8-bit state ``exp_avg`` is stored as ``exp_avg_codes`` (uint8, the parameter's shape) and
``exp_avg_scales`` (float32, one for 256 codes in the order of memory): csrc/math/dynamic_code.h. The
param groups then say ``state_format``. A master is ``param_remainder`` (int16) or
``param_compensation`` (bfloat16): csrc/math/master.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import library, shards

if TYPE_CHECKING:
    from .base import FusedStep

STATE_FORMAT = "dynamic8/256/1"  # the code, elements of a block, version
BLOCK = 256
SIGNED = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})  # the others are never negative
ROUNDINGS = ("nearest", "stochastic")
# kind: number in tt_master, name of the state, its dtype
MASTERS = {
    "kahan": (1, "param_compensation", torch.bfloat16),
    "remainder": (2, "param_remainder", torch.int16),
}
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


def check_options(optimizer: FusedStep) -> None:
    """state_dtype as a torch dtype, int8 for 8-bit codes; ValueError for what is not to be had."""
    name = type(optimizer).__name__
    given: Any = optimizer.state_dtype
    dtype = _DTYPES.get(given) if isinstance(given, str) else given
    # torch.int8 would promise plain integers: only the name stands for codes
    known = given in _DTYPES if isinstance(given, str) else given in library.DTYPES
    if given is not None and not known:
        raise ValueError(
            f"{name}: expected state_dtype float32, bfloat16, float16 or int8, got {given!r}"
        )
    optimizer.state_dtype = dtype
    if optimizer.rounding not in ROUNDINGS:
        raise ValueError(f"{name}: expected rounding in {ROUNDINGS}, got {optimizer.rounding!r}")
    if optimizer.master not in ("none", *MASTERS):
        raise ValueError(
            f"{name}: expected master in {('none', *MASTERS)}, got {optimizer.master!r}"
        )
    for key, limit in (("seed", 2**64), ("min_8bit_numel", 2**63)):
        value = getattr(optimizer, key)
        if not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError(
                f"{name}: expected {key} to be an integer from 0 to {limit - 1}, got {value!r}"
            )
    set_format(optimizer)


def set_format(optimizer: FusedStep) -> None:
    if optimizer.state_dtype == torch.int8:
        optimizer.defaults["state_format"] = STATE_FORMAT
        for group in optimizer.param_groups:
            group["state_format"] = STATE_FORMAT


def is_coded(optimizer: FusedStep, param: Tensor) -> bool:
    """Whether a parameter's states are 8-bit; by its whole size, if it is cut over processes."""
    return optimizer.state_dtype == torch.int8 and param.numel() >= max(optimizer.min_8bit_numel, 1)


# --- codes


# On the CPU, for tensors of any device: states are coded when they are made or loaded, not in a step.


def encode(x: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a float32 tensor without gaps between its elements."""
    if x.device.type != "cpu":
        codes, scales = encode(x.cpu(), is_signed)
        return codes.to(x.device), scales.to(x.device)
    codes = torch.empty_like(x, dtype=torch.uint8)
    scales = torch.empty(-(-x.numel() // BLOCK), dtype=torch.float32)
    library.encode(x.data_ptr(), x.numel(), is_signed, codes.data_ptr(), scales.data_ptr())
    return codes, scales


def decode(codes: Tensor, scales: Tensor, is_signed: bool) -> Tensor:
    if codes.device.type != "cpu":
        return decode(codes.cpu(), scales.cpu(), is_signed).to(codes.device)
    x = torch.empty_like(codes, dtype=torch.float32)
    if x.stride() != codes.stride():
        raise ValueError(f"8-bit states: strides {codes.stride()} leave gaps")
    library.decode(codes.data_ptr(), scales.data_ptr(), x.numel(), is_signed, x.data_ptr())
    return x


def keep_codes(
    state: dict[str, Any], name: str, like: Tensor, make: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """A state as codes in the layout of ``like``: what is there, made so if it is not."""
    codes, scales = state.get(f"{name}_codes"), state.get(f"{name}_scales")
    if codes is not None and scales is not None and codes.stride() == like.stride():
        return codes, scales
    value = state.pop(name, None)
    if codes is not None and scales is not None:
        value = decode(codes, scales, name in SIGNED)
    if value is None:
        value = make()
    dense = torch.empty_like(like, dtype=torch.float32).copy_(value)
    codes, scales = encode(dense, name in SIGNED)
    state[f"{name}_codes"], state[f"{name}_scales"] = codes, scales
    return codes, scales


# --- checkpoints


def plain_state_dict(optimizer: FusedStep, state_dict: dict[str, Any]) -> dict[str, Any]:
    """With float32 states for codes, and without masters: a state dict as torch's."""
    name = type(optimizer).__name__
    if not {"state", "param_groups"} <= state_dict.keys():
        return state_dict  # which is then refused
    groups = [dict(group) for group in state_dict["param_groups"]]
    for group in groups:
        found = group.pop("state_format", STATE_FORMAT)
        if found != STATE_FORMAT:
            raise ValueError(
                f"{name}.load_state_dict: expected 8-bit states of format {STATE_FORMAT}, got "
                f"{found!r}"
            )
    masters = {key for _, key, _ in MASTERS.values()}
    states = {}
    for index, saved in state_dict["state"].items():
        if not isinstance(saved, dict):
            states[index] = saved
            continue
        state = states[index] = {}
        for key, value in saved.items():
            if key.endswith("_codes"):
                base = key.removesuffix("_codes")
                scales = _checked(name, base, value, saved.get(f"{base}_scales"))
                state[base] = decode(value, scales, base in SIGNED)
            elif not key.endswith("_scales") and key not in masters:
                state[key] = value
    return {**state_dict, "state": states, "param_groups": groups}


def _checked(name: str, base: str, codes: Tensor, scales: Any) -> Tensor:
    count = -(-codes.numel() // BLOCK)
    right = isinstance(scales, Tensor) and scales.dtype == torch.float32
    if codes.dtype != torch.uint8 or not right or scales.shape != (count,):
        raise ValueError(
            f"{name}.load_state_dict: expected {base}_codes of uint8 and {base}_scales of float32 "
            f"[{count}]"
        )
    return scales.contiguous()


def check_masters(optimizer: FusedStep, states: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
    for param, saved in states:
        for kind, (_, key, dtype) in MASTERS.items():
            if key not in saved:
                continue
            if optimizer.master != kind:
                raise ValueError(
                    f"{type(optimizer).__name__}.load_state_dict: the states hold {key}, of an "
                    f'optimizer with master="{kind}"; this one has master="{optimizer.master}" '
                    "(float_state_dict() leaves masters out)"
                )
            if saved[key].dtype != dtype or saved[key].shape != param.shape:
                raise ValueError(
                    f"{type(optimizer).__name__}.load_state_dict: expected {key} of {dtype} "
                    f"{list(param.shape)}, got {saved[key].dtype} {list(saved[key].shape)}"
                )


def restore(optimizer: FusedStep, states: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
    """After torch's load_state_dict: codes and masters as they were saved, other states coded."""
    set_format(optimizer)
    for param, saved in states:
        state = optimizer.state[param]
        for _, key, _ in MASTERS.values():
            if key in saved:
                state[key] = saved[key].clone()
        if not is_coded(optimizer, param):
            continue
        for name in optimizer.all_state_names:
            if f"{name}_codes" in saved:
                state.pop(name, None)
                for key in (f"{name}_codes", f"{name}_scales"):
                    state[key] = saved[key].clone()
            elif isinstance(saved.get(name), Tensor):
                state[name] = saved[name].to(torch.float32, copy=True)
                if not shards.is_sharded(param):
                    wide = state[name]
                    keep_codes(state, name, torch.empty_like(param), wide.clone)


# --- masters


def join_remainder(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 whose upper half, rounded, is ``param``."""
    upper = param.detach().view(torch.int16).to(torch.int32) << 16
    return (upper + remainder.to(torch.int32)).view(torch.float32)


def split_remainder(value: Tensor) -> tuple[Tensor, Tensor]:
    bits = value.detach().to(torch.float32).view(torch.int32)
    wide = bits.to(torch.int64)
    upper = ((wide + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return upper, wide.to(torch.int16)
