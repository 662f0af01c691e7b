"""States and parameters in fewer bytes: 8-bit states, and masters beside bf16 parameters.

An 8-bit state ``exp_avg`` is stored as ``exp_avg_codes`` (uint8, the parameter's shape) and
``exp_avg_scales`` (float32, one for 256 codes in the order of memory): csrc/math/dynamic_code.h. The
param groups then say ``state_format``. Of a DTensor they are this process's, in its own blocks; its
state dict holds ``exp_avg`` itself, a float32 DTensor, which reshards. A master is
``param_remainder`` (int16) or ``param_compensation`` (bfloat16): csrc/math/master.h.
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


def encode_again(x: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """encode, but what decode has given keeps its values.

    -1 has no code: where the largest magnitude of a block was negative, it reads as a little less than
    the scale, and its block, coded once more by that, would be rounded once more. Such a block is known
    by the scale with which all of it are values of codes.
    """
    codes, scales = encode(x, is_signed)
    if not is_signed or not x.numel():
        return codes, scales
    n = x.numel()
    pad = (0, -n % BLOCK)
    flat, back = (t.as_strided((n,), (1,)) for t in (x, decode(codes, scales, True)))
    blocks, back = (torch.nn.functional.pad(t, pad).view(-1, BLOCK) for t in (flat, back))
    at = (blocks.ne(back).any(1) & blocks.isfinite().all(1)).nonzero().flatten()
    blocks = blocks[at]
    table = decode(torch.arange(256, dtype=torch.uint8), torch.ones(1), True).to(x.device)
    middles = (table[1:] + table[:-1]) / 2
    guess = -scales[at] / table[0]
    up, down = guess.nextafter(guess * 2), guess.nextafter(guess * 0)
    for scale in (down, up, guess):
        found = torch.bucketize(blocks / scale[:, None], middles)
        fits = (table[found] * scale[:, None]).eq(blocks).all(1)
        all_codes = torch.nn.functional.pad(codes.as_strided((n,), (1,)), pad).view(-1, BLOCK)
        all_codes[at[fits]] = found[fits].to(torch.uint8)
        codes.as_strided((n,), (1,)).copy_(all_codes.flatten()[:n])
        scales[at[fits]] = scale[fits]
    return codes, scales


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
    value, coder = (make(), encode) if value is None else (value, encode_again)
    dense = torch.empty_like(like, dtype=torch.float32).copy_(value)
    codes, scales = coder(dense, name in SIGNED)
    state[f"{name}_codes"], state[f"{name}_scales"] = codes, scales
    return codes, scales


# --- checkpoints


def whole_state_dict(optimizer: FusedStep, state_dict: dict[str, Any]) -> dict[str, Any]:
    """With 8-bit states of DTensors as float32 DTensors: blocks of other pieces would be others."""
    states = dict(state_dict["state"])
    params = (param for group in optimizer.param_groups for param in group["params"])
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    for param, key in zip(params, keys):
        if not shards.is_sharded(param) or key not in states:
            continue
        saved = states[key] = dict(states[key])
        for coded in [k for k in saved if k.endswith("_codes")]:
            name = coded.removesuffix("_codes")
            wide = decode(saved.pop(coded), saved.pop(f"{name}_scales"), name in SIGNED)
            saved[name] = shards.like(wide, param)
    return {**state_dict, "state": states}


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


def one_form(optimizer: FusedStep, state_dict: dict[str, Any]) -> dict[str, Any]:
    """With each state in one form.

    torch.distributed.checkpoint puts what it loads beside what the optimizer had. Of codes and floats
    of one state, those that this optimizer does not save are what was loaded.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        return state_dict
    states = dict(state_dict["state"])
    for group, given in zip(optimizer.param_groups, state_dict["param_groups"]):
        for param, index in zip(group["params"], given["params"]):
            saved = states.get(index)
            if not isinstance(saved, dict):
                continue
            has_codes = is_coded(optimizer, param) and not shards.is_sharded(param)
            saved = states[index] = dict(saved)
            for name in [k.removesuffix("_codes") for k in saved if k.endswith("_codes")]:
                if name not in saved:
                    continue
                for key in (f"{name}_codes", f"{name}_scales") if has_codes else (name,):
                    saved.pop(key, None)
    return {**state_dict, "state": states}


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
            if f"{name}_codes" in saved and shards.is_sharded(param):
                state[name] = shards.cut(state[name], param)
            elif f"{name}_codes" in saved:
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
