"""The demo's tables as CSVs beside the others: all-MiniLM-L6-v2 with 128 texts of 128 tokens (demo),
two models learning digits with torch.optim and trimtab.optim (demo_training), and the CNN pruned and
swapped (demo_pruning)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import harness
import torch
from harness import Table, Timing

from trimtab import demo
from trimtab.demo_page import smooth


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    torch.set_grad_enabled(True)  # for the training
    missing = [pip for name, pip in demo.PACKAGES.items() if not demo.importable(name)]
    if missing:
        print(f"not measured: {', '.join(missing)} not installed; `make demo` installs them")
        return 0
    size = (
        ["--texts", "8", "--rounds", "2", "--steps", "4"] if options.quick else ["--rounds", "12"]
    )
    with tempfile.TemporaryDirectory() as folder:
        figures, page = Path(folder) / "demo.json", Path(folder) / "demo.html"
        arguments = [*size, "--threads", str(options.threads), "--json", str(figures)]
        status = demo.main([*arguments, "--html", str(page)])
        if status:
            return status
        result = json.loads(figures.read_text())
    table = Table("demo", options.out)
    x = ("texts,tokens", f"{result['texts']},{result['tokens']}")
    for row in result["rows"]:
        times = [row[key] * 1e3 for key in ("milliseconds", "p20", "p80")]
        kept = ("texts_per_second", "speedup", "weight_bytes", "cosine_mean", "cosine_min")
        extra = {key: row[key] for key in (*kept, "nearest_agreement")}
        table.add(row["name"], "forward", x, Timing(*times, result["rounds"]), **extra)
    table.write()
    table = Table("demo_training", options.out)
    for row in result["training"]:
        times = [row[f"step_{key}"] for key in ("us", "p20", "p80")]
        kept = ("bytes", "accuracy", "same_bits", "parameters")
        extra = {key: row[key] for key in kept}
        loss = smooth(row["losses"])[-1]
        timing = Timing(*times, len(row["losses"]))
        table.add(row["name"], "step", ("model", row["model"]), timing, loss=loss, **extra)
    table.write()
    table = Table("demo_pruning", options.out)
    for row in result["pruning"]:
        kept = ("accuracy", "weight_bytes", "choices", "steps")
        extra = {key: row[key] for key in kept}
        for images, name in ((64, "batch"), (1, "one")):
            times = [row[f"{name}_{key}"] * 1e3 for key in ("ms", "p20", "p80")]
            x = ("sparsity,images", f"{row['sparsity']:.4f},{images}")
            table.add(row["name"], "forward", x, Timing(*times, row["rounds"]), **extra)
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
