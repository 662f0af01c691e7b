"""Mutants of a CUDA source: a wait or a barrier removed, a phase flipped, an index off by one.

All mutants of a file are compiled at once: each changed place asks simt::machine.mutant, which simt_mutate()
sets, whether it is the one. 0 is the source as it stands.

    text, found = mutate("int8_mm_sm90.cuh", source, {"m + row >= e.M": "m + row > e.M"})
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# Wrappers whose call is removed, and those whose last argument is a parity that is flipped.
WAITS = (
    "cp_async_wait",
    "mbarrier_wait",
    "mbarrier_wait_cluster",
    "wgmma_wait",
    "tma_store_wait_read",
)
BARRIERS = (
    "__syncthreads",
    "__syncwarp",
    "named_barrier_sync",
    "named_barrier_arrive",
    "cluster_sync",
)
ARRIVALS = ("mbarrier_arrive", "mbarrier_arrive_cluster", "mbarrier_release_cluster")
FENCES = ("fence_mbarrier_init", "fence_proxy_async", "wgmma_fence", "__threadfence")
GROUPS = ("cp_async_commit", "wgmma_commit", "tma_store_commit")
KINDS = {
    **dict.fromkeys(WAITS, "wait removed"),
    **dict.fromkeys(BARRIERS, "barrier removed"),
    **dict.fromkeys(ARRIVALS, "arrival removed"),
    **dict.fromkeys(FENCES, "fence removed"),
    **dict.fromkeys(GROUPS, "commit removed"),
}
PHASES = ("mbarrier_wait", "mbarrier_wait_cluster")
# Wrappers whose template argument is how many groups may still be under way.
COUNTED = ("cp_async_wait", "wgmma_wait")


@dataclass(frozen=True)
class Mutant:
    number: int
    kind: str
    file: str
    line: int
    text: str  # the source's line
    change: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}: {self.text}" + (
            f" [{self.change}]" if self.change else ""
        )


def closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` is closed."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no end to the parenthesis at {opening}")


def last_argument(text: str) -> int:
    """Where the last of the arguments starts."""
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(c, 0)
        if c == "," and depth == 0:
            start = i + 1
    return start


def mutate(
    file: str, source: str, edits: Mapping[str, str] | None = None, first: int = 1
) -> tuple[str, list[Mutant]]:
    """The source with every call above removable, phases to flip, and `edits` of expressions to choose.

    edits: {expression, which must stand in the source: another}. Numbers count from `first`.
    """
    found: list[Mutant] = []
    places: list[tuple[int, int, str]] = []  # start, end, replacement; none overlap

    def add(kind: str, at: int, change: str = "") -> int:
        line = source.count("\n", 0, at)
        text = " ".join(source.splitlines()[line].split())
        found.append(Mutant(first + len(found), kind, file, line + 1, text, change))
        return found[-1].number

    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment.group()), source)
    for old, new in (edits or {}).items():
        starts = [m.start() for m in re.finditer(re.escape(old), code)]
        if not starts:
            raise ValueError(f"no such expression to mutate: {old}")
        for start in starts:
            number = add("index off by one", start, f"{old} -> {new}")
            choice = f"(::simt::machine.mutant == {number} ? ({new}) : ({old}))"
            places.append((start, start + len(old), choice))

    names = "|".join(sorted(KINDS, key=len, reverse=True))
    for call in re.finditer(rf"(?<![\w.])({names})(<[^;()]*>)?\(", code):
        name, opening = call.group(1), call.end() - 1
        end = closing(code, opening)
        if code[end + 1] != ";":  # a definition
            continue
        number = add(KINDS[name], call.start())
        choice = f"::simt::machine.mutant == {number} ? void() : "
        if name in COUNTED:
            number = add("wait for a group less", call.start())
            less = f"{name}<({call.group(2)[1:-1]}) + 1>()"
            choice += f"::simt::machine.mutant == {number} ? {less} : "
        places.append((call.start(), call.start(), choice))
        if name in PHASES:
            start = opening + 1 + last_argument(code[opening + 1 : end])
            number = add("phase flipped", call.start())
            places.append((start, start, "("))
            places.append((end, end, f") ^ unsigned(::simt::machine.mutant == {number})"))

    for start, end, new in sorted(places, key=lambda place: -place[0]):
        source = source[:start] + new + source[end:]
    return source, found


def started(run: Callable[[], str | None], seconds: int) -> tuple[int, int]:
    """A process of its own for run(), and where its answer will be read."""
    read, write = os.pipe()
    child = os.fork()
    if child != 0:
        os.close(write)
        return child, read
    faulthandler.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(10 * seconds)
    status = 1
    try:
        os.write(write, (run() or "").encode())
        status = 0
    finally:
        os._exit(status)


def ended(child: int, read: int) -> str | None:
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return answer or None if os.WEXITSTATUS(status) == 0 else "raised an exception"


def fate(run: Callable[[], str | None], seconds: int = 60) -> str | None:
    """What becomes of run() in a process of its own, which may crash: its answer, or how it ended.

    It has so many seconds of processor time, which other processes do not use up, and ten times as long
    where it waits.
    """
    return ended(*started(run, seconds))


def survivors(
    found: Iterable[Mutant], run: Callable[[int], str | None], seconds: int = 60
) -> tuple[dict[Mutant, str], list[Mutant]]:
    """What caught each mutant, and those that nothing caught. run(number) says what went wrong, or None.

    Each in a process of its own, three at a time.
    """
    caught: dict[Mutant, str] = {}
    alive: list[Mutant] = []
    running: deque[tuple[Mutant, tuple[int, int]]] = deque()

    def end_one() -> None:
        mutant, process = running.popleft()
        answer = ended(*process)
        if answer is None:
            alive.append(mutant)
        else:
            caught[mutant] = answer

    for mutant in found:
        running.append((mutant, started(lambda number=mutant.number: run(number), seconds)))  # type: ignore[misc]
        if len(running) > 2:
            end_one()
    while running:
        end_one()
    return caught, alive
