"""``torch.nn``'s layers with pyreg's kernels, and the change of a model's layers to them and back."""

from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from pyreg.torch import _batch_norm, _functional

Tensor: TypeAlias = torch.Tensor
Model = TypeVar("Model", bound=nn.Module)


# ---- Dropout ---------------------------------------------------------------------------------------------------------
# TorchScript compiles the branch of is_scripting() alone.


class _Leaf:
    """A layer that torch.fx takes as a whole, as it does those of torch.nn; it asks the object for its module.

    Else it would trace the layer into its function, with ``training`` as it is then.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        layer = super().__new__(cls)
        layer.__dict__["__module__"] = _LEAF
        return layer


_LEAF = "torch.nn.pyreg"


class Dropout(_Leaf, nn.Dropout):
    """:class:`torch.nn.Dropout` by :func:`pyreg.torch.dropout`: the same parameters, attributes and state.

    Parameters
    ----------
    p, inplace
        As for torch's class.

    Raises
    ------
    ValueError
        If ``p`` is outside [0, 1].

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> pyreg.torch.Dropout(0.5).eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout(input, self.p, self.training, self.inplace)
        return _functional.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(_Leaf, nn.Dropout1d):
    """:class:`torch.nn.Dropout1d` by :func:`pyreg.torch.dropout1d`.

    Parameters
    ----------
    p, inplace
        As for torch's class.

    Raises
    ------
    ValueError
        If ``p`` is outside [0, 1].
    RuntimeError
        As torch's class, for an input of a wrong number of dims.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> y = pyreg.torch.Dropout1d(0.5)(torch.ones(2, 3, 4))
    >>> y.flatten(2).std(2, correction=0).max()
    tensor(0.)
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout1d(input, self.p, self.training, self.inplace)
        return _functional.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(_Leaf, nn.Dropout2d):
    """:class:`torch.nn.Dropout2d` by :func:`pyreg.torch.dropout2d`.

    Parameters
    ----------
    p, inplace
        As for torch's class.

    Raises
    ------
    ValueError
        If ``p`` is outside [0, 1].
    RuntimeError
        As torch's class, for an input of a wrong number of dims.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> y = pyreg.torch.Dropout2d(0.5)(torch.ones(2, 3, 4, 4))
    >>> y.flatten(2).std(2, correction=0).max()
    tensor(0.)
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout2d(input, self.p, self.training, self.inplace)
        return _functional.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(_Leaf, nn.Dropout3d):
    """:class:`torch.nn.Dropout3d` by :func:`pyreg.torch.dropout3d`.

    Parameters
    ----------
    p, inplace
        As for torch's class.

    Raises
    ------
    ValueError
        If ``p`` is outside [0, 1].
    RuntimeError
        As torch's class, for an input of a wrong number of dims.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> y = pyreg.torch.Dropout3d(0.5)(torch.ones(2, 3, 4, 4, 4))
    >>> y.flatten(2).std(2, correction=0).max()
    tensor(0.)
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout3d(input, self.p, self.training, self.inplace)
        return _functional.dropout3d(input, self.p, self.training, self.inplace)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


class _BatchNorm(_Leaf, nn.modules.batchnorm._BatchNorm):
    """What the three have in common: training by the kernels, and torch's own function for everything else."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        from_batch = self.training or (self.running_mean is None and self.running_var is None)
        counts = not self.training or self.track_running_stats
        mean, var = self.running_mean if counts else None, self.running_var if counts else None
        if torch.jit.is_scripting():
            return F.batch_norm(input, mean, var, self.weight, self.bias, from_batch, momentum, self.eps)
        return _batch_norm.batch_norm(input, mean, var, self.weight, self.bias, from_batch, momentum, self.eps)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` by :func:`pyreg.torch.batch_norm`: the same parameters, attributes and state.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch's class.

    Raises
    ------
    RuntimeError, ValueError
        As torch's class, for an input of a wrong shape.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> norm = pyreg.torch.BatchNorm1d(2)
    >>> norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach().round(decimals=3)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> norm.running_mean
    tensor([0.2000, 2.0000])
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` by :func:`pyreg.torch.batch_norm`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch's class.

    Raises
    ------
    RuntimeError, ValueError
        As torch's class, for an input of a wrong shape.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> y = pyreg.torch.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))
    >>> bool(y.transpose(0, 1).flatten(1).mean(1).abs().max() < 1e-6)
    True
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` by :func:`pyreg.torch.batch_norm`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch's class.

    Raises
    ------
    RuntimeError, ValueError
        As torch's class, for an input of a wrong shape.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> y = pyreg.torch.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4))
    >>> bool(y.transpose(0, 1).flatten(1).mean(1).abs().max() < 1e-6)
    True
    """


# ---- Whole models ----------------------------------------------------------------------------------------------------

_OURS: dict[Any, Any] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(model: Model) -> Model:
    """Let pyreg compute the dropout and batch-norm layers of a model, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Its ``Dropout``, ``Dropout1d/2d/3d`` and ``BatchNorm1d/2d/3d`` layers become those of ``pyreg.torch``: objects,
        parameters, hooks and ``state_dict`` stay as they are.  Subclasses of these layers are left alone; and dropout
        that a model calls as a function, or that is a number in an attention or recurrent layer, is not reached:
        :func:`accelerate` does that.

    Returns
    -------
    torch.nn.Module
        ``model`` itself.

    Raises
    ------
    TypeError
        If ``model`` is no module.

    Notes
    -----
    ``torch.save(model)`` of a converted model asks for pyreg when it is loaded; ``torch.save(model.state_dict())``, or
    :func:`revert` first, does not.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5))
    >>> pyreg.torch.convert(model)[1]
    Dropout(p=0.5, inplace=False)
    >>> isinstance(model[1], pyreg.torch.Dropout)
    True
    """
    return _change(model, _OURS)


def revert(model: Model) -> Model:
    """Undo :func:`convert`: let torch compute these layers again, in place.

    Parameters
    ----------
    model : torch.nn.Module
        A converted model, or any other.

    Returns
    -------
    torch.nn.Module
        ``model`` itself.

    Raises
    ------
    TypeError
        If ``model`` is no module.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> type(pyreg.torch.revert(pyreg.torch.Dropout(0.5)))
    <class 'torch.nn.modules.dropout.Dropout'>
    """
    return _change(model, _THEIRS)


def _change(model: Model, classes: dict[Any, Any]) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; wanted a torch.nn.Module")
    for layer in model.modules():
        if new := classes.get(type(layer)):
            layer.__class__ = new
            if new in _THEIRS:
                layer.__dict__["__module__"] = _LEAF
            else:
                layer.__dict__.pop("__module__", None)
    return model
