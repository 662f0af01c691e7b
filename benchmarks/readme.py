"""Rewrites the measured parts of README.md from the CSVs in benchmarks/results.

    python benchmarks/readme.py            rewrite
    python benchmarks/readme.py --check    exit 1 if README.md is not what the CSVs say

A measured part stands between ``<!-- measured: NAME -->`` and ``<!-- end -->``. Of several machines'
CSVs for one NAME, the one measured last is shown.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import stdev

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
PART = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = "trimtab int8"

Rows = list[dict[str, str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = options.readme.read_text(encoding="utf-8")
    after = rewrite(before, options.results)
    if options.check:
        if before != after:
            print(f"{options.readme} is not what the CSVs say: run python benchmarks/readme.py")
        return int(before != after)
    options.readme.write_text(after, encoding="utf-8")
    return 0


def rewrite(text: str, results: Path) -> str:
    """``text`` with every measured part made again; a part without a CSV says so."""

    def part(match: re.Match[str]) -> str:
        name = match[2]
        if name not in PARTS:
            raise SystemExit(f"readme.py: expected a part out of {', '.join(PARTS)}, got {name!r}")
        rows = newest(name, results)
        body = PARTS[name](rows) + stamp(rows) if rows else "Not measured yet: `make bench`.\n"
        return f"{match[1]}{body}{match[3]}"

    return PART.sub(part, text)


def newest(name: str, results: Path) -> Rows:
    tables = []
    for path in sorted(results.glob(f"*-{name}.csv")):
        with path.open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    return max((t for t in tables if t), key=lambda rows: rows[0]["timestamp"], default=[])


def stamp(rows: Rows) -> str:
    r = rows[0]
    return (
        f"\n{r['device']}, {r['threads']} threads, {r['isa']}; torch {r['torch']}; trimtab "
        f"{r['version']}, commit {r['commit']}; {r['timestamp']} UTC.\n"
    )


def extra(row: dict[str, str]) -> dict:
    return json.loads(row["extra_config"])


def us(row: dict[str, str]) -> float:
    return float(row["y_50"])


def markdown(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def demo(rows: Rows) -> str:
    head = ["model", "batch, ms (p20–p80)", "texts/s", "× fp32", "weights, MB", "cosine mean"]
    head += ["cosine min", "same nearest text"]
    body = []
    for row in rows:
        e = extra(row)
        times = [float(row[key]) / 1e3 for key in ("y_50", "y_20", "y_80")]
        cells = [row["provider"], "{:.0f} ({:.0f}–{:.0f})".format(*times)]
        cells += [
            f"{e['texts_per_second']:.0f}",
            f"{e['speedup']:.2f}",
            f"{e['weight_bytes'] / 1e6:.1f}",
        ]
        cells += [f"{e['cosine_mean']:.4f}", f"{e['cosine_min']:.4f}"]
        body.append(cells + [f"{100 * e['nearest_agreement']:.1f} %"])
    return markdown(head, body)


def demo_training(rows: Rows) -> str:
    head = ["model", "optimizer", "step, µs (p20–p80)", "weights + state, MB", "last loss"]
    head += ["accuracy", "losses and weights as torch's"]
    body = []
    for row in rows:
        e = extra(row)
        times = [float(row[key]) for key in ("y_50", "y_20", "y_80")]
        cells = [row["x_value"], row["provider"], "{:.0f} ({:.0f}–{:.0f})".format(*times)]
        cells += [f"{e['bytes'] / 1e6:.2f}", f"{e['loss']:.4f}", f"{100 * e['accuracy']:.1f} %"]
        body.append(cells + ["all bits" if e["same_bits"] else "close"])
    steps = sorted({extra(row)["rounds"] for row in rows})
    return f"{' and '.join(map(str, steps))} steps:\n\n{markdown(head, body)}"


def demo_pruning(rows: Rows) -> str:
    """A line a model; its batch and its single image are two rows of the CSV, one after the other."""
    head = ["CNN", "pruned", "accuracy", "batch of 64, µs (p20–p80)", "one image, µs (p20–p80)"]
    head += ["weights, kB", "layers, first to last"]
    body = []
    for pair in zip(rows[::2], rows[1::2]):
        e, sparsity = extra(pair[0]), float(pair[0]["x_value"].partition(",")[0])
        cells = [pair[0]["provider"], f"{100 * sparsity:.0f} %", f"{100 * e['accuracy']:.1f} %"]
        for row in pair:
            times = [float(row[key]) for key in ("y_50", "y_20", "y_80")]
            cells.append("{:.0f} ({:.0f}–{:.0f})".format(*times))
        body.append([*cells, f"{e['weight_bytes'] / 1e3:.0f}", ", ".join(e["choices"])])
    return markdown(head, body)


def prune(rows: Rows) -> str:
    """Accuracy a seed and its mean, then the cosines."""
    models: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["unit"] == "%":
            model = row["x_value"].partition(",")[0]
            models.setdefault(model, {}).setdefault(row["mode"], []).append(float(row["y_50"]))
    body = []
    for model, ways in models.items():
        means = {way: sum(values) / len(values) for way, values in ways.items()}
        best = max(value for way, value in means.items() if way.startswith("dense"))
        for way, values in ways.items():
            seeds = ", ".join(f"{value:.1f}" for value in values)
            lost = "" if way.startswith("dense") else f"{best - means[way]:+.2f}"
            body.append([model, way, seeds, f"{means[way]:.2f}", lost])
    out = markdown(["model", "weights", "accuracy a seed, %", "mean", "points lost"], body)
    cosines = [[row["mode"], f"{float(row['y_50']):.3f}"] for row in rows if row["unit"] == "1"]
    if cosines:
        out += "\n" + markdown(["all-MiniLM-L6-v2 at 60 %, one shot", "mean cosine"], cosines)
    return out


def int8_linear(rows: Rows) -> str:
    """A table for each dtype, then who could not be measured and why."""
    out = []
    for mode, title in (("fp32->fp32", "fp32 in and out"), ("bf16->bf16", "bf16 in and out")):
        timed = [row for row in rows if row["mode"] == mode]
        if timed:
            out.append(f"{title}:\n\n{comparison(timed)}")
    absent = [
        f"{row['provider']} ({extra(row)['reason']})" for row in rows if row["mode"] == "absent"
    ]
    if absent:
        out.append(f"Not measured: {'; '.join(absent)}.\n")
    return "\n".join(out)


def comparison(timed: Rows) -> str:
    body, ratios = [], []
    for shape in dict.fromkeys(row["x_value"] for row in timed):
        here = {row["provider"]: row for row in timed if row["x_value"] == shape}
        ours, e = here[OURS], extra(here[OURS])
        others = [row for name, row in here.items() if name != OURS]
        share = 100 * e["tops"] / e["peak_tops"]
        cells = [
            shape,
            f"{us(ours):.0f}",
            f"{e['tops']:.2f}",
            "–" if math.isnan(share) else f"{share:.0f} %",
        ]
        if others:
            best = min(others, key=us)
            ratios.append(us(best) / us(ours))
            mark = "{:.2f}" if ratios[-1] >= 1 else "**{:.2f}**"
            cells += [mark.format(ratios[-1]), f"{best['provider']}, {us(best):.0f} µs"]
        body.append(cells + [""] * (6 - len(cells)))
    head = ["M,K,N", "µs", "TOPS", "of the bare loop", "× best peer", "best peer"]
    text = markdown(head, body)
    if ratios:
        lost = sum(ratio < 1 for ratio in ratios)
        text += f"\nGeomean {geomean(ratios):.2f} × the best peer of each shape, "
        text += f"worst {min(ratios):.2f}; "
        text += "no losses.\n" if not lost else f"{lost} of {len(ratios)} lost (bold).\n"
    return text


def int8_linear_sweep(rows: Rows) -> str:
    by_m = {int(row["x_value"]): us(row) for row in rows if row["x_name"] == "M"}
    steps = {m: by_m[m] / by_m[m - 1] for m in by_m if m - 1 in by_m}
    worst = max(steps, key=lambda m: steps[m])
    size = extra(rows[0])["K"]
    text = (
        f"K = N = {size}: {by_m[1]:.0f} µs at M = 1, {by_m[max(by_m)]:.0f} µs at M = {max(by_m)}; "
    )
    text += f"the largest step from one M to the next is {steps[worst]:.2f} × (to M = {worst}).\n\n"
    padded = {row["x_value"]: us(row) for row in rows if row["mode"] == "padded"}
    body = [
        [row["x_value"], extra(row)["padded"], f"{us(row) / padded[extra(row)['padded']]:.2f}"]
        for row in rows
        if row["mode"] == "odd"
    ]
    return text + markdown(["odd M,K,N", "padded", "time, odd : padded"], body)


def int8_linear_isa(rows: Rows) -> str:
    body = []
    for row in rows:
        if row["provider"] == "torch fp32":
            fp32 = us(row)
        else:
            machine = "this machine" if row["mode"].startswith("this") else "as an AVX2 machine"
            cells = [row["provider"], machine, row["x_value"], f"{us(row):.0f}", f"{fp32:.0f}"]
            body.append(cells + [f"{fp32 / us(row):.2f}"])
    body.sort(key=lambda cells: cells[1])
    return markdown(["path", "torch runs", "M,K,N", "µs", "torch fp32, µs", "× torch fp32"], body)


def int8_linear_overhead(rows: Rows) -> str:
    figures = {row["provider"]: us(row) for row in rows}
    ours, theirs = figures["Int8Linear"], figures["nn.Linear"]
    return f"1×64×64: Int8Linear {ours:.1f} µs a call, nn.Linear {theirs:.1f} µs.\n"


def optim(rows: Rows) -> str:
    """Times of the bars' models, of small states and of the other rules; then the speed by size."""
    timed: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["x_name"] == "model" and row["mode"] != "absent":
            timed.setdefault((row["mode"], row["x_value"]), {})[row["provider"]] = us(row)
    bars = {case for case, model in timed if model == "2000x64"}
    small = {case for (case, _), times in timed.items() if "torch fused fp32" in times}
    text = "".join(
        f"{title}:\n\n{optim_steps({key: t for key, t in timed.items() if key[0] in cases})}\n"
        for title, cases in (
            ("Large models, many tensors, many groups", bars),
            ("Less memory", small),
            ("Other rules", {case for case, _ in timed} - bars - small),
        )
        if cases
    )
    absent = {row["provider"]: extra(row)["reason"] for row in rows if row["mode"] == "absent"}
    if absent:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in absent.items())
        text += f"Not measured: {reasons}.\n\n"
    return text + optim_sizes(rows)


def optim_steps(timed: dict[tuple[str, str], dict[str, float]]) -> str:
    """A row a step; how many times longer each other takes."""
    names = dict.fromkeys(name for times in timed.values() for name in times)
    peers = [name for name in names if name not in ("trimtab", "streaming loop")]
    body = []
    for (case, model), times in timed.items():
        ours, loop = times["trimtab"], times.get("streaming loop")
        cells = [case, model, f"{ours:.0f}", f"{100 * loop / ours:.0f} %" if loop else ""]
        ratios = [times[name] / ours if name in times else None for name in peers]
        cells += ["" if r is None else f"{r:.2f}" if r >= 1 else f"**{r:.2f}**" for r in ratios]
        body.append(cells)
    head = ["step", "tensors", "µs", "of a streaming loop", *(f"× {name}" for name in peers)]
    return markdown(head, body)


def optim_sizes(rows: Rows) -> str:
    speeds: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["x_name"] == "parameters":
            speeds.setdefault(int(row["x_value"]), {})[row["provider"]] = extra(row)["gb_per_s"]
    names = ("trimtab", "torch fused", "torch foreach", "streaming loop")
    body = [
        [f"{size:,}", *(f"{found[name]:.2f}" for name in names)]
        for size, found in sorted(speeds.items())
    ]
    if not body:
        return ""
    text = "GB/s of AdamW fp32 by parameters, in 16 tensors:\n\n"
    text += markdown(["parameters", *names], body)
    for plot in sorted(RESULTS.glob("*-optim-sizes.svg")):
        text += f"\n![GB/s by parameters](benchmarks/results/{plot.name})\n"
    return text


def sparse_products(rows: Rows) -> str:
    """A row a dtype, block, number of tokens and sparsity: how many times longer each other takes."""
    kinds: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        e, tokens = extra(row), int(row["x_value"].partition(",")[0])
        block = "×".join(map(str, e["block"])) if "block" in e else ""
        few = "1 to 16" if tokens <= 16 else "17 to 128" if tokens <= 128 else "more"
        kind = (row["mode"], block, few, f"{100 * e['sparsity']:.0f} %")
        kinds.setdefault(kind, {}).setdefault(row["x_value"], {})[row["provider"]] = us(row)
    body = []
    for (mode, block, few, sparsity), shapes in kinds.items():
        ours = next(iter(next(iter(shapes.values()))))
        for name in dict.fromkeys(name for times in shapes.values() for name in times):
            ratios = [t[name] / t[ours] for t in shapes.values() if name in t and name != ours]
            if ratios:
                figures = (f"{value:.2f}" for value in (geomean(ratios), min(ratios), max(ratios)))
                body.append([f"{mode} {block}".strip(), few, sparsity, name, *figures])
    head = ["values", "rows of x", "pruned", "against", "× geomean", "worst", "best"]
    return markdown(head, body)


def sparse_convolutions(rows: Rows) -> str:
    """A row a dtype and layer: torch's time over ours at each sparsity."""
    timed: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        sparsity = f"{100 * extra(row)['sparsity']:.0f} %"
        times = timed.setdefault((row["mode"], row["x_value"]), {}).setdefault(sparsity, {})
        times[row["provider"]] = us(row)
    sparsities = list(dict.fromkeys(s for found in timed.values() for s in found))
    ratios = {
        layer: [found[s]["torch"] / found[s]["trimtab"] for s in sparsities]
        for layer, found in timed.items()
    }
    body = [[*layer, *(f"{ratio:.2f}" for ratio in values)] for layer, values in ratios.items()]
    for mode in dict.fromkeys(mode for mode, _ in ratios):
        columns = zip(*(values for layer, values in ratios.items() if layer[0] == mode))
        body.append([mode, "geomean", *(f"{geomean(column):.2f}" for column in columns)])
    return markdown(["dtype", "layer", *sparsities], body)


def sparse_peers(rows: Rows) -> str:
    """A row a case: our time, and how many times longer each peer takes."""
    cases: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        at = (row["mode"], row["x_value"], f"{100 * extra(row)['sparsity']:.0f} %")
        cases.setdefault(at, {})[row["provider"]] = us(row)
    body = []
    for at, times in cases.items():
        (mine,) = (value for name, value in times.items() if name == f"trimtab {at[0]}")
        ratios = (
            f"{name} {value / mine:.2f}"
            for name, value in times.items()
            if name != f"trimtab {at[0]}"
        )
        body.append([*at, f"{mine:.0f}", ", ".join(ratios)])
    return markdown(["weight", "M,K,N", "pruned", "µs", "× as long"], body)


def sparse_dispatcher(rows: Rows) -> str:
    found = {row["metric"]: row["y_50"] for row in rows if row["mode"] == "summary"}
    ratios = [us(row) for row in rows if row["metric"] == "ratio"]
    won = [1 / ratio for ratio in ratios if ratio != 1]
    return (
        f"{float(found['points']):.0f} layers: {float(found['slower']):.0f} came out more than 3 % "
        f"slower than the best dense choice (worst {float(found['worst ratio']):.3f} of its time), "
        f"{float(found['larger']):.0f} larger than the dense weight. Where swap_ took something else, "
        f"it was {geomean(won):.2f} × as fast (geomean of {len(won)}).\n"
    )


def structured(rows: Rows) -> str:
    timed: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        timed.setdefault((row["x_value"], row["mode"]), {})[row["provider"]] = us(row)
    ratios = [times["whole"] / times["trimtab"] for times in timed.values()]
    body = [
        [shape, dtype, *(f"{value:.0f}" for value in times.values()), f"{ratio:.2f}"]
        for ((shape, dtype), times), ratio in zip(timed.items(), ratios)
    ]
    few = ", ".join(name for name in next(iter(timed.values())) if "neurons" in name)
    head = ["rows, width, neurons", "dtype", "half, µs", "whole, µs", f"{few}, µs", "whole / half"]
    text = markdown(head, body)
    return f"{text}\nGeomean {geomean(ratios):.2f} ×, worst {min(ratios):.2f} ×.\n"


def training_seeds(rows: Rows) -> str:
    """A row a model and optimizer: the loss over seeds, and how far from fp32 it is on average."""
    losses: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        losses.setdefault((row["mode"], row["provider"]), []).append(float(row["y_50"]))
    body = []
    for (model, name), values in losses.items():
        first = next(other for kind, other in losses if kind == model)
        base = losses[model, first]
        gap = sum(values) / len(values) - sum(base) / len(base)
        cells = [model, name, f"{sum(values) / len(values):.4f}", f"{stdev(values):.4f}"]
        body.append([*cells, "" if name == first else f"{gap:+.4f}"])
    seeds = len({row["x_value"] for row in rows})
    head = ["model", "optimizer", "last epoch's loss", "seeds' deviation", "gap to fp32"]
    return f"{seeds} seeds, {extra(rows[0])['steps']} steps each:\n\n{markdown(head, body)}"


PARTS: dict[str, Callable[[Rows], str]] = {
    "demo": demo,
    "demo_training": demo_training,
    "demo_pruning": demo_pruning,
    "training_seeds": training_seeds,
    "optim": optim,
    "bitmap_linear": sparse_products,
    "bitmap_conv2d": sparse_convolutions,
    "block_linear": sparse_products,
    "sparse_dispatcher": sparse_dispatcher,
    "sparse_peers": sparse_peers,
    "prune": prune,
    "structured": structured,
    "int8_linear": int8_linear,
    "int8_linear_sweep": int8_linear_sweep,
    "int8_linear_isa": int8_linear_isa,
    "int8_linear_overhead": int8_linear_overhead,
}

if __name__ == "__main__":
    sys.exit(main())
