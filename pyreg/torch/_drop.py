"""Dropout of a tensor in whatever mode torch is; the mask is philox's, of a key that torch's generator draws.

Three routes lead to one kernel.  An autograd function in eager code is the fast one; one that torch.func can transform
costs several times as much; and what records operations or compiles them sees the operator ``pyreg::dropout``.

Eager code keeps a key as an int.  Where others save, move or make again what autograd saves, it is a tensor.
"""

import functools
import threading
from typing import Any, TypeAlias

import numpy as np
import torch

from pyreg import _arguments as arg
from pyreg import _core
from pyreg.torch import _compat
from pyreg.torch._threads import TEAM

Tensor: TypeAlias = torch.Tensor
Key: TypeAlias = int | Tensor

CODES = {torch.float32: _core.F32, torch.float64: _core.F64, torch.float16: _core.F16, torch.bfloat16: _core.BF16}
_CPU = torch.device("cpu")


# ---- Keys ------------------------------------------------------------------------------------------------------------

_KEYS = 2**63 - 1  # they are drawn below it


class _Room:
    """Where a key is drawn: a new tensor for each would take longer than all of a small call."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.key = torch.empty((), dtype=torch.int64, device=_CPU)
        self.seen = self.key.numpy()


class _Rooms(threading.local):
    """Those of this thread that are free.  A signal handler that draws amid a draw finds none, and makes another."""

    def __init__(self) -> None:
        self.free: list[_Room] = []


_rooms = _Rooms()


def _draw(generator: torch.Generator | None) -> int:
    """The key that ``_draw_tensor`` would draw."""
    free = _rooms.free
    room = free.pop() if free else _Room()
    room.key.random_(_KEYS) if generator is None else room.key.random_(_KEYS, generator=generator)
    key = room.seen.item()
    free.append(room)
    return key


def _draw_tensor(generator: torch.Generator | None) -> Tensor:
    return torch.randint(_KEYS, (), generator=generator, device=_CPU)


def _as_tensor(key: Key) -> Tensor:
    return torch.tensor(key, device=_CPU) if isinstance(key, int) else key


def _as_int(key: Key) -> int:
    return key if isinstance(key, int) else int(key.item())


# ---- The kernel ------------------------------------------------------------------------------------------------------

_ONE_DIM = (1,)
_SERIAL = 8192  # so few elements are never shared by threads


@functools.lru_cache(maxsize=256)
def _scale(code: int, p: float) -> float:
    """1 / (1 - p), in the dtype of the data, as torch rounds it; XLA rounds 1 - p of half types instead."""
    if code == _core.F64:
        return 1 / (1 - p)
    single = np.float32(1) / np.float32(1 - p)
    if code == _core.F16:
        with np.errstate(over="ignore"):
            single = np.float32(np.float16(single))
    elif code == _core.BF16:  # NumPy has none: the upper half of a float32, ties to even
        bits = int(single.view(np.uint32))
        single = np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return float(single)


def _fill(y: Tensor, x: Tensor, key: int, p: float, shared: tuple[int, ...]) -> Tensor:
    """y = dropout(x), both ordinary tensors."""
    code, n = CODES[x.dtype], x.numel()
    shape, x_strides, y_strides, mask_strides = (n,), _ONE_DIM, _ONE_DIM, None
    if shared or not (x.is_contiguous() and y.is_contiguous()):
        shape, x_strides, y_strides = x.shape, x.stride(), y.stride()
        mask_strides = arg.as_mask_strides(shape, shared) if shared else None
    threads = torch.get_num_threads() if n > _SERIAL else 1
    x_at, y_at, scale = x.data_ptr(), y.data_ptr(), _scale(code, p)
    _core.dropout_at(code, x_at, y_at, shape, x_strides, y_strides, key, p, scale, mask_strides, threads, TEAM)
    return y


def _dropped(x: Tensor, key: int, p: float, shared: tuple[int, ...]) -> Tensor:
    return _fill(torch.empty_like(x), x, key, p, shared)


# ---- Eager code ------------------------------------------------------------------------------------------------------


class _Dropout(torch.autograd.Function):
    """Without ``setup_context``, which would make it several times slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Key, p: float, shared: tuple[int, ...]) -> Tensor:
        _keep(ctx, key, p, shared)
        return _dropped(x, _as_int(key), p, shared)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        key = ctx.saved_tensors[0] if ctx.key is None else ctx.key
        return _drop_again(dy, key, ctx.p, ctx.shared), None, None, None


class _DropoutInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Key, p: float, shared: tuple[int, ...]) -> Tensor:
        _keep(ctx, key, p, shared)
        ctx.mark_dirty(x)
        return _fill(x, x, _as_int(key), p, shared)

    backward = _Dropout.backward


def _keep(ctx: Any, key: Key, p: float, shared: tuple[int, ...]) -> None:
    if type(key) is int and not _compat.saved_tensors_are_hooked():
        ctx.key = key
    else:
        ctx.key = None
        ctx.save_for_backward(_as_tensor(key))
    ctx.p, ctx.shared = p, shared


_dropout = _compat.fast_apply(_Dropout)
_dropout_in_place = _compat.fast_apply(_DropoutInPlace)


# ---- torch.func and forward mode -------------------------------------------------------------------------------------


def _keep_tensor(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, key, ctx.p, ctx.shared = inputs
    ctx.save_for_backward(key)


class _Transformable(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
        if _route(x, p) is _EAGER:
            return _dropped(x, _as_int(key), p, shared)
        return torch.ops.pyreg.dropout.default(x, key, p, shared)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _keep_tensor(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (key,) = ctx.saved_tensors
        return _drop_again(dy, key, ctx.p, ctx.shared), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (key,) = ctx.saved_tensors
        return _drop_again(dx, key, ctx.p, ctx.shared)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Any:
        return _drop_batch(info.batch_size, in_dims, x, key, p, shared)


def _drop_batch(size: int, in_dims: Any, x: Tensor, key: Tensor, p: float, shared: Any) -> tuple[Tensor, int]:
    """Dropout of each element of a batch, by one key for all or by one for each; and the dim of the batch."""
    x = x.expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[1] is None:
        return _drop_again(x, key, p, (0, *(1 + d % (x.dim() - 1) for d in shared))), 0
    keys = key.movedim(in_dims[1], 0)
    return torch.stack([_drop_again(a, k, p, tuple(shared)) for a, k in zip(x, keys, strict=True)]), 0


# ---- torch.compile, torch.export, dispatch modes ---------------------------------------------------------------------


def _operator(x: Tensor, key: Tensor, p: float, shared: Any) -> Tensor:
    return _dropped(x, _as_int(key), p, tuple(shared)) if x.numel() else torch.empty_like(x)


_schema = "(Tensor x, Tensor key, float p, int[] shared) -> Tensor"
_op = torch.library.custom_op("pyreg::dropout", _operator, mutates_args=(), device_types="cpu", schema=_schema)


@_op.register_fake
def _(x: Tensor, key: Tensor, p: float, shared: Any) -> Tensor:
    return torch.empty_like(x)


def _op_backward(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.pyreg.dropout.default(dy, *ctx.saved_tensors, ctx.p, ctx.shared), None, None, None


_op.register_autograd(_op_backward, setup_context=_keep_tensor)


@_op.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, key: Tensor, p: float, shared: Any) -> Any:
    return _drop_batch(info.batch_size, in_dims, x, key, p, shared)


# ---- The choice ------------------------------------------------------------------------------------------------------

_STOCK, _EAGER, _TRACED = range(3)


def _route(x: Any, p: Any) -> int:
    """Who answers: torch, if there is no mask to draw or the kernel does not know such an input; or which of us."""
    if not isinstance(p, float) or not 0.0 < p < 1.0:
        return _STOCK
    compiled = torch.compiler.is_compiling()
    if compiled:
        if _compat.functorch_is_active():
            return _STOCK  # what is compiled and transformed loses derivatives of an operator
    else:
        if type(x) not in _compat.PLAIN_TYPES and not _compat.is_fake(x):
            return _STOCK  # also subclasses, which know torch's own operations
        if _compat.tracing_state() is not None:
            return _STOCK
    if not x.is_cpu or x.dtype not in CODES or x.layout is not torch.strided or x.is_nested or not x.numel():
        return _STOCK
    return _TRACED if compiled or _compat.is_transformed() or _compat.is_disguised(x) else _EAGER


def _drop_now(x: Tensor, key: Key, p: float, shared: tuple[int, ...]) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _dropout(x, key, p, shared)
    return _dropped(x, _as_int(key), p, shared)


def _drop_traced(x: Tensor, key: Tensor, p: float, shared: tuple[int, ...]) -> Tensor:
    derived = _compat.functorch_is_active() or _compat.forward_is_active()
    if derived and not (torch.compiler.is_compiling() or _compat.is_functionalized()):
        return _Transformable.apply(x, key, p, shared)
    return torch.ops.pyreg.dropout.default(x, key, p, shared)


def _drop_again(x: Tensor, key: Key, p: float, shared: tuple[int, ...]) -> Tensor:
    """Dropout by a known key."""
    if _route(x, p) is _EAGER:
        return _drop_now(x, key, p, shared)
    return _drop_traced(x, _as_tensor(key), p, shared)


def drop(
    x: Any,
    p: Any,
    shared: tuple[int, ...] = (),
    in_place: bool = False,
    generator: torch.Generator | None = None,
    only_eager: bool = False,
) -> Tensor | None:
    """Dropout in training; None where it is for torch's own function.  Dims in ``shared`` share the mask."""
    route = _route(x, p)
    if route is _STOCK or (only_eager and route is _TRACED):
        return None
    if route is _EAGER:
        if not in_place:
            return _drop_now(x, _draw(generator), p, shared)
        if x.is_contiguous() and not (x._is_view() or x.is_inference()):
            if not (x.requires_grad and torch.is_grad_enabled()):
                key = _draw(generator)
                torch.autograd.graph.increment_version(x)  # first: the call may be interrupted
                return _fill(x, x, key, p, shared)
            if not x.is_leaf:
                return _dropout_in_place(x, _draw(generator), p, shared)
    y = _drop_traced(x, _draw_tensor(generator), p, shared)
    # copy_ knows what may not be written, and refuses it before it is, in torch's words.
    return x.copy_(y) if in_place else y
