"""Which of two ways to compute something is faster, beyond the noise of a busy machine."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch

# A gain below 3 % is none: it does not pay for an exchange.
MARGIN = 0.97
BUDGET_S = 0.05  # per contest; while it is close, or other processes disturb, up to:
MOST_BUDGET_S = 0.3
LOOK_AGAIN = 1.5  # times as much spent, before a close contest is looked at again
SAMPLE_S = 50e-6  # shorter calls are repeated within a sample, for the clock's sake
MIN_ROUNDS, MAX_ROUNDS = 5, 2000
CALM = 0.9  # of a calm sample's time this thread was running
ENOUGH = 3  # calm rounds
# A sign test at 1 %: of n rounds, n/2 + 2.326 sqrt(n)/2 are below an equal pair's median so seldom.
SIGNS = 2.326 / 2
REST_S = 2e-3  # in which the threads of the call before go to sleep
STREAK_S = 1e-3  # a sample of calls that follow each other, whose weights stay in the caches
# More modules of one shape than this need not be cycled through.
MAX_MODULES = 4

Calls = Sequence[Callable[[], Any]]
# How calls follow each other. "turns": at once, as layers do in a model; "rested": before each sample
# a pause and a call that is not timed, as where a model is called now and then; "streak": the same
# one again and again, as in a loop over a small model.
Pace = Literal["turns", "rested", "streak"]


class Timing(NamedTuple):
    """Microseconds of a call; ``one_thread`` if it was CPU time of a single thread.

    ``worst``: what ``after`` may take at most, in 99 of 100 cases, where ``before`` is right.
    """

    before: float
    after: float
    one_thread: bool = False
    worst: float | None = None

    @property
    def faster(self) -> bool:
        """By more than the margin, and surely faster at all; a close contest is not won."""
        surely = self.after if self.worst is None else self.worst
        return self.after <= MARGIN * self.before and surely <= self.before

    @staticmethod
    def total(parts: Iterable[tuple[int, Timing]]) -> Timing:
        """Of several calls, each so many times."""
        before = after = worst = 0.0
        one_thread = False
        for count, part in parts:
            before, after = before + count * part.before, after + count * part.after
            worst += count * (part.after if part.worst is None else part.worst)
            one_thread |= part.one_thread
        return Timing(before, after, one_thread, worst)


class _Round(NamedTuple):
    """Seconds of a call, and for how many of them this thread was on a core."""

    before: float
    before_on_core: float
    after: float
    after_on_core: float

    @property
    def calm(self) -> bool:
        return (
            self.before_on_core > CALM * self.before and self.after_on_core > CALM * self.after
        )  # fmt: skip


def compare(before: Calls, after: Calls, cuda: bool = False, pace: Pace = "turns") -> Timing:
    """Median microseconds of a call, before and after, from samples taken in turn.

    The two samples of a round are neighbours in time, so that a slow moment of the machine slows
    both: what decides is the ratio within each round, by a sign test. A contest that is close goes on
    for longer.

    Rounds during which this thread waited for a core are dropped, and more are taken instead: they
    tell of other processes. If too few are left, CPU time on a single thread decides, to which other
    processes matter little.

    Where several pairs are given (all of a model's modules of one shape) the samples cycle through
    them, so that weights come from memory as in the model. With one pair its weights may stay in the
    cache; that favours the float layer, whose weights are the larger, and so is on the safe side.
    """
    pairs = list(zip(before, after))[:MAX_MODULES]
    rounds = _rounds(pairs, cuda, pace)
    calm = [r for r in rounds if r.calm]
    if cuda or len(calm) >= ENOUGH:
        return _timing([(r.before, r.after) for r in (rounds if cuda else calm)], False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        rounds = _rounds(pairs, cuda, pace, any_will_do=True)
    finally:
        torch.set_num_threads(threads)
    return _timing([(r.before_on_core, r.after_on_core) for r in rounds], True)


def _timing(taken: Sequence[tuple[float, float]], one_thread: bool) -> Timing:
    before = 1e6 * _median(seconds for seconds, _ in taken)
    ratio, bound = _median_and_bound(taken)
    return Timing(before, before * ratio, one_thread, before * bound)


def _median_and_bound(taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of after / before: the median, and what it is surely not above."""
    ratios = sorted(after / max(before, 1e-12) for before, after in taken)
    count = len(ratios)
    at = math.ceil(count / 2 + SIGNS * math.sqrt(count))
    return _median(ratios), ratios[min(at, count) - 1]


def _close(rounds: Sequence[_Round], cuda: bool, any_will_do: bool) -> bool:
    """Whether it takes more rounds to tell."""
    if any_will_do:
        taken = [(r.before_on_core, r.after_on_core) for r in rounds]
    else:
        taken = [(r.before, r.after) for r in rounds if cuda or r.calm]
    ratio, most = _median_and_bound(taken)
    if ratio <= MARGIN:
        return most > 1  # it seems to win
    least = 1 / _median_and_bound([(after, before) for before, after in taken])[1]
    return least <= MARGIN  # it might have


def _median(values: Iterable[float]) -> float:
    """As statistics.median, whose module takes 5 ms to import."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[~middle]) / 2


def _rounds(
    pairs: Sequence[tuple[Callable[[], Any], Callable[[], Any]]],
    cuda: bool,
    pace: Pace = "turns",
    any_will_do: bool = False,
) -> list[_Round]:
    """Until enough of them are calm, and it is clear who is faster."""
    for pair in pairs:
        for call in pair:
            call()
    once = sum(_sample(call, 1, cuda)[0] for call in pairs[0])
    long = STREAK_S if pace == "streak" else SAMPLE_S
    repeats = max(1, int(2 * long / max(once, 1e-7)))
    rounds: list[_Round] = []
    start, look, calm = time.perf_counter(), BUDGET_S, 0
    for i, (first, second) in zip(range(MAX_ROUNDS), itertools.cycle(pairs)):
        spent = time.perf_counter() - start
        # Calls of 50 ms and more: a few rounds there must be.
        if spent > MOST_BUDGET_S and (calm >= ENOUGH or i >= 2 * ENOUGH):
            break
        if i and spent > look:
            look = LOOK_AGAIN * spent
            if calm >= MIN_ROUNDS and not _close(rounds, cuda, any_will_do):
                break
        if i % 2:
            one, other = (_sample(call, repeats, cuda, pace) for call in (first, second))
        else:
            other, one = (_sample(call, repeats, cuda, pace) for call in (second, first))
        rounds.append(_Round(*one, *other))
        calm += cuda or any_will_do or rounds[-1].calm
    return rounds


def _sample(
    call: Callable[[], Any], repeats: int, cuda: bool, pace: Pace = "turns"
) -> tuple[float, float]:
    """Seconds of a call, and for how many of them this thread was on a core."""
    if pace == "rested":
        time.sleep(REST_S)
        call()
    if cuda:
        torch.cuda.synchronize()
    start, start_on_core = time.perf_counter(), time.thread_time()
    for _ in range(repeats):
        call()
    if cuda:
        torch.cuda.synchronize()
    on_core = time.thread_time() - start_on_core
    return (time.perf_counter() - start) / repeats, on_core / repeats
