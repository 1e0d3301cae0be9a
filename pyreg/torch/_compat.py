"""Names of torch that are not public, each in one place: what a call goes through."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

functorch_is_active = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack
tracing_state = torch._C._get_tracing_state


def _keys(x: Any) -> int:
    return torch._C._dispatch_keys(x).raw_repr()


with torch.inference_mode():
    _INFERENCE = torch.empty(0, device="cpu")
# The dispatch keys of ordinary dense tensors of CPUs.  Others, with a type that looks the same, are: sparse, nested,
# quantized, batched by vmap, wrapped by torch.func, or negated when they are read.
_PLAIN_KEYS = {_keys(torch.empty(0, device="cpu")), _keys(_INFERENCE)}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_plain(x: Any) -> bool:
    """Whether x is memory that a kernel can read and write, and nothing else."""
    return type(x) in _PLAIN_TYPES and _keys(x) in _PLAIN_KEYS


def is_known(x: Any) -> bool:
    """Whether x is a tensor of torch itself, and not of a subclass that expects torch's own operations."""
    return type(x) in _PLAIN_TYPES or type(x) is FakeTensor


def needs_derivative(x: Any) -> bool:
    return (x.requires_grad and torch.is_grad_enabled()) or forward_is_active()


def forward_is_active() -> bool:
    """Whether tensors may carry tangents (torch.autograd.forward_ad)."""
    return forward_ad._current_level >= 0
