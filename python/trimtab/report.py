"""What swap_ did: a row for every module, totals, and the way back."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

SWAPPED = "swapped"
FUSED = "fused"
ADJUSTED = "adjusted"
LEFT_ALONE = "left alone"

# The reason of rows that print() only counts.
NO_WEIGHTS = "no weights"

# The model itself has no qualified name.
ROOT = "(the model itself)"


@dataclasses.dataclass
class Row:
    """What became of one module.

    Attributes:
        name: qualified name; ``also`` holds further names of the same module object.
        type: class name of the module before.
        shape: of its weight; () if it has none.
        status: "swapped", "fused" (an activation that its Linear now computes), "adjusted" (a
            container whose setting had to change) or "left alone".
        reason: why, or how.
        activation: what is fused into the swapped layer, else "none".
        bytes_before, bytes_after: of its own parameters and buffers. A tensor that two modules
            share counts in both rows, once in the report's totals.
        sqnr_db: 10 log10(sum w^2 / sum (w - w')^2) of the weight w' that was put there, infinite where
            it is the same; None where nothing was exchanged.
        calls: how often ``example_inputs`` called it; None without example_inputs.
        us_before, us_after: microseconds of all these calls, fused activation included; measured
            for a rejected candidate as well, None where nothing was measured.
        us_choices: what each form that was tried took, by its name: "sparse", "in int8", ...
        one_thread: these are CPU time of a single thread, as other processes kept the cores busy.
    """

    name: str
    type: str
    shape: tuple[int, ...] = ()
    status: str = LEFT_ALONE
    reason: str = ""
    activation: str = "none"
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr_db: float | None = None
    calls: int | None = None
    us_before: float | None = None
    us_after: float | None = None
    us_choices: dict[str, float] = dataclasses.field(default_factory=dict)
    one_thread: bool = False
    also: tuple[str, ...] = ()

    def leave(self, reason: str) -> None:
        self.status, self.reason, self.activation = LEFT_ALONE, reason, "none"
        self.bytes_after = self.bytes_before


@dataclasses.dataclass
class Patch:
    """One exchange: an entry of ``owner``'s child modules or of its instance attributes."""

    owner: nn.Module
    key: str
    old: Any
    new: Any
    name: str
    in_modules: bool = True

    def _slot(self) -> dict[str, Any]:
        return self.owner._modules if self.in_modules else self.owner.__dict__

    def apply(self) -> None:
        self._slot()[self.key] = self.new

    def revert(self) -> None:
        self._slot()[self.key] = self.old

    def current(self) -> Any:
        return self._slot().get(self.key)


def apply_all(patches: Sequence[Patch]) -> None:
    """All of them or, whatever is raised meanwhile (KeyboardInterrupt too), none."""
    try:
        for patch in patches:
            patch.apply()
    except BaseException:
        revert_all(patches)
        raise


def revert_all(patches: Sequence[Patch]) -> None:
    for patch in reversed(patches):
        patch.revert()


class SwapReport:
    """What swap_ did to a model: ``print(report)``, ``report.rows``, ``report.undo()``.

    It keeps the modules that were replaced, for undo(); their float weights are freed when the
    report is dropped or by release().
    """

    def __init__(
        self, rows: list[Row], patches: list[Patch], bytes_before: int, bytes_after: int
    ) -> None:
        self.rows = rows
        self.bytes_before, self.bytes_after = bytes_before, bytes_after
        self._patches: list[Patch] | None = patches
        self._gone = ""

    @property
    def swapped(self) -> list[Row]:
        """The rows of modules that were exchanged."""
        return [row for row in self.rows if row.status == SWAPPED]

    @property
    def left_alone(self) -> list[Row]:
        return [row for row in self.rows if row.status == LEFT_ALONE]

    def __getitem__(self, name: str) -> Row:
        """The row of a qualified name, any of them if the module has several."""
        # A shared activation that is fused in one of its places has a row of its own for that place.
        for row in [row for row in self.rows if row.name == name] or self.rows:
            if name == row.name or name in row.also:
                return row
        raise KeyError(f"SwapReport: no module called {name!r}")

    def undo(self) -> None:
        """Puts back the very same modules, activations and settings.

        They come back as swap_ left them: a ``model.to(...)`` or ``model.train(...)`` in between has
        reached the new layers only. The bias is one parameter shared by both, so training it stays.

        Raises:
            RuntimeError: undone or released before, or a place no longer holds what swap_ put there;
                nothing is changed then.
        """
        if self._patches is None:
            raise RuntimeError(f"SwapReport.undo: expected a swap to undo, but it was {self._gone}")
        for patch in self._patches:
            if patch.current() is not patch.new:
                raise RuntimeError(
                    f"SwapReport.undo: expected {patch.name} to hold the {describe(patch.new)} that "
                    f"swap_ put there, got {describe(patch.current())}; put it back first"
                )
        revert_all(self._patches)
        self._patches, self._gone = None, "undone already"

    def release(self) -> None:
        """Frees the float modules; undo() is impossible afterwards."""
        if self._patches is not None:
            self._patches, self._gone = None, "released"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "state": self._gone or "in place",
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_json(self, **options: Any) -> str:
        """to_dict() as JSON; an infinite SQNR (a weight without rounding error) becomes null."""
        facts = self.to_dict()
        for row in facts["rows"]:
            if row["sqnr_db"] == float("inf"):
                row["sqnr_db"] = None
        return json.dumps(facts, **options)

    def __repr__(self) -> str:
        return f"SwapReport({len(self.swapped)} swapped of {len(self.rows)} modules)"

    def __str__(self) -> str:
        """A line for each module with weights or a changed role; the others are counted below."""
        told = [row for row in self.rows if row.status != LEFT_ALONE or row.reason != NO_WEIGHTS]
        measured = any(row.us_before is not None for row in told)
        head = ["module", "type", "shape", "what", "bytes", "SQNR dB"]
        head += ["µs"] * measured + ["why"]
        lines = _align([head, *(_cells(row, measured) for row in told)])
        return "\n".join([*lines, *self._totals(told)])

    def _totals(self, told: list[Row]) -> list[str]:
        lines = []
        rest = Counter(row.type for row in self.rows if not any(row is one for one in told))
        if rest:
            kinds = ", ".join(f"{count} {kind}" for kind, count in rest.most_common())
            lines.append(f"without weights, left alone: {kinds}")
        swapped = self.swapped
        weighty = sum(bool(row.shape) for row in self.rows)
        total = f"swapped {len(swapped)} of {weighty} modules with weights"
        fused = sum(row.status == FUSED for row in self.rows)
        total += f", {fused} activations fused" if fused else ""
        before, after = self.bytes_before, self.bytes_after
        total += f"; {megabytes(before)} -> {megabytes(after)}"
        total += f" ({before / after:.2f}x smaller)" if after else ""
        times = [(row.us_before, row.us_after) for row in swapped if row.us_before and row.us_after]
        if times:
            slow, fast = sum(b for b, _ in times), sum(a for _, a in times)
            total += f"; their calls {slow:,.0f} -> {fast:,.0f} µs ({slow / fast:.2f}x faster)"
        lines.append(total)
        if any(row.one_thread for row in self.rows):
            lines.append("* CPU time of one thread, as other processes kept the cores busy")
        return lines + ([f"({self._gone})"] if self._gone else [])


def _cells(row: Row, measured: bool) -> list[str]:
    times = ""
    if row.us_before is not None and row.us_after is not None:
        times = f"{row.us_before:,.1f} -> {row.us_after:,.1f}{'*' * row.one_thread}"
    size = f"{row.bytes_before:,}"
    if row.bytes_after != row.bytes_before:
        size += f" -> {row.bytes_after:,}"
    return [
        row.name + "".join(f" = {name}" for name in row.also),
        row.type,
        "x".join(map(str, row.shape)),
        row.status,
        size if row.bytes_before else "",
        "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
        *([times] * measured),
        row.reason,
    ]


def _align(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in table]
    return [line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]]]


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 10_000 else f"{count} B"


def describe(thing: Any) -> str:
    """A module by its class, a function or setting by itself."""
    if isinstance(thing, nn.Module):
        return type(thing).__name__
    return getattr(thing, "__name__", None) or repr(thing)


def tensor_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the distinct parameters and buffers of these modules (their own, not children's)."""
    tensors = {}
    for module in modules:
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and not nn.parameter.is_lazy(tensor):
                tensors[id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
