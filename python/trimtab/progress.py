"""A progress bar of one line, on a terminal only."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TextIO

_WIDTH = 28  # characters of the bar itself
_INTERVAL = 0.1  # seconds between two drawings


class Progress:
    """Counts to ``total``; draws itself where ``stream`` is a terminal, and is silent elsewhere.

    with progress(total, label) as bar: bar.advance("what comes next")
    for item in progress(items, label): ...
    """

    def __init__(self, total: int, label: str, stream: TextIO | None = None) -> None:
        self.total, self.label, self.done = max(total, 1), label, 0
        self.stream = stream or sys.stderr
        self.drawing = self.stream.isatty()
        self._items: Iterable[Any] = ()
        self._drawn_at = 0.0

    def __enter__(self) -> Progress:
        self.advance(steps=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.drawing:
            self.stream.write("\r\x1b[K")  # an empty line is left for what is printed next
            self.stream.flush()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.advance()

    def advance(self, note: str = "", steps: int = 1) -> None:
        """``steps`` more are done; ``note`` says what is being worked on."""
        self.done = min(self.done + steps, self.total)
        now = time.monotonic()
        if not self.drawing or (now - self._drawn_at < _INTERVAL and 0 < self.done < self.total):
            return
        self._drawn_at = now
        filled = _WIDTH * self.done // self.total
        bar = "█" * filled + "░" * (_WIDTH - filled)
        line = f"{self.label} {bar} {self.done}/{self.total} {note}"
        columns = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r\x1b[K{line[:columns]}")
        self.stream.flush()


def progress(items: int | Iterable[Any], label: str, stream: TextIO | None = None) -> Progress:
    """A Progress over a number of steps (a context) or over an iterable (a loop).

    One without a length is listed first. ``stream`` is stderr by default, so that what a program
    prints can be piped.
    """
    if isinstance(items, int):
        return Progress(items, label, stream)
    try:
        count = len(items)  # type: ignore[arg-type]
    except TypeError:
        items = list(items)
        count = len(items)
    bar = Progress(count, label, stream)
    bar._items = items
    return bar
