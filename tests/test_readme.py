"""README.md: every example runs as it stands, and every table is what the CSVs say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


PYTHON = blocks("python")


def run(command: list, folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def first_call(code: str) -> str:
    """A readable test id: the first name of trimtab's that the example uses."""
    return re.search(r"trimtab\.(?!nn$|numpy)[\w.]+|tt\.\w+", code, re.MULTILINE)[0]


@pytest.mark.parametrize("code", PYTHON, ids=map(first_call, PYTHON))
def test_python_example(code: str, tmp_path: Path) -> None:
    """Each in a process of its own, since a reader would start with any of them."""
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    run([sys.executable, "-W", "error::UserWarning:trimtab", script], tmp_path)


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 3 and len(blocks("c")) == 1


def test_c_example(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "example.c").write_text(blocks("c")[0], encoding="utf-8")
    lib = trimtab.get_library_dir()
    command = [compiler, "-std=c11", "-Wall", "-Werror", "example.c", "-o", "example"]
    command += [f"-I{trimtab.get_include()}", f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltrimtab"]
    run(command, tmp_path)
    printed = [float(word) for word in run([tmp_path / "example"], tmp_path).split()]
    assert printed == pytest.approx([1, 2, 7], abs=0.05)


def test_numpy_example_imports_no_torch(tmp_path: Path) -> None:
    code = next(code for code in PYTHON if "trimtab.numpy" in code)
    code += "\nimport sys\nassert 'torch' not in sys.modules\n"
    run([sys.executable, "-c", code], tmp_path)


def test_tables_are_what_the_results_say() -> None:
    run([sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], ROOT)


def test_a_measured_table_is_rewritten(tmp_path: Path) -> None:
    """Losses are bold, the geomean is right, and nothing outside the marks moves."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    head = "kernel_name,provider,mode,x_name,x_value,y_50,extra_config,device,isa,threads,torch,"
    head += "version,commit,timestamp\n"
    stamp = "Some CPU,amx,2,2.13.0,0.1.0,abc,2030-01-02 03:04\n"
    lines = [
        f'int8_linear,{name},fp32->fp32,"M,K,N","{shape}",{us},'
        f'"{{""tops"": 1.0, ""peak_tops"": 4.0}}",{stamp}'
        for shape, times in {"1,2,3": (10, 40, 20), "4,5,6": (10, 5, 90)}.items()
        for name, us in zip((readme.OURS, "peer A", "peer B"), times)
    ]
    (tmp_path / "cpu-int8_linear.csv").write_text(head + "".join(lines))
    before = "above\n<!-- measured: int8_linear -->\nstale\n<!-- end -->\nbelow\n"
    after = readme.rewrite(before, tmp_path)
    assert after.startswith("above\n<!-- measured: int8_linear -->\n")
    assert after.endswith("<!-- end -->\nbelow\n") and "stale" not in after
    assert "| 1,2,3 | 10 | 1.00 | 25 % | 2.00 | peer B, 20 µs |" in after
    assert "| 4,5,6 | 10 | 1.00 | 25 % | **0.50** | peer A, 5 µs |" in after
    assert "Geomean 1.00 × the best peer of each shape, worst 0.50; 1 of 2 lost (bold)." in after
    assert "Some CPU, 2 threads, amx" in after
    assert readme.rewrite(after, tmp_path) == after
