"""Dropout of a tensor by a drawn key, in whatever mode torch is: the mask is philox's, of the key.

Three routes lead to one kernel.  An autograd function in eager code is the fast one; one that torch.func can transform
costs four times as much; and what records operations or compiles them sees the operator ``pyreg::dropout``.  The key
is a tensor, so that whatever saves, moves or makes again what autograd saves does so with the key.
"""

import functools
from typing import Any

import numpy as np
import torch

from pyreg import _arguments as arg
from pyreg import _core
from pyreg.torch import _compat

Tensor = torch.Tensor

CODES = {torch.float32: _core.F32, torch.float64: _core.F64, torch.float16: _core.F16, torch.bfloat16: _core.BF16}
_CPU = torch.device("cpu")
_KEYS = 2**63 - 1  # torch.randint draws below it
_ONE_DIM = (1,)


def draw_key(generator: torch.Generator | None = None) -> Tensor:
    """A key for philox: an int64 tensor without dims, one draw of torch's generator."""
    return torch.randint(_KEYS, (), generator=generator, device=_CPU)


# ---- The kernel ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _scale(code: int, p: float) -> float:
    """1 / (1 - p), in the dtype of the data, as torch rounds it; XLA rounds 1 - p of half types instead."""
    if code == _core.F64:
        return 1 / (1 - p)
    single = np.float32(1) / np.float32(1 - p)
    if code == _core.F16:
        single = np.float32(np.float16(single))
    elif code == _core.BF16:  # NumPy has none: the upper half of a float32, ties to even
        bits = int(single.view(np.uint32))
        single = np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return float(single)


def _fill(y: Tensor, x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
    """y = dropout(x), both plain."""
    code = CODES[x.dtype]
    shape, x_strides, y_strides, strides = (x.numel(),), _ONE_DIM, _ONE_DIM, None
    if shared or not (x.is_contiguous() and y.is_contiguous()):
        shape, x_strides, y_strides = x.shape, x.stride(), y.stride()
        strides = arg.as_mask_strides(shape, shared) if shared else None
    _core.dropout_at(
        code,
        x.data_ptr(),
        y.data_ptr(),
        shape,
        x_strides,
        y_strides,
        key.item(),
        p,
        _scale(code, p),
        strides,
        torch.get_num_threads(),
    )
    return y


def _dropped(x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
    return _fill(torch.empty_like(x), x, key, p, shared)


# ---- Eager code ------------------------------------------------------------------------------------------------------


class _Dropout(torch.autograd.Function):
    """Without ``setup_context``, which would make it several times slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
        _save(ctx, key, p, shared)
        return _dropped(x, key, p, shared)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return drop(dy, *ctx.saved_tensors, ctx.p, ctx.shared), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return drop(dx, *ctx.saved_tensors, ctx.p, ctx.shared)


class _DropoutInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
        _save(ctx, key, p, shared)
        ctx.mark_dirty(x)
        return _fill(x, x, key, p, shared)

    backward = _Dropout.backward


def _save(ctx: Any, key: Tensor, p: float, shared: tuple[int, ...]) -> None:
    ctx.save_for_backward(key)
    if _compat.forward_is_active():
        ctx.save_for_forward(key)
    ctx.p, ctx.shared = p, shared


# ---- torch.func ------------------------------------------------------------------------------------------------------


class _Transformable(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
        return _dropped(x, key, p, shared)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, key, ctx.p, ctx.shared = inputs
        ctx.save_for_backward(key)
        ctx.save_for_forward(key)

    backward = _Dropout.backward
    jvp = _Dropout.jvp

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Any:
        return _drop_batch(info.batch_size, in_dims, x, key, p, shared)


def _drop_batch(size: int, in_dims: Any, x: Tensor, key: Tensor, p: float, shared: Any) -> tuple[Tensor, int]:
    """Dropout of each element of a batch, by one key for all or by one for each; and the dim of the batch."""
    x = x.expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[1] is None:
        return drop(x, key, p, (0, *(1 + d % (x.dim() - 1) for d in shared))), 0
    return torch.stack([drop(a, k, p, tuple(shared)) for a, k in zip(x, key.movedim(in_dims[1], 0), strict=True)]), 0


# ---- torch.compile, torch.export, dispatch modes ---------------------------------------------------------------------


def _operator(x: Tensor, key: Tensor, p: float, shared: Any) -> Tensor:
    return _dropped(x, key, p, tuple(shared))


_schema = "(Tensor x, Tensor key, float p, int[] shared) -> Tensor"
_op = torch.library.custom_op("pyreg::dropout", _operator, mutates_args=(), device_types="cpu", schema=_schema)


@_op.register_fake
def _(x: Tensor, key: Tensor, p: float, shared: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_op(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, key, ctx.p, ctx.shared = inputs
    ctx.save_for_backward(key)


def _op_backward(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.pyreg.dropout.default(dy, *ctx.saved_tensors, ctx.p, ctx.shared), None, None, None


_op.register_autograd(_op_backward, setup_context=_setup_op)


@_op.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, key: Tensor, p: float, shared: Any) -> Any:
    return _drop_batch(info.batch_size, in_dims, x, key, p, shared)


# ---- The choice ------------------------------------------------------------------------------------------------------


def drop(x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
    """Dropout with probability p in (0, 1) of a tensor that ``takes`` allows; dims in ``shared`` share the mask."""
    if torch.compiler.is_compiling():
        return torch.ops.pyreg.dropout.default(x, key, p, shared)
    if _compat.functorch_is_active():
        return _Transformable.apply(x, key, p, shared)
    if _compat.dispatch_modes() or not _compat.is_plain(x):
        return torch.ops.pyreg.dropout.default(x, key, p, shared)
    if _compat.needs_derivative(x):
        return _Dropout.apply(x, key, p, shared)
    return _dropped(x, key, p, shared)


def drop_in_place(x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
    direct = not (torch.compiler.is_compiling() or _compat.functorch_is_active() or _compat.dispatch_modes())
    # A tensor whose elements share memory, or a leaf that wants a gradient, is refused by copy_, in torch's words.
    if direct and _compat.is_plain(x) and x.is_contiguous() and not _compat.forward_is_active():
        if not _compat.needs_derivative(x):
            _fill(x, x, key, p, shared)
            torch.autograd.graph.increment_version(x)
            return x
        if not x.is_leaf:
            return _DropoutInPlace.apply(x, key, p, shared)
    return x.copy_(drop(x, key, p, shared))


def takes(x: Any, p: Any) -> bool:
    """Whether there is a mask to draw, for elements of a type and in a memory that the kernel knows."""
    return (
        type(p) is float
        and 0.0 < p < 1.0
        and (torch.compiler.is_compiling() or (_compat.is_known(x) and _compat.tracing_state() is None))
        and x.is_cpu
        and x.dtype in CODES
        and x.layout is torch.strided
        and not x.is_nested
        and x.numel() > 0
    )
