"""2:4 weights: prune and compress in one, the way back, and the bitmap they are on a CPU."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library

_op = torch.ops.trimtab.sparse24_compress


def sparse24_compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Prunes ``weight`` [N, K] to 2:4 and compresses it: the two largest |w| of each four along K stay.

    Equal magnitudes keep the lower index and -0.0 counts as 0 (NUMERICS.md section 5), so a group with
    fewer than two nonzeros keeps the zeros of lowest index. K is padded to whole groups with zeros.
    One pass over the weight, on a CPU and by CUDA C++; where that is missing, torch's operators.

    Args:
        weight: float32, bfloat16, float16 or int8 [N, K], any strides.

    Returns:
        values [N, K' / 2] of weight's dtype, in rising order of column, and indices uint8
        [N, ceil(K' / 8)], K' = K padded to a multiple of 4: four bits a group, the lower of the two
        positions in bits 0 and 1, the higher in bits 2 and 3; an even group in the low half of a byte.

    Raises:
        RuntimeError: wrong rank or dtype, a NaN in ``weight``: where; or ``weight`` requires grad.
    """
    if torch.is_grad_enabled():
        library.refuse_grad("sparse24_compress", weight=weight)
    values, indices = _op.default(weight)
    # A kernel on a GPU can't raise. It ranks NaN above all numbers, so one is among what it kept.
    on_gpu = weight.device.type == "cuda" and values.is_floating_point()
    if on_gpu and not torch.compiler.is_compiling() and bool(torch.isnan(values).any()):
        raise RuntimeError(
            f"sparse24_compress: expected a weight without NaN, got one at "
            f"{first_true(torch.isnan(weight))}"
        )
    return values, indices


def _check(weight: Tensor) -> None:
    library.expect(
        weight.dim() == 2 and weight.dtype in (*library.FLOAT_DTYPES, torch.int8),
        f"sparse24_compress: expected weight [N, K] of float32, bfloat16, float16 or int8, got "
        f"{library.describe(weight)}",
    )


@library.register_fake("trimtab::sparse24_compress")
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check(weight)
    N, K = weight.shape
    values = weight.new_empty(N, (K + 3) // 4 * 2)
    return values, weight.new_empty(N, (K + 7) // 8, dtype=torch.uint8)


def compress_in_torch(weight: Tensor) -> tuple[Tensor, Tensor]:
    """sparse24_compress by torch's operators, for devices that have no kernel."""
    _check(weight)
    if weight.dtype == torch.int8:
        return pick24(weight, weight.to(torch.int16).abs())  # |-128| has no int8
    # Magnitudes order as their bits do, NaN on top.
    integer, most = {4: (torch.int32, 0x7FFFFFFF), 2: (torch.int16, 0x7FFF)}[weight.element_size()]
    return pick24(weight, weight.contiguous().view(integer) & most)


library.implement("sparse24_compress.torch", compress_in_torch, "CUDA")


def first_true(where: Tensor) -> list[int]:
    """The position of the first True, row by row; [] if there is none."""
    found = where.nonzero()
    return found[0].tolist() if len(found) else []


def pick24(weight: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """sparse24_compress by scores, whose two highest in each four stay; ties: the lower index."""
    N, K = weight.shape
    groups = -(-K // 4)
    if groups * 4 != K:
        # Below every score of a real weight, so that padding is kept only where it must be.
        score = F.pad(score, (0, groups * 4 - K), value=-1)
        weight = F.pad(weight, (0, groups * 4 - K))
    score = score.reshape(N, groups, 4)
    # A weight stays if fewer than two others go before it.
    ahead = []
    for i in range(4):
        mine = score[..., i : i + 1]
        ahead.append((score[..., :i] >= mine).sum(-1) + (score[..., i + 1 :] > mine).sum(-1))
    kept = torch.stack(ahead, -1) < 2
    # The lowest and the highest position that is kept, of exactly two.
    low = kept.to(torch.uint8).argmax(-1)
    high = 3 - kept.flip(-1).to(torch.uint8).argmax(-1)
    values = weight.reshape(N, groups, 4).gather(2, torch.stack([low, high], 2))
    codes = (low + 4 * high).to(torch.uint8)
    if groups % 2:
        codes = F.pad(codes, (0, 1))
    pairs = codes.reshape(N, codes.shape[1] // 2, 2)
    return values.reshape(N, groups * 2), pairs[..., 0] | (pairs[..., 1] << 4)


def sparse24_codes(indices: Tensor, K: int) -> Tensor:
    """The four bits of each group, uint8 [N, ceil(K / 4)]."""
    return torch.stack([indices & 15, indices >> 4], -1).flatten(1)[:, : -(-K // 4)]


def sparse24_mask(indices: Tensor, K: int) -> Tensor:
    """The kept positions as bool [N, K4], K4 = K rounded up to 4."""
    codes = sparse24_codes(indices, K)[..., None]
    column = torch.arange(4, dtype=torch.uint8, device=indices.device)
    return ((column == codes & 3) | (column == codes >> 2)).flatten(1)


def sparse24_dense(values: Tensor, indices: Tensor, K: int) -> Tensor:
    """sparse24_unpack of indices that are known to be sound."""
    mask = sparse24_mask(indices, K)
    weight = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return weight.masked_scatter(mask, values)[:, :K].contiguous()


def sparse24_unpack(values: Tensor, indices: Tensor, K: int) -> Tensor:
    """The dense weight [N, K] of a compressed one, pruned places zero; differentiable in ``values``.

    Raises:
        RuntimeError: sizes that do not fit K, or indices that are no two rising positions: where.
    """
    sparse24_check(values, indices, K)
    return sparse24_dense(values, indices, K)


def sparse24_check(values: Tensor, indices: Tensor, K: int) -> None:
    """Checks a 2:4 weight as loaded: for once, not for every call. RuntimeError names what is wrong."""
    op, groups = "sparse24_check", -(-K // 4)
    library.expect(
        values.dim() == 2 and values.shape[1] == 2 * groups,
        f"{op}: expected values [N, {2 * groups}] for K={K}, got {library.describe(values)}",
    )
    N = values.shape[0]
    library.expect(
        indices.dtype == torch.uint8 and tuple(indices.shape) == (N, -(-groups // 2)),
        f"{op}: expected indices [{N}, {-(-groups // 2)}] uint8 for K={K}, got "
        f"{library.describe(indices)}",
    )
    if indices.device.type == "meta" or indices.numel() == 0:
        return
    known = _tables(indices.device)[0]
    masks = known[indices.long()]
    wrong = masks == 0
    if groups % 2:  # the last byte holds one group
        last = indices[:, -1]
        wrong[:, -1] = (last > 15) | (known[(last & 15).long() * 17] == 0)
    library.expect(
        not bool(wrong.any()),
        f"{op}: expected two rising positions a group, got byte {_byte(indices, wrong)} of indices at "
        f"{first_true(wrong)}",
    )


def _byte(indices: Tensor, wrong: Tensor) -> str:
    return f"0x{int(indices[wrong][0]):02x}" if bool(wrong.any()) else ""


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Byte of indices -> byte of bitmap (0: none has it), and back.

    Two groups of four are a byte of both: 2 x (2 + 2 bits), 2 x 4 bits.
    """
    forward, back = [0] * 256, [0] * 256
    masks = {low + 4 * high: (1 << low) | (1 << high) for high in range(4) for low in range(high)}
    for even, even_mask in masks.items():
        for odd, odd_mask in masks.items():
            forward[even | odd << 4] = even_mask | odd_mask << 4
            back[even_mask | odd_mask << 4] = even | odd << 4
        back[even_mask] = even
    return (
        torch.tensor(forward, dtype=torch.uint8, device=device),
        torch.tensor(back, dtype=torch.uint8, device=device),
    )


def indices_to_bitmap(indices: Tensor, K: int) -> Tensor:
    """uint8 [N, 8 ceil(K / 64)] of checked indices: bit k of a row says whether weight k is kept.

    A last group that is padded may set bits from K on, up to K padded to a multiple of 4.
    """
    N, used = indices.shape
    groups = -(-K // 4)
    bitmap = indices.new_zeros(N, -(-K // 64) * 8)
    if indices.device.type == "meta":
        return bitmap
    table = _tables(indices.device)[0]
    bitmap[:, :used] = table[indices.long()]
    if groups % 2:
        # The half that is no group reads as one here, and is cut off.
        bitmap[:, used - 1] = table[(indices[:, -1].long() & 15) * 17] & 15
    return bitmap


def bitmap_to_indices(bitmap: Tensor, K: int) -> Tensor:
    """The inverse of indices_to_bitmap."""
    used = -(-K // 8)
    if bitmap.device.type == "meta":
        return bitmap.new_empty(bitmap.shape[0], used)
    return _tables(bitmap.device)[1][bitmap[:, :used].long()]
