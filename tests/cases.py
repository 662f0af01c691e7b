"""What the op tests share: shapes, dtypes, conversion to the NumPy reference, equality of bits."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from trimtab import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = list(ops.library.ACTIVATIONS)

# (M, N, K): none, one, primes, the edges of every kernel's tile (4, 5, 12, 16, 32 rows; 16 and 64
# columns; 4 and 64 steps of K) and one beyond them.
SHAPES = [
    (0, 5, 8),
    (3, 0, 7),
    (2, 3, 0),
    (1, 1, 1),
    (1, 33, 70),
    (4, 64, 64),
    (5, 16, 65),
    (7, 17, 3),
    (12, 15, 63),
    (13, 48, 128),
    (16, 49, 100),
    (17, 31, 129),
    (33, 65, 191),
    (70, 100, 257),
]


def ident(value: object) -> str | None:
    """Readable test ids."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return None


def to_numpy(tensor: torch.Tensor | None) -> np.ndarray | None:
    """As the reference takes it: bfloat16 as its bits in uint16."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_same_bits(got: torch.Tensor, want: torch.Tensor | np.ndarray) -> None:
    """Equal bit for bit; a NaN equals any NaN."""
    if isinstance(want, np.ndarray):
        if got.dtype == torch.bfloat16:
            want = torch.from_numpy(want.view(np.int16).copy()).view(torch.bfloat16)
        else:
            want = torch.from_numpy(want.copy())
    got = got.detach().cpu()
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype)
    if not got.is_floating_point():
        assert torch.equal(got, want)
        return
    integer = {4: torch.int32, 2: torch.int16}[got.element_size()]
    same = got.contiguous().view(integer) == want.contiguous().view(integer)
    same |= got.isnan() & want.isnan()
    if not bool(same.all()):
        first = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{int((~same).sum())} of {same.numel()} differ, first at {first}: "
            f"{got[first].item()!r} != {want[first].item()!r}"
        )


def awkward_rows(M: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal rows of many magnitudes, and where there is room rows of zeros, NaN, Inf, subnormals."""
    x = torch.randn(M, K, generator=generator)
    x *= 10.0 ** torch.randint(-3, 4, (M, 1), generator=generator)
    x = x.to(dtype)
    if K and M > 4:
        x[0] = 0
        x[1, K // 2] = float("nan")
        x[2, -1] = float("-inf")
        x[3] = torch.finfo(dtype).smallest_normal / 8
        x[4, 0] = torch.finfo(dtype).max
    return x


def int8(M: int, K: int, generator: torch.Generator) -> torch.Tensor:
    """All of int8, -128 included: a user's own weights may hold it."""
    return torch.randint(-128, 128, (M, K), dtype=torch.int8, generator=generator)


# Scales of int8 out: ordinary, one whose codes all clamp, halves (ties), and those without a reciprocal.
OUT_SCALES = [0.02, 1e-6, 2.0, 1e-40, float("inf"), float("nan")]


def awkward_bias(N: int, generator: torch.Generator) -> torch.Tensor:
    """Normal values, then where there is room NaN, Inf, zero and a huge one."""
    bias = torch.randn(N, generator=generator)
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 3e38])
    bias[: len(odd)] = odd[:N]
    return bias


@contextmanager
def before_a_page_without_access(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """A copy that ends where reading one byte more would be a fault."""
    size = values.numel() * values.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    after = ctypes.c_void_p(start + room)
    copy = torch.frombuffer(memory, dtype=values.dtype, offset=room - size, count=values.numel())
    copy.copy_(values)

    def protect(access: int) -> None:
        if libc.mprotect(after, ctypes.c_size_t(mmap.PAGESIZE), access) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    protect(0)
    try:
        yield copy
    finally:
        protect(mmap.PROT_READ | mmap.PROT_WRITE)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def corrupt_blocks(
    crow: torch.Tensor, col: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Indices of a block weight that are out of range or fall."""
    return [
        (crow, col + 3),
        (crow, col - 2),
        (crow, torch.full_like(col, 2**31 - 1)),
        (crow + 7, col),
        (crow * 2**20, col),
        (-crow - 1, col),
        (crow.flip(0), col),
    ]
