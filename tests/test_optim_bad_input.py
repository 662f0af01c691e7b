"""Bad input: a clear error, and nothing half updated."""

from __future__ import annotations

import optim_cases
import pytest
import torch

from trimtab import optim


def good(n: int = 4) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(n))
    p.grad = torch.ones(n)
    return p


def refused(params, match: str, error=RuntimeError, **options) -> None:
    """The step raises and leaves every parameter alone, the good one in front too."""
    first = good()
    ours = optim.AdamW([first, *params], **options)
    with pytest.raises(error, match=match):
        ours.step()
    assert torch.equal(first, torch.ones(4))
    assert not ours.state[first].get("step", 0)


def test_sparse_gradient() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2))
    refused([p], "AdamW does not support sparse gradients.*parameter 1 of group 0")


def test_complex_and_float64() -> None:
    for dtype in (torch.complex64, torch.float64):
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        p.grad = torch.ones(3, dtype=dtype)
        refused([p], f"parameter 1 of group 0: expected float32, bfloat16 or float16, got {dtype}")


def test_meta_parameter() -> None:
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    refused([p], "expected tensors on a CPU or a GPU, got meta")


def test_gradient_of_another_shape() -> None:
    p = good(6)
    p.data = torch.ones(5)
    refused([p], r"expected a gradient of shape \[5\] on cpu, got \[6\]")


def test_overlapping_parameters() -> None:
    flat = torch.ones(10)
    a, b = torch.nn.Parameter(flat[:6]), torch.nn.Parameter(flat[5:])
    a.grad, b.grad = torch.ones(6), torch.ones(5)
    refused([a, b], "parameter 1 of group 0 and parameter 2 of group 0 share memory", ValueError)


def test_expanded_parameter() -> None:
    p = torch.nn.Parameter(torch.ones(1).expand(5))
    p.grad = torch.ones(5)
    refused([p], "several of its elements share memory")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_same_parameter_twice() -> None:
    p = good()
    with pytest.raises(ValueError, match="SGD: the same parameter twice in one group"):
        optim.SGD([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.SGD([{"params": [p]}, {"params": [p]}])


def test_differentiable() -> None:
    with pytest.raises(RuntimeError, match=r"Adam: no gradient runs.*differentiable=True"):
        optim.Adam([good()], differentiable=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_grad_norm": -1}, ValueError, "AdamW: expected max_grad_norm >= 0, got -1"),
        ({"ema_decay": 1.5}, ValueError, r"expected ema_decay in \[0, 1\], got 1.5"),
        ({"l1": -0.1}, ValueError, "expected l1 >= 0, got -0.1"),
        ({"state_dtype": torch.int8}, ValueError, "expected state_dtype float32.*got torch.int8"),
        ({"max_norm": 1}, TypeError, r"unknown arguments \['max_norm'\].*'max_grad_norm'"),
    ],
)
def test_options(options: dict, error, match: str) -> None:
    with pytest.raises(error, match=match):
        optim.AdamW([good()], **options)


def test_masks_and_copies() -> None:
    p = good()
    ours = optim.AdamW([p])
    with pytest.raises(ValueError, match=r"expected a mask of shape \[4\], got \[3\]"):
        ours.set_mask(p, torch.ones(3))
    with pytest.raises(ValueError, match="set_mask: not a parameter of this optimizer"):
        ours.set_mask(good(), torch.ones(4))
    with pytest.raises(ValueError, match="set_copy: expected a tensor of shape"):
        ours.set_copy(p, torch.ones(5))
    with pytest.raises(ValueError, match="set_copy: expected float32.*got torch.int32"):
        ours.set_copy(p, torch.ones(4, dtype=torch.int32))


def test_state_dict_of_another() -> None:
    params = optim_cases.parameters()
    sgd = optim.SGD(params, momentum=0.9)
    adam = optim.AdamW(params)
    optim_cases.set_gradients(0, params)
    sgd.step()
    adam.step()
    with pytest.raises(
        ValueError, match=r"AdamW.load_state_dict: expected states .*'momentum_buffer'"
    ):
        adam.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match=r"SGD.load_state_dict: expected states .*'exp_avg'"):
        sgd.load_state_dict(adam.state_dict())
    other = optim.AdamW([torch.nn.Parameter(torch.ones(n + 1)) for n in optim_cases.SIZES])
    with pytest.raises(ValueError, match="expected .* of shape .*another model"):
        other.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="expected the keys 'state' and 'param_groups'"):
        adam.load_state_dict({})
    adam.step()


def test_c_interface_refuses() -> None:
    """What a C caller can get wrong, with its tensor."""
    from trimtab.optim import library

    ours = optim.AdamW([good()])
    ours.step()
    table = ours._plan.table
    table["state"][0, 1] = 0
    with pytest.raises(
        RuntimeError, match="optim_step: tensor 0: expected all of the rule's states"
    ):
        ours._plan._call(ours)
    table["group"] = 3
    with pytest.raises(RuntimeError, match="tensor 0: expected group to be an index into groups"):
        ours._plan._call(ours)
    with pytest.raises(RuntimeError, match="optim_step: expected a tt_rule, got 99"):
        library.step(library.Call(99))
