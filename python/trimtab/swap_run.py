"""What swap_ does: survey, choice, measurement, exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .report import (
    ADJUSTED,
    FUSED,
    ROOT,
    SWAPPED,
    Row,
    SwapReport,
    apply_all,
    revert_all,
    tensor_bytes,
)
from .swap_candidate import Candidate, Chosen, build, layer_problem, patches_of
from .swap_contest import keep_winners, keep_winning_encoders
from .swap_fuse import EncoderPatch, Fusion, encoder_patches, find_fusion
from .swap_measure import Capture
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
        candidates = keep_winners(candidates, capture)
        candidates = keep_winning_encoders(candidates, survey, capture)
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
