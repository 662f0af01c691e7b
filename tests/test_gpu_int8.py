"""CUDA C++ and Triton against the CPU on a GPU: the same bits. Runs where there is one (`make gpu`).

Inputs are fresh at every run: the seed comes from the clock and is printed; TRIMTAB_SEED repeats a run.
Memory that outputs may get is filled with NaN before.
"""

from __future__ import annotations

import copy
import io
import os
import time
from collections.abc import Callable, Iterator

import cases
import pytest
import torch

from trimtab import nn, ops
from trimtab.nn.int8_weight import padded_rows

pytestmark = pytest.mark.gpu

_ops = torch.ops.trimtab
# Who computes: the op as it is called, CUDA C++ where it can be, and Triton by its name.
LINEAR = {"cuda": _ops.int8_linear.inference, "triton": _ops.int8_linear.triton}
MM = {"cuda": _ops.int8_mm.default, "triton": _ops.int8_mm.triton}
QUANTIZE = {"cuda": _ops.quantize_int8.default, "triton": _ops.quantize_int8.triton}
WEIGHT_MM = {"cuda": _ops.int8_weight_mm.inference, "triton": _ops.int8_weight_mm.triton}
WHO = pytest.mark.parametrize("who", ["cuda", "triton"])

# Edges of the CUDA kernels' tiles: 16, 64, 128, 256 rows and columns, 64 and 128 steps of K.
LARGER = [
    (16, 4096, 4096),
    (17, 4099, 1001),
    (64, 256, 2048),
    (65, 129, 4096),
    (127, 255, 1024),
    (128, 128, 128),
    (129, 513, 640),
    (256, 1000, 4097),
    (513, 1023, 2064),
    (1, 8191, 8192),
    (2048, 24, 8),
    (5, 3, 133_144),
]


@pytest.fixture
def fresh() -> torch.Generator:
    seed = int(os.environ.get("TRIMTAB_SEED", time.time_ns() % 2**62))
    print(f"TRIMTAB_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What torch's allocator hands out next holds NaN."""
    sizes = [2**k for k in range(9, 28, 2)]
    blocks = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes * 2]
    del blocks
    yield
    torch.cuda.synchronize()  # a fault belongs to the test that made it


def integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def operands(N: int, K: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """int8 weight, its scale, bias of a random dtype; on the CPU."""
    weight, scale = ops.quantize_int8(torch.randn(N, K, generator=generator))
    dtype = cases.DTYPES[integer(0, 3, generator)]
    return weight, scale, torch.randn(N, generator=generator).to(dtype)


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.cuda() for t in tensors]


def test_cuda_answers() -> None:
    """Or "cuda" below means Triton."""
    if ops.backend.cuda_problem():
        pytest.skip(ops.backend.cuda_problem())
    assert ops.backend.describe()[-1] in ("tensors on a GPU: CUDA C++", "tensors on a GPU: Triton")


@WHO
@pytest.mark.parametrize("shape", cases.SHAPES + LARGER, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_linear(who: str, shape, dtype: torch.dtype, fresh) -> None:
    M, N, K = shape
    x = cases.awkward_rows(M, K, dtype, fresh)
    weight, scale, bias = operands(N, K, fresh)
    activation = integer(0, 5, fresh)
    out_dtype = cases.DTYPES[integer(0, 3, fresh)]
    want = _ops.int8_linear.default(x, ops.int8_pack(weight), scale, bias, activation, out_dtype)
    gx, gw, gs, gb = on_gpu(x, weight, scale, bias)
    for w in (gw, padded_rows(gw)):
        cases.assert_same_bits(LINEAR[who](gx, w, gs, gb, activation, out_dtype), want)
    if who == "cuda":
        out = torch.full((M, N), float("nan"), dtype=out_dtype, device="cuda")
        _ops.int8_linear.out(gx, gw, gs, gb, activation, out=out)
        cases.assert_same_bits(out, want)
    q, q_scale = QUANTIZE[who](gx)
    for got, expected in zip((q, q_scale), ops.quantize_int8(x), strict=True):
        cases.assert_same_bits(got, expected)
    cases.assert_same_bits(MM[who](q, gw, q_scale, gs, gb, activation, out_dtype), want)


@WHO
@pytest.mark.parametrize("shape", [(5, 33, 70), *LARGER[:9]], ids=cases.ident)
def test_int8_out(who: str, shape, fresh) -> None:
    """Codes for a next product: columns of NaN and Inf, scales with and without a reciprocal."""
    M, N, K = shape
    x = cases.awkward_rows(M, K, torch.bfloat16, fresh)
    weight, scale, _ = operands(N, K, fresh)
    bias, packed = cases.awkward_bias(N, fresh), ops.int8_pack(weight)
    args = on_gpu(x, weight, scale, bias)
    q, q_scale = QUANTIZE[who](args[0])
    for activation in range(5):
        for value in cases.OUT_SCALES:
            tail, out_scale = (activation, torch.int8), torch.tensor([value])
            want = _ops.int8_linear.default(x, packed, scale, bias, *tail, out_scale)
            got = LINEAR[who](*args, *tail, out_scale.cuda())
            cases.assert_same_bits(got, want)
            got = MM[who](q, args[1], q_scale, *args[2:], *tail, out_scale.cuda())
            cases.assert_same_bits(got, want)


@WHO
def test_random_shapes(who: str, fresh) -> None:
    for _ in range(60):
        M, N, K = (integer(1, limit, fresh) for limit in (700, 1500, 3000))
        x = cases.awkward_rows(M, K, torch.bfloat16, fresh)
        weight, scale, bias = operands(N, K, fresh)
        want = ops.int8_linear(x, ops.int8_pack(weight), scale, bias, "gelu")
        got = LINEAR[who](*on_gpu(x, weight, scale, bias), 2)
        cases.assert_same_bits(got, want)


@WHO
def test_batch_size_does_not_matter(who: str, fresh) -> None:
    """A row has the same bits in every batch, whichever kernel the batch gets."""
    weight, scale, bias = on_gpu(*operands(640, 1024, fresh))
    x = torch.randn(600, 1024, generator=fresh).bfloat16().cuda()
    whole = LINEAR[who](x, weight, scale, bias)
    for M in (*range(1, 70), 127, 128, 129, 255, 256, 257, 511, 512, 513):
        assert torch.equal(LINEAR[who](x[:M], weight, scale, bias), whole[:M]), M


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
    "expanded-row": lambda x: x[3:4].expand(6, -1),
    "expanded-4d": lambda x: x[None, :, None].expand(2, -1, 3, -1),
    "1d": lambda x: x[0],
    "4d": lambda x: x.reshape(3, 8, 10, 4).transpose(0, 2),
    "empty": lambda x: x[:0],
    "misaligned": lambda x: x[:, 1:],
    "rows-apart": lambda x: x[::3, :32],
}


@WHO
@pytest.mark.parametrize("view", VIEWS)
def test_strides_and_ranks(who: str, view: str, fresh) -> None:
    whole = torch.randn(24, 40, generator=fresh)
    x, gx = VIEWS[view](whole), VIEWS[view](whole.cuda())
    weight, scale, bias = operands(19, x.shape[-1], fresh)
    want = ops.int8_linear(x, weight, scale, bias)
    wide = torch.full((19, x.shape[-1] + 5), 77, dtype=torch.int8, device="cuda")
    gw, gs, gb = on_gpu(weight, scale, bias)
    wide[:, 3:-2] = gw
    for w in (gw, wide[:, 3:-2], gw.t().contiguous().t()):
        cases.assert_same_bits(LINEAR[who](gx, w, gs, gb), want)
    for got, expected in zip(QUANTIZE[who](gx), ops.quantize_int8(x), strict=True):
        cases.assert_same_bits(got, expected)


@WHO
def test_all_int8_values(who: str, fresh) -> None:
    """-128 too, and the largest sums there are."""
    for M, N, K in ((33, 70, 1000), (3, 5, 131_071)):
        a, b = cases.int8(M, K, fresh), cases.int8(N, K, fresh)
        a[0], b[0] = -128, -128
        a_scale, b_scale = torch.rand(M, generator=fresh), torch.rand(N, generator=fresh)
        want = ops.int8_mm(a, b, a_scale, b_scale, out_dtype=torch.float32)
        got = MM[who](*on_gpu(a, b, a_scale, b_scale), None, 0, torch.float32)
        cases.assert_same_bits(got, want)


def test_a_billion_outputs(fresh) -> None:
    """CUDA and Triton equal the CPU on 10^9 outputs, rows of NaN, Inf, zeros and subnormals included."""
    M, N, done = 8192, 8192, 0
    while done < 10**9:
        K, dtype = integer(1, 300, fresh), cases.DTYPES[integer(0, 3, fresh)]
        activation, out_dtype = integer(0, 5, fresh), cases.DTYPES[integer(0, 3, fresh)]
        x = cases.awkward_rows(M, K, dtype, fresh)
        weight, scale, bias = operands(N, K, fresh)
        packed = ops.int8_pack(weight)
        want = _ops.int8_linear.default(x, packed, scale, bias, activation, out_dtype).cuda()
        bits = {4: torch.int32, 2: torch.int16}[want.element_size()]
        args = on_gpu(x, weight, scale, bias)
        for who, op in LINEAR.items():
            got = op(*args, activation, out_dtype)
            same = (got.view(bits) == want.view(bits)) | (got.isnan() & want.isnan())
            assert bool(same.all()), (who, K, dtype, activation, out_dtype, int((~same).sum()))
        done += want.numel()
    print(f"{done:,} outputs equal")


# --- the quantizer behind RMSNorm and SiLU times gate

FUSED_SIZES = [(0, 64), (5, 0), (7, 1), (6, 3), (33, 1025), (300, 4096), (9, 8192), (5, 28_672)]


@WHO
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize("size", FUSED_SIZES, ids=cases.ident)
def test_fused_quantizers(who: str, size: tuple[int, int], dtype: torch.dtype, fresh) -> None:
    x = cases.awkward_rows(*size, dtype, fresh)
    up = torch.randn(size, generator=fresh).to(dtype)
    weight = torch.rand(size[1], generator=fresh) + 0.5
    calls = [
        (_ops.silu_mul_quantize_int8, (x, up)),
        (_ops.rms_norm_quantize_int8, (x, weight, 1e-6)),
        (_ops.rms_norm_quantize_int8, (x, weight.to(dtype), 0.0)),
    ]
    for op, args in calls:
        want = op.default(*args)
        moved = [a.cuda() if torch.is_tensor(a) else a for a in args]
        got = (op.default if who == "cuda" else op.triton)(*moved)
        if who == "cuda":
            q = torch.full(size, 77, dtype=torch.int8, device="cuda")
            scale = torch.full(size[:1], float("nan"), device="cuda")
            op.out(*moved, q=q, scale=scale)
            got = (*got, q, scale)
        for value, expected in zip(got, want * (len(got) // 2), strict=True):
            cases.assert_same_bits(value, expected)


# --- weight-only


@WHO
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16, 33, 64, 65, 200])
def test_weight_mm(who: str, M: int, dtype: torch.dtype, fresh) -> None:
    """NUMERICS.md section 7, the float64 product as the judge; and the same bits twice."""
    for N, K in ((4096, 4096), (33, 70), (130, 1001)):
        x = torch.randn(M, K, generator=fresh).to(dtype).cuda()
        weight, scale, bias = on_gpu(*operands(N, K, fresh))
        got = WEIGHT_MM[who](x, padded_rows(weight), scale, None, bias)
        want = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
        # Beyond 64 rows the weight is rounded to x's dtype for torch's own product.
        eps = torch.finfo(dtype).eps * (4 if M > 64 else 1)
        bound = 2 * K**0.5 * torch.finfo(torch.float32).eps + eps
        assert (got.double() - want).norm() <= bound * want.norm()
        again = WEIGHT_MM[who](x, padded_rows(weight), scale, None, bias)
        assert torch.equal(got, again)


@WHO
def test_weight_mm_groups(who: str, fresh) -> None:
    for M, N, K, group in ((1, 70, 256, 64), (5, 33, 100, 32), (16, 129, 4096, 128), (3, 9, 70, 4)):
        groups = -(-K // group)
        x = torch.randn(M, K, generator=fresh).bfloat16()
        weight = cases.int8(N, K, fresh)
        scale = torch.rand(groups, N, generator=fresh)
        zero = torch.randint(-20, 20, (groups, N), dtype=torch.int8, generator=fresh)
        args = (x, weight, scale, zero, None, group, 0, torch.float32)
        want = _ops.int8_weight_mm.inference(*args)
        moved = [a.cuda() if torch.is_tensor(a) else a for a in args]
        got = WEIGHT_MM[who](*moved)
        if who == "cuda":
            out = torch.full((M, N), float("nan"), device="cuda")
            _ops.int8_weight_mm.out(*moved[:-1], out=out)
            assert torch.equal(out, got)
        bound = 2 * K**0.5 * torch.finfo(torch.float32).eps
        assert (got.cpu() - want).norm() <= 2 * bound * want.norm()  # both sums are rounded


def test_weight_mm_passes_nan_on(fresh) -> None:
    x = torch.randn(6, 512, generator=fresh).bfloat16()
    x[2, 100], x[4, 7] = float("nan"), float("inf")
    weight, scale, _ = operands(64, 512, fresh)
    got = _ops.int8_weight_mm.inference(*on_gpu(x, weight, scale)).cpu()
    assert (
        got[2].isnan().all() and not got[4].isfinite().any() and got[[0, 1, 3, 5]].isfinite().all()
    )


# --- streams, graphs, devices


def test_current_stream(fresh) -> None:
    """The op waits for what its stream does, and only its stream's later work sees the result."""
    weight, scale, bias = on_gpu(*operands(512, 512, fresh))
    x = torch.randn(64, 512, generator=fresh).bfloat16()
    want = ops.int8_linear(x.cuda(), weight, scale, bias)
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.zeros_like(x, device="cuda")
    source = x.cuda()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(source)
        got = ops.int8_linear(late, weight, scale, bias)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("M", [1, 16, 64, 700])
def test_cuda_graph(M: int, fresh) -> None:
    weight, scale, bias = on_gpu(*operands(640, 1024, fresh))
    x = torch.zeros(M, 1024, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.int8_linear(x, weight, scale, bias)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer = ops.int8_linear(x, weight, scale, bias, "silu")
        decode = ops.int8_weight_mm(x[:16], weight, scale, bias=bias)
        codes, scales = ops.quantize_int8(x)
    for _ in range(3):
        x.copy_(cases.awkward_rows(M, 1024, torch.bfloat16, fresh))
        graph.replay()
        cases.assert_same_bits(layer, ops.int8_linear(x, weight, scale, bias, "silu").cpu())
        cases.assert_same_bits(decode, ops.int8_weight_mm(x[:16], weight, scale, bias=bias).cpu())
        for got, want in zip((codes, scales), ops.quantize_int8(x), strict=True):
            cases.assert_same_bits(got, want.cpu())


def test_at_most_two_launches(fresh) -> None:
    weight, scale, bias = on_gpu(*operands(512, 512, fresh))
    for M in (1, 8, 64, 1000):
        x = torch.randn(M, 512, generator=fresh).bfloat16().cuda()
        ops.int8_linear(x, weight, scale, bias)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ops.int8_linear(x, weight, scale, bias)
            torch.cuda.synchronize()
        kernels = [
            e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        if not kernels:
            pytest.skip("the profiler sees no kernels here")
        assert len(kernels) <= 2, kernels


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_device_guard(fresh) -> None:
    """Tensors of another GPU than the current one."""
    weight, scale, bias = operands(64, 128, fresh)
    x = torch.randn(9, 128, generator=fresh)
    want = ops.int8_linear(x, weight, scale, bias)
    with torch.cuda.device(0):
        got = ops.int8_linear(*(t.to("cuda:1") for t in (x, weight, scale, bias)))
        assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    cases.assert_same_bits(got, want)
    with pytest.raises(RuntimeError, match="expected weight on cuda:0, like the others"):
        ops.int8_linear(x.to("cuda:0"), *(t.to("cuda:1") for t in (weight, scale, bias)))


def test_refusals(fresh) -> None:
    weight, scale, _ = operands(64, 128, fresh)
    x = torch.randn(9, 128, generator=fresh)
    with pytest.raises(
        RuntimeError, match="int8_linear: expected weight on cuda:0, like the others"
    ):
        ops.int8_linear(x.cuda(), weight, scale.cuda())
    with pytest.raises(RuntimeError, match="expected weight .* on a GPU, got its packed form"):
        ops.int8_linear(x.cuda(), ops.int8_pack(weight).cuda(), scale.cuda())
    with pytest.raises(RuntimeError, match="expected K <= 133144"):
        ops.int8_mm(*(torch.zeros(1, 140_000, dtype=torch.int8, device="cuda"),) * 2,
                    *(torch.ones(1, device="cuda"),) * 2)  # fmt: skip


# --- layers


@pytest.mark.parametrize("weight_only", [False, True], ids=["int8", "weight-only"])
@pytest.mark.parametrize("size", [(64, 48), (70, 33)], ids=cases.ident)
def test_layer_moves_and_stays_the_same(size, weight_only: bool, fresh) -> None:
    inputs, outputs = size
    layer = nn.Int8Linear.from_float(torch.nn.Linear(inputs, outputs), weight_only=weight_only)
    x = torch.randn(5, inputs, generator=fresh)
    want, checkpoint = layer(x), layer.state_dict()
    moved = copy.deepcopy(layer).cuda()
    assert moved.packed.stride(0) % 16 == 0 and moved.packed.shape == (outputs, inputs)
    saved = io.BytesIO()
    torch.save(moved.state_dict(), saved)
    saved.seek(0)
    for name, value in torch.load(saved, weights_only=True).items():
        assert value.is_contiguous() and torch.equal(value.cpu(), checkpoint[name]), name
    for other in (moved, copy.deepcopy(moved)):
        got = other(x.cuda())
        if weight_only:
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
        else:
            cases.assert_same_bits(got, want)
    cases.assert_same_bits(moved.cpu()(x), want)


def test_compile_and_registration(fresh) -> None:
    weight, scale, bias = on_gpu(*operands(48, 64, fresh))
    x = torch.randn(7, 64, generator=fresh).bfloat16().cuda()
    want = ops.int8_linear(x * 2, weight, scale, bias, "gelu") + 1
    run = torch.compile(
        lambda x: ops.int8_linear(x * 2, weight, scale, bias, "gelu") + 1, fullgraph=True
    )
    cases.assert_same_bits(run(x), want.cpu())
    torch.library.opcheck(_ops.int8_linear.default, (x, weight, scale, bias, 1))
    torch.library.opcheck(_ops.quantize_int8.default, (x,))
