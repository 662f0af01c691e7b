"""csrc/math/power.h against the C library's pow: the same constants in fp32, so torch's bits."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCE = r"""
#include "math/power.h"
#include <initializer_list>
using namespace trimtab;
static bool differ(double a, double b) { return float(a) != float(b); }
extern "C" long different() {
  long count = 0;
  for (double beta : {0.9, 0.99, 0.999, 0.95, 0.98, 0.8, 0.4, 0.3, 0.9999, 0.5, 0.0})
    for (int t = 1; t <= 100000; ++t) {
      const double a = 1.0 - power(beta, t), b = 1.0 - ::pow(beta, t);
      count += differ(a, b) || differ(1e-3 / a, 1e-3 / b) || differ(::sqrt(a), ::sqrt(b));
    }
  for (double decay : {0.004, 0.01, 0.1, 0.0})
    for (int t = 1; t <= 100001; ++t) {
      const double a = 0.9 * (1.0 - 0.5 * power_of_096(t * decay));
      const double b = 0.9 * (1.0 - 0.5 * ::pow(0.96, t * decay));
      count += differ(a, b) || differ(1e-3 * (1.0 - a), 1e-3 * (1.0 - b));
    }
  for (double decay : {-0.8, -0.5, -0.3, -1.0, -2.0, -0.01, 0.0})
    for (int t = 1; t <= 100000; ++t) {
      const double a = power_of_count(t, decay), b = ::pow(double(t), decay);
      count += differ(a, b) || differ(a - 1.0, b - 1.0);
    }
  return count;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_constants_are_those_of_pow(tmp_path: Path) -> None:
    source, library = tmp_path / "power.cpp", tmp_path / "power.so"
    source.write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([*command, "-I", str(CSRC), str(source), "-o", str(library)], check=True)
    assert ctypes.CDLL(str(library)).different() == 0
