"""Names of torch that are not public, each in one place.

All are there from torch 2.8 on.  Where one is gone, importing ``pyreg.torch`` fails: a call that no longer sees a mode
of torch would be wrong in silence.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

functorch_is_active = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack
tracing_state = torch._C._get_tracing_state
safe_softmax = torch.ops.aten._safe_softmax.default

_is_batched = torch._C._functorch.is_legacy_batchedtensor
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_fake(x: Any) -> bool:
    """Whether x has a shape and no elements, and a mode is active that takes such tensors."""
    return type(x) is FakeTensor and dispatch_modes() > 0


def is_disguised(x: Any) -> bool:
    """Whether a strided tensor of torch's own type is not the memory that it looks like."""
    return x.is_neg() or x._is_zerotensor() or _is_batched(x)


def is_plain(x: Any) -> bool:
    """Whether x is memory that a kernel can read and write, and nothing else, outside of torch.func."""
    return type(x) in PLAIN_TYPES and x.layout is torch.strided and x.is_cpu and not (x.is_nested or is_disguised(x))


def is_functionalized() -> bool:
    """Whether the innermost transform of torch.func is ``functionalize``, which takes no autograd function."""
    stack = torch._C._functorch.peek_interpreter_stack()
    return stack is not None and stack.key() == torch._C._functorch.TransformType.Functionalize


def is_transformed() -> bool:
    """Whether torch.func, forward mode or a dispatch mode looks at what is computed."""
    return functorch_is_active() or forward_is_active() or dispatch_modes() > 0


def is_eager(x: Any) -> bool:
    """Whether a plain tensor is computed with now, and nothing records or transforms that."""
    return not torch.compiler.is_compiling() and not is_transformed() and is_plain(x)


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves goes through hooks: those of a checkpoint may make it again, as something else."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def forward_is_active() -> bool:
    """Whether tensors may carry tangents (torch.autograd.forward_ad)."""
    return forward_ad._current_level >= 0


def fast_apply(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` outside of torch.func, without the questions that it asks in Python each time."""
    return super(torch.autograd.Function, function).apply
