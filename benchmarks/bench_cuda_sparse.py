"""The sparse products on a GPU against cuBLAS and cuSPARSELt, in one run.

    python benchmarks/bench_cuda_sparse.py [--quick] [--device cuda] [--only decode blocks ...]

decode     bitmap_linear, bf16 and int8 values, M = 1 ... 32, against nn.Linear in bf16; beside it the
           time that the bytes alone take at the copy bandwidth measured in the same rounds
blocks     block_linear, bf16 and int8 values, blocks of 16, 32 and 64, many rows
thin       block_linear by multiply-adds: blocks of 64 in float32, blocks of 1 x 16
gradients  of block_linear, for x and for the kept values, against the dense layer's products
two_four   sparse24_linear, bf16 and int8, M >= 2048; cuSPARSELt by its own search, where torch has it
compress   sparse24_pack one way and both ways against a clone of the weight

The first three and the gradient of values also in Triton, by its name, where it is installed.

Every turn finds L2 cold (gpu.py). Writes <device>.csv: every figure, the bars of the project and what
came of them, losses too. Where torch sees no GPU it measures nothing and says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu
import harness
import torch
from gpu import Gpu, Table
from torch import Tensor
from torch.nn.functional import linear

from trimtab import ops
from trimtab.ops.backend import has_triton
from trimtab.ops.sparse24_compress import sparse24_unpack
from trimtab.ops.sparse24_linear import sparse24_pack, sparse24_pack_both

DECODE = ((4096, 4096), (11008, 4096))  # N, K
DECODE_ROWS = (1, 2, 4, 8, 16, 32)
SPARSITIES = (0.5, 0.7, 0.9)
DECODE_BARS = {0.5: 1.5, 0.7: 2.1, 0.9: 3.5}  # x cuBLAS bf16, M <= 16
BLOCKS = ((4096, 4096), (11008, 4096))
BLOCK_ROWS = (1, 16, 256, 2048, 8192)
BLOCK_BAR = 5.0  # 64 x 64, 90 %, M = 8192
TWO_FOUR = ((4096, 4096), (11008, 4096), (4096, 11008))
TWO_FOUR_ROWS = (2048, 8192)
TWO_FOUR_BARS = {"2:4 bf16": 1.25, "2:4 int8": 2.2}  # x cuBLAS bf16
COMPRESS_BAR = 1.4  # x a clone, both ways
FAILURES: list[str] = []  # shapes whose result was wrong
CUBLAS, CUSPARSELT = "cuBLAS bf16", "cuSPARSELt bf16"


@dataclass
class Weight:
    """A pruned weight: dense bf16, and for each name a call of our op and the bytes it has to read."""

    dense: Tensor
    forms: dict[str, tuple[Callable[[Tensor], Tensor], int]]


def main() -> int:
    parser = harness.parser(__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu: only to see whether it works")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS))
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="of rounds a shape (%(default)s)"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no GPU")
        return 0
    if options.device == "cuda" and (problem := ops.backend.cuda_problem()):
        print(f"bench_cuda_sparse: CUDA C++ does not answer here: {problem}", file=sys.stderr)
        return 1
    harness.start(options)
    table, device = Table(options.device, options.out), Gpu(options.device)
    table.path = table.path.with_name(f"sparse-{table.path.name}")
    print(", ".join(f"{key} {value}" for key, value in table.stamp.items()), flush=True)
    for name in options.only or SECTIONS:
        SECTIONS[name](device, table, options)
        table.write()  # after each: what was measured survives what follows
    for failure in FAILURES:
        print(f"NOT TIMED: {failure}", file=sys.stderr)
    return 1 if FAILURES else 0


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def pruned(N: int, K: int, block: int, sparsity: float, device: torch.device) -> Tensor:
    """bf16 [N, K], a random share of its blocks kept."""
    keep = torch.rand(-(-N // block), -(-K // block), device=device) >= sparsity
    keep = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)[:N, :K]
    return (torch.randn(N, K, device=device) / K**0.5).bfloat16() * keep


def overloads(name: str, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """An op as it is called, and by Triton."""
    op = getattr(torch.ops.trimtab, name)
    every = {"": op.inference if "inference" in op.overloads() else op.default}
    return every | ({" Triton": op.triton} if device.type == "cuda" and has_triton() else {})


def bitmap_weight(N: int, K: int, sparsity: float, device: torch.device) -> Weight:
    dense = pruned(N, K, 1, sparsity, device)
    codes, scale = ops.quantize_int8(dense)
    forms: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {}
    for name, parts, s in (
        ("bitmap bf16", ops.bitmap_pack(dense), None),
        ("bitmap int8", ops.bitmap_pack(codes, dense != 0), scale),
    ):
        for who, op in overloads("bitmap_linear", device).items():
            call = lambda x, op=op, parts=parts, s=s: op(x, *parts, s)  # noqa: E731
            forms[name + who] = (call, size_of(*parts[:2]))
    return Weight(dense, forms)


def block_weight(N: int, K: int, block: int, sparsity: float, device: torch.device) -> Weight:
    dense = pruned(N, K, block, sparsity, device)
    codes, scale = ops.quantize_int8(dense)
    forms: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {}
    for name, weight, s in (("bf16", dense, None), ("int8", codes, scale)):
        parts = ops.block_pack(weight, (block, block), refuse_larger=False)
        for who, op in overloads("block_linear", device).items():
            call = lambda x, op=op, parts=parts, s=s: op(x, *parts, s, None, 0, N)  # noqa: E731
            forms[f"block {block} {name}{who}"] = (call, size_of(*parts))
    return Weight(dense, forms)


def thin_weight(N: int, K: int, kind: str, device: torch.device) -> Weight:
    """A tenth kept, in the dtype and the blocks of multiply-adds."""
    block, dtype = ((64, 64), torch.float32) if kind == "64 fp32" else ((1, 16), torch.bfloat16)
    keep = torch.rand(N // block[0], K // block[1], device=device) >= 0.9
    keep = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    dense = ((torch.randn(N, K, device=device) / K**0.5) * keep).to(dtype)
    parts = ops.block_pack(dense, block, refuse_larger=False)
    forms: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {}
    for who, op in overloads("block_linear", device).items():
        call = lambda x, op=op: op(x, *parts, None, None, 0, N)  # noqa: E731
        forms[f"block {kind}{who}"] = (call, size_of(*parts))
    return Weight(dense, forms)


class CuSparseLt:
    """torch's way to cuSPARSELt, with the algorithm that its search names for the rows of x."""

    def __init__(self, dense: Tensor) -> None:
        self.packed, self.algorithms = torch._cslt_compress(dense), {}

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) not in self.algorithms:
            self.algorithms[len(x)] = torch._cslt_sparse_mm_search(
                self.packed, x.t(), transpose_result=True
            )
        algorithm = self.algorithms[len(x)]
        return torch._cslt_sparse_mm(self.packed, x.t(), transpose_result=True, alg_id=algorithm)


def two_four_weight(N: int, K: int, device: torch.device) -> Weight:
    full = (torch.randn(N, K, device=device) / K**0.5).bfloat16()
    values, indices = ops.sparse24_compress(full)
    dense = sparse24_unpack(values, indices, K)
    codes, scale = ops.quantize_int8(dense)
    forms: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {}
    for name, weight, s in (("2:4 bf16", dense, None), ("2:4 int8", codes, scale)):
        if device.type != "cuda":  # to see whether it works: a bitmap weight, as on every CPU
            parts = ops.bitmap_pack(weight)
            call = lambda x, parts=parts, s=s: ops.bitmap_linear(x, *parts, s)  # noqa: E731
        else:
            parts = sparse24_pack(weight)
            op = torch.ops.trimtab.sparse24_linear.inference
            call = lambda x, parts=parts, s=s, op=op: op(x, *parts, s)  # noqa: E731
        forms[name] = (call, size_of(*parts))
    try:
        forms[CUSPARSELT] = (CuSparseLt(dense), 0)
    except RuntimeError as error:
        print(f"{CUSPARSELT}: not timed: {str(error).splitlines()[0]}", flush=True)
    return Weight(dense, forms)


def runs(call: gpu.Call, what: str) -> bool:
    """Whether it does. Triton compiles at the first call, and what fails there is no reason to leave
    the rest unmeasured."""
    try:
        call()
    except Exception as error:
        FAILURES.append(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return False
    return True


def compare(
    device: Gpu, table: Table, section: str, weight: Weight, M: int, seconds: float, **extra: Any
) -> dict[str, harness.Timing]:
    """All forms of the weight and cuBLAS in the same rounds; those that are wrong are left out."""
    N, K = weight.dense.shape
    x = torch.randn(M, K, device=device.device).to(weight.dense.dtype)
    want = linear(x[:64].float(), weight.dense.float())
    peer = CUBLAS if x.dtype == torch.bfloat16 else "cuBLAS fp32"
    calls: dict[str, gpu.Call] = {peer: lambda: linear(x, weight.dense)}
    for name, (call, _) in weight.forms.items():
        if not runs(lambda call=call: call(x), f"{name} at M,K,N={M},{K},{N}"):
            continue
        error = (call(x)[:64].float() - want).norm() / want.norm().clamp(min=1e-30)
        if float(error) < (0.03 if "int8" in name else 0.01):
            calls[name] = lambda call=call: call(x)
        else:
            FAILURES.append(f"{name} at M,K,N={M},{K},{N}: error {float(error):.3g}")
    times = device.interleave(calls, seconds)
    for name, value in times.items():
        table.add(section, name, (M, K, N), value, **extra)
    return times


def judge(table: Table, what: str, value: float, bar: float, most: bool = False) -> None:
    """Met from the bar on, or with `most` up to it."""
    met = value <= bar if most else value >= bar
    print(f"{'met ' if met else 'MISSED'} {what}: {value:.3g}, bar {bar}", flush=True)
    table.add("bars", "trimtab", ("", "", ""), value, metric=what, unit="", bar=bar, met=met)


def copy_rate(device: Gpu, quick: bool) -> float:
    """Bytes a microsecond, read and written."""
    source = torch.empty(1 << (16 if quick else 28), dtype=torch.int8, device=device.device)
    target = torch.empty_like(source)
    time = device.interleave({"copy": lambda: target.copy_(source)}, 0.02)["copy"].median
    return 2 * source.numel() / time


def bench_decode(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    rate = copy_rate(device, options.quick)
    for sparsity in SPARSITIES:
        worst = float("inf")
        for N, K in ((48, 64),) if options.quick else DECODE:
            weight = bitmap_weight(N, K, sparsity, device.device)
            for M in (1, 9) if options.quick else DECODE_ROWS:
                seconds = 0.01 if options.quick else options.seconds
                times = compare(device, table, "decode", weight, M, seconds, sparsity=sparsity)
                line = f"decode {M},{K},{N} {sparsity:.0%} cuBLAS {times[CUBLAS].median:7.1f} us"
                for name, (_, size) in weight.forms.items():
                    if name not in times:
                        continue
                    mine = times[name].median
                    line += f"; {name} {mine:.1f} us, x {times[CUBLAS].median / mine:.2f}, "
                    line += f"{size / rate / mine:.0%} of the floor"
                    if name == "bitmap bf16" and M <= 16:
                        worst = min(worst, times[CUBLAS].median / mine)
                print(line, flush=True)
        judge(
            table, f"bitmap decode, {sparsity:.0%}, worst of M <= 16", worst, DECODE_BARS[sparsity]
        )


def bench_blocks(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    for block in (16, 32, 64):
        for N, K in ((128, 64),) if options.quick else BLOCKS:
            weight = block_weight(N, K, block, 0.5 if options.quick else 0.9, device.device)
            for M in (1, 40) if options.quick else BLOCK_ROWS:
                seconds = 0.01 if options.quick else options.seconds
                times = compare(device, table, "blocks", weight, M, seconds, block=block)
                line = f"blocks {block} {M},{K},{N} cuBLAS {times[CUBLAS].median:7.1f} us"
                for name in weight.forms:
                    if name in times:
                        ratio = times[CUBLAS].median / times[name].median
                        line += f"; {name} {times[name].median:.1f} us, x {ratio:.2f}"
                print(line, flush=True)
            name = "block 64 bf16"
            if block == 64 and name in times:
                ratio = times[CUBLAS].median / times[name].median
                judge(table, f"block 64 x 64, 90 %, M = {M}, {K}x{N}", ratio, BLOCK_BAR)


def ratios(section: str, shape: tuple[int, int, int], times: dict[str, harness.Timing]) -> None:
    """A line of what was timed; the peer comes first."""
    (M, K, N), (peer, *ours) = shape, times
    line = f"{section} {M},{K},{N} {peer} {times[peer].median:7.1f} us"
    for name in ours:
        line += f"; {name} {times[name].median:.1f} us, x "
        line += f"{times[peer].median / times[name].median:.2f}"
    print(line, flush=True)


def bench_thin(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    """The dense peer has the weight's dtype."""
    for kind in ("64 fp32", "1x16 bf16"):
        for N, K in ((128, 64),) if options.quick else BLOCKS:
            weight = thin_weight(N, K, kind, device.device)
            for M in (1, 40) if options.quick else BLOCK_ROWS:
                seconds = 0.01 if options.quick else options.seconds
                times = compare(device, table, "thin", weight, M, seconds, block=kind)
                ratios(f"thin {kind}", (M, K, N), times)


def bench_gradients(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    N, K, M = (128, 64, 40) if options.quick else (4096, 4096, 8192)
    grad_x, of_values = (
        torch.ops.trimtab.block_grad_x,
        overloads("block_grad_values", device.device),
    )
    x, grad = (torch.randn(M, size, device=device.device).bfloat16() for size in (K, N))
    for block in ((16, 16), (32, 32), (64, 64), (1, 16)):
        keep = torch.rand(N // block[0], K // block[1], device=device.device) >= 0.9
        keep = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        dense = torch.randn(N, K, device=device.device).bfloat16() * keep
        values, crow, col = ops.block_pack(dense, block, keep, refuse_larger=False)
        name = f"block {block[0]}x{block[1]}"
        products: dict[str, dict[str, gpu.Call]] = {
            "of x": {
                CUBLAS: lambda dense=dense: grad @ dense,
                name: lambda v=values, r=crow, c=col: grad_x(grad, v, r, c, K),
            },
            "of values": {CUBLAS: lambda: grad.t() @ x},
        }
        for who, op in of_values.items():
            call = lambda op=op, r=crow, c=col, b=block: op(grad, x, r, c, *b)  # noqa: E731
            if runs(call, f"gradient of values, {name}{who}"):
                products["of values"][name + who] = call
        for what, calls in products.items():
            seconds = 0.01 if options.quick else options.seconds
            times = device.interleave(calls, seconds)
            for who, value in times.items():
                table.add("gradients", who, (M, K, N), value, block=name, of=what)
            ratios(f"gradient {what}", (M, K, N), times)


def bench_two_four(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    worst = dict.fromkeys((*TWO_FOUR_BARS, CUSPARSELT), float("inf"))
    for N, K in ((128, 64),) if options.quick else TWO_FOUR:
        weight = two_four_weight(N, K, device.device)
        for M in (40,) if options.quick else TWO_FOUR_ROWS:
            seconds = 0.01 if options.quick else options.seconds
            times = compare(device, table, "two_four", weight, M, seconds)
            ratios("2:4", (M, K, N), times)
            for name in TWO_FOUR_BARS:
                if name in times:
                    worst[name] = min(worst[name], times[CUBLAS].median / times[name].median)
            if CUSPARSELT in times and "2:4 bf16" in times:
                ratio = times[CUSPARSELT].median / times["2:4 bf16"].median
                worst[CUSPARSELT] = min(worst[CUSPARSELT], ratio)
    for name, bar in TWO_FOUR_BARS.items():
        if worst[name] < float("inf"):
            judge(table, f"{name}, M >= 2048, x {CUBLAS}, worst", worst[name], bar)
    if worst[CUSPARSELT] < float("inf"):
        judge(table, f"2:4 bf16, M >= 2048, x {CUSPARSELT}, worst", worst[CUSPARSELT], 1.0)


def bench_compress(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    on_gpu = device.device.type == "cuda"
    pack, pack_both = (
        (sparse24_pack, sparse24_pack_both)
        if on_gpu
        else (ops.sparse24_compress, ops.sparse24_compress)  # to see whether it works
    )
    worst = 0.0
    for N, K in ((128, 64),) if options.quick else TWO_FOUR:
        for dtype in (torch.bfloat16, torch.int8):
            weight = (40 * torch.randn(N, K, device=device.device)).clamp(-127, 127).to(dtype)
            calls: dict[str, gpu.Call] = {
                "clone": weight.clone,
                "sparse24_pack": lambda weight=weight: pack(weight),
                "sparse24_pack_both": lambda weight=weight: pack_both(weight),
            }
            times = device.interleave(calls, 0.01 if options.quick else options.seconds)
            kind = str(dtype).removeprefix("torch.")
            for name, value in times.items():
                table.add("compress", name, ("", K, N), value, dtype=kind)
            one, both = (times[name].median / times["clone"].median for name in list(calls)[1:])
            worst = max(worst, both)
            print(
                f"compress {N},{K} {kind} clone {times['clone'].median:.1f} us; one way x {one:.2f}, "
                f"both ways x {both:.2f}",
                flush=True,
            )
    judge(table, "prune + compress both ways, x a clone, worst", worst, COMPRESS_BAR, most=True)


SECTIONS = {
    "decode": bench_decode,
    "blocks": bench_blocks,
    "thin": bench_thin,
    "gradients": bench_gradients,
    "two_four": bench_two_four,
    "compress": bench_compress,
}

if __name__ == "__main__":
    sys.exit(main())
