"""The optimizers' GPU benchmark without a GPU: it runs on the CPU with small sizes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_cuda_optim.py"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = list(map(str, (sys.executable, BENCH, *arguments)))
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_all_sections_on_the_cpu(tmp_path: Path) -> None:
    done = bench("--quick", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-optim.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = [row for row in rows if row["metric"] == "time"]
    assert {row["section"] for row in timed} == {
        *("sizes", "tensors", "host", "formats", "matrices")
    }
    providers = {row["provider"] for row in timed if row["section"] == "sizes"}
    assert providers == {"trimtab", "torch fused", "streaming kernel"}
    assert all(0 < float(row["y_20"]) <= float(row["y_50"]) <= float(row["y_80"]) for row in timed)
    bars = [row for row in rows if row["section"] == "bars"]
    assert len(bars) == 3 and all("met" in json.loads(row["extra"]) for row in bars)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would measure")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = bench("--out", tmp_path)
    assert done.returncode == 0 and done.stdout == "not measured: torch sees no GPU\n"
    assert not list(tmp_path.iterdir())
