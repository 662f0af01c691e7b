"""The table of optim_step's Triton kernels: what they know of each tensor, made on the host.

One int64 array in the device's memory, copied at once and good for every step until a tensor or a group
changes:

    rows    [n, ROW]     addresses and sizes of each tensor; the columns below
    groups  [n, GROUP]   the members of tt_optim_group, doubles as their bits
    pieces  [n, 2]       tensor and first tile of each program of the update
    blocks  [n, 2]       tensor and number of each block of NORM_BLOCK elements, for the norm
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl

from .optim_constants import CONSTANTS
from .optim_rules import COUNTS_STEPS, FLAGS, HAS_TAILS, RULES, states_of, variants

OP = "optim_step"
DTYPES = ("float32", "bfloat16", "float16")  # by tt_dtype
TILE = 1024  # elements: eight a thread, 32 bytes of fp32 and 16 of bf16
FACTS_BYTES = 64
NORM_BLOCK = tl.constexpr(4096)  # of csrc/math/norm.h

# Columns of a row. Addresses of arrays are those of element -SHIFT, at a multiple of 16 bytes.
PARAM, GRAD, STATE, EMA, COPY, MASK = (tl.constexpr(i) for i in (0, 1, 2, 6, 7, 8))
STEP, PRODUCT, NUMEL, SHIFT, BODY = (tl.constexpr(i) for i in (9, 10, 11, 12, 13))
GROUP_AT, KIND, WIDE, NEGATE = (tl.constexpr(i) for i in (14, 15, 16, 17))
DTYPE, GRAD_DTYPE = tl.constexpr(18), tl.constexpr(19)  # tt_dtype
ROW, GROUP = tl.constexpr(20), tl.constexpr(13)
GROUP_NUMBERS = (
    "lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "dampening", "alpha", "lr_decay",
    "momentum_decay", "l1",
)  # fmt: skip


class OptimTable(NamedTuple):
    """What is known of a table on the host."""

    rule: str
    kinds: tuple[int, ...]  # what tensors differ in that kernels are compiled for
    grad_dtypes: tuple[int, ...]
    rows: int
    groups: int
    pieces: int
    blocks: int
    tiles: int  # of a piece

    @property
    def masked(self) -> bool:
        return any(kind & 8192 for kind in self.kinds)

    def parts(self, table: torch.Tensor) -> list[torch.Tensor]:
        """rows, groups, pieces and blocks of a table on the device, for kernels."""
        whole = table.view(torch.int64)
        ends = np.cumsum([self.rows * ROW.value, self.groups * GROUP.value, self.pieces * 2])
        return [whole, *(whole[at:] for at in ends.tolist())]

    @property
    def workspace_bytes(self) -> int:
        return FACTS_BYTES + 8 * self.blocks + 4 * CONSTANTS.value * self.rows

    def workspace(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of that many bytes: facts [4] fp32 (scale, clip, whether to skip), constants [rows,
        CONSTANTS] fp32, sums [blocks] float64."""
        after = FACTS_BYTES + 8 * self.blocks
        facts, constants = memory.view(torch.float32), memory[after:].view(torch.float32)
        return facts, constants, memory[FACTS_BYTES:after].view(torch.float64)


# A kind packs everything that the update is compiled for.
def kinds_of(tensors: np.ndarray, variant: np.ndarray, tails: np.ndarray) -> np.ndarray:
    copy = np.where(tensors["copy"] != 0, tensors["copy_dtype"].astype(np.int64) + 1, 0)
    return (
        variant
        | tensors["param_dtype"].astype(np.int64) << 5
        | tensors["grad_dtype"].astype(np.int64) << 7
        | tensors["state_dtype"].astype(np.int64) << 9
        | copy << 11
        | (tensors["mask"] != 0).astype(np.int64) << 13
        | (tensors["ema"] != 0).astype(np.int64) << 14
        | tails.astype(np.int64) << 15
    )


def check(rule: str, tensors: np.ndarray, groups: np.ndarray) -> None:
    """RuntimeError that says which tensor is wrong; those without a gradient are not looked at."""
    if rule not in RULES:
        raise RuntimeError(f"{OP}: expected a rule in {list(RULES)}, got {rule!r}")
    t = tensors[tensors["grad"] != 0]
    there = t["numel"] > 0

    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            at = int(np.flatnonzero(tensors["grad"] != 0)[np.argmax(wrong)])
            raise RuntimeError(f"{OP}: tensor {at}: expected {what}")

    refuse((t["numel"] < 0) | (t["numel"] >= 2**40), "0 <= numel < 2^40")
    group = t["group"]
    refuse((group < 0) | (group >= len(groups)), "group to be an index into groups")
    wrong = (t["copy"] != 0) & (t["copy_dtype"] >= len(DTYPES))
    for name in ("param", "grad", "state"):
        wrong |= t[f"{name}_dtype"] >= len(DTYPES)
    refuse(wrong, "float32, bfloat16 or float16 with Triton")
    refuse((t["param"] == 0) & there, "param, got NULL")
    if rule in COUNTS_STEPS:
        refuse(t["step"] == 0, "step, got NULL")
    if rule == "NAdam":
        refuse(t["product"] == 0, "product, got NULL")
    if "master_kind" in t.dtype.names:
        refuse(t["master_kind"] != 0, "no master: that is the CPU's only")
    if len(t):
        count = _states(rule, _variant(rule, t, groups))
        for k in range(4):
            refuse(
                (t["state"][:, k] == 0) & (count > k) & there, "all of the rule's states, got NULL"
            )


def _variant(rule: str, tensors: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Of each tensor."""
    both = np.stack([variants(rule, groups, fresh) for fresh in (False, True)], axis=1)
    return both[tensors["group"], (tensors["fresh"] != 0).astype(np.int64)].astype(np.int64)


def _states(rule: str, variant: np.ndarray) -> np.ndarray:
    return np.array([states_of(rule, v) for v in range(16)])[variant]


def _shifts(addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The least number of elements by which every array [rows, arrays] has to be extended to the left
    to begin at a multiple of 16 bytes; -1: no number does. Address 0: no such array."""
    shift = np.full(len(addresses), -1)
    for s in reversed(range(8)):
        fits = ((addresses - s * sizes) % 16 == 0) | (addresses == 0)
        shift = np.where(fits.all(axis=1), s, shift)
    return shift


def make_rows(
    rule: str, tensors: np.ndarray, groups: np.ndarray, torch_tails: bool
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The rows, and the kinds that occur."""
    t = tensors
    active = t["grad"] != 0
    rows = np.zeros((len(t), ROW.value), np.int64)
    if not active.any():
        return rows, ()
    variant = np.where(active, _variant(rule, t, groups), 0)
    lanes = np.where(t["param_dtype"] == 0, 8, 16)  # of torch's vectors
    body = t["numel"] // lanes * lanes if torch_tails and rule in HAS_TAILS else t["numel"]
    count = _states(rule, variant)
    states = np.where(np.arange(4) < count[:, None], t["state"], 0)
    addresses = np.column_stack([t["param"], t["grad"], states, t["ema"], t["copy"]]).view(np.int64)
    size = {name: np.where(t[f"{name}_dtype"] == 0, 4, 2) for name in ("param", "grad", "state")}
    fours = np.full(len(t), 4)
    copy_size = np.where(t["copy_dtype"] == 0, 4, 2)
    columns = [size["param"], size["grad"], *[size["state"]] * 4, fours, copy_size]
    sizes = np.column_stack(columns)
    shift = _shifts(addresses, sizes)
    wide = shift >= 0
    shift = np.where(wide, shift, 0)
    rows[:, : addresses.shape[1]] = np.where(addresses, addresses - shift[:, None] * sizes, 0)
    mask = t["mask"].view(np.int64)
    rows[:, MASK.value] = np.where(mask, mask - shift, 0)
    rows[:, STEP.value] = t["step"].view(np.int64)
    rows[:, PRODUCT.value] = t["product"].view(np.int64)
    rows[:, NUMEL.value] = t["numel"]
    rows[:, SHIFT.value] = shift
    rows[:, BODY.value] = body
    rows[:, GROUP_AT.value] = t["group"]
    rows[:, WIDE.value] = wide
    rows[:, NEGATE.value] = (
        groups["flags"][np.where(active, t["group"], 0)] & FLAGS["maximize"] != 0
    )
    rows[:, DTYPE.value] = t["param_dtype"]
    rows[:, GRAD_DTYPE.value] = t["grad_dtype"]
    kinds = kinds_of(t, variant, body < t["numel"])
    found, index = np.unique(kinds[active], return_inverse=True)
    rows[active, KIND.value] = index
    rows[~active] = 0
    return rows, tuple(found.tolist())


def _repeated(counts: np.ndarray, stride: int = 1) -> np.ndarray:
    """[n, 2]: row i counts[i] times, with 0, stride, 2 stride ..."""
    row = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return np.column_stack([row, (np.arange(len(row)) - first) * stride])


def make_table(
    rule: str,
    tensors: np.ndarray,
    groups: np.ndarray,
    torch_tails: bool,
    device: torch.device,
) -> tuple[OptimTable, np.ndarray]:
    """The table of tt_optim_tensor and tt_optim_group, whose addresses are the device's; int64."""
    check(rule, tensors, groups)
    rows, kinds = make_rows(rule, tensors, groups, torch_tails)
    table = np.zeros((len(groups), GROUP.value), np.int64)
    for i, name in enumerate(GROUP_NUMBERS):
        table[:, i] = groups[name].view(np.int64)
    table[:, 11], table[:, 12] = groups["flags"], groups["lr_tensor"].view(np.int64)
    numel = np.where(rows[:, GRAD.value] != 0, rows[:, NUMEL.value], 0)
    n_tiles = np.where(numel, -(-(numel + rows[:, SHIFT.value]) // TILE), 0)
    processors = 1 << 20
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    # As the CUDA C++ kernel: eight rounds of four programs a multiprocessor balance well, and after
    # 32 tiles a program's start is paid for.
    tiles = min(max(int(n_tiles.sum()) // (processors * 32), 1), 32)
    pieces = _repeated(-(-n_tiles // tiles), tiles)
    blocks = _repeated(-(-numel // NORM_BLOCK.value))
    grad_dtypes = np.unique(tensors["grad_dtype"][tensors["grad"] != 0]).tolist()
    made = OptimTable(
        rule, kinds, tuple(grad_dtypes), len(rows), len(groups), len(pieces), len(blocks), tiles
    )
    return made, np.concatenate([x.reshape(-1) for x in (rows, table, pieces, blocks)])
