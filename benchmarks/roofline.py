"""A roofline plot of bench_int8_linear's CSV, as SVG: no plotting library needed."""

from __future__ import annotations

import csv
import json
import math
import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 520, 70, 30, 50, 60
OURS = "trimtab int8"
INK, GRID, PEER, OWN, ROOF = "#1d2733", "#e3e8ee", "#9fb0c3", "#d9622b", "#5b6b7c"


def intensity(M: int, K: int, N: int, bytes_io: int) -> float:
    """Operations a byte that must move at least once: int8 weight, float input and output."""
    return 2 * M * K * N / (N * K + bytes_io * M * (K + N))


def points(path: Path) -> tuple[list[dict], float]:
    """Every fp32 measurement as intensity, TOPS, provider; and the median of the bare loop's TOPS."""
    with path.open() as file:
        rows = [r for r in csv.DictReader(file) if r["mode"] == "fp32->fp32"]
    found, peaks = [], []
    for row in rows:
        extra = json.loads(row["extra_config"])
        M, K, N = (int(part) for part in row["x_value"].split(","))
        found.append(
            {
                "x": intensity(M, K, N, 4),
                "y": extra["tops"],
                "name": row["provider"],
                "shape": (M, K, N),
            }
        )
        peaks.append(extra["peak_tops"])
    peaks = sorted(p for p in peaks if p == p)
    return found, peaks[len(peaks) // 2] if peaks else 0.0


def write(path: Path) -> Path | None:
    """Plots ``path``'s measurements beside it; None if there are none."""
    marks, peak = points(path)
    if not marks:
        return None
    svg = path.with_name(path.stem + "-roofline.svg")
    svg.write_text(draw(marks, peak), encoding="utf-8")
    print(f"wrote {svg}")
    return svg


def draw(marks: list[dict], peak: float) -> str:
    low_x, high_x = decades([m["x"] for m in marks])
    low_y, high_y = decades([m["y"] for m in marks] + ([peak] if peak else []))

    def px(value: float) -> float:
        span = WIDTH - LEFT - RIGHT
        return LEFT + span * (math.log10(value) - low_x) / (high_x - low_x)

    def py(value: float) -> float:
        span = HEIGHT - TOP - BOTTOM
        return HEIGHT - BOTTOM - span * (math.log10(value) - low_y) / (high_y - low_y)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" fill="{INK}" '
        f'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">int8 linear layers, fp32 in and '
        "out: speed against arithmetic intensity</text>",
    ]
    for exponent in range(low_x, high_x + 1):
        x = px(10.0**exponent)
        out.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        out.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{10**exponent}</text>'
        )
    for exponent in range(low_y, high_y + 1):
        y = py(10.0**exponent)
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        out.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**exponent:g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(
        f'<text x="{middle}" y="{HEIGHT - 16}" text-anchor="middle">operations a byte (weight as int8, '
        "input and output as fp32, each moved once)</text>"
    )
    out.append(
        f'<text x="18" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 18 {HEIGHT / 2})">'
        "TOPS</text>"
    )
    if peak:
        y = py(peak)
        out.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{ROOF}" stroke-dasharray="6 4"/>'
        )
        out.append(
            f'<text x="{LEFT + 6}" y="{y - 6:.1f}" fill="{ROOF}">bare dot-product loop, no memory '
            f"traffic: {peak:.2f} TOPS</text>"
        )
    for mark in sorted(marks, key=lambda m: m["name"] == OURS):
        own = mark["name"] == OURS
        label = escape(f"{mark['name']}, {'×'.join(map(str, mark['shape']))}: {mark['y']:.3f} TOPS")
        out.append(
            f'<circle cx="{px(mark["x"]):.1f}" cy="{py(mark["y"]):.1f}" r="{5 if own else 3}" '
            f'fill="{OWN if own else PEER}"><title>{label}</title></circle>'
        )
    out.append(f'<circle cx="{WIDTH - 190}" cy="40" r="5" fill="{OWN}"/>')
    out.append(f'<text x="{WIDTH - 180}" y="44">{OURS}</text>')
    out.append(f'<circle cx="{WIDTH - 90}" cy="40" r="3" fill="{PEER}"/>')
    out.append(f'<text x="{WIDTH - 82}" y="44">peers</text></svg>')
    return "\n".join(out) + "\n"


def decades(values: list[float]) -> tuple[int, int]:
    """Whole powers of ten around the values."""
    low = math.floor(math.log10(min(v for v in values if v > 0)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))
