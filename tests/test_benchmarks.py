"""Every benchmark runs, checks its results first, and writes rows that can be read back."""

import csv
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from trimtab import ops

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
# The demo has a test of its own; the linear layer is taken apart below.
SMALL = ("bitmap_conv2d", "int8_mm", "int8_pack", "optim", "quantize_int8", "structured")


def bench(name: str, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / f"bench_{name}.py", "--out", out, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def rows(out: Path, name: str) -> list[dict[str, str]]:
    (path,) = out.glob(f"*-{name}.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def harness():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import harness
    finally:
        sys.path.remove(str(BENCHMARKS))
    return harness


@pytest.mark.parametrize("name", SMALL)
def test_quick(name: str, tmp_path: Path) -> None:
    done = bench(name, tmp_path, "--quick", "--threads", "2")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path, name)
    assert {"trimtab"} < {row["provider"] for row in found}
    for row in found:
        if row["metric"] == "absent":
            assert json.loads(row["extra_config"])["reason"]
            continue
        assert 0 < float(row["y_20"]) <= float(row["y_50"]) <= float(row["y_80"])
        assert row["unit"] == "us" and row["threads"] == "2" and row["isa"] == ops.get_isa()
        assert row["device"] and row["commit"] and row["timestamp"]


def test_int8_linear_shapes(tmp_path: Path) -> None:
    """TOPS follow from the time, absent peers are named, the plot is well-formed."""
    arguments = ("--quick", "--only", "shapes", "--peers", "^torch (fp32|bf16)")
    done = bench("int8_linear", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    timed = [row for row in rows(tmp_path, "int8_linear") if row["metric"] == "time"]
    assert {row["provider"] for row in timed} == {
        "trimtab int8",
        "torch fp32",
        "torch bf16 (casts)",
        "torch bf16",
    }
    for row in timed:
        M, K, N = map(int, row["x_value"].split(","))
        tops = 2e-6 * M * K * N / float(row["y_50"])
        assert json.loads(row["extra_config"])["tops"] == pytest.approx(tops, rel=1e-3)
    (plot,) = tmp_path.glob("*-roofline.svg")
    root = ElementTree.parse(plot).getroot()
    assert root.tag.endswith("svg") and len(list(root.iter())) > 2 * len(timed) / 2
    assert "geomean" in done.stdout


@pytest.mark.parametrize("mode", ["sweep", "isa", "overhead"])
def test_int8_linear_modes(mode: str, tmp_path: Path) -> None:
    """Each writes its CSV, and the README's part is made from it without a hitch."""
    done = bench("int8_linear", tmp_path, "--quick", "--only", mode)
    assert done.returncode == 0, done.stderr
    name = f"int8_linear_{mode}"
    assert rows(tmp_path, name)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- measured: {name} -->\nstale\n<!-- end -->\n")
    command = [sys.executable, BENCHMARKS / "readme.py", "--readme", page, "--results", tmp_path]
    subprocess.run(list(map(str, command)), check=True)
    assert "stale" not in page.read_text() and " threads, " in page.read_text()


def test_wrong_shape_is_refused(tmp_path: Path) -> None:
    done = bench("int8_linear", tmp_path, "--shapes", "1,2")
    assert done.returncode == 2 and "expected M,K,N, got '1,2'" in done.stderr


@pytest.mark.parametrize("isa", [isa for isa in ops.available_isas() if isa != "scalar"])
def test_bare_loop_counts_what_it_does(harness, isa: str) -> None:
    """Twice the threads' work is reported as such, and no CPU does more than 100 TOPS a core."""
    call, work = harness.bare_loop(isa, 1)
    _, twice = harness.bare_loop(isa, 2)
    assert 1e9 < work / call() < 1e14
    assert twice > 0 and harness.bare_loop("no such isa", 1) is None


def test_interleaving_finds_the_slower_one(harness) -> None:
    """Sleeps of known length come out in order, and a slow one sits out unless it is kept."""
    import time

    calls = {
        "short": lambda: time.sleep(0.001),
        "long": lambda: time.sleep(0.002),
        "slow": lambda: time.sleep(0.02),
        "kept": lambda: time.sleep(0.02),
    }
    times = harness.interleave(calls, 0.8, keep=("kept",))
    assert 1000 <= times["short"].p20 <= times["short"].median < times["long"].median
    assert times["slow"].rounds == harness.SLOW_ROUNDS < times["kept"].rounds
    assert harness.interleave({"own": lambda: 0.25}, 0.01)["own"].median == 250000


def test_optim_plot(tmp_path: Path) -> None:
    """The sweep's speeds follow from its times, and the plot has a mark for each."""
    done = bench("optim", tmp_path, "--quick", "--threads", "2", "--only", "^sweep")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path, "optim")
    assert len(found) == 2 * 4 and {row["mode"] for row in found} == {"sweep"}
    for row in found:
        speed = 28e-3 * int(row["x_value"]) / float(row["y_50"])
        assert json.loads(row["extra_config"])["gb_per_s"] == pytest.approx(speed, rel=1e-3)
    (plot,) = tmp_path.glob("*-sizes.svg")
    root = ElementTree.parse(plot).getroot()
    assert sum(part.tag.endswith("circle") for part in root.iter()) == len(found) + 4


def test_sparse(tmp_path: Path) -> None:
    """swap_'s choice is compared at each point and counted; the peers' rows are times."""
    done = bench("sparse", tmp_path, "--quick", "--threads", "2", "--match", "bitmap.* 50%")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path, "sparse_dispatcher")
    ratios = [row for row in found if row["metric"] == "ratio"]
    summary = {row["metric"]: float(row["y_50"]) for row in found if row["mode"] == "summary"}
    assert len(ratios) == summary["points"] == 4 and summary["larger"] == 0
    assert max(float(row["y_50"]) for row in ratios) == pytest.approx(summary["worst ratio"])
    for row in ratios:
        extra = json.loads(row["extra_config"])
        assert extra["bytes"] <= extra["dense"]
    providers = {row["provider"] for row in rows(tmp_path, "sparse_peers")}
    assert {"trimtab bf16 bitmap", "trimtab int8 bitmap", "trimtab int8", "torch bf16"} <= providers


def test_training_seeds(tmp_path: Path) -> None:
    """A loss for each model, optimizer and seed; README's table is made from such rows."""
    done = bench("training_seeds", tmp_path, "--quick", "--threads", "2")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path, "training_seeds")
    assert (
        len({(row["mode"], row["provider"], row["x_value"]) for row in found}) == len(found) == 16
    )
    assert all(0 < float(row["y_50"]) < 3 and row["metric"] == "loss" for row in found)
    first = [row["y_50"] for row in found if row["provider"] == "trimtab AdamW"]
    assert len(set(first)) == 4  # models and seeds differ
