"""NumPy layers: state, and the functions of ``_ops`` applied to it."""

import copy
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from pyreg import _ops

__all__ = ["BatchNorm", "Dropout"]


class Layer:
    """What layers share: training or evaluation."""

    training = True

    def __copy__(self) -> Self:
        """A copy shares no state with its original."""
        return copy.deepcopy(self)

    def train(self, mode: bool = True) -> Self:
        """Switch to training (or, if ``mode`` is false, to evaluation); returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation; returns the layer."""
        return self.train(False)


class Dropout(Layer):
    """Dropout with a fresh mask at each call; the backward pass makes the mask again from its key.

    Parameters
    ----------
    rate : float
        Probability of dropping an element, in [0, 1].
    broadcast_dims : int or sequence of int
        Dims along which the mask is shared.
    rng : int or numpy.random.Generator, optional
        Source of the keys; by default one seeded by the operating system.
    impl : {"philox", "threefry", "threefry_x64"}
        Generator of the mask, as in :func:`pyreg.dropout`.
    inverted : bool
        If true, scale by ``1 / (1 - rate)`` in training.  If false, scale by ``1 - rate`` in evaluation instead, as in
        Srivastava et al., JMLR 15 (2014).

    Attributes
    ----------
    training : bool
        Set by :meth:`train` and :meth:`eval`; true at first.
    key : int or None
        Key of the last training call.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> layer = pyreg.Dropout(0.5, rng=0)
    >>> y = layer(np.ones((2, 3), np.float32))
    >>> dx = layer.backward(np.ones((2, 3), np.float32))
    >>> bool((dx == y).all())
    True
    >>> layer.eval()(np.ones(3))
    array([1., 1., 1.])
    """

    _settings: tuple[str, ...] = ("rate", "broadcast_dims", "impl", "inverted")

    def __init__(
        self,
        rate: float = 0.5,
        *,
        broadcast_dims: _ops.Dims = (),
        rng: int | np.random.Generator | None = None,
        impl: _ops.Impl = "philox",
        inverted: bool = True,
    ) -> None:
        self.rate = _ops._check_rate(rate)
        self.broadcast_dims = broadcast_dims
        self.impl = impl
        self.inverted = inverted
        self.rng = np.random.default_rng(rng)
        self.key: int | None = None
        self._trained: bool | None = None  # was the last call one in training?
        _ops._check_impl(impl)

    def __call__(self, x: ArrayLike, *, out: _ops.Array | None = None) -> _ops.Array:
        """Dropout of ``x`` in training; in evaluation ``x`` itself, or ``x * (1 - rate)`` if not ``inverted``."""
        dims = self._shared_dims(np.ndim(x))
        if self.training:
            self.key = _ops.fresh_key(self.rng)
        self._trained = self.training
        return self._drop(x, dims, out, "x") if self.training else self._evaluate(x, out)

    def backward(self, dy: ArrayLike, *, out: _ops.Array | None = None) -> _ops.Array:
        """Gradient of the last call with respect to its input."""
        if self._trained is None:
            raise RuntimeError("backward() before a call; wanted layer(x) first")
        dims = self._shared_dims(np.ndim(dy))
        return self._drop(dy, dims, out, "dy") if self._trained else self._evaluate(dy, out)

    def _shared_dims(self, ndim: int) -> _ops.Dims:
        """Dims of an input along which the mask is shared; raises if there can be no such input."""
        return self.broadcast_dims

    @property
    def _scaled(self) -> bool:
        """Are kept elements scaled in training?"""
        return self.inverted

    def _drop(self, x: ArrayLike, dims: _ops.Dims, out: _ops.Array | None, name: str) -> _ops.Array:
        return _ops._apply(x, self.rate, self.key, None, dims, self.impl, 0, out, scaled=self._scaled, name=name)

    def _evaluate(self, x: ArrayLike, out: _ops.Array | None) -> _ops.Array:
        x, _ = _ops._as_input(x)
        if out is not None:
            _ops._check_out(out, x)
        if self.inverted:
            if out is None:
                return x
            np.copyto(out, x)
            return out
        y: _ops.Array = np.multiply(x, x.dtype.type(1 - self.rate), out=out)
        return y

    def state_dict(self) -> dict[str, Any]:
        """The state of the key source, so that training can go on from a checkpoint with the same masks."""
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of another layer's :meth:`state_dict`.  An empty dict (PyTorch's) changes nothing."""
        unknown = set(state) - {"rng"}
        if unknown:
            raise ValueError(f"state has {sorted(unknown)}; wanted 'rng' only")
        if "rng" in state:
            self.rng.bit_generator.state = state["rng"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._settings)})"


class BatchNorm(Layer):
    """Batch-norm with running statistics: by the batch's own in training, by the running ones in evaluation.

    Parameters
    ----------
    num_features : int
        Number of channels.
    axis : int
        The dim that counts the channels.
    momentum : float
        Weight of the old value in the running mean and variance, as in Flax (PyTorch's momentum is 1 minus this).
    epsilon : float
        Added to the variance.
    use_scale, use_bias : bool
        Whether there is a scale, a bias to train.
    dtype : dtype
        Of parameters and running statistics.

    Attributes
    ----------
    scale, bias : ndarray, shape (num_features,), or None
    mean, var : ndarray, shape (num_features,)
        Running statistics; the variance is the biased one, as in Flax.
    grads : dict
        Set by :meth:`backward`: the gradients of ``scale`` and ``bias``.
    training : bool
        Set by :meth:`train` and :meth:`eval`; true at first.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> layer = pyreg.BatchNorm(2, momentum=0.9)
    >>> y = layer(np.array([[1, 10], [3, 30]], np.float32))
    >>> layer.mean, layer.var
    (array([0.2, 2. ], dtype=float32), array([ 1. , 10.9], dtype=float32))
    >>> dx = layer.backward(np.ones((2, 2), np.float32))
    >>> layer.grads["bias"]
    array([2., 2.], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: DTypeLike = np.float32,
    ):
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum is {momentum}; wanted a weight of the old value in [0, 1]")
        self.num_features = num_features
        self.axis = axis
        self.momentum = momentum
        self.epsilon = _ops._check_epsilon(epsilon)
        self.scale: _ops.Array | None = np.ones(num_features, dtype) if use_scale else None
        self.bias: _ops.Array | None = np.zeros(num_features, dtype) if use_bias else None
        self.mean: _ops.Array = np.zeros(num_features, dtype)
        self.var: _ops.Array = np.ones(num_features, dtype)
        self.grads: dict[str, _ops.Array] = {}
        self._saved: tuple[bool, _ops.Array, ArrayLike | None, _ops.Array, _ops.Array] | None = None

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> _ops.Array:
        """Batch-norm of ``x``; in training the running statistics take a step.  ``mask``: as in `pyreg.batch_norm`."""
        x, _ = _ops._as_input(x)
        self._check_channels(x)
        options: Any = {"axis": self.axis, "epsilon": self.epsilon}
        if not self.training:
            self._saved = False, x, None, self.mean, self.var
            return _ops.batch_norm_inference(x, self.mean, self.var, self.scale, self.bias, **options)
        y, mean, var = _ops.batch_norm(x, self.scale, self.bias, mask=mask, **options)
        self._saved = True, x, mask, mean, var
        self.mean = self._step(self.mean, mean)
        self.var = self._step(self.var, var)
        return y

    def backward(self, dy: ArrayLike) -> _ops.Array:
        """Gradient of the last call, in whatever mode that was, with respect to its input; sets ``grads``."""
        if self._saved is None:
            raise RuntimeError("backward() before a call; wanted layer(x) first")
        by_batch, x, mask, mean, var = self._saved
        options: Any = {"axis": self.axis, "epsilon": self.epsilon}
        if by_batch:
            dx, dscale, dbias = _ops.batch_norm_backward(dy, x, mean, var, self.scale, mask=mask, **options)
        else:  # the statistics are constants
            g: _ops.Array = _ops._check_like(dy, x, "dy")
            zero = np.zeros_like(mean)
            dx = _ops.batch_norm_inference(g, zero, var, self.scale, **options)
            xhat = _ops.batch_norm_inference(x, mean, var, **options).astype(np.float64)
            others = tuple(d for d in range(x.ndim) if d != self.axis % x.ndim)
            dscale, dbias = (g * xhat).sum(others), g.sum(others, dtype=np.float64)
        self.grads = {}
        if self.scale is not None:
            self.grads["scale"] = dscale.astype(self.scale.dtype, copy=False)
        if self.bias is not None:
            self.grads["bias"] = dbias.astype(self.bias.dtype, copy=False)
        return dx

    def _check_channels(self, x: _ops.Array) -> None:
        channels = x.shape[_ops._check_axis(self.axis, x.ndim)]
        if channels != self.num_features:
            raise ValueError(f"x has {channels} channels in dim {self.axis}; wanted {self.num_features}")

    def _step(self, old: _ops.Array, new: _ops.Array) -> _ops.Array:
        return (self.momentum * old + (1 - self.momentum) * new).astype(old.dtype, copy=False)

    def state_dict(self) -> dict[str, _ops.Array]:
        """Copies of parameters and running statistics, by Flax's names: scale, bias, mean, var."""
        return {name: getattr(self, name).copy() for name in _STATE if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Take parameters and running statistics, by Flax's names or by PyTorch's.

        PyTorch's are weight, bias, running_mean, running_var; num_batches_tracked is ignored.  Nothing changes if
        something is missing or does not fit.
        """
        state = {_TORCH_NAMES.get(name, name): value for name, value in state.items() if name != "num_batches_tracked"}
        wanted = {name for name in _STATE if getattr(self, name) is not None}
        if set(state) != wanted:
            raise ValueError(f"state has {sorted(state)}; wanted {sorted(wanted)} (or PyTorch's names for them)")
        new = {name: np.array(value, self.mean.dtype) for name, value in state.items()}
        for name, value in new.items():
            if value.shape != (self.num_features,):
                raise ValueError(f"{name} has shape {value.shape}; wanted ({self.num_features},)")
        for name, value in new.items():
            setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take the state, not the arrays kept for the backward pass."""
        return {**self.__dict__, "_saved": None}

    def __repr__(self) -> str:
        return f"BatchNorm({self.num_features}, axis={self.axis}, momentum={self.momentum}, epsilon={self.epsilon})"


_STATE = ("scale", "bias", "mean", "var")
_TORCH_NAMES = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
