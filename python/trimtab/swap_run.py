"""What swap_ does: survey, choice, measurement, exchange."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .progress import progress
from .report import (
    ADJUSTED,
    FUSED,
    ROOT,
    SWAPPED,
    Patch,
    Row,
    SwapReport,
    apply_all,
    revert_all,
    tensor_bytes,
)
from .swap_candidate import Candidate, Chosen, build, layer_problem, patches_of
from .swap_fuse import EncoderPatch, Fusion, encoder_patches, find_fusion
from .swap_measure import MARGIN, Call, Capture, Timing, compare
from .swap_rules import KINDS, FilterFn, Survey, by_torch_quantized, kind_of, why_not

if TYPE_CHECKING:
    from .swap import Int8, Sparse


def run(
    model: nn.Module, config: Int8 | Sparse, filter_fn: FilterFn | None, example_inputs: Any
) -> SwapReport:
    """swap_, its arguments checked."""
    survey = Survey(model)
    rows, chosen = _select(survey, config, filter_fn, example_inputs is not None)
    fusions = {id(m): f for m, _, _ in chosen if (f := find_fusion(m, survey))}
    capture = None
    if example_inputs is not None:
        capture = _run_example(survey, chosen, fusions, example_inputs)
        chosen = _keep_reached(chosen, fusions, capture)
    candidates = build(chosen, fusions, config, capture is not None)
    if capture is not None:
        candidates = _keep_winners(candidates, capture)
        candidates = _keep_winning_encoders(candidates, survey, capture)
    patches = patches_of(candidates, survey)
    units = encoder_patches(survey, {id(c.module) for c in candidates})
    patches += [patch for unit in units for patch in unit.patches]
    _note(candidates, units, rows)
    before = tensor_bytes(survey.modules.values())
    apply_all(patches)
    try:
        return SwapReport(_in_order(rows, survey), patches, before, tensor_bytes(model.modules()))
    except BaseException:
        revert_all(patches)
        raise


def _select(
    survey: Survey, config: Int8 | Sparse, filter_fn: FilterFn | None, measured: bool
) -> tuple[dict[str, Row], Chosen]:
    """A row for each leaf and each module with parameters of its own; which of them may change."""
    rows: dict[str, Row] = {}
    chosen: Chosen = []
    for name, module in survey.modules.items():
        if not _has_row(module):
            continue
        row = rows[name] = _row(name, module, survey)
        row.reason = why_not(module, name, survey, filter_fn, measured)
        if not row.reason and (base := kind_of(module)) is not None:
            row.reason = layer_problem(config, KINDS[base])
        if not row.reason:
            chosen.append((module, name, row))
    return rows, chosen


def _has_row(module: nn.Module) -> bool:
    """Leaves, what holds parameters of its own, and what would be a leaf if not parametrized."""
    return (
        all(child is None for child in module._modules.values())
        or any(parameter is not None for parameter in module._parameters.values())
        or kind_of(module) is not None
        or by_torch_quantized(module)
    )


def _row(name: str, module: nn.Module, survey: Survey) -> Row:
    # items(), as a TorchScript module has no real dict there.
    own = {key: t for key, t in module._parameters.items() if t is not None}
    told = own.get("weight", next(iter(own.values()), None))
    shape = () if told is None or nn.parameter.is_lazy(told) else tuple(told.shape)
    size = tensor_bytes([module])
    names = [place.name for place in survey.places[id(module)]]
    also = tuple(other for other in names if other != name)
    return Row(
        name or ROOT, type(module).__name__, shape, bytes_before=size, bytes_after=size, also=also
    )


def _run_example(
    survey: Survey, chosen: Chosen, fusions: dict[int, Fusion], example_inputs: Any
) -> Capture:
    for name, module in survey.modules.items():
        if (
            isinstance(module, nn.modules.lazy.LazyModuleMixin)
            and module.has_uninitialized_params()
        ):
            raise ValueError(
                f"swap_: expected modules with weights to measure on example_inputs, got {name} still "
                "lazy; run the model once first"
            )
    units = encoder_patches(survey, {id(module) for module, _, _ in chosen})
    capture = Capture()
    modules = [module for module, _, _ in chosen]
    capture.run(survey.model, example_inputs, modules, fusions, [unit.unit for unit in units])
    return capture


def _keep_reached(chosen: Chosen, fusions: dict[int, Fusion], capture: Capture) -> Chosen:
    kept = []
    for module, name, row in chosen:
        if not capture.reached(module):
            row.calls = 0
            row.leave("example_inputs never called it, so that there is nothing to measure")
            continue
        row.calls = sum(capture.counts[id(module)].values())
        if id(module) in fusions and not capture.confirms(module, fusions[id(module)]):
            del fusions[id(module)]
        kept.append((module, name, row))
    return kept


def _keep_winners(candidates: list[Candidate], capture: Capture) -> list[Candidate]:
    """Each choice in turn against the best so far, at first the module itself; losers stay out."""
    for rank in range(max((len(candidate.choices) for candidate in candidates), default=0)):
        entered = [c for c in candidates if len(c.choices) > rank]
        _challenge(entered, rank, capture)
    kept = []
    for candidate in candidates:
        if candidate.best is not None:
            kept.append(candidate)
            continue
        row = candidate.row
        told = ", ".join(f"{us:,.1f} {label}" for label, us in row.us_choices.items())
        also = f"; {row.reason}" if row.reason else ""
        row.leave(f"not faster here: {row.us_before:,.1f} µs in float, {told}{also}")
    return kept


def _challenge(candidates: list[Candidate], rank: int, capture: Capture) -> None:
    """Measures each distinct layer on each distinct input, its ``rank``-th choice against the best."""
    groups: dict[tuple, list[Candidate]] = defaultdict(list)
    likeness = {id(c): c.likeness(c.choices[rank]) for c in candidates}
    for candidate in candidates:
        for key in capture.counts[id(candidate.module)]:
            groups[(likeness[id(candidate)], key)].append(candidate)
    times: dict[tuple, Timing] = {}
    with progress(len(groups), "measuring") as bar:
        for (like, key), group in groups.items():
            times[like, key] = _time(group, rank, capture.calls[key])
            bar.advance(group[0].name)
    for candidate in candidates:
        row, choice = candidate.row, candidate.choices[rank]
        before = after = 0.0
        for key, count in capture.counts[id(candidate.module)].items():
            time = times[likeness[id(candidate)], key]
            before, after = before + count * time.before, after + count * time.after
            row.one_thread |= time.one_thread
        if row.us_before is None:
            row.us_before = before
        # In the microseconds of the first round, which a later one may have seen faster or slower.
        best = row.us_before if candidate.best is None else row.us_choices[candidate.best.label]
        row.us_choices[choice.label] = us = after if best == before else best * after / before
        if after <= MARGIN * before:
            candidate.take(choice)
            row.us_after = us
        elif candidate.best is None:
            row.us_after = min(row.us_choices.values())


def _time(group: Sequence[Candidate], rank: int, call: Call) -> Timing:
    args, kwargs = call.arguments()
    cuda = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in args)
    with torch.no_grad(), call.context():
        before = [one.before(args, kwargs) for one in group]
        after = [one.after(one.choices[rank], args, kwargs) for one in group]
        return Timing(*compare(before, after, cuda))


def _keep_winning_encoders(
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
        before, after, _ = _time_encoder(unit, patches_of(inside, survey) + unit.patches, call)
        if after > MARGIN * before:
            for module in unit.members:
                lost[id(module)] = (
                    f"{unit.name or ROOT} as a whole is not faster without its fused inference "
                    f"path: {before:,.1f} µs with it, {after:,.1f} exchanged"
                )
    for candidate in candidates:
        if id(candidate.module) in lost:
            candidate.row.leave(lost[id(candidate.module)])
    return [candidate for candidate in candidates if id(candidate.module) not in lost]


def _time_encoder(unit: EncoderPatch, patches: list[Patch], call: Call) -> Timing:
    args, kwargs = call.arguments()
    cuda = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in args)

    def before() -> None:
        unit.unit(*args, **kwargs)

    def after() -> None:
        try:
            apply_all(patches)
            unit.unit(*args, **kwargs)
        finally:
            revert_all(patches)

    with torch.random.fork_rng(), torch.no_grad(), call.context():
        return Timing(*compare([before], [after], cuda))


def _in_order(rows: dict[str, Row], survey: Survey) -> list[Row]:
    """Rows in the model's order; an activation function, which is no module, behind its parent."""
    order = {name: i for i, name in enumerate(survey.modules)}
    parent = {name: order.get(name, order.get(name.rpartition(".")[0], 0)) for name in rows}
    return [rows[name] for name in sorted(rows, key=lambda name: parent[name])]


def _words(candidate: Candidate) -> str:
    """What took a module's place; of a sparse layer how much of it is left."""
    module = candidate.replacement
    name = type(module).__name__
    sparsity: Any = getattr(module, "sparsity", None)
    if sparsity is None:
        return name
    form = f"{module.pattern}{', int8' if module.int8 else ''}"
    if module.pattern == "block":
        form = "block {}x{}".format(*module.block) + (", int8" if module.int8 else "")  # type: ignore[misc]
    return f"{name} ({form}, {100 * sparsity:.1f} % zeros)"


def _others(row: Row, candidate: Candidate) -> str:
    """What else was tried, and what it took."""
    assert candidate.best is not None
    others = [
        f"{us:,.1f} {label}"
        for label, us in row.us_choices.items()
        if label != candidate.best.label
    ]
    return f"; not {', '.join(others)}" if others else ""


def _note(candidates: list[Candidate], units: list[EncoderPatch], rows: dict[str, Row]) -> None:
    """Writes what happened into the rows."""
    for candidate in candidates:
        row, fusion = candidate.row, candidate.fusion
        row.status = SWAPPED
        also = f"; {row.reason}" if row.reason else ""
        row.reason = f"now {_words(candidate)}"
        if fusion is not None:
            row.activation = fusion.activation
            row.reason += f", computes {fusion.name} ({fusion.activation}) as well"
        row.reason += _others(row, candidate) + also
        if fusion is None:
            continue
        kind = getattr(fusion.act, "__name__", type(fusion.act).__name__)
        act = rows.setdefault(fusion.name, Row(fusion.name, kind))
        here = f"computed by {candidate.name} now"
        # A module that stands in several places may be fused in some of them only.
        act.status, act.reason = FUSED, f"{act.reason}; {here}" if act.status == FUSED else here
    for unit in units:
        for name, note in unit.notes.items():
            kind = "TransformerEncoder" if "padded" in note else "TransformerEncoderLayer"
            rows.setdefault(name, Row(name or ROOT, kind, status=ADJUSTED, reason=note))
