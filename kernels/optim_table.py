"""The table of optim_step's Triton kernels: what they know of each tensor, made on the host.

One int64 array in the device's memory, copied at once and good for every step until a tensor or a group
changes:

    rows    [n, ROW]     addresses and sizes of each tensor; the columns below
    groups  [n, GROUP]   the members of tt_optim_group, doubles as their bits
    pieces  [n, 2]       tensor and first tile of each program of the update
    blocks  [n, 2]       tensor and number of each block of NORM_BLOCK elements, for the norm
    codes   the tables of 8-bit states with sign and without, fp32; where a tensor has some
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from .optim_constants import CONSTANTS
from .optim_memory import KEY_WORDS, dynamic_code
from .optim_rules import COUNTS_STEPS, FLAGS, HAS_TAILS, RULES, states_of, variants

OP = "optim_step"
DYNAMIC8 = 16  # a state's dtype: 8-bit codes
DTYPES = ("float32", "bfloat16", "float16")  # by tt_dtype
TILE = 1024  # elements: eight a thread, 32 bytes of fp32 and 16 of bf16
FACTS_BYTES = 64
NORM_BLOCK = tl.constexpr(4096)  # of csrc/math/norm.h

# Columns of a row. Addresses of arrays are those of element -SHIFT, at a multiple of 16 bytes.
PARAM, GRAD, STATE, EMA, COPY, MASK = (tl.constexpr(i) for i in (0, 1, 2, 6, 7, 8))
STEP, PRODUCT, NUMEL, SHIFT, BODY = (tl.constexpr(i) for i in (9, 10, 11, 12, 13))
GROUP_AT, KIND, WIDE, NEGATE = (tl.constexpr(i) for i in (14, 15, 16, 17))
DTYPE, GRAD_DTYPE = tl.constexpr(18), tl.constexpr(19)  # tt_dtype; of the parameter's arithmetic
SCALE, MASTER = tl.constexpr(20), tl.constexpr(23)
FIRST_BLOCK = tl.constexpr(
    24
)  # number of the tensor's first block of NORM_BLOCK elements, among all
ROW, GROUP = tl.constexpr(25), tl.constexpr(13)
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
    processors: int  # of the device

    @property
    def probes(self) -> bool:
        """Whether a step takes the norms of each tensor first."""
        return self.rule == "LAMB"

    @property
    def masked(self) -> bool:
        return any(kind & HAS_MASK.value for kind in self.kinds)

    @property
    def coded(self) -> bool:
        return any(kind >> STATE_AT.value & 3 == CODES for kind in self.kinds)

    @property
    def stochastic(self) -> bool:
        return any(kind & STOCHASTIC.value for kind in self.kinds)

    def parts(self, table: torch.Tensor) -> list[torch.Tensor]:
        """rows, groups, pieces, blocks and codes of a table on the device, for kernels."""
        whole = table.view(torch.int64)
        sizes = self.rows * ROW.value, self.groups * GROUP.value, self.pieces * 2, self.blocks * 2
        rows, groups, pieces, blocks, codes = whole.tensor_split(np.cumsum(sizes).tolist())
        return [rows, groups, pieces, blocks, codes.view(torch.float32)]

    @property
    def workspace_bytes(self) -> int:
        return sum(self._workspace_parts())

    def _workspace_parts(self) -> tuple[int, ...]:
        keys = self.rows * KEY_WORDS.value * 4 if self.stochastic else 0
        sums, counts = (self.blocks * 16, self.rows * 4) if self.probes else (0, 0)
        constants = self.rows * CONSTANTS.value * 4
        return FACTS_BYTES, self.blocks * 8, sums, constants, keys, counts

    def workspace(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Of that many bytes: facts [4] fp32 (scale, clip, whether to skip), sums [blocks] float64, a
        probe's [2, blocks], constants [rows, CONSTANTS] fp32, keys [rows, KEY_WORDS] int32, counts of a
        probe's blocks [rows] int32."""
        parts = memory.tensor_split(np.cumsum(self._workspace_parts())[:-1].tolist())
        real, word = torch.float32, torch.int32
        dtypes = real, torch.float64, torch.float64, real, word, word
        return [part.view(dtype) for part, dtype in zip(parts, dtypes, strict=True)]


# A kind packs everything that the update is compiled for: the variant in five bits, then these.
PARAM_AT, GRAD_KIND_AT, STATE_AT, COPY_AT = (
    tl.constexpr(i) for i in (5, 7, 9, 11)
)  # two bits each
HAS_MASK, HAS_EMA, TAILS = (tl.constexpr(1 << i) for i in (13, 14, 15))
MASTER_AT, STOCHASTIC = tl.constexpr(16), tl.constexpr(1 << 18)
CODES = 3  # in the place of a state's dtype


@triton.constexpr_function
def field(kind, at):
    """One of two bits of a kind."""
    return kind >> at & 3


@triton.constexpr_function
def has(kind, flag):
    return kind & flag != 0


def kinds_of(
    tensors: np.ndarray, variant: np.ndarray, tails: np.ndarray, stochastic: bool
) -> np.ndarray:
    wide = {
        name: tensors[name].astype(np.int64)
        for name in ("param_dtype", "grad_dtype", "state_dtype", "copy_dtype", "master_kind")
    }
    return (
        variant
        | wide["param_dtype"] << PARAM_AT.value
        | wide["grad_dtype"] << GRAD_KIND_AT.value
        | np.where(wide["state_dtype"] == DYNAMIC8, CODES, wide["state_dtype"]) << STATE_AT.value
        | np.where(tensors["copy"] != 0, wide["copy_dtype"] + 1, 0) << COPY_AT.value
        | np.where(tensors["mask"] != 0, HAS_MASK.value, 0)
        | np.where(tensors["ema"] != 0, HAS_EMA.value, 0)
        | np.where(tails, TAILS.value, 0)
        | wide["master_kind"] << MASTER_AT.value
        | (STOCHASTIC.value if stochastic else 0)
    )


def check(rule: str, tensors: np.ndarray, groups: np.ndarray, stochastic: bool) -> None:
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
    for name in ("param", "grad"):
        wrong |= t[f"{name}_dtype"] >= len(DTYPES)
    coded = t["state_dtype"] == DYNAMIC8
    refuse(wrong | ~coded & (t["state_dtype"] >= len(DTYPES)), "float32, bfloat16 or float16")
    has_master = t["master_kind"] != 0
    refuse((t["master_kind"] < 0) | (t["master_kind"] > 2), "a tt_master")
    refuse(has_master & (t["param_dtype"] != 1), "bfloat16 where there is a master")
    refuse(has_master & (t["master"] == 0) & there, "master, got NULL")
    if stochastic:
        refuse(t["numel"] > 2**32, "numel <= 2^32 with stochastic rounding in Triton")
    refuse((t["param"] == 0) & there, "param, got NULL")
    if rule in COUNTS_STEPS or stochastic:
        refuse(t["step"] == 0, "step, got NULL")
    if rule == "NAdam":
        refuse(t["product"] == 0, "product, got NULL")
    if len(t):
        count = _states(rule, _variant(rule, t, groups))
        for k in range(4):
            lacks = (t["state"][:, k] == 0) | coded & (t["scale"][:, k] == 0)
            refuse(lacks & (count > k) & there, "all of the rule's states, got NULL")


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
    rule: str, tensors: np.ndarray, groups: np.ndarray, torch_tails: bool, stochastic: bool
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The rows, and the kinds that occur."""
    t = tensors
    active = t["grad"] != 0
    rows = np.zeros((len(t), ROW.value), np.int64)
    if not active.any():
        return rows, ()
    variant = np.where(active, _variant(rule, t, groups), 0)
    # A remainder makes the parameter an fp32 one.
    arithmetic = np.where(t["master_kind"] == 2, 0, t["param_dtype"])
    coded = t["state_dtype"] == DYNAMIC8
    body = t["numel"].copy()
    if torch_tails and rule in HAS_TAILS:
        lanes = np.where(arithmetic == 0, 8, 16)  # of torch's vectors; scales span the tail
        body = np.where(coded, body, body // lanes * lanes)
    count = _states(rule, variant)
    states = np.where(np.arange(4) < count[:, None], t["state"], 0)
    arrays = [t["param"], t["grad"], states, t["ema"], t["copy"], t["master"]]
    addresses = np.column_stack(arrays).view(np.int64)
    size = {name: np.where(t[f"{name}_dtype"] == 0, 4, 2) for name in ("param", "grad", "state")}
    fours = np.full(len(t), 4)
    copy_size = np.where(t["copy_dtype"] == 0, 4, 2)
    size["state"] = np.where(coded, 1, size["state"])
    columns = [size["param"], size["grad"], *[size["state"]] * 4, fours, copy_size, fours // 2]
    sizes = np.column_stack(columns)
    shift = _shifts(addresses, sizes)
    # Blocks of codes begin where tiles do.
    wide = np.where(coded, shift == 0, shift >= 0)
    shift = np.where(wide, shift, 0)
    moved = np.where(addresses, addresses - shift[:, None] * sizes, 0)
    rows[:, : MASK.value] = moved[:, :-1]
    rows[:, MASTER.value] = moved[:, -1]
    rows[:, SCALE.value : MASTER.value] = t["scale"][:, :3].view(np.int64)
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
    rows[:, DTYPE.value] = arithmetic
    rows[:, GRAD_DTYPE.value] = t["grad_dtype"]
    kinds = kinds_of(t, variant, body < t["numel"], stochastic)
    found, index = np.unique(kinds[active], return_inverse=True)
    rows[active, KIND.value] = index
    rows[~active] = 0
    return rows, tuple(found.tolist())


def repeated(counts: np.ndarray, stride: int = 1) -> np.ndarray:
    """[n, 2]: row i counts[i] times, with 0, stride, 2 stride ..."""
    row = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return np.column_stack([row, (np.arange(len(row)) - first) * stride])


def make_table(
    rule: str,
    tensors: np.ndarray,
    groups: np.ndarray,
    torch_tails: bool,
    stochastic: bool,
    device: torch.device,
) -> tuple[OptimTable, np.ndarray]:
    """The table of tt_optim_tensor and tt_optim_group, whose addresses are the device's; int64."""
    check(rule, tensors, groups, stochastic)
    rows, kinds = make_rows(rule, tensors, groups, torch_tails, stochastic)
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
    pieces = repeated(-(-n_tiles // tiles), tiles)
    n_blocks = -(-numel // NORM_BLOCK.value)
    blocks = repeated(n_blocks)
    rows[:, FIRST_BLOCK.value] = np.cumsum(n_blocks) - n_blocks
    grad_dtypes = np.unique(tensors["grad_dtype"][tensors["grad"] != 0]).tolist()
    counts = len(rows), len(groups), len(pieces), len(blocks)
    made = OptimTable(rule, kinds, tuple(grad_dtypes), *counts, tiles, processors)
    parts = [x.reshape(-1) for x in (rows, table, pieces, blocks)]
    if made.coded:
        parts += [dynamic_code(with_sign).view(np.int64) for with_sign in (True, False)]
    return made, np.concatenate(parts)
