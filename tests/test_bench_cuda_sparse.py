"""The sparse GPU benchmark without a GPU: it runs on the CPU, and says so where it measures nothing."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_cuda_sparse.py"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = list(map(str, [sys.executable, BENCH, *arguments]))
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_all_sections_on_the_cpu(tmp_path: Path) -> None:
    done = bench("--quick", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("sparse-*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = [row for row in rows if row["metric"] == "time"]
    sections = {"decode", "blocks", "thin", "gradients", "two_four", "compress"}
    assert {row["section"] for row in timed} == sections
    blocks = {f"block {size} {kind}" for size in (16, 32, 64) for kind in ("bf16", "int8")}
    blocks |= {"block 64 fp32", "block 1x16 bf16", "block 1x16"}
    blocks |= {f"block {size}x{size}" for size in (16, 32, 64)}
    two_four = {"2:4 bf16", "2:4 int8", "clone", "sparse24_pack", "sparse24_pack_both"}
    providers = {row["provider"] for row in timed}
    peers = {"cuBLAS bf16", "cuBLAS fp32"}
    assert providers == {"bitmap bf16", "bitmap int8"} | peers | blocks | two_four
    assert len([row for row in rows if row["section"] == "bars"]) == 7
    assert all(0 < float(row["y_20"]) <= float(row["y_80"]) for row in timed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would measure")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = bench("--out", tmp_path)
    assert done.returncode == 0 and done.stdout == "not measured: torch sees no GPU\n"
    assert not list(tmp_path.iterdir())
