"""csrc/include/trimtab/{optim_step,adafactor}.h and csrc/torch/optim_step.cpp, for ctypes and NumPy."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_int64, c_uint64, c_void_p, py_object
from functools import cache
from itertools import chain
from operator import is_not
from typing import Any

import numpy as np
import torch

from ..ops import library as _library  # loads libtrimtab_torch.so

FOLDER = _library.Path(_library.__file__).parent.parent / "lib"

STATES = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DYNAMIC8 = 16  # a state_dtype: 8-bit codes
RULES = ("SGD", "Adam", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Lion", "LAMB")
FLAGS = {
    "maximize": 1,
    "amsgrad": 2,
    "nesterov": 4,
    "decoupled_weight_decay": 8,
    "centered": 16,
    "bias_correction": 32,
    "always_adapt": 64,
}

# tt_optim_group
NUMBERS = (
    "lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "dampening", "alpha", "lr_decay",
    "momentum_decay", "l1",
)  # fmt: skip
GROUP = np.dtype(
    [*((name, np.float64) for name in NUMBERS), ("flags", np.int64), ("lr_tensor", np.uint64)]
)

# tt_optim_tensor
POINTERS = (
    "param", "grad", "state", "ema", "copy", "mask", "step", "product", "scale", "master",
)  # fmt: skip
TENSOR = np.dtype(
    [
        *((name, np.uint64, (STATES,) if name in ("state", "scale") else ()) for name in POINTERS),
        ("numel", np.int64),
        ("group", np.int32),
        *((f"{name}_dtype", np.uint8) for name in ("param", "grad", "state", "copy")),
        ("fresh", np.int32),
        ("master_kind", np.int32),
    ]
)

# Columns of the table of TensorImpl pointers: where the gradient hangs, then tensors as in TENSOR.
OWNER, PARAM, STATE, EMA, COPY, MASK, STEP, PRODUCT, SCALE, MASTER = 0, 1, 2, 6, 7, 8, 9, 10, 11, 15
SLOTS = 16
READY, NO_GRAD, IRREGULAR, NEW, CHANGED = range(5)


def rule_number(name: str) -> int:
    """Its tt_rule; that of a rule with a C function of its own is not read."""
    return RULES.index(name) if name in RULES else 0


class Call(ctypes.Structure):
    """tt_optim_call"""

    _fields_ = [
        ("rule", c_int32),
        ("zero_grad", c_int32),
        ("skip_nonfinite", c_int32),
        ("torch_tails", c_int32),
        ("tensors", c_void_p),
        ("n_tensors", c_int64),
        ("groups", c_void_p),
        ("n_groups", c_int64),
        ("grad_scale", c_void_p),
        ("found_inf", c_void_p),
        ("max_norm", c_double),
        ("ema_decay", c_double),
        ("norm", c_void_p),
        ("skipped", c_void_p),
        ("given_norm", c_void_p),
        ("round_clipped", c_int32),
        ("reserved", c_int32),
        ("stochastic", c_int64),
        ("seed", c_uint64),
    ]


class Gather(ctypes.Structure):
    """OptimGather of csrc/torch/optim_step.cpp"""

    _fields_ = [
        ("n", c_int64),
        ("tensors", c_void_p),
        ("grads", c_void_p),
        ("layout", c_void_p),
        ("layout_at", c_void_p),
        ("is_new", c_void_p),
        ("out", c_void_p),
        ("status", c_void_p),
        ("device", c_void_p),
        ("counts", c_int64 * 5),
        ("lengths", c_void_p),
    ]


# csrc/include/trimtab/adafactor.h
ADAFACTOR_GROUP = np.dtype([(name, np.float64) for name in ("beta2_decay", "eps1", "eps2", "d")])
ADAFACTOR_SIZES = "batch rows columns whole_rows whole_columns whole_numel sums_at".split()
ADAFACTOR_SHAPE = np.dtype([(name, np.int64) for name in ADAFACTOR_SIZES])
WHOLE, SQUARES, AVERAGE, DIRECTION, UPDATE = range(5)  # tt_adafactor_part


class AdafactorCall(ctypes.Structure):
    """tt_adafactor_call"""

    _fields_ = [
        ("step", c_void_p),
        ("groups", c_void_p),
        ("shapes", c_void_p),
        ("sums", c_void_p),
        ("part", c_int32),
        ("reserved", c_int32),
    ]


@cache
def _step_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(FOLDER / "libtrimtab_torch.so"))  # lets go of the GIL while it works


@cache
def _gather_library() -> ctypes.PyDLL:
    return ctypes.PyDLL(str(FOLDER / "libtrimtab_torch.so"))  # keeps it: it reads tensors


@cache
def _core_library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(FOLDER / "libtrimtab.so"))
    lib.tt_last_error.restype = ctypes.c_char_p
    return lib


def step(call: Call) -> None:
    """tt_optim_step; RuntimeError with its message if it refuses."""
    if _step_library().trimtab_optim_step(ctypes.byref(call)):
        raise RuntimeError(_core_library().tt_last_error().decode())


def squares(call: Call, found: int) -> None:
    """tt_optim_squares, to an address"""
    if _step_library().trimtab_optim_squares(ctypes.byref(call), c_void_p(found)):
        raise RuntimeError(_core_library().tt_last_error().decode())


def step_by(call: Call, squares: int) -> None:
    """tt_optim_step_by, from an address"""
    if _step_library().trimtab_optim_step_by(ctypes.byref(call), c_void_p(squares)):
        raise RuntimeError(_core_library().tt_last_error().decode())


def skips(call: Call) -> bool:
    """Whether found_inf, in this machine's memory, is not 0."""
    address = call.found_inf
    return bool(address) and ctypes.c_float.from_address(address).value != 0.0


def adafactor_step(call: AdafactorCall) -> None:
    """tt_adafactor_step; RuntimeError with its message if it refuses."""
    if _step_library().trimtab_adafactor_step(ctypes.byref(call)):
        raise RuntimeError(_core_library().tt_last_error().decode())


def encode(x: int, n: int, is_signed: bool, codes: int, scales: int) -> None:
    """tt_optim_encode, on addresses"""
    pointers = c_void_p(x), c_int64(n), c_int32(is_signed), c_void_p(codes), c_void_p(scales)
    if _core_library().tt_optim_encode(*pointers):
        raise RuntimeError(_core_library().tt_last_error().decode())


def decode(codes: int, scales: int, n: int, is_signed: bool, x: int) -> None:
    """tt_optim_decode, on addresses"""
    pointers = c_void_p(codes), c_void_p(scales), c_int64(n), c_int32(is_signed), c_void_p(x)
    if _core_library().tt_optim_decode(*pointers):
        raise RuntimeError(_core_library().tt_last_error().decode())


def gather(arguments: Gather) -> None:
    """Pointers of all tensors into the table, a status each."""
    _gather_library().trimtab_optim_gather(ctypes.byref(arguments))


@cache
def _memcmp() -> Any:
    function = ctypes.CDLL(None).memcmp
    function.argtypes = (c_void_p, c_void_p, ctypes.c_size_t)
    return function


def memory_differs(left: int, right: int, size: int) -> bool:
    """Whether `size` bytes at two addresses differ."""
    return bool(_memcmp()(left, right, size))


@cache
def _reads_objects() -> bool:
    return bool(_gather_library().trimtab_optim_reads_objects())


def same_objects(left: list[Any], right: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    if _reads_objects():
        return bool(_gather_library().trimtab_optim_same(py_object(left), py_object(right)))
    return len(left) == len(right) and not any(map(is_not, left, right))


def same_values(dicts: dict[Any, Any], values: list[Any]) -> bool:
    """Whether the values of a dict's dicts, one after the other, are these objects."""
    if _reads_objects():
        return bool(
            _gather_library().trimtab_optim_same_values(py_object(dicts), py_object(values))
        )
    found = [value for value in dicts.values() if isinstance(value, dict)]
    return same_objects(list(chain.from_iterable(map(dict.values, found))), values)


@cache
def _bumps_versions() -> bool:
    """Whether the library counts versions up itself: the symbols are there and do what they did."""
    tensor = torch.zeros(3)
    before = tensor._version
    pointer = c_uint64(tensor._cdata)
    counted = _gather_library().trimtab_optim_bump_versions(ctypes.byref(pointer), c_int64(1))
    return bool(counted) and tensor._version == before + 1


def bump_versions(tensors: list[torch.Tensor], pointers: np.ndarray) -> None:
    """Tells autograd that these tensors changed; ``pointers`` are their ``_cdata``."""
    done = _bumps_versions() and _gather_library().trimtab_optim_bump_versions(
        c_void_p(pointers.ctypes.data), c_int64(len(pointers))
    )
    if not done:  # or not of all; once more does no harm
        torch.autograd.graph.increment_version(tensors)


@cache
def reads_gradients() -> bool:
    """Whether the library finds gradients itself: the symbol is there and does what it did."""
    if not _gather_library().trimtab_optim_reads_grad():
        return False
    bare, param = torch.zeros(3), torch.zeros(3)
    param.grad = torch.ones(3)
    tensors = np.zeros((2, SLOTS), np.uint64)
    tensors[:, OWNER] = tensors[:, PARAM] = bare._cdata, param._cdata
    layout, at = np.array([1, 3, 1]), np.zeros(2, np.int64)
    out, status, is_new = np.zeros(2, TENSOR), np.zeros(2, np.uint8), np.zeros(2, np.uint8)
    out["numel"] = 3
    arrays = (tensors, None, layout, at, is_new, out, status, np.full(2, -1, np.int32))
    gather(Gather(2, *(None if a is None else a.ctypes.data for a in arrays)))
    found = status.tolist() == [NO_GRAD, READY] and out["grad"].tolist() == [
        0,
        param.grad.data_ptr(),
    ]
    return found and int(out["param"][1]) == param.data_ptr()
