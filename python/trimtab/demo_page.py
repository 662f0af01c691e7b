"""How the demo's result looks: a table for the terminal, a self-contained page for the browser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .demo_pruning_page import PRUNING, PRUNING_NOTE, pruning_plot, pruning_title

if TYPE_CHECKING:
    from .demo import Result, Row
    from .demo_training import Training

COLUMNS: list[tuple[str, str, Callable[[Row], str]]] = [
    ("model", "<", lambda r: r.name),
    ("batch ms", ">", lambda r: f"{r.milliseconds:.0f}"),
    ("p20-p80", ">", lambda r: f"{r.p20:.0f}-{r.p80:.0f}"),
    ("texts/s", ">", lambda r: f"{r.texts_per_second:.0f}"),
    ("× fp32", ">", lambda r: f"{r.speedup:.2f}"),
    ("weights MB", ">", lambda r: f"{r.weight_bytes / 1e6:.1f}"),
    ("cos mean", ">", lambda r: f"{r.cosine_mean:.4f}"),
    ("cos min", ">", lambda r: f"{r.cosine_min:.4f}"),
    ("same nearest", ">", lambda r: f"{100 * r.nearest_agreement:.1f} %"),
]

TRAINING: list[tuple[str, str, Callable[[Training], str]]] = [
    ("model", "<", lambda t: t.model),
    ("optimizer", "<", lambda t: t.name),
    ("step µs", ">", lambda t: f"{t.step_us:.0f}"),
    ("p20-p80", ">", lambda t: f"{t.step_p20:.0f}-{t.step_p80:.0f}"),
    ("weights + state MB", ">", lambda t: f"{t.bytes / 1e6:.2f}"),
    ("last loss", ">", lambda t: f"{smooth(t.losses)[-1]:.4f}"),
    ("accuracy", ">", lambda t: f"{100 * t.accuracy:.1f} %"),
    ("bits as torch", ">", lambda t: "all" if t.same_bits else "no"),
]
TRAINING_NOTE = (
    "step: the optimizer alone, median; last loss: mean of the last ten; accuracy: on 1,000 digits "
    "kept aside; bits as torch: every loss and final weight"
)

INK, GRID, PLAIN, OURS = "#1d2733", "#dde3ea", "#9fb0c3", "#d9622b"


def title(result: Result) -> str:
    return f"all-MiniLM-L6-v2, {result.texts} texts × {result.tokens} tokens"


def table(result: Result) -> str:
    """The result as plain text."""
    about = f"{result.environment['machine']}; median of {result.rounds} interleaved rounds"
    note = (
        "cos: cosine to the fp32 embedding; same nearest: texts whose nearest other text is fp32's"
    )
    text = ["", f"{title(result)} ({about})", "", *columns(COLUMNS, result.rows), "", note, ""]
    text += [training_title(result), "", *columns(TRAINING, result.training), "", TRAINING_NOTE, ""]
    text += [pruning_title(result.pruning), "", *columns(PRUNING, result.pruning), ""]
    text += [PRUNING_NOTE, ""]
    return "\n".join(text)


def training_title(result: Result) -> str:
    steps = sorted({len(t.losses) for t in result.training})
    return f"4,000 MNIST digits, {' and '.join(map(str, steps))} steps with batches of 64"


def columns(wanted: list[Any], rows: list[Any]) -> list[str]:
    """Lines of plain text: a head, a rule, a line a row."""
    cells = [[name for name, _, _ in wanted]]
    cells += [[show(row) for _, _, show in wanted] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(wanted))]
    lines = [
        "  ".join(
            f"{text:{align}{width}}" for text, width, (_, align, _) in zip(line, widths, wanted)
        )
        for line in cells
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def html_table(wanted: list[Any], rows: list[Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name, _, _ in wanted)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(show(row))}</td>" for _, _, show in wanted) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n'
        "</table></div>"
    )


def page(result: Result) -> str:
    """The result as one HTML file that loads nothing from anywhere."""
    fastest = max(result.rows, key=lambda r: r.speedup)
    first = result.rows[0]
    smaller = first.weight_bytes / fastest.weight_bytes
    lead = (
        f"<b>{escape(fastest.name)}</b>: {fastest.speedup:.1f} times the speed of fp32 with "
        f"{smaller:.1f} times less weight memory; the least similar embedding has cosine "
        f"{fastest.cosine_min:.4f} to fp32's."
    )
    charts = [
        bars(
            result, "Time of a batch, ms (less is better)", lambda r: r.milliseconds, "{:.0f}", True
        ),
        bars(result, "Weights resident in memory, MB", lambda r: r.weight_bytes / 1e6, "{:.1f}"),
        dots(result),
    ]
    names = list(dict.fromkeys(t.model for t in result.training))
    learned = [curves(name, [t for t in result.training if t.model == name]) for name in names]
    footer = " · ".join(f"{escape(k)} {escape(v)}" for k, v in result.environment.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>trimtab demo: {escape(title(result))}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; background: #fff; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 0; }}
figure {{ margin: 1.5rem 0; }}
svg {{ width: 100%; height: auto; font: 14px system-ui, sans-serif; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid {GRID};
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
footer {{ margin-top: 2rem; font-size: .8rem; color: #5b6b7c; }}
</style>
</head>
<body>
<h1>{escape(title(result))}</h1>
<p>{lead}</p>
{"".join(f"<figure>{chart}</figure>" for chart in charts)}
{html_table(COLUMNS, result.rows)}
<p>Latency is the median of {result.rounds} interleaved rounds, with the 20th and 80th percentile.
"cos" is the cosine of a text's embedding to its fp32 embedding, "same nearest" the share of texts
whose nearest other text is the one fp32 finds. Texts: Python's language reference, from pydoc.</p>
<h2>{escape(training_title(result))}</h2>
{"".join(f"<figure>{curve}</figure>" for curve in learned)}
{html_table(TRAINING, result.training)}
<p>{escape(TRAINING_NOTE)}. All variants of a model start from the same weights, see the same batches
and take turns. Bytes are those of the parameters and the optimizer's state.</p>
<h2>{escape(pruning_title(result.pruning))}</h2>
<figure>{pruning_plot(result.pruning)}</figure>
{html_table(PRUNING, result.pruning)}
<p>{escape(PRUNING_NOTE)}. "sparse" keeps the values exactly, "sparse or int8" may round them as int8
does. Times are medians of {result.pruning[0].rounds} interleaved rounds. The dense model learned on the
same batches, as long as the most pruned one.</p>
<footer>{footer}</footer>
</body>
</html>
"""


# Geometry of a chart, in SVG units: names to the left, figures to the right of the bars.
WIDTH, LEFT, RIGHT, TOP, STEP, BAR = 900, 190, 110, 34, 34, 22


def color(row: Row) -> str:
    return OURS if row.name.startswith("trimtab") else PLAIN


def chart(result: Result, heading: str, marks: list[str]) -> str:
    height = TOP + STEP * len(result.rows) + 22
    names = [
        f'<text x="{LEFT - 10}" y="{middle(i) + 5}" text-anchor="end">{escape(row.name)}</text>'
        for i, row in enumerate(result.rows)
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(heading)}" fill="{INK}">'
        f'<text x="0" y="18" font-weight="600">{escape(heading)}</text>{"".join(names + marks)}</svg>'
    )


def middle(i: int) -> float:
    return TOP + STEP * i + BAR / 2


def bars(
    result: Result, heading: str, value: Callable[[Row], float], form: str, spread: bool = False
) -> str:
    """Bars from zero; ``spread`` adds the line from p20 to p80."""
    most = max(max(value(row), row.p80 if spread else 0) for row in result.rows)
    scale = (WIDTH - LEFT - RIGHT) / most
    marks = []
    for i, row in enumerate(result.rows):
        y, length, end = middle(i), value(row) * scale, value(row) * scale
        marks.append(
            f'<rect x="{LEFT}" y="{y - BAR / 2}" width="{length:.1f}" height="{BAR}" rx="2" '
            f'fill="{color(row)}"/>'
        )
        if spread:
            low, high = LEFT + row.p20 * scale, LEFT + row.p80 * scale
            end = max(end, row.p80 * scale)
            marks.append(
                f'<path d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 5}v10M{high:.1f} {y - 5}v10" '
                f'stroke="{INK}" fill="none"/>'
            )
        marks.append(f'<text x="{LEFT + end + 8:.1f}" y="{y + 5}">{form.format(value(row))}</text>')
    return chart(result, heading, marks)


def dots(result: Result) -> str:
    """Minimum and mean cosine as dots: their axis does not start at zero, so no bars."""
    low = min(0.98, *(row.cosine_min - 0.002 for row in result.rows))
    scale = (WIDTH - LEFT - RIGHT) / (1 - low)
    bottom = TOP + STEP * len(result.rows)
    marks = []
    for tick in range(5):
        at = low + (1 - low) * tick / 4
        x = LEFT + (at - low) * scale
        marks.append(f'<path d="M{x:.1f} {TOP - 4}V{bottom}" stroke="{GRID}"/>')
        marks.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{at:.4g}</text>')
    for i, row in enumerate(result.rows):
        y = middle(i)
        least, mean = (LEFT + (c - low) * scale for c in (row.cosine_min, row.cosine_mean))
        marks.append(
            f'<path d="M{least:.1f} {y}H{mean:.1f}" stroke="{color(row)}" stroke-width="3"/>'
        )
        marks.append(f'<circle cx="{mean:.1f}" cy="{y}" r="5" fill="{color(row)}"/>')
        marks.append(
            f'<circle cx="{least:.1f}" cy="{y}" r="5" fill="#fff" stroke="{color(row)}" '
            'stroke-width="3"/>'
        )
        label = f"{row.cosine_min:.4f}"
        marks.append(f'<text x="{WIDTH - RIGHT + 14}" y="{y + 5}">{label}</text>')
    return chart(result, "Cosine to fp32: mean (filled) and minimum (open, and its figure)", marks)


# A line each: color and width. The second lies on the first where their bits are equal.
STROKES = ((PLAIN, 7), (OURS, 2), ("#2b7fd9", 2), ("#3a9a5b", 2))


def smooth(losses: Sequence[float], window: int = 10) -> list[float]:
    """Mean of each loss and those before it, at most ``window`` of them."""
    parts = (losses[max(0, i - window + 1) : i + 1] for i in range(len(losses)))
    return [sum(part) / len(part) for part in parts]


def curves(name: str, runs: list[Training]) -> str:
    """Training loss over steps, the loss on a logarithmic axis."""
    lines = [smooth(run.losses) for run in runs]
    values = [v for line in lines for v in line if 0 < v < math.inf]
    low, high = math.log10(min(values, default=1.0)), math.log10(max(values, default=10.0))
    left, right, top, height = 60, 690, 34, 250
    scale = height / max(high - low, 1e-3)
    step = (right - left) / max(len(runs[0].losses) - 1, 1)
    marks = []
    for tick in (c * 10.0**e for e in range(-6, 6) for c in (1, 2, 5)):
        if low <= math.log10(tick) <= high:
            y = top + (high - math.log10(tick)) * scale
            marks.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{GRID}"/>')
            marks.append(f'<text x="{left - 8}" y="{y + 5:.1f}" text-anchor="end">{tick:g}</text>')
    for i, (run, line, (ink, width)) in enumerate(zip(runs, lines, STROKES)):
        points = " ".join(
            f"{left + k * step:.1f},{top + (high - math.log10(v)) * scale:.1f}"
            for k, v in enumerate(line)
            if 0 < v < math.inf
        )
        look = f'stroke="{ink}" stroke-width="{width}" fill="none"'
        marks.append(f'<polyline points="{points}" {look} stroke-linejoin="round"/>')
        y = top + 12 + 24 * i
        marks.append(f'<path d="M{right + 14} {y}h20" {look}/>')
        marks.append(f'<text x="{right + 42}" y="{y + 5}">{escape(run.name)}</text>')
    heading = f"{name}: training loss, mean of ten steps"
    steps = (
        f'<text x="{right}" y="{top + height + 20}" text-anchor="end">step {len(lines[0])}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {top + height + 28}" role="img" aria-label="{escape(heading)}" '
        f'fill="{INK}"><text x="0" y="18" font-weight="600">{escape(heading)}</text>'
        f"{''.join(marks)}{steps}</svg>"
    )
