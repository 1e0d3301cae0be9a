"""Dropout and batch-norm of all eager code of the process on CPUs: torch's own operators, with other kernels."""

import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeAlias

import torch

from pyreg import _arguments as arg
from pyreg.torch import _batch_norm, _compat
from pyreg.torch._drop import drop

Tensor: TypeAlias = torch.Tensor
_Key, _Keys = torch._C.DispatchKey, torch._C.DispatchKeySet

_lock = threading.Lock()
_holders: dict[str, int] = {"dropout": 0, "batch_norm": 0}  # how many want it
_installed: dict[str, Any] = {}  # the library of kernels while anyone does


class Accelerated:
    """What :func:`accelerate` returns: a context manager, and ``undo()``.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> handle = pyreg.torch.accelerate()
    >>> y = torch.nn.functional.dropout(torch.ones(8), 0.5)
    >>> handle.undo()
    """

    def __init__(self, kinds: list[str]) -> None:
        self._kinds = kinds

    def undo(self) -> None:
        """End it, unless another call of :func:`accelerate` still holds it; a second ``undo`` changes nothing."""
        with _lock:
            kinds, self._kinds = self._kinds, []
            for kind in kinds:
                _holders[kind] -= 1
                if _holders[kind] == 0:
                    _installed.pop(kind)._destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


def accelerate(*, dropout: bool = True, batch_norm: bool = False) -> Accelerated:
    """Let pyreg compute all eager dropout on CPUs in this process, wherever torch or a library on it calls for it.

    It reaches ``torch.nn.functional.dropout`` and ``dropout1d/2d/3d``, all their layers, attention
    (``scaled_dot_product_attention``, ``nn.MultiheadAttention``, ``nn.Transformer``), recurrent layers, and models of
    other packages, because it replaces kernels of torch's operators.

    Parameters
    ----------
    dropout : bool
        Replace the kernels of ``aten::dropout``, ``dropout_``, ``feature_dropout`` and ``feature_dropout_``.
    batch_norm : bool
        Replace those of ``aten::native_batch_norm`` and its backward pass.

    Returns
    -------
    Accelerated
        ``undo()`` ends it, and so does the end of a ``with`` block.  Several may overlap: torch's own kernels are back
        when the last has ended.

    Raises
    ------
    TypeError
        If an argument is no bool.

    Warns
    -----
    RuntimeWarning
        If this version of torch does not give its own kernels away; then nothing is replaced.

    Notes
    -----
    ``torch.compile`` and ``torch.export`` trace torch's own dropout, because what they compile outlives the process in
    caches: for a compiled model use :func:`convert`.  ``torch.func``, forward mode, tensors of other devices and what
    the kernels do not know also have torch's own dropout.  What torch runs operator by operator counts as eager: an
    exported program, TorchScript, ``backend="eager"``.

    The backward pass of batch-norm takes the statistics that it is given to be those of its input.

    Masks are those of :func:`pyreg.torch.dropout`.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> with pyreg.torch.accelerate():
    ...     y = torch.nn.functional.dropout(torch.ones(8), 0.5)
    """
    wanted = {"dropout": arg.as_flag(dropout, "dropout"), "batch_norm": arg.as_flag(batch_norm, "batch_norm")}
    kinds = [kind for kind, flag in wanted.items() if flag]
    if not hasattr(torch.library, "get_kernel"):
        warnings.warn(
            f"torch {torch.__version__} has no torch.library.get_kernel; nothing is replaced",
            RuntimeWarning,
            stacklevel=2,
        )
        return Accelerated([])
    with _lock:
        for kind in kinds:
            if _holders[kind] == 0:
                library = torch.library.Library("aten", "IMPL")
                _INSTALL[kind](library)
                _installed[kind] = library
            _holders[kind] += 1
    return Accelerated(kinds)


def _stock(name: str, key: Any) -> Callable[..., Any]:
    """Torch's own kernel; to be asked for before another is registered."""
    kernel = torch.library.get_kernel(name, key.name)
    keys = _Keys(_Key.CPU) if key == _Key.CPU else _Keys(key) | _Keys(_Key.CPU)
    return lambda *args: kernel.call_boxed(keys, *args)


# ---- Dropout ---------------------------------------------------------------------------------------------------------


def _install_dropout(library: Any) -> None:
    keys = _Key.AutogradCPU, _Key.CPU
    for name in ("dropout", "dropout_", "feature_dropout", "feature_dropout_"):
        for key, kernel in [(key, _dropout_kernel(name, key)) for key in keys]:
            library.impl(name, kernel, key.name)


def _dropout_kernel(name: str, key: Any) -> Callable[..., Tensor]:
    stock = _stock(f"aten::{name}", key)
    of_channels, in_place = name.startswith("feature"), name.endswith("_")
    apply = torch.no_grad()(drop) if key == _Key.CPU else drop  # below autograd

    def kernel(x: Tensor, p: float, train: bool) -> Tensor:
        if not train and 0 <= p <= 1:
            return x
        if train and (not of_channels or x.dim() > 2):
            y = apply(x, p, tuple(range(2, x.dim())) if of_channels else (), in_place, only_eager=True)
            if y is not None:
                return y
        return stock(x, p, train)

    return kernel


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


def _install_batch_norm(library: Any) -> None:
    stock = _stock("aten::native_batch_norm", _Key.CPU)
    stock_backward = _stock("aten::native_batch_norm_backward", _Key.CPU)

    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Any:
        statistics = running_mean, running_var
        if not (training and _batch_norm.takes(x, *statistics, weight, bias, eps)):
            return stock(x, weight, bias, *statistics, training, momentum, eps)
        y, mean, var = _batch_norm.normalise(x, weight, bias, eps)
        _batch_norm.update_running(*statistics, mean, var, x, momentum)
        # What is kept for the backward pass has the dtype of the parameters, as torch has it.
        others = [value for value in (weight, bias, *statistics) if value is not None]
        dtype = others[0].dtype if others else x.dtype
        return y, mean.to(dtype), (var + eps).rsqrt_().to(dtype)

    def backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        train: bool,
        eps: float,
        wanted: list[bool],
    ) -> Any:
        ours = train and _batch_norm.takes(x, None, None, weight, None, eps)
        ours = ours and _compat.is_plain(dy) and dy.dtype is x.dtype
        ours = ours and all(a is None or (a.dtype is torch.float64) == (x.dtype is torch.float64) for a in (mean, rstd))
        if mean is None or rstd is None or not ours:
            return stock_backward(dy, x, weight, running_mean, running_var, mean, rstd, train, eps, wanted)
        # What torch keeps is 1 / sqrt(var + eps); the kernel adds its epsilon, here 0, to a variance.
        dx, dweight, dbias = _batch_norm.gradients(dy, x, weight, mean, rstd.double().pow(-2), 0.0)
        dtype = x.dtype if weight is None else weight.dtype
        gradients = dx, dweight.to(dtype), dbias.to(dtype)
        return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is there already
        library.impl("native_batch_norm", forward, "CPU", allow_override=True)
        library.impl("native_batch_norm_backward", backward, "CPU", allow_override=True)


_INSTALL = {"dropout": _install_dropout, "batch_norm": _install_batch_norm}
