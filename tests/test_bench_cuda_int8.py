"""The GPU benchmark without a GPU: it runs on the CPU with small shapes, and says so where it measures none."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "bench_cuda_int8.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import bench_cuda_int8
        import gpu
        import gpu_peers
    finally:
        sys.path.remove(str(BENCHMARKS))
    return bench_cuda_int8, gpu, gpu_peers


def test_all_sections_on_the_cpu(tmp_path: Path) -> None:
    done = bench("--quick", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = [row for row in rows if row["metric"] == "time"]
    assert {row["section"] for row in timed} == {"layer", "product", "decode", "scan", "host"}
    for row in timed:
        assert 0 < float(row["y_20"]) <= float(row["y_50"]) <= float(row["y_80"])
        assert row["device"] and row["driver"] and row["cuda"] and row["commit"] and row["sm_mhz"]
        if row["section"] in ("layer", "product"):
            tops = 2e-6 * int(row["M"]) * int(row["K"]) * int(row["N"]) / float(row["y_50"])
            assert json.loads(row["extra"])["tops"] == pytest.approx(tops, rel=1e-3)
    # What could not run here is named with its reason; every bar is judged, met or not.
    absent = {
        row["provider"]: json.loads(row["extra"])["reason"]
        for row in rows
        if row["metric"] == "absent"
    }
    assert "trimtab Triton" in absent and all(absent.values())
    bars = [row for row in rows if row["section"] == "bars"]
    assert len(bars) == 8 and all("met" in json.loads(row["extra"]) for row in bars)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would measure")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = bench("--out", tmp_path)
    assert done.returncode == 0 and done.stdout == "not measured: torch sees no GPU\n"
    assert not list(tmp_path.iterdir())


def test_wrong_result_is_not_timed(
    modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench_cuda_int8, _, gpu_peers = modules
    monkeypatch.setattr(bench_cuda_int8, "FAILURES", [])
    p = gpu_peers.problem(4, 16, 8, torch.device("cpu"))
    wrong = {bench_cuda_int8.OURS: lambda: torch.zeros(4, 8)}
    assert not bench_cuda_int8.is_right(p, wrong)
    assert bench_cuda_int8.FAILURES == ["not close to the float layer at M,K,N=4,16,8"]


def test_shapes_are_the_issue_s(modules) -> None:
    bench_cuda_int8, gpu, _ = modules
    assert min(bench_cuda_int8.ROWS) == 1 and max(bench_cuda_int8.ROWS) == 8192
    assert {(4096, 28672), (14336, 4096)} <= set(bench_cuda_int8.LLAMA_8B)
    assert {(8192, 57344), (28672, 8192)} <= set(bench_cuda_int8.LLAMA_70B)
    assert set(bench_cuda_int8.SCAN_ROWS) == set(range(1, 514))
    assert (1001, 4099) in bench_cuda_int8.SCAN
    assert gpu.peak_tops("NVIDIA H100 80GB HBM3") == gpu.peak_tops("NVIDIA H200") == 1979
    assert gpu.peak_tops("another") != gpu.peak_tops("another")


def test_quantizers_of_the_peers(modules) -> None:
    """What torch's int8 and fp8 products get stands for the same x."""
    _, _, gpu_peers = modules
    x = torch.randn(7, 100).bfloat16()
    for quantize, close in ((gpu_peers._quantize_int8, 0.02), (gpu_peers._quantize_fp8, 0.05)):
        q, scale = quantize(x)
        assert (q.float() * scale - x.float()).norm() < close * x.float().norm()
