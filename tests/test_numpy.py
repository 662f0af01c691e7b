"""trimtab.numpy: equal to the reference on every instruction set, zero-copy, and clear about bad input."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import trimtab.numpy as tn
from trimtab.reference.int8_linear import int8_linear as reference_linear
from trimtab.reference.int8_mm import int8_mm as reference_mm
from trimtab.reference.int8_weight_mm import int8_weight_mm as reference_weight_mm
from trimtab.reference.quantize_int8 import quantize_int8 as reference_quantize
from trimtab.reference.rms_norm_quantize_int8 import rms_norm_quantize_int8 as reference_rms_norm
from trimtab.reference.silu_mul_quantize_int8 import silu_mul_quantize_int8 as reference_silu_mul

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHAPES = [(0, 5, 8), (1, 1, 1), (1, 33, 70), (3, 17, 0), (5, 16, 64), (17, 31, 129), (70, 100, 257)]
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu"]


@pytest.fixture(params=tn.available_isas())
def isa(request):
    tn.set_isa(request.param)
    yield request.param
    tn.set_isa(None)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def bits(array):
    """The array as unsigned integers, so that -0.0, NaN and bfloat16 compare too."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def same(got, expected):
    assert got.shape == expected.shape
    np.testing.assert_array_equal(bits(got), bits(expected))


def plain(array):
    """For the reference, which keeps bfloat16 as uint16."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def floats(rng, shape, dtype="float32"):
    return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])


def weight(rng, N, K):
    w = rng.integers(-127, 128, (N, K), dtype=np.int8)
    return w, rng.uniform(0.001, 0.02, N).astype(np.float32)


# --- equal to the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1,), (7, 1), (2, 3, 67), (33, 256), (5, 1001)])
def test_quantize_int8(isa, dtype, shape, rng):
    x = floats(rng, shape, dtype)
    q, scale = tn.quantize_int8(x)
    expected_q, expected_scale = reference_quantize(plain(x))
    same(q, expected_q)
    same(scale, expected_scale)


QUANTIZE_SHAPES = [(0, 8), (3, 0), (1,), (7, 1), (2, 3, 67), (5, 2100)]


def same_codes(got, expected):
    same(got[0], expected[0])
    same(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", QUANTIZE_SHAPES)
def test_rms_norm_quantize_int8(isa, dtype, shape, rng):
    x, w = floats(rng, shape, dtype), floats(rng, shape[-1:])
    same_codes(tn.rms_norm_quantize_int8(x, w), reference_rms_norm(plain(x), w))
    w = np.repeat(w.astype(DTYPES[dtype]), 2)[::2]
    expected = reference_rms_norm(plain(x), plain(np.ascontiguousarray(w)), 0.5)
    same_codes(tn.rms_norm_quantize_int8(x, w, 0.5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", QUANTIZE_SHAPES)
def test_silu_mul_quantize_int8(isa, dtype, shape, rng):
    gate, up = floats(rng, shape, dtype), floats(rng, shape, dtype)
    expected = reference_silu_mul(plain(gate), plain(up))
    same_codes(tn.silu_mul_quantize_int8(gate, up), expected)
    wide = np.concatenate([gate, up], axis=-1)  # as a joined projection gives them
    K = shape[-1]
    same_codes(tn.silu_mul_quantize_int8(wide[..., :K], wide[..., K:]), expected)


def test_quantize_int8_rows_that_have_no_scale(isa):
    x = np.ones((7, 37), np.float32)
    x[0] = 0
    x[1, 36] = np.nan
    x[2, 0] = -np.inf
    x[3] = 1e-45
    x[4] = 1e-38
    x[5] = np.finfo(np.float32).max
    q, scale = tn.quantize_int8(x)
    expected_q, expected_scale = reference_quantize(x)
    same(q, expected_q)
    np.testing.assert_array_equal(scale, expected_scale)
    assert np.isnan(scale[[1, 2]]).all() and (q[[1, 2]] == 0).all()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("M,N,K", SHAPES)
def test_int8_mm(isa, M, N, K, packed, rng):
    a = rng.integers(-127, 128, (M, K), dtype=np.int8)
    a_scale = rng.uniform(0.001, 0.02, M).astype(np.float32)
    b, b_scale = weight(rng, N, K)
    bias = floats(rng, N)
    got = tn.int8_mm(a, tn.int8_pack(b) if packed else b, a_scale, b_scale, bias)
    same(got, reference_mm(a, b, a_scale, b_scale, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M,N,K", SHAPES)
def test_int8_linear(isa, M, N, K, dtype, activation, rng):
    x, (w, w_scale), bias = floats(rng, (M, K), dtype), weight(rng, N, K), floats(rng, N, dtype)
    got = tn.int8_linear(x, w, w_scale, bias, activation)
    assert got.dtype == DTYPES[dtype]
    same(got, reference_linear(plain(x), w, w_scale, plain(bias), activation))


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_int8_linear_out_dtype(isa, out_dtype, rng):
    x, (w, w_scale) = floats(rng, (3, 4, 40), "bfloat16"), weight(rng, 19, 40)
    expected = reference_linear(plain(x), w, w_scale, None, "none", out_dtype)
    same(tn.int8_linear(x, w, w_scale, out_dtype=out_dtype), expected)
    same(tn.int8_linear(x, w, w_scale, out_dtype=DTYPES[out_dtype]), expected)
    out = np.zeros((3, 4, 19), DTYPES[out_dtype])
    assert tn.int8_linear(x, w, w_scale, out=out) is out
    same(out, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_out(isa, activation, rng):
    x, (w, w_scale) = floats(rng, (17, 129)), weight(rng, 31, 129)
    x[3, 5] = np.nan
    bias, out_scale = floats(rng, 31), np.array([0.05], np.float32)
    bias[:3] = np.nan, np.inf, -np.inf
    expected = reference_linear(x, w, w_scale, bias, activation, "int8", out_scale)
    got = tn.int8_linear(x, w, w_scale, bias, activation, "int8", out_scale=out_scale)
    same(got, expected)
    q, scale = tn.quantize_int8(x)
    out = np.full((20, 40), 99, np.int8)
    tn.int8_mm(q, w, scale, w_scale, bias, activation, out=out[1:18, 2:33], out_scale=out_scale)
    same(out[1:18, 2:33], expected)
    out[1:18, 2:33] = 99
    assert (out == 99).all(), "wrote outside of out"


@pytest.mark.parametrize("M,N,K", SHAPES)
def test_int8_pack_round_trip(M, N, K, rng):
    b, _ = weight(rng, N, K)
    packed = tn.int8_pack(b)
    assert packed.ctypes.data % 64 == 0
    same(tn.int8_unpack(packed, N, K), b)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("M,N,K", [(0, 5, 8), (3, 17, 0), (1, 33, 70), (5, 16, 64), (17, 31, 129)])
def test_int8_weight_mm(isa, M, N, K, zero, group_size, rng):
    x, (w, scale) = floats(rng, (M, K)), weight(rng, N, K)
    if group_size is not None:
        groups = max(-(-K // group_size), 1)
        scale = rng.uniform(0.001, 0.02, (groups, N)).astype(np.float32)
    zero_point = rng.integers(-20, 20, scale.shape, dtype=np.int8) if zero else None
    arguments = (zero_point, floats(rng, N), group_size, "silu")
    expected = reference_weight_mm(x, w, scale, *arguments)
    same(tn.int8_weight_mm(x, w, scale, *arguments), expected)
    same(tn.int8_weight_mm(x, tn.int8_pack(w), scale, *arguments), expected)


# --- the same bits for every batch and every number of threads


@pytest.fixture
def threads():
    yield tn.set_num_threads
    tn.set_num_threads(0)


def test_threads_and_batch_do_not_change_a_bit(isa, threads, rng):
    x, (w, w_scale) = floats(rng, (97, 515)), weight(rng, 301, 515)
    packed = tn.int8_pack(w)
    expected = tn.int8_linear(x, packed, w_scale, activation="gelu")
    for count in (1, 2, 3, 7):
        threads(count)
        assert tn.get_num_threads() == count
        same(tn.int8_linear(x, packed, w_scale, activation="gelu"), expected)
    for m in (1, 2, 15, 33):
        same(tn.int8_linear(x[:m], packed, w_scale, activation="gelu"), expected[:m])


def test_set_num_threads_bad():
    with pytest.raises(ValueError, match="set_num_threads: expected 0 .* got -1"):
        tn.set_num_threads(-1)


def test_python_threads_at_once(threads, rng):
    threads(2)
    x, (w, w_scale) = floats(rng, (64, 256)), weight(rng, 256, 256)
    expected = tn.int8_linear(x, w, w_scale)
    wrong = []

    def work():
        for _ in range(50):
            if not np.array_equal(tn.int8_linear(x, w, w_scale), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_gil_is_released(threads, rng):
    # With a switch interval this long the other thread runs only if the kernel lets go of the GIL.
    x, (w, w_scale) = floats(rng, (512, 1024)), weight(rng, 512, 1024)
    started, done = threading.Event(), threading.Event()
    threads(1)
    tn.set_isa("scalar")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)

    def work():
        started.set()
        tn.int8_linear(x, w, w_scale)
        done.set()

    try:
        worker = threading.Thread(target=work)
        worker.start()
        started.wait()
        still_running = not done.is_set()
        worker.join()
    finally:
        sys.setswitchinterval(interval)
        tn.set_isa(None)
    assert still_running


def forked(x, w, w_scale, connection):
    connection.send(tn.int8_linear(x, w, w_scale))


def test_pool_after_fork(threads, rng):
    threads(2)
    x, (w, w_scale) = floats(rng, (64, 512)), weight(rng, 512, 512)
    expected = tn.int8_linear(x, w, w_scale)  # starts the pool, whose threads a child does not have
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=forked, args=(x, w, w_scale, sender), daemon=True
    )
    child.start()
    assert receiver.poll(60), "the child hangs"
    same(receiver.recv(), expected)
    child.join()


# --- how arrays lie in memory


def misaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


LAYOUTS = {
    "rows_sliced": lambda x: np.repeat(x, 2, axis=0)[::2],
    "columns_sliced": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
    "part_of_wider": lambda x: np.concatenate([x, x], axis=-1)[..., : x.shape[-1]],
    "rows_reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "columns_reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "fortran": np.asfortranarray,
    "misaligned": misaligned,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rng):
    x, (w, w_scale), bias = floats(rng, (6, 40)), weight(rng, 24, 40), floats(rng, 24)
    expected = tn.int8_linear(x, w, w_scale, bias)
    turned = LAYOUTS[layout]
    np.testing.assert_array_equal(turned(x), x)
    same(tn.int8_linear(turned(x), w, w_scale, bias), expected)
    same(tn.int8_linear(x, turned(w), w_scale, bias), expected)
    same(tn.int8_unpack(tn.int8_pack(turned(w)), 24, 40), w)
    same(tn.int8_linear(x, w, w_scale[::-1][::-1], np.repeat(bias, 2)[::2]), expected)
    q, scale = tn.quantize_int8(turned(x))
    same(q, reference_quantize(x)[0])
    same(tn.int8_mm(turned(q), turned(w), scale, w_scale, bias), expected)


def test_broadcast_and_any_rank(rng):
    row, (w, w_scale) = floats(rng, 40), weight(rng, 24, 40)
    one = tn.int8_linear(row, w, w_scale)
    assert one.shape == (24,)
    same(tn.int8_linear(np.broadcast_to(row, (5, 40)), w, w_scale), np.broadcast_to(one, (5, 24)))
    x = floats(rng, (2, 5, 3, 40))
    expected = tn.int8_linear(x, w, w_scale)
    same(tn.int8_linear(x.transpose(1, 2, 0, 3), w, w_scale), expected.transpose(1, 2, 0, 3))
    same(tn.int8_linear(x[:, ::2], w, w_scale), expected[:, ::2])


def test_out_with_row_stride(isa, rng):
    x, (w, w_scale) = floats(rng, (6, 40)), weight(rng, 24, 40)
    wide = np.full((6, 50), 7, np.float32)
    tn.int8_linear(x, w, w_scale, out=wide[:, 3:27])
    same(wide[:, 3:27], tn.int8_linear(x, w, w_scale))
    assert (wide[:, :3] == 7).all() and (wide[:, 27:] == 7).all()


# --- DLPack


class Producer:
    """An array behind __dlpack__ alone, as another library's would be."""

    def __init__(self, array, versioned=True):
        self.array = array
        self.versioned = versioned

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        if options and not self.versioned:
            raise TypeError("from before DLPack 1.0")
        return self.array.__dlpack__(**options)


@pytest.mark.parametrize("versioned", [True, False], ids=["1.0", "0.x"])
def test_dlpack(versioned, rng):
    x, (w, w_scale), bias = floats(rng, (6, 80))[:, ::2], weight(rng, 24, 40), floats(rng, 24)
    references = sys.getrefcount(x)
    wrapped = [Producer(array, versioned) for array in (x, w, w_scale, bias)]
    same(tn.int8_linear(*wrapped), tn.int8_linear(x, w, w_scale, bias))
    out = np.zeros((6, 24), np.float32)
    target = Producer(out, versioned)
    assert tn.int8_linear(*wrapped, out=target) is target
    same(out, tn.int8_linear(x, w, w_scale, bias))
    del wrapped
    assert sys.getrefcount(x) == references, "the tensor was not given back"


def test_dlpack_read_only_out(rng):
    x, (w, w_scale) = floats(rng, (6, 40)), weight(rng, 24, 40)
    out = np.zeros((6, 24), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="int8_linear: expected out writable, got a read-only"):
        tn.int8_linear(x, w, w_scale, out=Producer(out))


def test_gpu_tensor_is_refused():
    class OnGpu(Producer):
        def __dlpack_device__(self):
            return (2, 0)

    with pytest.raises(
        ValueError, match="quantize_int8: expected x in CPU memory, got DLPack device"
    ):
        tn.quantize_int8(OnGpu(np.ones((2, 3), np.float32)))


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    x, (w, w_scale) = floats(rng, (6, 40), "bfloat16"), weight(rng, 24, 40)
    expected = tn.int8_linear(x, w, w_scale)
    tx = torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    tw, ts = torch.from_numpy(w), torch.from_numpy(w_scale)
    same(tn.int8_linear(tx, tw, ts), expected)
    out = torch.empty(6, 24, dtype=torch.bfloat16)
    assert tn.int8_linear(tx, tw, ts, out=out) is out
    same(out.view(torch.uint16).numpy(), expected.view(np.uint16))
    same(tn.int8_linear(tx[:0], tw, ts), expected[:0])
    with pytest.raises(BufferError, match="grad"):
        tn.quantize_int8(torch.ones(2, 3, requires_grad=True))


# --- in a process of its own


def python(*lines, **environment):
    command = [sys.executable, "-c", "\n".join(lines)]
    env = {**os.environ, **environment}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    return run.returncode, run.stdout + run.stderr


def test_import_brings_no_torch():
    code, text = python(
        "import sys, numpy, trimtab.numpy as tn",
        "tn.quantize_int8(numpy.ones((2, 3), numpy.float32))",
        "bad = [name for name in sys.modules if name.split('.')[0] in ('torch', 'triton', 'ml_dtypes')]",
        "assert not bad, bad",
    )
    assert code == 0, text


def test_bfloat16_without_ml_dtypes():
    code, text = python(
        "import sys, numpy, trimtab.numpy as tn",
        "sys.modules['ml_dtypes'] = None",
        "x = numpy.ones((2, 4), numpy.float32)",
        "tn.int8_linear(x, x.astype('i1'), x[:, 0], out_dtype='bfloat16')",
    )
    assert code == 1 and "TypeError: int8_linear: expected the package ml_dtypes" in text, text


@pytest.mark.parametrize("name", tn.available_isas())
def test_isa_from_environment(name):
    code, text = python("import trimtab.numpy as tn", "print(tn.get_isa())", TRIMTAB_ISA=name)
    assert (code, text.strip()) == (0, name)


def test_bad_isa_from_environment():
    lines = (
        "import numpy, trimtab.numpy as tn",
        "x = numpy.ones((2, 4), numpy.float32)",
        "tn.quantize_int8(x)",
    )
    code, text = python(*lines, TRIMTAB_ISA="sse9")
    assert code == 1 and "ValueError: TRIMTAB_ISA: expected scalar, avx2" in text, text
