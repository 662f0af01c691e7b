"""Latency of an MLP with half of its neurons removed by structured_, over the whole one's.

Linear, GELU, Linear, all torch's. Weights rotate over copies that together are larger than the L2
caches, so that a call finds its own in memory, as in a model. The two take turns, and with them an MLP
of FEW neurons, which shows what a call costs however few there are. The smaller one's outputs are
compared with those of the same neurons masked before it is timed.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable

import harness
import torch
from harness import Table
from torch import Tensor, nn

from trimtab import prune

BAR = 1.8
FEW = 8
CALM = 1.4
ROTATED_BYTES = 1 << 28
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# rows of x, width, neurons
SHAPES = (
    *itertools.product((1, 16, 128, 512), (768,), (3072,)),
    *itertools.product((1, 128), (4096,), (11008,)),
    (64, 256, 1024),
)
QUICK_SHAPES = ((3, 32, 64),)


def mlp(width: int, neurons: int, dtype: torch.dtype) -> nn.Sequential:
    layers = nn.Linear(width, neurons), nn.GELU(), nn.Linear(neurons, width)
    return nn.Sequential(*layers).to(dtype).eval()


def halved(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """Without half of its neurons; SystemExit if that is not what masking them gives."""
    masked, smaller = copy.deepcopy(model), copy.deepcopy(model)
    prune.structured_(masked, {"0": 0.5}, x, remove=False)
    prune.structured_(smaller, {"0": 0.5}, x)
    assert smaller[0].out_features == model[0].out_features // 2
    got, want = smaller(x).double(), masked(x).double()
    error = float((got - want).norm() / want.norm())
    if not error < (1e-5 if x.dtype == torch.float32 else 1e-2):
        raise SystemExit(f"bench_structured: removal is {error:.1e} off masking: not timed")
    return smaller


def rotate(models: list[nn.Sequential], x: Tensor) -> Callable[[], object]:
    turn = itertools.cycle(models)
    return lambda: next(turn)(x)


def unrest(times: dict[str, harness.Timing]) -> float:
    """How far apart the 20th and 80th percentile are at worst."""
    return max(time.p80 / time.p20 for time in times.values())


def calmest(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, harness.Timing]:
    """Timed again, twice at most, where something disturbed it; the run that varied least counts."""
    runs = []
    while len(runs) < 3 and (not runs or unrest(runs[-1]) > CALM):
        runs.append(harness.interleave(calls, seconds, min_rounds=9, keep=list(calls)))
    return min(runs, key=unrest)


def main() -> int:
    options = harness.parser(__doc__.partition("\n")[0]).parse_args()
    harness.start(options)
    table, ratios = Table("structured", options.out), []
    for name, dtype in DTYPES.items():
        for shape in QUICK_SHAPES if options.quick else SHAPES:
            M, width, neurons = shape
            x = torch.randn(M, width).to(dtype)
            size = 2 * width * neurons * x.element_size()
            count = 2 if options.quick else max(2, ROTATED_BYTES // size)
            whole = mlp(width, neurons, dtype)
            half = halved(whole, x)
            parts = {"trimtab": half, "whole": whole, f"{FEW} neurons": mlp(width, FEW, dtype)}
            calls = {
                part: rotate([copy.deepcopy(model) for _ in range(count)], x)
                for part, model in parts.items()
            }
            times = calmest(calls, 0.1 if options.quick else 1.0)
            for part, value in times.items():
                table.add(part, name, ("M,width,neurons", ",".join(map(str, shape))), value)
            ratios.append(times["whole"].median / times["trimtab"].median)
            print(f"{name} {shape!s:<18} {ratios[-1]:.2f}x", flush=True)
    print(f"geomean {harness.geomean(ratios):.2f}x, worst {min(ratios):.2f}x (bar {BAR})")
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
