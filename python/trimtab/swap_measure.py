"""What a model's layers really see, and which of two ways to compute it is faster."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .swap_fuse import Fusion

# Medians of interleaved samples wobble by 2 to 3 % on a busy machine: a gain below that is none.
MARGIN = 0.97
BUDGET_S = 0.05  # per distinct shape, and where other processes disturb:
MOST_BUDGET_S = 0.3
SAMPLE_S = 50e-6  # shorter calls are repeated within a sample, for the clock's sake
MIN_ROUNDS, MAX_ROUNDS = 5, 400
CALM = 0.9  # of a calm sample's time this thread was running
ENOUGH = 3  # calm samples, before and after
# More modules of one shape than this need not be cycled through.
MAX_MODULES = 4

_INDEX_DTYPES = (torch.int32, torch.int64)


@dataclasses.dataclass
class Call:
    """Arguments of one call: float tensors as a description, all else as it was."""

    leaves: list[Any]
    tree: Any
    autocast: tuple[str, torch.dtype] | None

    @staticmethod
    def of(args: tuple, kwargs: dict[str, Any]) -> Call:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        on = torch.is_autocast_enabled(device)
        autocast = (device, torch.get_autocast_dtype(device)) if on else None
        return Call([_keep(leaf) for leaf in leaves], tree, autocast)

    def key(self) -> tuple:
        """Equal for calls that cost the same."""
        shapes = (leaf.key() if isinstance(leaf, _Spec) else _other(leaf) for leaf in self.leaves)
        return (str(self.tree), self.autocast, *shapes)

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """Arguments of the same shapes, strides and dtypes, random where they were float."""
        random_numbers = torch.Generator().manual_seed(0)
        leaves = [
            leaf.tensor(random_numbers) if isinstance(leaf, _Spec) else leaf for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.tree)

    def context(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.autocast[0], self.autocast[1])


@dataclasses.dataclass(frozen=True)
class _Spec:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def key(self) -> tuple:
        return (tuple(self.shape), self.stride, str(self.dtype), str(self.device))

    def tensor(self, generator: torch.Generator) -> Tensor:
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        storage = torch.randn(max(last + 1, 1), generator=generator)
        return storage.to(self.device, self.dtype).as_strided(self.shape, self.stride)


def _keep(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    plain = type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided
    if plain and not leaf.is_nested and leaf.is_floating_point():
        return _Spec(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return leaf.detach().clone()


def _other(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        # Indices are kept as they were: one embedding's may be out of another one's range.
        largest = leaf.max().item() if leaf.numel() and leaf.dtype in _INDEX_DTYPES else None
        return (tuple(leaf.shape), str(leaf.dtype), str(leaf.device), str(leaf.layout), largest)
    return repr(leaf)


class Capture:
    """One run of a model on example inputs: what was called, with what, how often."""

    def __init__(self) -> None:
        self.counts: dict[int, Counter[tuple]] = {}
        self.calls: dict[tuple, Call] = {}
        self.first: dict[int, Call] = {}  # with the arguments themselves, for whole encoders
        self._direct: Counter[int] = Counter()
        self._pending: dict[int, Tensor] = {}

    def reached(self, module: nn.Module) -> bool:
        return id(module) in self.counts

    def confirms(self, module: nn.Module, fusion: Fusion) -> bool:
        """True if each output of ``module`` went into the activation as the very next thing."""
        if not isinstance(fusion.act, nn.Module):
            return True  # a function cannot be hooked; its class's source decides
        return self._direct[id(module)] == sum(self.counts[id(module)].values())

    def run(
        self,
        model: nn.Module,
        example_inputs: Any,
        modules: Sequence[nn.Module],
        fusions: Mapping[int, Fusion],
        units: Sequence[nn.Module],
    ) -> None:
        """Calls the model once without gradients; leaves no trace in it."""
        args, kwargs = _arguments(example_inputs)
        handles = []
        try:
            for module in modules:
                hook = self._see if id(module) not in fusions else self._see_fusable
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            acts = {id(f.act): f.act for f in fusions.values() if isinstance(f.act, nn.Module)}
            for act in acts.values():
                handles.append(act.register_forward_pre_hook(self._see_activation))
            for unit in units:
                handles.append(unit.register_forward_pre_hook(self._see_unit, with_kwargs=True))
            with unchanged(model), torch.no_grad():
                model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            self._pending.clear()

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        call = Call.of(args, kwargs)
        key = call.key()
        self.calls.setdefault(key, call)
        self.counts.setdefault(id(module), Counter())[key] += 1

    def _see_fusable(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        self._see(module, args, kwargs, out)
        self._pending[id(module)] = out

    def _see_activation(self, act: nn.Module, args: tuple) -> None:
        for module_id, out in list(self._pending.items()):
            if args and args[0] is out:
                self._direct[module_id] += 1
                del self._pending[module_id]

    def _see_unit(self, unit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if id(unit) not in self.first:
            leaves, tree = pytree.tree_flatten((args, kwargs))
            kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
            self.first[id(unit)] = Call(kept, tree, Call.of(args, kwargs).autocast)


def _arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        "swap_: expected example_inputs as a tensor, a tuple of arguments or a dict of keyword "
        f"arguments, got {type(example_inputs).__name__}"
    )


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores buffers (batch-norm statistics) and every random state; forces plain eager calls."""
    saved = []
    for module in model.modules():
        # Our own layers' buffers are their weight: large, and no forward writes to them.
        if module._buffers and not hasattr(module, "resident_bytes"):
            objects = dict(module._buffers)
            copies = {k: b.clone() for k, b in objects.items() if b is not None}
            saved.append((module, objects, copies))
    cuda = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), _numpy_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng(sorted(cuda)), torch.compiler.set_stance("force_eager"):
            # nn.TransformerEncoderLayer's fast path calls none of the modules to be watched.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        random.setstate(python_state)
        _numpy_state(numpy_state)
        with torch.no_grad():
            for module, objects, copies in saved:
                module._buffers.clear()
                module._buffers.update(objects)
                for key, copy in copies.items():
                    buffer = objects[key]
                    if buffer is not None and not torch.equal(buffer, copy):
                        buffer.copy_(copy)


def _numpy_state(state: Any = None) -> Any:
    import numpy  # late, as it takes its time

    if state is None:
        return numpy.random.get_state()
    return numpy.random.set_state(state)


class Timing(NamedTuple):
    """Microseconds of a call; ``one_thread`` if it was CPU time of a single thread."""

    before: float
    after: float
    one_thread: bool = False


def _median(values: Iterable[float]) -> float:
    """As statistics.median, whose module takes 5 ms to import."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[~middle]) / 2


def compare(
    before: Sequence[Callable[[], Any]], after: Sequence[Callable[[], Any]], cuda: bool = False
) -> Timing:
    """Median microseconds of a call, before and after, from samples taken in turn.

    Samples during which this thread waited for a core are dropped, and more are taken instead: they
    tell of other processes. If too few are left, CPU time on a single thread decides, to which other
    processes matter little.

    Where several pairs are given (all of a model's modules of one shape) the samples cycle through
    them, so that weights come from memory as in the model. With one pair its weights may stay in the
    cache; that favours the float layer, whose weights are the larger, and so is on the safe side.
    """
    pairs = list(zip(before, after))[:MAX_MODULES]
    samples = _samples(pairs, cuda)
    calm = [
        [seconds for seconds, on_core in taken if on_core > CALM * seconds] for taken in samples
    ]
    if cuda or min(map(len, calm)) >= ENOUGH:
        wall = calm if not cuda else [[seconds for seconds, _ in taken] for taken in samples]
        slow, fast = (1e6 * _median(taken) for taken in wall)
        return Timing(slow, fast)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        samples = _samples(pairs, cuda, any_will_do=True)
    finally:
        torch.set_num_threads(threads)
    slow, fast = (1e6 * _median(cpu for _, cpu in taken) for taken in samples)
    return Timing(slow, fast, one_thread=True)


_Sample = tuple[float, float]


def _samples(
    pairs: Sequence[tuple[Callable[[], Any], Callable[[], Any]]],
    cuda: bool,
    any_will_do: bool = False,
) -> tuple[list[_Sample], list[_Sample]]:
    """(seconds, seconds on a core) of calls before and after, until enough of them are calm."""
    for pair in pairs:
        for call in pair:
            call()
    once = sum(_sample(call, 1, cuda)[0] for call in pairs[0])
    repeats = max(1, int(2 * SAMPLE_S / max(once, 1e-7)))
    taken: tuple[list[_Sample], list[_Sample]] = ([], [])
    start = time.perf_counter()
    for i, pair in zip(range(MAX_ROUNDS), itertools.cycle(pairs)):
        spent = time.perf_counter() - start
        calm = min(sum(cpu > CALM * wall for wall, cpu in samples) for samples in taken)
        enough = (i if cuda or any_will_do else calm) >= MIN_ROUNDS
        if i and spent > (BUDGET_S if enough else MOST_BUDGET_S):
            break
        for which in (0, 1) if i % 2 else (1, 0):
            taken[which].append(_sample(pair[which], repeats, cuda))
    return taken


def _sample(call: Callable[[], Any], repeats: int, cuda: bool) -> _Sample:
    """Seconds of a call, and for how many of them this thread was on a core."""
    if cuda:
        torch.cuda.synchronize()
    start, start_on_core = time.perf_counter(), time.thread_time()
    for _ in range(repeats):
        call()
    if cuda:
        torch.cuda.synchronize()
    on_core = time.thread_time() - start_on_core
    return (time.perf_counter() - start) / repeats, on_core / repeats
