"""Which modules swap_ may exchange, and the reason for each that it may not."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .ops.library import FLOAT_DTYPES, MAX_K
from .report import NO_WEIGHTS
from .swap_source import weight_reads

FilterFn = Callable[[nn.Module, str], bool]

# What is exchanged, and its name, which those of its forms in trimtab.nn end with.
KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "Linear",
    nn.Conv2d: "Conv2d",
    nn.Embedding: "Embedding",
    nn.EmbeddingBag: "EmbeddingBag",
}

# Without example_inputs nothing is measured, so layers that could lose stay. On a 2-core AMX Xeon
# Int8Linear beat nn.Linear from 16x16 on at 1 to 64 rows, but at 256 rows it lost where a side of the
# weight is below 16 (8 x 1024: 1.6x slower; 1024 x 8: even), since quantizing a row of x is then not
# repaid by the product. Of convolutions only those with few outputs a group lost (depthwise 7x7: 1.5x
# slower, 16 outputs a group: 1.1x). Below 4096 weights there are at most 12 KB to save, whatever the
# speed.
MIN_SIDE = 16
MIN_GROUP_OUTPUTS = 32
MIN_WEIGHTS = 4096

# Modules whose insides must not be exchanged once they are wrapped.
_WRAPPERS = {
    "DistributedDataParallel": "inside DistributedDataParallel, whose reducer has registered its "
    "parameters: swap first, wrap afterwards",
    "FullyShardedDataParallel": "inside FullyShardedDataParallel, which has flattened its "
    "parameters: swap first, wrap afterwards",
    "ScriptModule": "inside a TorchScript module, which is compiled already",
}

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_state_dict_hooks": "state_dict hook",
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}


@dataclasses.dataclass
class Place:
    """A spot that holds a module: ``parent``'s child called ``key``."""

    parent: nn.Module
    key: str
    name: str


class Survey:
    """Every module of a model once, where it is registered and what shares its weight."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.places: dict[int, list[Place]] = defaultdict(list)
        self._wrapped: list[tuple[str, str]] = []
        for name, module in self.modules.items():
            prefix = f"{name}." if name else ""
            for key, child in module._modules.items():
                if child is not None:
                    self.places[id(child)].append(Place(module, key, prefix + key))
            for base in type(module).__mro__:
                if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                    self._wrapped.append((prefix, _WRAPPERS[base.__name__]))
                    break
        self._partners = _sharing(self.modules)

    def wrapper(self, name: str) -> str:
        """Why nothing may change around ``name``; empty if it may."""
        return next((why for prefix, why in self._wrapped if name.startswith(prefix)), "")

    def tie(self, module: nn.Module) -> str:
        """What else holds the weight's memory; empty if nothing does."""
        return self._partners.get(id(module), "")


def _sharing(modules: dict[str, nn.Module]) -> dict[int, str]:
    """id(module) -> why its weight is not its own: the same Parameter elsewhere, or shared bytes."""
    owners: dict[int, list[tuple[int, str]]] = defaultdict(list)
    extents = []
    for name, module in modules.items():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not _has_bytes(tensor):
                continue
            full = f"{name}.{key}" if name else key
            if id(tensor) not in owners:
                extents.append((*_extent(tensor), id(tensor)))
            owners[id(tensor)].append((id(module), full))
    extents.sort()
    tied: dict[int, str] = {}
    for holders in owners.values():
        for module_id, full in holders:
            partners = [name for other, name in holders if name != full]
            if partners and full.rpartition(".")[2] == "weight":
                tied[module_id] = f"weight tied with {', '.join(partners)}, kept tied"
    # Distinct tensors whose bytes overlap: sorted by start, only what starts before the end counts.
    for i, (device, _, end, this) in enumerate(extents):
        for other_device, other_start, _, other in extents[i + 1 :]:
            if other_device != device or other_start >= end:
                break
            for mine, theirs in ((this, other), (other, this)):
                for module_id, full in owners[mine]:
                    if full.rpartition(".")[2] == "weight":
                        name = owners[theirs][0][1]
                        tied.setdefault(module_id, f"weight shares memory with {name}")
    return tied


def _has_bytes(tensor: Tensor) -> bool:
    return (
        not nn.parameter.is_lazy(tensor)
        and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel() > 0
    )


def _extent(tensor: Tensor) -> tuple[str, int, int]:
    """(device, first byte, byte after the last) of a strided tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start = tensor.data_ptr()
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The torch.nn class that a module is a kind of, among those with another form."""
    return next((base for base in KINDS if isinstance(module, base)), None)


def why_not(
    module: nn.Module, name: str, survey: Survey, filter_fn: FilterFn | None, measured: bool
) -> str:
    """The reason to leave a module alone; empty if it may be exchanged."""
    base = kind_of(module)
    if base is None:
        return _no_form(module)
    if hasattr(module, "int8_weight"):
        return "int8 already"
    if hasattr(module, "sparsity"):
        return "sparse already"
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn said no"
    if not survey.places[id(module)]:
        return (
            "the model itself cannot be exchanged in place: swap a wrapper, such as "
            "nn.Sequential(model)"
        )
    return (
        survey.wrapper(name)
        or _unlike(module, base)
        or _hooked(module)
        or _extra(module)
        or _weight_problem(module, base)
        or survey.tie(module)
        or _read_not_called(module, survey)
        or ("" if measured else _too_small(module, base))
    )


def _no_form(module: nn.Module) -> str:
    if by_torch_quantized(module):
        return "quantized by torch already"
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module, which is compiled already"
    if any(tensor is not None for tensor in module._parameters.values()):
        if isinstance(module, nn.MultiheadAttention):
            return (
                "MultiheadAttention reads its projections as weights and calls no module for them"
            )
        return f"no int8 or sparse form of {type(module).__name__}"
    return NO_WEIGHTS


def by_torch_quantized(module: nn.Module) -> bool:
    return (
        type(module).__module__.startswith("torch.ao.nn.")
        and "quantized" in type(module).__module__
    )


def _unlike(module: nn.Module, base: type[nn.Module]) -> str:
    """Why a module does not compute what its torch.nn class computes."""
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations.keys())  # type: ignore[operator,union-attr]
        return f"parametrized ({names}): its weight is computed anew at each call"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "lazy, without a weight yet: run the model once first"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if type(module).forward is not base.forward:
        return f"subclass {type(module).__name__} has a forward of its own"
    if type(module).__call__ is not nn.Module.__call__:
        return f"subclass {type(module).__name__} has a __call__ of its own"
    if module._compiled_call_impl is not None:
        return "compiled already, by module.compile(): swap first, compile afterwards"
    return ""


def _extra(module: nn.Module) -> str:
    children = [key for key, child in module._modules.items() if child is not None]
    # The mask that trimtab.prune keeps beside a weight says nothing that its zeros do not.
    mask, weight = module._buffers.get("weight_mask"), module._parameters.get("weight")
    is_mask = mask is not None and mask.dtype == torch.bool and weight is not None
    buffers = set(module._buffers) - ({"weight_mask"} if is_mask else set())
    extra = [*(set(module._parameters) - {"weight", "bias"}), *buffers, *children]
    if extra:
        return f"holds more than weight and bias: {', '.join(sorted(extra))}"
    if "weight" not in module._parameters:
        return "its weight is no parameter of its own"
    return ""


def _hooked(module: nn.Module) -> str:
    found = [what for attribute, what in _HOOKS.items() if getattr(module, attribute, None)]
    weight = module._parameters.get("weight")
    if weight is not None and (
        weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    ):
        found.append("hook on its weight")
    if found:
        return f"hooked ({', '.join(found)}): an exchange would lose the hook"
    return ""


def _weight_problem(module: nn.Module, base: type[nn.Module]) -> str:
    weight: Any = module._parameters["weight"]
    if weight is None:
        return "has no weight"
    if type(weight) not in (Tensor, nn.Parameter) or type(weight.data) is not Tensor:
        return (
            f"weight is a {type(weight.data).__name__}: sharded or quantized by another library; "
            "swap first"
        )
    if weight.device.type == "meta":
        return "on the meta device: it has no values to quantize"
    if weight.dtype not in FLOAT_DTYPES:
        return f"weight is {str(weight.dtype).removeprefix('torch.')}, not float32, bfloat16 or float16"
    if weight.numel() == 0:
        return "weight is empty"
    columns = weight.numel() // weight.shape[0]
    if columns > MAX_K and base in (nn.Linear, nn.Conv2d):
        return f"rows of {columns} exceed the {MAX_K} whose int32 sum is exact"
    return _settings_problem(module)


def _settings_problem(module: nn.Module) -> str:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites its weight at each call"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "no int8 form of mode='max'"
    return ""


def _read_not_called(module: nn.Module, survey: Survey) -> str:
    for place in survey.places[id(module)]:
        if isinstance(place.parent, nn.MultiheadAttention):
            return "MultiheadAttention reads this weight without calling the module"
        # Its fast path reads the weights too, but swap_ knows how to turn that off.
        if isinstance(place.parent, nn.TransformerEncoderLayer):
            continue
        cls: type = type(place.parent)
        if place.key in weight_reads(cls):
            return (
                f"{cls.__name__} reads this weight itself: a swap would be bypassed, or the weight "
                "dequantized at each call"
            )
    return ""


def _too_small(module: nn.Module, base: type[nn.Module]) -> str:
    weight: Any = module._parameters["weight"]
    shape = "x".join(map(str, weight.shape))
    if weight.numel() < MIN_WEIGHTS:
        return f"too small: {shape} is below {MIN_WEIGHTS} weights, with too little to gain"
    sides = (weight.shape[0], weight.numel() // weight.shape[0])
    if base is nn.Linear and min(sides) < MIN_SIDE:
        return (
            f"too small: a side of {shape} is below {MIN_SIDE}, where quantizing the input costs "
            "more than the product saves"
        )
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        outputs = module.out_channels // module.groups
        if outputs < MIN_GROUP_OUTPUTS:
            return f"too small: {outputs} outputs a group, below {MIN_GROUP_OUTPUTS}, gain nothing"
    return ""
