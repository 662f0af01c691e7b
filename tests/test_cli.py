"""python -m trimtab: what it prints, and how it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

import trimtab
from trimtab import cli


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"trimtab       {trimtab.__version__}" in text
    assert "instruction sets: scalar" in text
    assert "in use:" in text
    for topic in ("python", "threads", "torch ops", "CUDA library", "Triton", "backend"):
        assert f"\n{topic:<13} " in text
    assert "int8_linear" in text


def test_info_names_a_bad_isa():
    code = (
        "import os; os.environ['TRIMTAB_ISA'] = 'sse9'\n"
        "from trimtab import cli; raise SystemExit(cli.main(['info']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "in use: none, every kernel raises: TRIMTAB_ISA: expected scalar" in run.stdout


def test_info_names_a_bad_backend():
    code = (
        "import os; os.environ['TRIMTAB_BACKEND'] = 'tpu'\n"
        "from trimtab import cli; raise SystemExit(cli.main(['info']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    text = "TRIMTAB_BACKEND: expected cpu, cuda, triton, reference, got 'tpu'"
    assert f"backend       none: {text}" in run.stdout and f"not loaded: {text}" in run.stdout


@pytest.mark.parametrize("wish", ["", "cpu", "triton", "reference"])
def test_info_says_who_answers(wish):
    code = (
        f"import os; os.environ['TRIMTAB_BACKEND'] = {wish!r}\n"
        "from trimtab import cli; print(*cli.backend(), sep='; ')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    why = f"TRIMTAB_BACKEND={wish}" if wish else "TRIMTAB_BACKEND is not set"
    assert f"({why})" in run.stdout, run.stderr
    gpu = {"cpu": "GPU: refused", "triton": "GPU: Triton", "reference": "for all tensors"}
    assert gpu.get(wish, "tensors on a GPU: ") in run.stdout


@pytest.mark.parametrize(
    "option,file",
    [
        ("--cmakedir", "trimtab-config.cmake"),
        ("--includedir", "trimtab/int8_linear.h"),
        ("--libdir", "libtrimtab.so"),
    ],
)
def test_folders(option, file, capsys):
    assert cli.main([option]) == 0
    assert (Path(capsys.readouterr().out.strip()) / file).is_file()


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == trimtab.__version__


def test_nothing_asked(capsys):
    assert cli.main([]) == 2
    assert "usage: python -m trimtab" in capsys.readouterr().err


def test_unknown_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """A checkout with two benchmarks, one of which fails."""
    monkeypatch.setattr(cli, "PACKAGE", tmp_path / "python" / "trimtab")
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "bench_good.py").write_text("import sys; print('good', sys.argv[1:])")
    (folder / "bench_bad.py").write_text("raise SystemExit(3)")
    return folder


def test_bench(benchmarks, capfd):
    assert cli.main(["bench", "good", "--", "--quick"]) == 0
    assert "good ['--quick']" in capfd.readouterr().out
    assert cli.main(["bench"]) == 1
    output = capfd.readouterr()
    assert "failed: bad" in output.err and "good []" in output.out


def test_bench_unknown_name(benchmarks, capsys):
    assert cli.main(["bench", "ugly"]) == 2
    assert "expected names out of bad, good; got ugly" in capsys.readouterr().err


def test_bench_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "PACKAGE", tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "run this in a source checkout" in capsys.readouterr().err
