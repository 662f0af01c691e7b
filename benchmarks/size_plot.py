"""A plot of bench_optim's sweep: bytes moved a second by model size, as SVG."""

from __future__ import annotations

import csv
import json
import math
import sys
from html import escape
from pathlib import Path

from roofline import GRID, INK, OWN, PEER, ROOF, decades

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 460, 60, 150, 50, 60
# name: color, width of the line
LOOKS = {
    "trimtab": (OWN, 3),
    "torch fused": ("#2b7fd9", 2),
    "torch foreach": (PEER, 2),
    "streaming loop": (ROOF, 2),
}


def points(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Parameters and GB/s of each provider, by size."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["x_name"] == "parameters"]
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        speed = json.loads(row["extra_config"])["gb_per_s"]
        found.setdefault(row["provider"], []).append((float(row["x_value"]), speed))
    return {name: sorted(marks) for name, marks in found.items()}


def write(path: Path) -> Path | None:
    """Plots ``path``'s sweep beside it; None if there is none."""
    lines = points(path)
    if not lines:
        return None
    svg = path.with_name(path.stem + "-sizes.svg")
    svg.write_text(draw(lines), encoding="utf-8")
    print(f"wrote {svg}")
    return svg


def draw(lines: dict[str, list[tuple[float, float]]]) -> str:
    """Both axes logarithmic: a call's fixed costs are a slope of one at the left."""
    low_x, high_x = decades([x for marks in lines.values() for x, _ in marks])
    low_y, high_y = decades([y for marks in lines.values() for _, y in marks])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def px(value: float) -> float:
        return LEFT + (right - LEFT) * (math.log10(value) - low_x) / (high_x - low_x)

    def py(value: float) -> float:
        return bottom - (bottom - TOP) * (math.log10(value) - low_y) / (high_y - low_y)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" fill="{INK}" '
        f'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">AdamW, fp32: speed by model '
        "size</text>",
    ]
    for e in range(low_x, high_x + 1):
        x = px(10.0**e)
        out.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{GRID}"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{10**e:,}</text>')
    for e in range(low_y, high_y + 1):
        y = py(10.0**e)
        out.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{GRID}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**e:g}</text>')
    out.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 16}" text-anchor="middle">parameters, in 16 '
        "tensors of one length</text>"
    )
    out.append(
        f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">'
        "GB/s (28 bytes a parameter)</text>"
    )
    # Ours last, on top of the others.
    for name in sorted(lines, key=lambda n: n == "trimtab"):
        ink, width = LOOKS.get(name, (PEER, 2))
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in lines[name])
        dash = ' stroke-dasharray="6 4"' if name == "streaming loop" else ""
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="{width}"{dash}/>'
        )
        for x, y in lines[name]:
            label = escape(f"{name}, {x:,.0f} parameters: {y:.2f} GB/s")
            out.append(
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="{width + 1}" fill="{ink}">'
                f"<title>{label}</title></circle>"
            )
    for i, name in enumerate(sorted(lines, key=lambda n: -lines[n][-1][1])):
        ink, _ = LOOKS.get(name, (PEER, 2))
        y = TOP + 12 + 22 * i
        out.append(f'<circle cx="{right + 20}" cy="{y - 4}" r="5" fill="{ink}"/>')
        out.append(f'<text x="{right + 32}" y="{y}">{escape(name)}</text>')
    return "\n".join(out) + "</svg>\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))
