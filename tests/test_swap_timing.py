"""Which of two calls is faster: under a clock with noise, and on this machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import trimtab
from trimtab import swap_contest, swap_timing
from trimtab.swap_timing import Timing


class Machine:
    """A clock that only calls move, with the noise of a shared machine, the same in every run.

    Each call takes its time times a log-normal factor; one in twelve meets another process, for some
    milliseconds in which this thread is off its core (or, ``unseen``, on it all the same).
    """

    def __init__(self, seed: int, sigma: float, unseen: bool = False) -> None:
        self.now = self.on_core = 0.0
        self.random, self.sigma, self.unseen = random.Random(seed), sigma, unseen

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.on_core

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.woken = True

    woken = False
    last: Callable[[], None] | None = None

    def call(self, us: float, after_rest: float = 1.0, after_itself: float = 1.0):
        def run() -> None:
            slow = 1 + 0.3 * (int(self.now / 0.02) % 2)  # a machine whose speed goes up and down
            slow *= after_rest if self.woken else 1
            slow *= after_itself if self.last is run else 1
            self.last = run
            seconds = us * 1e-6 * slow * self.random.lognormvariate(0, self.sigma)
            self.now, self.on_core = self.now + seconds, self.on_core + seconds
            if self.random.random() < 1 / 12:
                wait = self.random.expovariate(500)
                self.now += wait
                self.on_core += wait * self.unseen

        return run


def share_won(monkeypatch, before: float, after: float, sigma: float, **noise) -> float:
    """Of 100 contests, how many ``after`` won."""
    won = 0
    for seed in range(100):
        machine = Machine(seed, sigma, **noise)
        monkeypatch.setattr(swap_timing, "time", machine)
        timing = swap_timing.compare([machine.call(before)], [machine.call(after)])
        assert not timing.one_thread
        assert machine.now < 1.2 * swap_timing.MOST_BUDGET_S + 15e-6 * (before + after)
        won += timing.faster
    return won / 100


@pytest.mark.parametrize("us", [20.0, 800.0, 6000.0])
@pytest.mark.parametrize("unseen", [False, True], ids=["off-core", "on-core"])
def test_what_is_not_faster_does_not_win(monkeypatch, us: float, unseen: bool) -> None:
    """Slower by 4 %: at most once in 100; equal: seldom (several looks, each at 1 %)."""
    assert share_won(monkeypatch, us, 1.04 * us, 0.2, unseen=unseen) <= 0.01
    assert share_won(monkeypatch, us, 1.0 * us, 0.2, unseen=unseen) <= 0.05


@pytest.mark.parametrize("us", [20.0, 800.0])
def test_what_is_faster_wins(monkeypatch, us: float) -> None:
    """A fifth always, a tenth nearly always, in spite of 20 % of noise on each sample."""
    assert share_won(monkeypatch, us, 0.8 * us, 0.2) == 1
    assert share_won(monkeypatch, us, 0.9 * us, 0.2) >= 0.9


def test_a_tie_is_not_won_on_a_quiet_machine(monkeypatch) -> None:
    assert share_won(monkeypatch, 500.0, 0.985 * 500, 0.005) == 0  # surely faster, but by 1.5 %
    assert share_won(monkeypatch, 500.0, 0.96 * 500, 0.005) == 1


def test_only_a_close_contest_takes_long(monkeypatch) -> None:
    spent = {}
    for after in (0.5, 0.98, 2.0):
        machine = Machine(0, 0.2)
        monkeypatch.setattr(swap_timing, "time", machine)
        swap_timing.compare([machine.call(500.0)], [machine.call(after * 500)])
        spent[after] = machine.now
    assert spent[0.5] < 0.08 and spent[2.0] < 0.08 and spent[0.98] > 0.25


def test_few_rounds_of_slow_calls_decide_all_the_same(monkeypatch) -> None:
    assert share_won(monkeypatch, 60e3, 30e3, 0.05, unseen=True) == 1
    assert share_won(monkeypatch, 60e3, 66e3, 0.05, unseen=True) <= 0.05


def test_rested(monkeypatch) -> None:
    """One that is fast only while no one rests: it wins at once, not with pauses."""
    for pace in ("turns", "rested"):
        machine = Machine(0, 0.1)
        monkeypatch.setattr(swap_timing, "time", machine)
        calls = [machine.call(700.0)], [machine.call(600.0, after_rest=1.3)]
        rested = pace == "rested"
        assert swap_timing.compare(*calls, pace=pace).faster != rested
        assert machine.woken == rested


def test_streak(monkeypatch) -> None:
    """One that is fast only while the other's weights have left the caches."""
    for pace in ("turns", "streak"):
        machine = Machine(0, 0.02)
        monkeypatch.setattr(swap_timing, "time", machine)
        calls = [machine.call(25.0, after_itself=0.75)], [machine.call(18.6)]
        assert swap_timing.compare(*calls, pace=pace).faster == (pace == "turns")


def test_total_weighs_the_bounds_as_well() -> None:
    parts = [(10, Timing(10.0, 9.0, worst=9.5)), (1, Timing(10.0, 12.0, True, 16.0))]
    timing = Timing.total(parts)
    assert timing == (110.0, 102.0, True, 111.0) and not timing.faster
    assert Timing.total(parts[:1]).faster and Timing(10.0, 9.7).faster
    assert not Timing(10.0, 9.71).faster and not Timing(10.0, 5.0, worst=10.1).faster


@pytest.mark.parametrize("loses", ["never", "rested", "streak"])
def test_a_winner_by_little_has_to_win_again_later(monkeypatch, loses: str) -> None:
    """A minute that favours one of the two all along: no number of rounds in it tells."""
    calls = []

    def compare(before, after, cuda, pace) -> Timing:
        calls.append((len(before), pace))
        return Timing(10.0, 11.0 if pace == loses else 8.0)

    monkeypatch.setattr(swap_contest, "compare", compare)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    report = trimtab.swap_(model, trimtab.Int8(), example_inputs=torch.randn(3, 64))
    paces = ["turns", "rested"] if loses == "rested" else ["turns", "rested", "streak"]
    assert calls == [(2, pace) for pace in paces]
    assert len(report.swapped) == (2 if loses == "never" else 0)
    if loses != "never":
        row = report["0"]
        assert row.reason == "not faster here: 10.0 µs in float, 11.0 in int8"
        assert row.bytes_after == row.bytes_before and row.sqnr_db is None


def test_a_winner_by_much_does_not(monkeypatch) -> None:
    calls = []

    def compare(before, after, cuda, pace) -> Timing:
        calls.append(1)
        return Timing(10.0, 4.0)

    monkeypatch.setattr(swap_contest, "compare", compare)
    report = trimtab.swap_(
        nn.Sequential(nn.Linear(64, 64)), trimtab.Int8(), example_inputs=torch.randn(3, 64)
    )
    assert len(calls) == 1 and len(report.swapped) == 1


def test_a_gain_within_the_noise_is_named(monkeypatch) -> None:
    monkeypatch.setattr(swap_contest, "compare", lambda *_: Timing(10.0, 9.0, worst=10.5))
    report = trimtab.swap_(
        nn.Sequential(nn.Linear(64, 64)), trimtab.Int8(), example_inputs=torch.randn(3, 64)
    )
    assert report["0"].reason == "not surely faster here: 10.0 µs in float, 9.0 in int8"


# --- on this machine


def spin(microseconds):
    """Work of so much CPU time, however busy the machine is."""

    def call():
        end = time.thread_time() + microseconds * 1e-6
        while time.thread_time() < end:
            pass

    return call


def test_compare_tells_a_slow_call_from_a_fast_one():
    before, after, *_ = swap_timing.compare([spin(300)], [spin(100)])
    assert 290 < before < 600 and 95 < after < 250
    assert after < 0.7 * before


def test_compare_is_bounded_in_time():
    start = time.perf_counter()
    swap_timing.compare([lambda: time.sleep(0.01)], [lambda: time.sleep(0.01)])
    # A sleeping thread is never calm, so this is the longest a measurement takes.
    assert time.perf_counter() - start < 2 * swap_timing.MOST_BUDGET_S + 2.0


def test_compare_drops_samples_in_which_the_thread_had_no_core():
    calls, work = [0], spin(200)

    def sometimes_asleep():
        calls[0] += 1
        if calls[0] % 3 == 0:
            time.sleep(0.005)
        work()

    before, after, *_ = swap_timing.compare([sometimes_asleep], [spin(1000)])
    assert 190 < before < 1000 <= after * 1.01


def test_without_a_core_the_cpu_time_of_one_thread_decides():
    threads, seen = torch.get_num_threads(), set()

    def waits(work):
        def call():
            seen.add(torch.get_num_threads())
            time.sleep(0.002)
            work()

        return call

    timing = swap_timing.compare([waits(spin(100))], [waits(spin(400))])
    assert timing.one_thread and seen == {threads, 1} and torch.get_num_threads() == threads
    assert 95 < timing.before < 400 <= timing.after * 1.01 < 1500
