"""Who takes a module's place: contests of what might, by time on the inputs that the module saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .progress import progress
from .report import ROOT, Patch, apply_all, revert_all
from .swap_candidate import Candidate, Choice, patches_of
from .swap_fuse import EncoderPatch, encoder_patches
from .swap_measure import Call, Capture
from .swap_rules import Survey
from .swap_timing import MARGIN, Pace, Timing, compare

# A winner that took more of the other's time than this has to win again, later, at other paces: what
# disturbs a machine for a second may favour one of the two all along, and no number of rounds tells;
# and one that is faster only while all threads are awake, or while the other's weights have left the
# caches, is not faster in every model.
SURE = 0.6
PACES: tuple[Pace, ...] = ("rested", "streak")


class _Contest(NamedTuple):
    """``choice`` against ``holder``, the best so far; None stands for the module itself."""

    candidate: Candidate
    holder: Choice | None
    choice: Choice

    def likeness(self) -> tuple:
        return self.candidate.likeness(self.holder, self.choice)


def keep_winners(candidates: list[Candidate], capture: Capture) -> list[Candidate]:
    """Each choice in turn against the best so far, at first the module itself; losers stay out."""
    unsure: list[_Contest] = []
    for rank in range(max((len(candidate.choices) for candidate in candidates), default=0)):
        contests = [
            _Contest(c, c.best, c.choices[rank]) for c in candidates if len(c.choices) > rank
        ]
        unsure += [contest for contest, took in _challenge(contests, capture) if took > SURE]
    _confirm(unsure, capture)
    kept = []
    for candidate in candidates:
        row = candidate.row
        assert row.us_before is not None
        if candidate.best is not None:
            row.us_after = row.us_choices[candidate.best.label]
            kept.append(candidate)
            continue
        row.us_after = min(row.us_choices.values())
        surely = "surely " if row.us_after <= MARGIN * row.us_before else ""
        told = ", ".join(f"{us:,.1f} {label}" for label, us in row.us_choices.items())
        also = f"; {row.reason}" if row.reason else ""
        row.leave(f"not {surely}faster here: {row.us_before:,.1f} µs in float, {told}{also}")
    return kept


def _challenge(
    contests: Sequence[_Contest], capture: Capture
) -> list[tuple[_Contest, float]]:  # fmt: skip
    """Who wins takes the place. Returns the contests that were won, and the time's share taken."""
    won = []
    for contest, timing in zip(contests, _times(contests, capture)):
        _write(contest, timing)
        if timing.faster:
            contest.candidate.take(contest.choice)
            won.append((contest, timing.after / timing.before))
    return won


def _confirm(unsure: Sequence[_Contest], capture: Capture) -> None:
    """Who won by little meets those it came after again, the last one first, and may give way."""
    won: dict[int, list[_Contest]] = defaultdict(list)
    for contest in unsure:
        won[id(contest.candidate)].append(contest)
    while any(won.values()):
        again = [_against_best(contests.pop()) for contests in won.values() if contests]
        for pace in PACES:
            still = []
            for contest, timing in zip(again, _times(again, capture, pace)):
                if timing.faster:
                    still.append(contest)
                else:
                    _write(contest, timing)
                    contest.candidate.take(contest.holder)
            again = still


def _against_best(contest: _Contest) -> _Contest:
    """The same holder: the choice that won then may have lost its place since, to a better one."""
    best = contest.candidate.best
    assert best is not None  # None held before the first contest, and that is met last
    return contest._replace(choice=best)


def _write(contest: _Contest, timing: Timing) -> None:
    """Microseconds into the row: of its first contest, which a later one may have seen otherwise."""
    row, choice = contest.candidate.row, contest.choice
    row.one_thread |= timing.one_thread
    if row.us_before is None:
        row.us_before = timing.before
    held = row.us_before if contest.holder is None else row.us_choices[contest.holder.label]
    us = timing.after if held == timing.before else held * timing.after / timing.before
    row.us_choices[choice.label] = us


def _times(contests: Sequence[_Contest], capture: Capture, pace: Pace = "turns") -> list[Timing]:
    """Of all calls of each; each distinct pair of layers on each distinct input is measured once."""
    groups: dict[tuple, list[_Contest]] = defaultdict(list)
    likeness = [contest.likeness() for contest in contests]
    counts = [capture.counts[id(contest.candidate.module)] for contest in contests]
    for contest, like, seen in zip(contests, likeness, counts):
        for key in seen:
            groups[like, key].append(contest)
    times: dict[tuple, Timing] = {}
    with progress(len(groups), "measuring") as bar:
        for (like, key), group in groups.items():
            times[like, key] = _time(group, capture.calls[key], pace)
            bar.advance(group[0].candidate.name)
    return [
        Timing.total((count, times[like, key]) for key, count in seen.items())
        for like, seen in zip(likeness, counts)
    ]


def _on_cuda(args: tuple) -> bool:
    return any(isinstance(x, Tensor) and x.device.type == "cuda" for x in args)


def _time(group: Sequence[_Contest], call: Call, pace: Pace) -> Timing:
    args, kwargs = call.arguments()
    with torch.no_grad(), call.context():
        before = [one.candidate.call(one.holder, args, kwargs) for one in group]
        after = [one.candidate.call(one.choice, args, kwargs) for one in group]
        return Timing(*compare(before, after, _on_cuda(args), pace))


def keep_winning_encoders(
    candidates: list[Candidate], survey: Survey, capture: Capture
) -> list[Candidate]:
    """Measures each encoder as a whole, since its Linears run without its fused inference path."""
    lost: dict[int, str] = {}
    for unit in encoder_patches(survey, {id(c.module) for c in candidates}):
        call = capture.first.get(id(unit.unit))
        if call is None or not unit.patches:
            continue
        members = {id(module) for module in unit.members}
        inside = [c for c in candidates if id(c.module) in members]
        timing = _time_encoder(unit, patches_of(inside, survey) + unit.patches, call)
        if not timing.faster:
            for module in unit.members:
                lost[id(module)] = (
                    f"{unit.name or ROOT} as a whole is not faster without its fused inference "
                    f"path: {timing.before:,.1f} µs with it, {timing.after:,.1f} exchanged"
                )
    for candidate in candidates:
        if id(candidate.module) in lost:
            candidate.row.leave(lost[id(candidate.module)])
    return [candidate for candidate in candidates if id(candidate.module) not in lost]


def _time_encoder(unit: EncoderPatch, patches: list[Patch], call: Call) -> Timing:
    args, kwargs = call.arguments()

    def before() -> None:
        unit.unit(*args, **kwargs)

    def after() -> None:
        try:
            apply_all(patches)
            unit.unit(*args, **kwargs)
        finally:
            revert_all(patches)

    with torch.random.fork_rng(), torch.no_grad(), call.context():
        return Timing(*compare([before], [after], _on_cuda(args), "turns"))
