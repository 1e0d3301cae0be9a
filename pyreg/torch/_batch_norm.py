"""Batch-norm of dense tensors in eager training; all else is for torch's own."""

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from pyreg import _core
from pyreg.torch import _compat
from pyreg.torch._drop import CODES
from pyreg.torch._threads import TEAM

Tensor: TypeAlias = torch.Tensor

_HALF = (torch.float16, torch.bfloat16)
_LEAST_EPS = 1e-30  # below, torch divides by what float32 makes of it


# ---- The kernels -----------------------------------------------------------------------------------------------------


def _array(x: Tensor) -> Any:
    """A view for _core.  Not ``x.numpy()``: that would forbid its storage to be resized, for ever."""
    return _core.array_at(CODES[x.dtype], x.data_ptr(), x.shape, x.stride(), x)


def _values(x: Tensor | None, like: Tensor) -> Any:
    """A parameter or statistic, in the dtype that goes with the data."""
    if x is None:
        return None
    return _array(x.detach().to(torch.float64 if like.dtype is torch.float64 else torch.float32).contiguous())


def _new(x: Tensor) -> Tensor:
    """Where torch's batch-norm puts a result like x: in the order of x if that is a memory format, else in C order."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    keeps = last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return torch.empty_like(x, memory_format=last if keeps else torch.contiguous_format)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array).clone()  # with a storage of torch's own


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and biased variance per channel, in float32 or float64."""
    y = _new(x)
    arrays = _array(x), 1, eps, False, _values(weight, x), _values(bias, x), None, None, _array(y)
    mean, var = _core.batch_norm(CODES[x.dtype], *arrays, None, torch.get_num_threads(), TEAM)
    return y, _tensor(mean), _tensor(var)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, weight and bias."""
    dx = _new(x)
    scale, mean_of_x, var_of_x = _values(weight, x), _values(mean, x), _values(var, x)
    arrays = _array(dy), _array(x), 1, eps, False, scale, None, None, mean_of_x, var_of_x, _array(dx), None
    others = None, None, torch.get_num_threads(), TEAM
    dweight, dbias = _core.batch_norm_backward(CODES[x.dtype], *arrays, *others)
    return dx, _tensor(dweight), _tensor(dbias)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        y, mean, var = normalise(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> Any:
        if dy is None:
            return None, None, None, None
        x, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled() or not _compat.is_plain(dy) or dy.dtype is not x.dtype:
            # torch's gradient has a gradient itself, and takes batches of dy.
            rstd, wanted = (var + ctx.eps).rsqrt(), ctx.needs_input_grad[:3]
            return *_stock_backward(dy, x, weight, None, None, mean, rstd, True, ctx.eps, wanted), None
        dx, dweight, dbias = gradients(dy, x, weight, mean, var, ctx.eps)
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            None,
        )


def with_statistics(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As normalise, with gradients of y."""
    result: tuple[Tensor, Tensor, Tensor] = _BatchNorm.apply(x, weight, bias, eps)
    return result


_stock_backward = torch.ops.aten.native_batch_norm_backward.default


# ---- The function ----------------------------------------------------------------------------------------------------


def takes(x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, eps: Any) -> bool:
    """Whether a training call is one for the kernels: all plain and fitting, and more than one element per channel."""
    if not (_compat.is_eager(x) and x.dtype in CODES and x.dim() >= 2 and x.numel() > x.shape[1]):
        return False
    if not (isinstance(eps, float) and _LEAST_EPS < eps < float("inf")):
        return False
    for value in (running_mean, running_var, weight, bias):
        if value is not None and not (_compat.is_plain(value) and value.shape == x.shape[1:2]):
            return False
    for running in (running_mean, running_var):  # those are written
        if running is not None and (running.requires_grad or not running.is_contiguous() or running.is_inference()):
            return False
    dtypes = {value.dtype for value in (running_mean, running_var, weight, bias) if value is not None}
    fit = all(dtype is x.dtype or (dtype is torch.float32 and x.dtype in _HALF) for dtype in dtypes)
    return fit and len(dtypes) <= 1 and (running_mean is None) == (running_var is None)


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, x: Tensor, momentum: float
) -> None:
    """A step of both towards the statistics of x, of which torch has the unbiased variance."""
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        _step(running_mean, mean, momentum)
        _step(running_var, var * (count / (count - 1)), momentum)


def _step(running: Tensor, value: Tensor, momentum: float) -> None:
    # .data: as torch does, without notice to autograd, which may have kept it for an evaluation.
    old = running.data
    if old.dtype is value.dtype:
        old.mul_(1 - momentum).add_(value, alpha=float(momentum))
    else:  # a half type, in which the value alone may overflow
        old.copy_(value.mul(momentum).add_(old.to(value.dtype), alpha=1 - momentum))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel, the second dim: ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        Dense tensors of float32, float64, float16 or bfloat16 in the memory of the CPU go to pyreg's kernels in eager
        training; what is compiled, transformed by ``torch.func`` or evaluated goes to torch's function.
    running_mean, running_var : Tensor or None, shape (C,)
        Take a step in training: ``(1 - momentum) * running + momentum * batch``, with the unbiased variance.
    weight, bias : Tensor, optional, shape (C,)
        By default 1 and 0.
    training : bool
        Whether statistics are those of the batch, or the running ones.
    momentum : float
        Weight of the batch in the running statistics.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor
        Shape, dtype and memory format as torch's function gives them.  Statistics are accurate also where the mean is
        many standard deviations from zero.

    Raises
    ------
    RuntimeError, ValueError
        As torch's function.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> pyreg.torch.batch_norm(x, None, None, training=True).round(decimals=3)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    if (
        not training
        or torch.compiler.is_compiling()  # first: the rest is not to be traced
        or _compat.tracing_state() is not None
        or not isinstance(momentum, (float, int))
        or not takes(input, running_mean, running_var, weight, bias, eps)
    ):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y, mean, var = with_statistics(input, weight, bias, eps)
    update_running(running_mean, running_var, mean, var, input, momentum)
    return y
