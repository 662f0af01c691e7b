"""The demo's pruning part as a table and as a plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .demo_pruning import Pruning

Value = Callable[["Pruning"], float]

PRUNING: list[tuple[str, str, Callable[[Pruning], str]]] = [
    ("CNN", "<", lambda r: r.name),
    ("pruned", ">", lambda r: f"{100 * r.sparsity:.0f} %"),
    ("accuracy", ">", lambda r: f"{100 * r.accuracy:.1f} %"),
    ("batch of 64, ms", ">", lambda r: f"{r.batch_ms:.2f}"),
    ("p20-p80", ">", lambda r: f"{r.batch_p20:.2f}-{r.batch_p80:.2f}"),
    ("one image, ms", ">", lambda r: f"{r.one_ms:.3f}"),
    ("p20-p80", ">", lambda r: f"{r.one_p20:.3f}-{r.one_p80:.3f}"),
    ("weights kB", ">", lambda r: f"{r.weight_bytes / 1e3:.0f}"),
    ("layers, first to last", "<", lambda r: ", ".join(r.choices)),
]
PRUNING_NOTE = (
    "layers: what swap_ measured to be fastest for a batch of 64, dense where nothing gained; one "
    "image runs through the same model; accuracy: on 1,000 digits kept aside"
)

# Where lines go, in SVG units.
WIDTH, LEFT, RIGHT, TOP, HEIGHT, GAP = 900, 70, 690, 50, 130, 44
INK, GRID = "#1d2733", "#dde3ea"
COLORS = ("#7d8fa3", "#2b7fd9", "#d9622b", "#3a9a5b")
FROM, TO = 0.4, 1.0  # sparsity


def pruning_title(rows: list[Pruning]) -> str:
    steps = sorted({row.steps for row in rows})
    return f"A CNN pruned level by level, {steps[0]} to {steps[-1]} steps of training, then swapped"


@dataclass
class Panel:
    """One of the plots over sparsity that stand above each other, and its scale."""

    heading: str
    value: Value
    form: str
    top: float
    low: float
    high: float

    def y(self, value: float) -> float:
        return self.top + (self.high - value) / (self.high - self.low) * HEIGHT

    def axes(self) -> list[str]:
        marks = [f'<text x="{LEFT}" y="{self.top - 10}">{escape(self.heading)}</text>']
        for tick in range(4):
            at = self.low + (self.high - self.low) * tick / 3
            y = self.y(at)
            marks.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{GRID}"/>')
            label = self.form.format(at)
            marks.append(f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{label}</text>')
        return marks

    def line(self, rows: list[Pruning], ink: str) -> list[str]:
        """Points joined; straight through where nothing is pruned."""
        if len(rows) == 1:
            y = self.y(self.value(rows[0]))
            return [
                f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{ink}" stroke-width="2" '
                'stroke-dasharray="7 4"/>'
            ]
        points = [(x_of(row.sparsity), self.y(self.value(row))) for row in rows]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks = [f'<polyline points="{joined}" stroke="{ink}" stroke-width="2" fill="none"/>']
        marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{ink}"/>' for x, y in points]
        return marks


def x_of(sparsity: float) -> float:
    return LEFT + (sparsity - FROM) / (TO - FROM) * (RIGHT - LEFT)


def panels(rows: list[Pruning]) -> list[Panel]:
    worst = min(row.accuracy for row in rows)
    span = max(1 - worst, 0.01) * 1.1
    wanted: list[tuple[str, Value, str, float, float]] = [
        ("Accuracy, %", lambda r: 100 * r.accuracy, "{:.1f}", 100 * (1 - span), 100.0)
    ]
    times: list[tuple[str, Value]] = [
        ("Batch of 64, ms", lambda r: r.batch_ms),
        ("One image, ms", lambda r: r.one_ms),
    ]
    for heading, value in times:
        wanted.append((heading, value, "{:.3g}", 0.0, 1.1 * max(map(value, rows))))
    return [
        Panel(heading, value, form, TOP + i * (HEIGHT + GAP), low, high)
        for i, (heading, value, form, low, high) in enumerate(wanted)
    ]


def pruning_plot(rows: list[Pruning]) -> str:
    """Accuracy and both latencies over sparsity; what is not pruned as a dashed line across."""
    names = list(dict.fromkeys(row.name for row in rows))
    marks = []
    for panel in panels(rows):
        marks += panel.axes()
        for name, ink in zip(names, COLORS):
            marks += panel.line([row for row in rows if row.name == name], ink)
    bottom = TOP + 3 * HEIGHT + 2 * GAP
    for sparsity in sorted({row.sparsity for row in rows if row.sparsity}):
        marks.append(
            f'<text x="{x_of(sparsity):.1f}" y="{bottom + 20}" text-anchor="middle">'
            f"{100 * sparsity:.0f} %</text>"
        )
    for i, (name, ink) in enumerate(zip(names, COLORS)):
        y = TOP + 12 + 24 * i
        dash = "" if name.startswith("sparse") else ' stroke-dasharray="7 4"'
        marks.append(
            f'<path d="M{RIGHT + 14} {y}h24" stroke="{ink}" stroke-width="2" fill="none"{dash}/>'
        )
        marks.append(f'<text x="{RIGHT + 46}" y="{y + 5}">{escape(name)}</text>')
    heading = "CNN: accuracy and latency over sparsity"
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + 30}" role="img" aria-label="{heading}" fill="{INK}">'
        f'<text x="0" y="18" font-weight="600">{heading}</text>{"".join(marks)}</svg>'
    )
