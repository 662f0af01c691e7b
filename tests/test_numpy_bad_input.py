"""trimtab.numpy refuses bad input before any work: the function, what was expected, what came."""

import numpy as np
import pytest

import trimtab.numpy as tn


def floats(rng, shape):
    return rng.standard_normal(shape, dtype=np.float32)


def weight(rng, N, K):
    return rng.integers(-127, 128, (N, K), dtype=np.int8), floats(rng, N)


def bad_calls():
    rng = np.random.default_rng(0)
    x, (w, w_scale), bias = floats(rng, (6, 40)), weight(rng, 24, 40), floats(rng, 24)
    q, scale = tn.quantize_int8(x)
    packed = tn.int8_pack(w)
    raw = np.zeros(packed.size + 128, np.int8)
    start = -raw.ctypes.data % 64 + 1
    shifted = raw[start : start + packed.size]
    shifted[:] = packed
    big = np.zeros((1, 133145), np.int8)
    frozen = np.zeros((6, 24), np.float32)
    frozen.flags.writeable = False
    square = floats(rng, (24, 24))
    w24, s24 = weight(rng, 24, 24)
    lin, mm, wmm = tn.int8_linear, tn.int8_mm, tn.int8_weight_mm
    out = np.zeros((6, 24), np.float32)
    return {
        "x_list": (
            TypeError,
            "quantize_int8: expected x as a NumPy array or an object with __dlpack__, got list",
            lambda: tn.quantize_int8([1.0]),
        ),
        "x_none": (
            TypeError,
            "int8_linear: expected x as a NumPy array .*, got NoneType",
            lambda: lin(None, w, w_scale),
        ),
        "x_float64": (
            TypeError,
            r"quantize_int8: expected x of float32, bfloat16 or float16, got \[6, 40\] float64",
            lambda: tn.quantize_int8(x.astype(np.float64)),
        ),
        "x_big_endian": (
            TypeError,
            "quantize_int8: expected x of float32, .* got .*>f4",
            lambda: tn.quantize_int8(x.astype(">f4")),
        ),
        "x_scalar": (
            ValueError,
            r"quantize_int8: expected x of at least one dimension, got \[\] float32",
            lambda: tn.quantize_int8(np.ones((), np.float32)),
        ),
        "rms_norm_weight_length": (
            ValueError,
            r"rms_norm_quantize_int8: expected weight \[K=40\], got \[24\] float32",
            lambda: tn.rms_norm_quantize_int8(x, bias),
        ),
        "rms_norm_weight_rank": (
            ValueError,
            r"rms_norm_quantize_int8: expected weight of rank 1, got \[1, 40\]",
            lambda: tn.rms_norm_quantize_int8(x, x[:1]),
        ),
        "rms_norm_weight_dtype": (
            TypeError,
            r"rms_norm_quantize_int8: expected weight of float32 or x's dtype .* got \[40\] float16",
            lambda: tn.rms_norm_quantize_int8(x, x[0].astype(np.float16)),
        ),
        "silu_mul_shape": (
            ValueError,
            r"silu_mul_quantize_int8: expected up like gate, \[6, 40\] float32, got \[5, 40\]",
            lambda: tn.silu_mul_quantize_int8(x, x[:5]),
        ),
        "silu_mul_dtype": (
            TypeError,
            r"silu_mul_quantize_int8: expected up of gate's dtype, .* got \[6, 40\] float16",
            lambda: tn.silu_mul_quantize_int8(x, x.astype(np.float16)),
        ),
        "silu_mul_scalar": (
            ValueError,
            r"silu_mul_quantize_int8: expected up of at least one dimension, got \[\]",
            lambda: tn.silu_mul_quantize_int8(x, np.ones((), np.float32)),
        ),
        "a_float": (
            TypeError,
            r"int8_mm: expected a of int8, got \[6, 40\] float32",
            lambda: mm(x, w, scale, w_scale),
        ),
        "a_rank": (
            ValueError,
            r"int8_mm: expected a of rank 2, got \[2, 3, 40\] int8",
            lambda: mm(q.reshape(2, 3, 40), w, scale, w_scale),
        ),
        "a_scale_length": (
            ValueError,
            r"int8_mm: expected a_scale \[M=6\], got \[5\]",
            lambda: mm(q, w, scale[:5], w_scale),
        ),
        "a_scale_dtype": (
            TypeError,
            r"int8_mm: expected a_scale of float32, got \[6\] float64",
            lambda: mm(q, w, scale.astype(float), w_scale),
        ),
        "a_scale_rank": (
            ValueError,
            r"int8_mm: expected a_scale of rank 1, got \[6, 1\]",
            lambda: mm(q, w, scale[:, None], w_scale),
        ),
        "K_mismatch": (
            ValueError,
            r"int8_linear: expected weight as \[N=24, K=39\] or packed, got \[24, 40\] int8",
            lambda: lin(x[:, :39], w, w_scale),
        ),
        "K_mismatch_packed": (
            ValueError,
            r"int8_linear: expected weight as the \d+ bytes that int8_pack makes for N=24 and K=30, got \[\d+\] int8",
            lambda: lin(x[:, :30], packed, w_scale),
        ),
        "K_bound": (
            ValueError,
            "int8_mm: expected K <= 133144, .* got K=133145",
            lambda: mm(big, big, np.ones(1, np.float32), np.ones(1, np.float32)),
        ),
        "K_bound_linear": (
            ValueError,
            "int8_linear: expected K <= 133144, .* got K=133145",
            lambda: lin(big.astype(np.float32), big, np.ones(1, np.float32)),
        ),
        "weight_dtype": (
            TypeError,
            r"int8_linear: expected weight of int8, got \[24, 40\] uint8",
            lambda: lin(x, w.view(np.uint8), w_scale),
        ),
        "weight_scale_length": (
            ValueError,
            r"int8_linear: expected weight as \[N=23, K=40\]",
            lambda: lin(x, w, w_scale[:23]),
        ),
        "packed_misaligned": (
            ValueError,
            "int8_linear: expected weight aligned to 64 bytes, .* got an address 1 bytes past",
            lambda: lin(x, shifted, w_scale),
        ),
        "packed_strided": (
            ValueError,
            "int8_linear: expected weight with adjacent elements, got a stride of 2",
            lambda: lin(x, np.repeat(packed, 2)[::2], w_scale),
        ),
        "unpack_size": (
            ValueError,
            "int8_unpack: expected packed as the .* for N=40 and K=40",
            lambda: tn.int8_unpack(packed, 40, 40),
        ),
        "unpack_negative": (
            ValueError,
            "int8_unpack: expected sizes >= 0, got N=-1",
            lambda: tn.int8_unpack(packed, -1, 40),
        ),
        "pack_rank": (
            ValueError,
            r"int8_pack: expected b of rank 2, got \[24\]",
            lambda: tn.int8_pack(w[:, 0]),
        ),
        "bias_length": (
            ValueError,
            r"int8_linear: expected bias \[N=24\], got \[23\] float32",
            lambda: lin(x, w, w_scale, bias[:23]),
        ),
        "bias_dtype": (
            TypeError,
            "int8_linear: expected bias of float32, bfloat16 or float16, got .* int64",
            lambda: lin(x, w, w_scale, np.ones(24, int)),
        ),
        "activation": (
            ValueError,
            'int8_linear: expected activation none, relu, gelu, gelu_tanh or silu, got "tanh"',
            lambda: lin(x, w, w_scale, activation="tanh"),
        ),
        "out_dtype": (
            TypeError,
            "int8_linear: expected out_dtype float32, bfloat16 or float16, or int8 with out_scale, got float64",
            lambda: lin(x, w, w_scale, out_dtype=float),
        ),
        "out_scale_missing": (
            TypeError,
            r"int8_linear: expected out_scale \[1\] float32 for int8 out, got None",
            lambda: lin(x, w, w_scale, out_dtype="int8"),
        ),
        "out_scale_unasked": (
            TypeError,
            "int8_mm: expected out_scale with int8 out alone",
            lambda: mm(q, w, scale, w_scale, out_scale=scale[:1]),
        ),
        "out_scale_dtype": (
            TypeError,
            r"int8_mm: expected out_scale of float32, got \[1\] float64",
            lambda: mm(q, w, scale, w_scale, out_dtype="int8", out_scale=np.ones(1)),
        ),
        "out_scale_shape": (
            ValueError,
            r"int8_mm: expected out_scale \[1\], got \[6\] float32",
            lambda: mm(q, w, scale, w_scale, out_dtype="int8", out_scale=scale),
        ),
        "out_int8": (
            TypeError,
            "int8_weight_mm: expected out_dtype float32, bfloat16 or float16, got int8",
            lambda: wmm(x, w, w_scale, out_dtype="int8"),
        ),
        "out_dtype_differs": (
            TypeError,
            "int8_linear: expected out of the given out_dtype, got .* float32",
            lambda: lin(x, w, w_scale, out_dtype="float16", out=out),
        ),
        "out_shape": (
            ValueError,
            r"int8_linear: expected out of shape \[6, 24\], got \[5, 24\]",
            lambda: lin(x, w, w_scale, out=out[:5]),
        ),
        "out_int": (
            TypeError,
            "int8_linear: expected out of float32, .* got .* int32",
            lambda: lin(x, w, w_scale, out=out.astype(np.int32)),
        ),
        "out_read_only": (
            ValueError,
            "int8_linear: expected out writable",
            lambda: lin(x, w, w_scale, out=frozen),
        ),
        "out_strided": (
            ValueError,
            "int8_linear: expected out as aligned rows of adjacent elements",
            lambda: lin(x, w, w_scale, out=np.zeros((6, 48), np.float32)[:, ::2]),
        ),
        "out_overlaps_itself": (
            ValueError,
            "int8_linear: expected out .* that do not overlap",
            lambda: lin(
                x,
                w,
                w_scale,
                out=np.lib.stride_tricks.as_strided(np.zeros(24, np.float32), (6, 24), (0, 4)),
            ),
        ),
        "out_is_x": (
            ValueError,
            "int8_linear: expected out in memory of its own, got one that shares memory with x",
            lambda: lin(square, w24, s24, out=square),
        ),
        "out_is_bias": (
            ValueError,
            "int8_linear: expected out in memory of its own, .* bias",
            lambda: lin(square[:1], w24, s24, square[0], out=square[:1]),
        ),
        "group": (
            ValueError,
            "int8_weight_mm: expected group_size to be a multiple of 4, or K=40 or more, got 6",
            lambda: wmm(x, w, np.ones((7, 24), np.float32), group_size=6),
        ),
        "group_zero": (
            ValueError,
            "int8_weight_mm: expected group_size >= 1 or None, got 0",
            lambda: wmm(x, w, w_scale, group_size=0),
        ),
        "groups": (
            ValueError,
            r"int8_weight_mm: expected weight_scale \[groups=5, N\] .* got 1 groups",
            lambda: wmm(x, w, w_scale, group_size=8),
        ),
        "zero_point": (
            ValueError,
            r"int8_weight_mm: expected zero_point \[groups=1, N=24\]",
            lambda: wmm(x, w, w_scale, zero_point=np.zeros(23, np.int8)),
        ),
        "isa_unknown": (
            ValueError,
            'set_isa: expected scalar, avx2, .* got "neon"',
            lambda: tn.set_isa("neon"),
        ),
    }


BAD = bad_calls()


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_isa_this_cpu_lacks():
    missing = {"avx2", "avxvnni", "avx512", "amx"} - set(tn.available_isas())
    if not missing:
        pytest.skip("this CPU has them all")
    name = missing.pop()
    with pytest.raises(ValueError, match=f'set_isa: this CPU has no "{name}"'):
        tn.set_isa(name)
