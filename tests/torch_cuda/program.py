"""What tests/test_torch_cuda.py runs in a process of its own, with pretend.cpp preloaded.

program.py FOLDER [triton]: FOLDER holds the adapter and its libraries. Every op against trimtab.numpy.
"""

import ctypes
import sys
from pathlib import Path

import torch

import trimtab.numpy as plain

folder = Path(sys.argv[1])
torch.ops.load_library(folder / "libtrimtab_torch.so")
pretend = ctypes.CDLL(str(folder / "libtrimtab_cuda.so"))
for name in ("pretend_guards", "pretend_allocations", "pretend_b_stride"):
    getattr(pretend, name).restype = ctypes.c_int64
pretend.pretend_other_device.argtypes = [ctypes.c_void_p]
ops = torch.ops.trimtab
calls = []


def python_overload(op, overload, result):
    """An overload that Python implements; says that it was called and with what."""

    def run(*args, **options):
        calls.append((op, overload))
        return result(*args, **options)

    library.impl(f"{op}.{overload}", run, "CPU")


library = torch.library.Library("trimtab", "IMPL")


def expect_error(text, function, *args, **options):
    try:
        function(*args, **options)
    except RuntimeError as error:
        assert text in str(error), f"{error}\ndoes not hold\n{text}"
        return
    raise AssertionError(f"no error, but expected: {text}")


def numpy(*tensors):
    return [None if t is None else t.contiguous().numpy() for t in tensors]


def same(got, want):
    assert got.dtype == torch.from_numpy(want).dtype and tuple(got.shape) == want.shape
    assert torch.equal(got, torch.from_numpy(want)), (got, want)


def weight_of(N, K):
    """As a layer holds it on a GPU: rows of whole 16 bytes, a view."""
    wide = torch.randint(-127, 128, (N, (K + 15) // 16 * 16), dtype=torch.int8)
    return wide[:, :K]


def cuda():
    for M, N, K in ((5, 7, 33), (1, 3, 16), (1, 1, 5), (64, 10, 40)):
        x, b = torch.randn(M, K), weight_of(N, K)
        scale, bias = torch.rand(N), torch.randn(N)
        q, q_scale = ops.quantize_int8.default(x)
        want_q, want_scale = plain.quantize_int8(*numpy(x))
        same(q, want_q)
        same(q_scale, want_scale)
        ops.quantize_int8.out(x, q=q.zero_(), scale=q_scale.zero_())
        same(q, want_q)
        want = plain.int8_linear(*numpy(x, b, scale, bias), "silu")
        before = pretend.pretend_allocations()
        for overload in (ops.int8_linear.default, ops.int8_linear.inference):
            same(overload(x, b, scale, bias, 4), want)
        assert pretend.pretend_allocations() == before + 4  # each an output and a workspace
        # The weight is read where it lies.
        assert pretend.pretend_b_stride() == (b.stride(0) if N > 1 else (K + 15) // 16 * 16)
        out = torch.full((M, N), float("nan"))
        ops.int8_linear.out(x, b, scale, bias, 4, out=out)
        same(out, want)
        same(ops.int8_mm.default(q, b, q_scale, scale, bias, 4, torch.float32), want)
        ops.int8_mm.out(q, b, q_scale, scale, bias, 4, out=out.zero_())
        same(out, want)
        code_scale = torch.tensor([0.1])
        tail = {"out_dtype": "int8", "out_scale": code_scale.numpy()}
        want = plain.int8_linear(*numpy(x, b, scale, bias), "silu", **tail)
        same(ops.int8_linear.inference(x, b, scale, bias, 4, torch.int8, code_scale), want)
        same(ops.int8_mm.default(q, b, q_scale, scale, bias, 4, torch.int8, code_scale), want)
        codes = torch.zeros(M, N, dtype=torch.int8)
        ops.int8_mm.out(q, b, q_scale, scale, bias, 4, code_scale, out=codes)
        same(codes, want)
        want = plain.int8_weight_mm(*numpy(x, b, scale, None, bias), None, "relu")
        same(ops.int8_weight_mm.default(x, b, scale, None, bias, None, 1), want)
        ops.int8_weight_mm.out(x, b, scale, None, bias, None, 1, out=out.zero_())
        same(out, want)
    # Any strides, any rank: what the kernels do not read in place is copied.
    x = torch.randn(4, 6, 40).transpose(0, 2)
    b, scale = weight_of(6, 4).t().contiguous().t(), torch.rand(6)
    same(ops.int8_linear.default(x, b, scale), plain.int8_linear(*numpy(x, b, scale)))
    a = weight_of(1, 4).expand(3, 4)
    got = ops.int8_mm.default(a, b, torch.ones(3), scale, None, 0, torch.float32)
    same(got, plain.int8_mm(*numpy(a, b, torch.ones(3), scale), out_dtype="float32"))
    # The quantizers with a step before: the same bits as the CPU's, which the other tests hold.
    x, up, gain = torch.randn(3, 20), torch.randn(3, 20), torch.rand(20)
    q, q_scale = ops.silu_mul_quantize_int8.default(x, up)
    assert q.shape == (3, 20) and bool(q_scale.isfinite().all()) and bool(q.any())
    q, q_scale = ops.rms_norm_quantize_int8.default(x, gain, 1e-6)
    assert q.shape == (3, 20) and bool(q_scale.isfinite().all()) and bool(q.any())
    # Groups and zero points.
    x, b, scale = torch.randn(3, 20), weight_of(5, 20), torch.rand(3, 5)
    zero = torch.randint(-9, 9, (3, 5), dtype=torch.int8)
    want = plain.int8_weight_mm(*numpy(x, b, scale, zero), None, 8)
    same(ops.int8_weight_mm.inference(x, b, scale, zero, None, 8), want)
    sparse24()
    bitmap()
    blocks()
    calls.clear()
    refusals()
    many_rows()


def sparse24():
    """A 2:4 weight that keeps the first two of every four."""
    weight = torch.tensor([[1.0, -3, 2, 0, 5, 5], [0, 0, 0, 7, 0, 9]])
    values, indices = ops.sparse24_compress.default(weight)
    assert values.is_contiguous() and values.tolist() == [[-3, 2, 5, 5], [0, 7, 0, 9]]
    assert indices.tolist() == [[0x49], [0x4C]]
    x, scale, bias = torch.randn(2, 3, 72), torch.rand(20), torch.randn(20)
    values = weight_of(20, 36)
    metadata = torch.full((2, 2, 32), 0x44444444, dtype=torch.int32)
    dense = torch.zeros(20, 18, 4, dtype=torch.int8)
    dense[:, :, :2] = values.reshape(20, 18, 2)
    want = plain.int8_linear(*numpy(x, dense.view(20, 72), scale, bias), "silu")
    for overload in (ops.sparse24_linear.default, ops.sparse24_linear.inference):
        same(overload(x, values, metadata, scale, bias, 4), want)
    call = ops.sparse24_linear.default
    for text, args in {
        "expected values [N, 36] for K=72": (x, values[:, :34], metadata, scale),
        "that start on whole 16 bytes, got a stride of 36": (
            *(x, values.contiguous(), metadata, scale),
        ),
        "expected contiguous metadata [2, 2, 32]": (x, values, metadata[:1], scale),
        "expected values of bfloat16, float16 or int8, got float32": (x, values.float(), metadata),
        "expected weight_scale [N=20] float32 for int8 values": (x, values, metadata),
    }.items():
        expect_error(text, call, *args)


def bitmap():
    """Every second weight kept; above 32 rows and off 16 bytes the overload that unpacks."""
    python_overload("bitmap_linear", "dense", lambda x, *rest: x.new_full((len(x), 20), 7.0))
    scale, bias, dense = torch.rand(20), torch.randn(20), weight_of(20, 72).contiguous()
    dense[:, ::2] = 0
    values = dense[:, 1::2].reshape(-1).contiguous()
    bits = torch.full((20, 16), 0xAA, dtype=torch.uint8)
    bits[:, 9:] = 0
    start = torch.arange(21) * 36
    x = torch.randn(32, 72)
    want = plain.int8_linear(*numpy(x, dense, scale, bias), "silu")
    for overload in (ops.bitmap_linear.default, ops.bitmap_linear.inference):
        same(overload(x, values, bits, start, scale, bias, 4), want)
    assert not calls
    shifted = torch.cat([values[:1], values])[1:]
    for args in ((x[:1].expand(33, 72), values), (x, shifted)):
        assert ops.bitmap_linear.default(*args, bits, start, scale).eq(7).all()
    assert calls == [("bitmap_linear", "dense")] * 2
    expect_error(
        "expected a contiguous row_start [N + 1=21]", ops.bitmap_linear.default, x, values, bits,
        start[:-1], scale,
    )  # fmt: skip
    pretend.pretend_other_device(start.data_ptr())
    expect_error(
        "expected row_start on cuda:0", ops.bitmap_linear.default, x, values, bits, start, scale
    )
    pretend.pretend_other_device(None)
    calls.clear()


def blocks():
    """The block diagonal of 16 x 16, whatever the dtype and the alignment; its gradient."""
    scale, bias, values = torch.rand(48), torch.randn(48), weight_of(48, 16).view(3, 16, 16)
    crow, col = torch.arange(4, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    x, dense = torch.randn(5, 48), torch.block_diag(*values)
    want = plain.int8_linear(*numpy(x, dense, scale, bias), "silu")
    for overload in (ops.block_linear.default, ops.block_linear.inference):
        same(overload(x, values, crow, col, scale, bias, 4, 48), want)
    half = x.half()
    same(
        ops.block_linear.default(half, values.half(), crow, col, None, None, 0, 48),
        plain.block_linear(*numpy(half, values.half(), crow, col), N=48),
    )
    off = torch.cat([torch.zeros(1), values.float().reshape(-1)])[1:].view(3, 16, 16)
    for a, b in ((x, values.float()), (half[:, 1:], values.half()), (x, off)):
        same(
            ops.block_linear.default(a, b, crow, col, None, None, 0, 48),
            plain.block_linear(*numpy(a.contiguous(), b.contiguous(), crow, col), N=48),
        )
    grad, wide = torch.randint(-9, 9, (5, 48)).float(), torch.randint(-9, 9, (5, 50)).float()
    for a in (wide[:, :48].contiguous(), wide[:, 1:49]):
        same(
            ops.block_grad_values.default(grad, a, crow, col, 16, 16),
            torch.stack([grad[:, i : i + 16].t() @ a[:, i : i + 16] for i in (0, 16, 32)]).numpy(),
        )
    expect_error(
        "expected grad and x of as many rows", ops.block_grad_values.default, grad, x[:3], crow,
        col, 16, 16,
    )  # fmt: skip
    assert not calls
    pretend.pretend_other_device(col.data_ptr())
    args = (x, values, crow, col, scale, None, 0, 48)
    expect_error("expected col on cuda:0", ops.block_linear.default, *args)
    pretend.pretend_other_device(None)
    calls.clear()


def refusals():
    x, b, scale = torch.randn(3, 20), weight_of(5, 20), torch.rand(5)
    packed = torch.zeros(2000, dtype=torch.int8)
    for op in (ops.int8_linear.default, ops.int8_weight_mm.default):
        expect_error(
            "expected weight [N=5, K=20] int8 on a GPU, got its packed form", op, x, packed, scale
        )
    codes = (x, b, scale, None, 0, torch.int8, code_scale := torch.ones(1))
    for name, far, op, args in (
        ("out_scale", code_scale, ops.int8_linear.default, codes),
        ("weight", b, ops.int8_linear.default, (x, b, scale)),
        ("weight_scale", scale, ops.int8_linear.default, (x, b, scale)),
        ("weight", b, ops.int8_weight_mm.default, (x, b, scale)),
        ("bias", scale, ops.int8_linear.default, (x, b, scale.clone(), scale)),
    ):
        pretend.pretend_other_device(far.data_ptr())
        expect_error(f"expected {name} on cuda:0, like the others, got it on cuda:1", op, *args)
        pretend.pretend_other_device(None)
    long = torch.zeros(1, 200_000)
    wide = torch.zeros(1, 200_000, dtype=torch.int8)
    expect_error("133144", ops.int8_linear.default, long, wide, torch.ones(1))  # the C message
    assert pretend.pretend_guards() == 0


def many_rows():
    """More rows than the weight-only kernel takes: the overload that dequantizes."""
    python_overload("int8_weight_mm", "dequantized", lambda x, b, *rest: x @ b.float().t())
    x, b, scale = torch.randn(5, 13, 20), weight_of(5, 20), torch.ones(5)
    want = x @ b.float().t()
    assert torch.equal(ops.int8_weight_mm.default(x, b, scale), want)
    out = torch.zeros(5, 13, 5)
    ops.int8_weight_mm.out(x, b, scale, out=out)
    assert torch.equal(out, want) and calls == [("int8_weight_mm", "dequantized")] * 2


def triton():
    """TRIMTAB_BACKEND=triton: every overload goes to Python's, with all its arguments."""
    x, b, scale, bias = torch.randn(3, 20), weight_of(5, 20), torch.rand(5), torch.randn(5)
    q, a_scale = torch.ones(3, 20, dtype=torch.int8), torch.rand(3)

    def answer(*args):
        if torch.int8 in args:
            assert args[-3:-1] == (2, torch.int8) and args[-1] is code_scale, args
            return torch.full((3, 5), 9, dtype=torch.int8)
        assert args[-2:] == (2, torch.float16), args
        return torch.full((3, 5), 7, dtype=torch.float16)

    code_scale = torch.ones(1)

    python_overload("quantize_int8", "triton", lambda x: (q, a_scale))
    for op in ("int8_mm", "int8_linear", "int8_weight_mm"):
        python_overload(op, "triton", answer)
    want, out = torch.full((3, 5), 7, dtype=torch.float16), torch.zeros(3, 5, dtype=torch.float16)
    got = ops.quantize_int8.default(x)
    assert torch.equal(got[0], q) and torch.equal(got[1], a_scale)
    codes, scales = torch.zeros_like(q), torch.zeros(3)
    ops.quantize_int8.out(x, q=codes, scale=scales)
    assert torch.equal(codes, q) and torch.equal(scales, a_scale)
    for op, args in (
        (ops.int8_mm, (q, b, a_scale, scale, bias, 2)),
        (ops.int8_linear, (x, b, scale, bias, 2)),
        (ops.int8_weight_mm, (x, b, scale, None, bias, None, 2)),
    ):
        assert torch.equal(op.default(*args, torch.float16), want)
        op.out(*args, out=out.zero_())
        assert torch.equal(out, want)
    for op, args in ((ops.int8_mm, (q, b, a_scale, scale)), (ops.int8_linear, (x, b, scale))):
        codes = op.default(*args, bias, 2, torch.int8, code_scale)
        assert codes.dtype == torch.int8 and bool((codes == 9).all())
        op.out(*args, bias, 2, code_scale, out=codes.zero_())
        assert bool((codes == 9).all())
        expect_error("expected out_scale [1] float32", op.default, *args, bias, 2, torch.int8)
    assert len(calls) == 12
    sparse_in_triton()
    assert pretend.pretend_allocations() == 0


def sparse_in_triton():
    """Few rows of a bitmap weight; more take the dense one, which no library is needed for."""
    calls.clear()
    for op, overload in (
        ("bitmap_linear", "triton"),
        ("bitmap_linear", "dense"),
        ("block_linear", "triton"),
    ):
        python_overload(op, overload, lambda x, *rest: x.new_full((*x.shape[:-1], 16), 7.0))
    python_overload(
        "block_grad_values", "triton", lambda *args: args[0].new_full((1, *args[4:]), 7.0)
    )
    x, many = torch.randn(2, 16, 48), torch.randn(33, 48)
    bits, start = torch.zeros(16, 8, dtype=torch.uint8), torch.zeros(17).long()
    values = torch.zeros(0)
    for rows in (x, x[0, 1:], many):
        for overload in (ops.bitmap_linear.default, ops.bitmap_linear.inference):
            assert overload(rows, values, bits, start).eq(7).all()
    crow, col = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    block = torch.zeros(1, 16, 16)
    for rows in (x, many):
        got = ops.block_linear.default(rows, block, crow, col, None, None, 0, 16)
        assert got.eq(7).all() and got.shape == (*rows.shape[:-1], 16)
    grad = torch.zeros(33, 16)
    assert ops.block_grad_values.default(grad, many, crow, col, 16, 16).eq(7).all()
    assert calls == [
        *[("bitmap_linear", "triton")] * 4,
        *[("bitmap_linear", "dense")] * 2,
        *[("block_linear", "triton")] * 2,
        ("block_grad_values", "triton"),
    ]
    args = (x, values, bits, start[1:])
    expect_error("expected a contiguous row_start [N + 1=17]", ops.bitmap_linear.default, *args)
    args = (x, block, crow, col[:0], None, None, 0, 16)
    expect_error("expected col [blocks=1]", ops.block_linear.default, *args)


(triton if sys.argv[2:] == ["triton"] else cuda)()
print("as expected")
