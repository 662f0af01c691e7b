"""Linears whose output goes straight into an activation; encoders that bypass their Linears."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .report import Patch
from .swap_rules import Place, Survey
from .swap_source import straight_pairs

_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}

# transformers' own classes, by name, so that it need not be imported.
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}


def identity(x: Tensor) -> Tensor:
    """Stands where an activation function was; a module-level name, so that models still pickle."""
    return x


def activation_name(act: Any) -> str:
    """Our name of an activation module or function; empty if it is none of ours."""
    if not isinstance(act, nn.Module):
        return next((name for function, name in _FUNCTIONS.items() if act is function), "")
    if act._forward_hooks or act._forward_pre_hooks or "forward" in vars(act):
        return ""
    if act._backward_hooks or act._backward_pre_hooks:
        return ""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate, "")
    if type(act) in (nn.ReLU, nn.SiLU):
        return type(act).__name__.lower()
    if type(act).__module__ == "transformers.activations":
        return _TRANSFORMERS.get(type(act).__name__, "")
    return ""


@dataclasses.dataclass
class Fusion:
    """An activation that the Linear before it can compute: ``owner.key`` is ``act``."""

    activation: str
    act: Any
    owner: nn.Module
    key: str
    name: str

    def patch(self) -> Patch:
        """Puts an identity in the activation's place."""
        if isinstance(self.act, nn.Module):
            return Patch(
                self.owner, self.key, self.act, nn.Identity().train(self.act.training), self.name
            )
        return Patch(self.owner, self.key, self.act, identity, self.name, in_modules=False)


def find_fusion(module: nn.Module, survey: Survey) -> Fusion | None:
    """The activation that takes all of a Linear's or Conv2d's output; None if there is none.

    nn.Sequential neighbours, and attributes of any class whose source calls the one on the other's
    result and uses neither elsewhere.
    """
    places = survey.places[id(module)]
    # In another place it might be followed by something else.
    if not isinstance(module, nn.Linear | nn.Conv2d) or len(places) != 1:
        return None
    place = places[0]
    key = _next_in_sequence(place) or _next_in_source(place)
    act = _look_up(place.parent, key) if key else None
    activation = activation_name(act) if act is not None else ""
    if not activation or survey.wrapper(place.name):
        return None
    name = place.name.removesuffix(place.key) + key
    return Fusion(activation, act, place.parent, key, name)


def _look_up(owner: nn.Module, key: str) -> Any:
    return owner._modules[key] if key in owner._modules else owner.__dict__.get(key)


def _next_in_sequence(place: Place) -> str:
    parent = place.parent
    if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
        return ""
    if "forward" in vars(parent):
        return ""
    keys = list(parent._modules)
    after = keys.index(place.key) + 1
    return keys[after] if after < len(keys) else ""


def _next_in_source(place: Place) -> str:
    if "forward" in vars(place.parent) or isinstance(place.parent, nn.Sequential):
        return ""
    cls: type = type(place.parent)
    return next((act for fc, act in straight_pairs(cls) if fc == place.key), "")


@dataclasses.dataclass
class EncoderPatch:
    """What makes an encoder call its Linears instead of reading their weights."""

    unit: nn.Module  # the outermost encoder or encoder layer
    name: str
    patches: list[Patch]
    notes: dict[str, str]  # name of a module -> what was changed
    members: list[nn.Module]  # the Linears inside that were exchanged


def encoder_patches(survey: Survey, exchanged: set[int]) -> list[EncoderPatch]:
    """For each encoder with an exchanged Linear: turn its inference fast path off, on that instance.

    In eval mode without gradients nn.TransformerEncoderLayer hands linear1.weight and linear2.weight
    to one fused float operator and calls neither module. It does so only if its attribute
    activation_relu_or_gelu is not 0, and reads that nowhere else. nn.TransformerEncoder in turn drops
    padded tokens (use_nested_tensor) in a form that only this operator understands.
    """
    units: dict[str, EncoderPatch] = {}
    for name, module in survey.modules.items():
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        inside = [m for m in module.modules() if id(m) in exchanged]
        if not inside:
            continue
        encoder_name, encoder = _outermost_encoder(name, module, survey)
        unit = units.setdefault(encoder_name, EncoderPatch(encoder, encoder_name, [], {}, []))
        unit.members += inside
        for owner_name, owner in _chain(name, module, survey):
            if any(patch.owner is owner for patch in unit.patches):
                continue
            key = "activation_relu_or_gelu"
            note = "its fused inference path, which reads weights and calls no module, is off"
            if isinstance(owner, nn.TransformerEncoder):
                key = "use_nested_tensor"
                note = "padded tokens are computed, no longer dropped and returned as zeros"
            if owner.__dict__.get(key):
                new = False if key == "use_nested_tensor" else 0
                old = owner.__dict__[key]
                where = f"{owner_name}.{key}" if owner_name else key
                unit.patches.append(Patch(owner, key, old, new, where, in_modules=False))
                unit.notes[owner_name] = note
    return list(units.values())


def _chain(name: str, layer: nn.Module, survey: Survey) -> list[tuple[str, nn.Module]]:
    """The layer and every nn.TransformerEncoder around it, inside out."""
    chain = [(name, layer)]
    while name:
        name = name.rpartition(".")[0]
        if isinstance(survey.modules[name], nn.TransformerEncoder):
            chain.append((name, survey.modules[name]))
    return chain


def _outermost_encoder(name: str, layer: nn.Module, survey: Survey) -> tuple[str, nn.Module]:
    return _chain(name, layer, survey)[-1]
