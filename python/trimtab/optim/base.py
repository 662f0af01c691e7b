"""What all optimizers share: from param groups and gradients to one call of the kernel a step.

A class gives its rule, the names of its states and which entries of a param group the rule reads; the
rest is here. Between steps a :class:`Plan` keeps the table of tensors; a step checks that it still
fits, refreshes pointers and hyper-parameters, and calls the kernel once for all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from torch import Tensor

from . import library, memory, shards
from .groups import Run
from .plan import Plan


class StepOptions(TypedDict, total=False):
    """Keywords that every optimizer takes beside torch's own.

    max_grad_norm: clip the gradients of all groups to this total 2-norm, as
        ``torch.nn.utils.clip_grad_norm_`` would, but without writing them; see ``grad_norm``.
    norm_estimate: clip as if this were the norm (a number or 0-d tensor; may be set anew before each
        step), so that no gradient is read before its update.
    clip_rounding: "folded" (the default) keeps clipped gradients in float32 on their way into the
        update; "torch" rounds coefficient and clipped gradients to the gradients' dtype, as
        ``clip_grad_norm_`` does when it writes them.
    main_grads: read ``param.main_grad`` where a parameter has one, see :func:`accumulate_main_grads`.
    ema_decay: keep ``state[p]["ema"]``, ema = ema + (1 - ema_decay) * (p - ema), in float32; it
        starts as the parameter before its first step.
    l1: after the update shrink every weight by lr * l1 towards zero, and stop at zero (proximal step).
        A param group may have its own.
    zero_grads: set the gradients to zero in the same pass. A skipped step zeroes them too.
    skip_nonfinite: leave everything as it is if a gradient is NaN or Inf; ``skipped_steps`` counts.
    state_dtype: of the states, where torch takes the parameter's: float32, bfloat16, float16 or their
        names; "int8" for 8-bit codes, 256 to a float32 scale (https://arxiv.org/abs/2110.02861); of
        DTensors each process codes its piece.
    min_8bit_numel: smaller parameters keep float32 states with "int8", as is usual: they cost
        little, and biases and norms matter. 4096.
    rounding: "nearest", or "stochastic" for 8-bit and bfloat16 states and bfloat16 parameters
        without a master. The random bits are a hash of (seed, step, number of the parameter, element):
        the same run gives the same bits, whatever the threads and instruction set.
    master: "remainder": 16 bits beside a bfloat16 parameter that make it an exact float32, as
        which it is trained; "kahan": what rounding took off, in bfloat16; "none".
    seed: of the stochastic rounding.
    torch_tails: Adam, AdamW and Adagrad round the last elements of a tensor, which fill no vector
        of torch's, as its kernel does (the default: all bits are torch's). False: as all others, so
        that a tensor in pieces gives the bits of the whole.
    """

    max_grad_norm: float | None
    norm_estimate: float | Tensor | None
    clip_rounding: str
    main_grads: bool
    ema_decay: float | None
    l1: float
    zero_grads: bool
    skip_nonfinite: bool
    state_dtype: torch.dtype | str | None
    min_8bit_numel: int
    rounding: str
    master: str
    seed: int
    torch_tails: bool


DEFAULTS: dict[str, Any] = {
    "max_grad_norm": None,
    "norm_estimate": None,
    "clip_rounding": "folded",
    "main_grads": False,
    "ema_decay": None,
    "zero_grads": False,
    "skip_nonfinite": False,
    "state_dtype": None,
    "min_8bit_numel": 4096,
    "rounding": "nearest",
    "master": "none",
    "seed": 0,
    "torch_tails": True,
}


class FusedStep(torch.optim.Optimizer):
    """The step. Stands before torch's class, which keeps constructor, checks and state dicts."""

    rule: ClassVar[str]  # one of library.RULES
    # Entries of a param group that the rule reads; "betas" stands for beta1 and beta2.
    numbers: ClassVar[tuple[str, ...]]
    flags: ClassVar[tuple[str, ...]] = ("maximize",)
    all_state_names: ClassVar[tuple[str, ...]]  # in the kernel's order
    counts_steps: ClassVar[bool] = True
    product: ClassVar[str | None] = None  # a scalar state that the rule multiplies up

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf

    max_grad_norm: float | None
    norm_estimate: float | Tensor | None
    clip_rounding: str
    main_grads: bool
    ema_decay: float | None
    zero_grads: bool
    skip_nonfinite: bool
    state_dtype: torch.dtype | None
    min_8bit_numel: int
    rounding: str
    master: str
    seed: int
    torch_tails: bool
    _plan: Plan | None = None

    sees_rows: ClassVar[bool] = False  # the rule reads elements as rows of a matrix, in that order

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Those states that this group has; all, unless the class says otherwise."""
        return self.all_state_names

    def new_state(self, name: str, param: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A state before the first step; ``like`` has the layout it takes."""
        return torch.zeros_like(like, dtype=dtype)

    def names_of(self, group: dict[str, Any], param: Tensor) -> tuple[str, ...]:
        """Those states that a parameter of the group has."""
        return self.state_names(group)

    def summed_dim(self, name: str) -> int | None:
        """The dimension of its parameter that a state has not, where it is 1; None: it has all."""
        return None

    def launch(self, plan: Plan, run: Run, call: library.Call, rows: np.ndarray) -> None:
        """The step of a device's parameters, of which ``rows`` is the table."""
        run.runner.step(call, rows, run.groups)

    def _setup(self, options: StepOptions) -> None:
        """Called by each constructor after torch's."""
        name = type(self).__name__
        given: dict[str, Any] = dict(options)
        l1 = given.pop("l1", 0.0)
        unknown = given.keys() - DEFAULTS.keys()
        if unknown:
            raise TypeError(
                f"{name}: unknown arguments {sorted(unknown)}; beside torch's own there are "
                f"{sorted([*DEFAULTS, 'l1'])}"
            )
        for key, default in DEFAULTS.items():
            setattr(self, key, given.get(key, default))
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise ValueError(f"{name}: expected max_grad_norm >= 0, got {self.max_grad_norm}")
        if self.norm_estimate is not None and self.max_grad_norm is None:
            raise ValueError(f"{name}: norm_estimate says how to clip; expected max_grad_norm too")
        if self.clip_rounding not in ("folded", "torch"):
            raise ValueError(
                f'{name}: expected clip_rounding "folded" or "torch", got {self.clip_rounding!r}'
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise ValueError(f"{name}: expected ema_decay in [0, 1], got {self.ema_decay}")
        memory.check_options(self)
        if not l1 >= 0:
            raise ValueError(f"{name}: expected l1 >= 0, got {l1}")
        if self.defaults.get("differentiable"):
            raise RuntimeError(
                f"{name}: no gradient runs through a fused step (differentiable=True)"
            )
        alone = self.norm_estimate is None
        clips = ["max_grad_norm"] if self.max_grad_norm is not None and alone else []
        skips = ["skip_nonfinite"] if self.skip_nonfinite else []
        shards.refuse_partition(name, clips + skips)
        if l1 or any("l1" in group for group in self.param_groups):
            self.defaults["l1"] = l1
            for group in self.param_groups:
                group.setdefault("l1", l1)
        self._reset()

    def _reset(self) -> None:
        self._plan = None
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._norm = torch.zeros(())
        self._masks: dict[Tensor, Tensor] = self.__dict__.get("_masks", {})
        self._copies: dict[Tensor, Tensor] = self.__dict__.get("_copies", {})

    # --- what a user sees beside torch's interface

    @property
    def skipped_steps(self) -> int:
        """Steps that an overflow left out."""
        return int(self._skipped)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step before clipping (0-d); None without clipping."""
        return None if self.max_grad_norm is None else self._norm

    def set_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Where ``mask`` is False or 0, ``param`` and its states are exactly 0 after every step.

        Its gradients there do not count for the norm. None takes the mask away. Masks are the model's
        affair: they are no part of the state dict.
        """
        self._own(param, "set_mask")
        if mask is None:
            self._masks.pop(param, None)
        else:
            if mask.shape != param.shape:
                raise ValueError(
                    f"set_mask: expected a mask of shape {list(param.shape)}, got {list(mask.shape)}"
                )
            self._masks[param] = mask.detach() != 0
        self._plan = None

    def set_copy(self, param: Tensor, copy: Tensor | None) -> None:
        """After every step ``copy`` (float32, bfloat16, float16) holds ``param``, rounded."""
        self._own(param, "set_copy")
        if copy is None:
            self._copies.pop(param, None)
        else:
            like = torch.empty_like(param)
            if copy.shape != param.shape or copy.stride() != like.stride():
                raise ValueError(
                    f"set_copy: expected a tensor of shape {list(param.shape)} and strides "
                    f"{list(like.stride())}, got {list(copy.shape)} and {list(copy.stride())}"
                )
            if copy.dtype not in library.DTYPES or copy.device != param.device:
                raise ValueError(
                    f"set_copy: expected float32, bfloat16 or float16 on {param.device}, got "
                    f"{copy.dtype} on {copy.device}"
                )
            self._copies[param] = copy.detach()
        self._plan = None

    def master_weight(self, param: Tensor) -> Tensor:
        """A copy of the float32 that is trained in place of ``param``, with master="remainder"."""
        self._own(param, "master_weight")
        remainder = self.state[param].get("param_remainder") if param in self.state else None
        if remainder is None:
            return param.detach().to(torch.float32, copy=True)
        return memory.join_remainder(param, remainder)

    def set_master_weight(self, param: Tensor, value: Tensor) -> None:
        """``param`` and its remainder, of master="remainder", from a float32 of the same shape."""
        self._own(param, "set_master_weight")
        if self.master != "remainder" or param.dtype != torch.bfloat16:
            raise ValueError(
                'set_master_weight: expected a bfloat16 parameter and master="remainder", got '
                f'{param.dtype} and master="{self.master}"'
            )
        if value.shape != param.shape or value.dtype != torch.float32:
            raise ValueError(
                f"set_master_weight: expected float32 {list(param.shape)}, got {value.dtype} "
                f"{list(value.shape)}"
            )
        upper, remainder = memory.split_remainder(value)
        with torch.no_grad():
            param.copy_(upper)
        self.state[param]["param_remainder"] = remainder
        self._plan = None

    def float_state_dict(self) -> dict[str, Any]:
        """The state dict as torch's optimizer would have it: 8-bit states in float32, no masters."""
        return memory.plain_state_dict(self, self.state_dict())

    def _own(self, param: Tensor, method: str) -> None:
        if not any(param is p for group in self.param_groups for p in group["params"]):
            raise ValueError(f"{method}: not a parameter of this optimizer")

    # --- torch's interface

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            plan = self._plan
            if plan is None or not plan.fits(self) or not plan.gather():
                plan = self._plan = Plan(self)
                if not plan.gather():
                    raise RuntimeError(
                        f"{type(self).__name__}: the parameters change during step()"
                    )
            plan.step(self)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; with ``main_grads`` those too."""
        super().zero_grad(set_to_none)
        if not self.main_grads:
            return
        for group in self.param_groups:
            for param in group["params"]:
                if getattr(param, "main_grad", None) is None:
                    continue
                if set_to_none:
                    param.main_grad = None
                else:
                    param.main_grad.zero_()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._plan = None
        group = self.param_groups[-1]
        if len({id(p) for p in group["params"]}) != len(group["params"]):
            self.param_groups.pop()
            raise ValueError(
                f"{type(self).__name__}: the same parameter twice in one group; it would step twice"
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's; 8-bit states of DTensors are in there as float32, so that they reshard.

        Cut as before, they load to the same values; cut otherwise they are rounded once more.
        """
        found = super().state_dict()
        return memory.whole_state_dict(self, found) if self.state_dtype == torch.int8 else found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; refuses states of another optimizer, and keeps wide states wide.

        With state_dtype="int8" float states are rounded to codes; 8-bit states load into any
        optimizer, as what they stand for.
        """
        given = memory.one_form(self, state_dict)
        state_dict = memory.plain_state_dict(self, given)
        self._check_states(state_dict)
        memory.check_masters(self, self._saved_states(given))
        super().load_state_dict(state_dict)
        self._load_wide(state_dict)
        memory.restore(self, self._saved_states(given))

    def _load_wide(self, state_dict: dict[str, Any]) -> None:
        """What torch's load_state_dict has narrowed, again."""
        if self.product is not None:
            for param, saved in self._saved_states(state_dict):
                self.state[param][self.product] = torch.tensor(float(saved[self.product]))
        if self.state_dtype is None and self.ema_decay is None:
            return
        # torch has cast every state to its parameter's dtype.
        for param, saved in self._saved_states(state_dict):
            for key, value in saved.items():
                wide = key == "ema" or (self.state_dtype is not None and key != "step")
                if wide and isinstance(value, Tensor) and value.dim() > 0:
                    dtype = self.state_dtype
                    if key == "ema" or dtype == torch.int8:
                        dtype = torch.float32
                    self.state[param][key] = value.to(param.device, dtype, copy=True)

    def _saved_states(self, state_dict: dict[str, Any]) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for param, key in zip(group["params"], saved["params"]):
                if state_dict["state"].get(key):
                    yield param, state_dict["state"][key]

    def _check_states(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"{name}.load_state_dict: expected the keys 'state' and 'param_groups', got "
                f"{sorted(map(str, state_dict))}"
            )
        group = self.param_groups[0]
        needed = set(
            self.state_names({**group, "amsgrad": False, "centered": False, "momentum": 0})
        )
        needed |= {"step"} if self.counts_steps else set()
        known = {*self.all_state_names, "ema"}
        known |= {"step"} if self.counts_steps or self.rounding == "stochastic" else set()
        for param, saved in self._saved_states(state_dict):
            if not needed <= saved.keys() or not saved.keys() & known:
                raise ValueError(
                    f"{name}.load_state_dict: expected states {sorted(needed) or sorted(known)}, got "
                    f"{sorted(map(str, saved))}: a state dict of another optimizer?"
                )
            for key in known - {"step", self.product}:
                value = saved.get(key)
                if isinstance(value, Tensor) and value.shape != param.shape:
                    raise ValueError(
                        f"{name}.load_state_dict: expected {key} of shape {list(param.shape)}, got "
                        f"{list(value.shape)}: a state dict of another model?"
                    )

    def __getstate__(self) -> dict[str, Any]:
        extra = {key: getattr(self, key) for key in (*DEFAULTS, "_masks", "_copies")}
        return {**super().__getstate__(), **extra}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for key, default in DEFAULTS.items():
            self.__dict__.setdefault(key, default)
        if "l1" in self.defaults:
            for group in self.param_groups:
                group.setdefault("l1", self.defaults["l1"])
        skipped = self.__dict__.get("_skipped")
        self._reset()
        if skipped is not None:
            self._skipped = skipped
