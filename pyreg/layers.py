"""NumPy layers: state, and the functions of ``_ops`` applied to it."""

import copy
import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from pyreg import _arguments as arg
from pyreg import _core, _ops
from pyreg._arguments import Array, Dims, Impl

__all__ = ["BatchNorm", "Dropout"]

_forks = 0  # that lie between this process and the one that imported pyreg


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_count_fork)


def _check_state(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"state is {arg.kind(state)}; wanted a mapping, such as state_dict() returns")


class Layer:
    """What layers share: training or evaluation."""

    training: bool = True

    def __copy__(self) -> Self:
        """A copy shares no state with its original."""
        return copy.deepcopy(self)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or to evaluation.

        Parameters
        ----------
        mode : bool
            If false, switch to evaluation.

        Returns
        -------
        Layer
            The layer itself.

        Raises
        ------
        TypeError
            If ``mode`` is no bool.

        Examples
        --------
        >>> import pyreg
        >>> pyreg.Dropout(0.5).train(False).training
        False
        """
        self.training = arg.as_flag(mode, "mode")
        return self

    def eval(self) -> Self:
        """Switch to evaluation.

        Returns
        -------
        Layer
            The layer itself.

        Examples
        --------
        >>> import pyreg
        >>> pyreg.BatchNorm(3).eval().training
        False
        """
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
    rng : numpy.random.Generator
        Source of the keys.  What is assigned to it counts as the parameter ``rng``.

    Raises
    ------
    TypeError, ValueError
        If a setting is of another type or out of range.

    Notes
    -----
    Settings may be changed at any time, by a schedule for one.  They are checked when the layer is called, and the
    backward pass takes those of the call that it follows.  A call that raises changes nothing.

    Copies, pickles and forked processes: a layer without ``rng`` draws other masks in each of them, as it does in each
    run of a program.  One with ``rng``, also a generator without a seed, goes on in each of them with the same masks as
    its original: the stream is the user's.  :meth:`spawn` makes layers for workers.

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
    _rng: np.random.Generator
    _seeded_in: int | None  # the process where the operating system has seeded _rng; None: _rng is the user's

    def __init__(
        self,
        rate: float = 0.5,
        *,
        broadcast_dims: Dims = (),
        rng: int | np.random.Generator | None = None,
        impl: Impl = "philox",
        inverted: bool = True,
    ) -> None:
        self.rate: float = arg.as_rate(rate)
        arg.as_integers(broadcast_dims, "broadcast_dims")
        self.broadcast_dims = broadcast_dims
        arg.as_generator(impl)
        self.impl = impl
        self.inverted: bool = arg.as_flag(inverted, "inverted")
        self.rng = rng
        self.key: int | None = None
        # What backward() takes of the last call: was it in training, the shape of x, rate, generator, strides of the
        # mask, inverted, scaled, key.
        self._last: tuple[bool, tuple[int, ...], float, int, tuple[int, ...] | None, bool, bool, int] | None = None

    @property
    def rng(self) -> np.random.Generator:
        """Source of the keys."""
        if self._seeded_in is not None and self._seeded_in != _forks:
            self._rng, self._seeded_in = np.random.default_rng(), _forks
        return self._rng

    @rng.setter
    def rng(self, rng: int | np.random.Generator | None) -> None:
        if rng is None:
            self._seeded_in = -1  # nowhere yet
        else:
            self._rng, self._seeded_in = arg.as_rng(rng), None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of pickles whose layer has ``rng`` as an attribute of its own."""
        state = {"key": None, "_last": None, **state}
        state.pop("_trained", None)
        if "rng" in state:
            state["_rng"], state["_seeded_in"] = state.pop("rng"), None
        self.__dict__.update(state)

    def __call__(self, x: ArrayLike, *, out: Array | None = None) -> Array:
        """Dropout of ``x`` in training; in evaluation ``x`` itself, or ``x * (1 - rate)`` if not ``inverted``.

        Parameters
        ----------
        x : array_like
            float32, float64, float16 or bfloat16, of any shape and memory layout.
        out : ndarray, optional
            Where to write the result, as in :func:`pyreg.dropout`; in evaluation, too.

        Returns
        -------
        ndarray
            Shape and dtype of ``x``.

        Raises
        ------
        TypeError, ValueError, KeyboardInterrupt
            As :func:`pyreg.dropout`; the layer is then as it was before the call.
        """
        x, code = arg.as_input(x)
        rate, generator = arg.as_rate(self.rate), arg.as_generator(self.impl)
        dims = self._shared_dims(x.ndim)
        strides = None if dims is arg.NO_DIMS else arg.as_mask_strides(x.shape, dims)
        inverted, scaled = arg.as_flag(self.inverted, "inverted"), self._scaled
        if not arg.as_flag(self.training, "training"):
            y = self._evaluate(x, inverted, rate, out, "x")
            self._last = False, x.shape, rate, generator, strides, inverted, scaled, 0
            return y
        y = _core.empty_like(x) if out is None else arg.prepare_out(out, x, (x,))
        key = _ops.drop_by_fresh_key(self.rng, code, x, y, generator, rate, 0, scaled, strides)
        y = _core.deliver(y, out)
        self._last, self.key = (True, x.shape, rate, generator, strides, inverted, scaled, key), key
        return y

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array:
        """Gradient of the last call, in whatever mode and with whatever settings that was, with respect to its input.

        Parameters
        ----------
        dy : array_like
            Gradient with respect to the output, of the same shape.
        out : ndarray, optional
            Where to write the result; may be ``dy`` itself.

        Returns
        -------
        ndarray
            Shape and dtype of ``dy``; after a call in evaluation ``dy`` itself, if ``inverted``.

        Raises
        ------
        RuntimeError
            If the layer has not been called.
        TypeError, ValueError, KeyboardInterrupt
            As :func:`pyreg.dropout_backward`, or if ``dy`` has another shape than ``x`` had.

        Examples
        --------
        >>> import numpy as np, pyreg
        >>> layer = pyreg.Dropout(0.5, rng=0)
        >>> y = layer(np.ones(4))
        >>> layer.rate = 0.9  # for the next call
        >>> bool((layer.backward(np.ones(4)) == y).all())
        True
        """
        if self._last is None:
            raise RuntimeError("backward() before a call; wanted layer(x) first")
        trained, shape, rate, generator, strides, inverted, scaled, key = self._last
        dy, code = arg.as_input(dy, "dy")
        if dy.shape != shape:
            raise ValueError(f"dy has {dy.ndim} dims, shape {dy.shape}; wanted the shape that x had, {shape}")
        if not trained:
            return self._evaluate(dy, inverted, rate, out, "dy")
        dx = _core.empty_like(dy) if out is None else arg.prepare_out(out, dy, (dy,), "dy")
        _core.dropout(code, dy, dx, generator, key, rate, 0, scaled, strides)
        return _core.deliver(dx, out)

    def _shared_dims(self, ndim: int) -> Dims:
        """Dims of an input along which the mask is shared; raises if there can be no such input."""
        return self.broadcast_dims

    @property
    def _scaled(self) -> bool:
        """Are kept elements scaled in training?"""
        return self.inverted

    @staticmethod
    def _evaluate(x: Array, inverted: bool, rate: float, out: Array | None, name: str) -> Array:
        if inverted:
            if out is None:
                return x
            arg.check_out(out, x, name)
            return _core.deliver(x, out)
        y = _core.empty_like(x) if out is None else arg.prepare_out(out, x, (x,), name)
        np.multiply(x, x.dtype.type(1 - rate), out=y)
        return _core.deliver(y, out)

    def spawn(self, n: int) -> list[Self]:
        """Layers for ``n`` workers: the same settings, and masks that are independent of this layer's and each other's.

        Parameters
        ----------
        n : int
            How many.

        Returns
        -------
        list of layers
            Their generators are those of ``rng.spawn(n)``: they follow from the seed and from how often it has spawned
            (which is no part of :meth:`state_dict`).  None of them has been called.

        Raises
        ------
        TypeError, ValueError
            If ``n`` is not an int of 0 or more, or ``rng`` cannot spawn.

        Examples
        --------
        Two workers with masks of their own, the same in each run of the program:

        >>> import multiprocessing
        >>> import numpy as np, pyreg
        >>> layer = pyreg.Dropout(0.5, rng=0)
        >>> with multiprocessing.get_context("fork").Pool(2) as pool:
        ...     y = pool.starmap(pyreg.Dropout.__call__, [(worker, np.ones(64)) for worker in layer.spawn(2)])
        >>> bool((y[0] == y[1]).all())
        False
        """
        n = arg.as_integer(n, "n")
        if not 0 <= n < 1 << 63:
            raise ValueError(f"n is {arg.shown(n)}; wanted how many layers to make")
        try:
            rngs = self.rng.spawn(n) if self._seeded_in is None else [None] * n
        except TypeError as error:
            raise TypeError(f"rng cannot spawn ({error}); wanted a generator that was made from a seed") from error
        layers = [copy.copy(self) for _ in rngs]
        for layer, rng in zip(layers, rngs, strict=True):
            layer.rng, layer.key, layer._last = rng, None, None
        return layers

    def state_dict(self) -> dict[str, Any]:
        """The state of the key source, so that training can go on from a checkpoint with the same masks.

        Returns
        -------
        dict
            ``{"rng": rng.bit_generator.state}``.

        Examples
        --------
        >>> import numpy as np, pyreg
        >>> layer, other = pyreg.Dropout(0.5), pyreg.Dropout(0.5)
        >>> other.load_state_dict(layer.state_dict())
        >>> x = np.ones(64)
        >>> bool((layer(x) == other(x)).all())
        True
        """
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of another layer's :meth:`state_dict`.  The layer then counts as one with ``rng``.

        Parameters
        ----------
        state : mapping
            An empty one (PyTorch's) changes nothing.

        Raises
        ------
        TypeError, ValueError
            If that is no state of this layer's kind of generator; nothing changes.

        Examples
        --------
        >>> import numpy as np, pyreg
        >>> layer, x = pyreg.Dropout(0.5, rng=0), np.ones(64)
        >>> before = layer.state_dict()
        >>> y = layer(x)
        >>> layer.load_state_dict(before)
        >>> bool((layer(x) == y).all())
        True
        """
        _check_state(state)
        unknown = set(state) - {"rng"}
        if unknown:
            raise ValueError(f"state has {sorted(map(str, unknown))}; wanted 'rng' only")
        if "rng" not in state:
            return
        source = self.rng.bit_generator
        try:
            copy.deepcopy(source).state = state["rng"]  # it may be taken in part
        except Exception as error:
            raise arg.error_like(error)(
                f"state['rng'] is not one of {type(source).__name__}, this layer's generator: {error!r}"
            ) from error
        source.state = state["rng"]
        self._seeded_in = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a layer without rng are seeded for themselves."""
        state = self.__dict__.copy()
        if self._seeded_in is not None:
            state.pop("_rng", None)
            state["_seeded_in"] = -1
        return state

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
        Of parameters and running statistics, a float dtype.

    Attributes
    ----------
    scale, bias : ndarray, shape (num_features,), or None
    mean, var : ndarray, shape (num_features,)
        Running statistics; the variance is the biased one, as in Flax.
    grads : dict
        Set by :meth:`backward`: the gradients of ``scale`` and ``bias``.
    training : bool
        Set by :meth:`train` and :meth:`eval`; true at first.

    Raises
    ------
    TypeError, ValueError
        If a setting is of another type or out of range.

    Notes
    -----
    Settings and arrays may be changed at any time, the arrays also in place, as an optimizer does.  They are checked
    when the layer is called, and the backward pass takes those of the call that it follows.  A call that raises changes
    nothing.

    The layer keeps ``x`` and ``mask`` of its last call, no copies of them: who changes these in place before
    :meth:`backward` (by ``out=x`` of a later layer, for one) changes the gradients.

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
        self.num_features: int = arg.as_integer(num_features, "num_features")
        try:
            dtype = np.dtype(dtype)
        except Exception:
            raise TypeError(f"dtype is {arg.shown(dtype)}; wanted a float dtype") from None
        if not _is_float(dtype):
            raise TypeError(f"dtype is {dtype}; wanted a float dtype")
        if not 0 <= self.num_features < 2**63 // dtype.itemsize:
            raise ValueError(f"num_features is {arg.shown(num_features)}; wanted the length of an array")
        self.axis: int = arg.as_integer(axis, "axis")
        self.momentum: float = arg.as_momentum(momentum)
        self.epsilon: float = arg.as_epsilon(epsilon)
        use_scale, use_bias = arg.as_flag(use_scale, "use_scale"), arg.as_flag(use_bias, "use_bias")
        self.scale: Array | None = np.ones(self.num_features, dtype) if use_scale else None
        self.bias: Array | None = np.zeros(self.num_features, dtype) if use_bias else None
        self.mean: Array = np.zeros(self.num_features, dtype)
        self.var: Array = np.ones(self.num_features, dtype)
        self.grads: dict[str, Array] = {}
        # What backward() takes of the last call: was it in training, x, mask, mean, var, scale (a copy, as are mean and
        # var of evaluation), scale and bias as they are now, for their dtypes, axis and epsilon.
        self._saved: tuple[bool, Array, Any, Array, Array, Any, Any, Any, Any] | None = None

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Array:
        """Batch-norm of ``x``; in training the running statistics take a step.

        Parameters
        ----------
        x : array_like
            float32, float64, float16 or bfloat16, of one or more dims and any memory layout.
        mask : array_like of bool, optional
            As in :func:`pyreg.batch_norm`; without effect in evaluation.

        Returns
        -------
        ndarray
            Shape and dtype of ``x``.

        Raises
        ------
        TypeError, ValueError, KeyboardInterrupt
            As :func:`pyreg.batch_norm`; the layer is then as it was before the call.
        """
        x, code = arg.as_input(x)
        axis, epsilon, _ = arg.as_norm(x.ndim, self.axis, self.epsilon, None)
        channels = x.shape[axis]
        if channels != arg.as_integer(self.num_features, "num_features"):
            raise ValueError(f"x has {channels} channels in dim {self.axis}; wanted {arg.shown(self.num_features)}")
        options: Any = {"axis": axis, "epsilon": epsilon}
        scale, bias = _optional(self.scale, "scale"), _optional(self.bias, "bias")
        saved = None if scale is None else scale.copy()
        if not arg.as_flag(self.training, "training"):
            if mask is not None:
                arg.spread_mask(x, arg.as_array(mask, "mask"))
            mean, var = arg.as_array(self.mean, "mean").copy(), arg.as_array(self.var, "var").copy()
            y = _ops.batch_norm_inference(x, mean, var, scale, bias, **options)
            self._saved = False, x, None, mean, var, saved, scale, bias, options
            return y
        momentum = arg.as_momentum(self.momentum)
        old_mean, old_var = self._running("mean", code, channels), self._running("var", code, channels)
        y, mean, var = _ops.batch_norm(x, scale, bias, mask=mask, **options)
        new_mean, new_var = _step(momentum, old_mean, mean), _step(momentum, old_var, var)
        self._saved = True, x, mask, mean, var, saved, scale, bias, options
        self.mean, self.var = new_mean, new_var
        return y

    def backward(self, dy: ArrayLike) -> Array:
        """Gradient of the last call, in whatever mode that was, with respect to its input; sets ``grads``.

        Parameters
        ----------
        dy : array_like
            Gradient with respect to the output, of its shape and dtype.

        Returns
        -------
        ndarray
            Shape and dtype of ``x``.

        Raises
        ------
        RuntimeError
            If the layer has not been called.
        TypeError, ValueError, KeyboardInterrupt
            As :func:`pyreg.batch_norm_backward`; ``grads`` are then as they were.

        Examples
        --------
        >>> import numpy as np, pyreg
        >>> layer = pyreg.BatchNorm(2).eval()
        >>> y = layer(np.ones((3, 2), np.float32))
        >>> dx = layer.backward(np.ones((3, 2), np.float32))
        >>> layer.grads["bias"]
        array([3., 3.], dtype=float32)
        """
        if self._saved is None:
            raise RuntimeError("backward() before a call; wanted layer(x) first")
        trained, x, mask, mean, var, scale, scale_now, bias_now, options = self._saved
        if trained:
            dx, dscale, dbias = _ops.batch_norm_backward(dy, x, mean, var, scale, mask=mask, **options)
        else:  # the statistics are constants
            g = arg.as_like(dy, x, "dy")
            dx = _ops.batch_norm_inference(g, np.zeros_like(mean), var, scale, **options)
            wide = x.astype(np.float32) if x.itemsize == 2 else x
            xhat = _ops.batch_norm_inference(wide, mean, var, **options).astype(np.float64)
            others = tuple(d for d in range(x.ndim) if d != options["axis"])
            with np.errstate(all="ignore"):  # NaN and Inf stay in their channel, in silence as in training
                dscale, dbias = (g * xhat).sum(others), g.sum(others, dtype=np.float64)
        grads = {}
        if scale_now is not None:
            grads["scale"] = _cast(dscale, scale_now.dtype)
        if bias_now is not None:
            grads["bias"] = _cast(dbias, bias_now.dtype)
        self.grads = grads
        return dx

    def _running(self, name: str, code: int, channels: int) -> Array:
        """A running statistic that can take a step."""
        value = getattr(self, name)
        if _core.is_statistic(value, code, channels):
            return value  # type: ignore[no-any-return]
        value = arg.as_array(value, name)
        arg.check_channels(value, channels, name)
        if not _is_float(value.dtype):
            raise TypeError(f"{name} has dtype {value.dtype}; wanted a float dtype")
        return value

    def state_dict(self) -> dict[str, Array]:
        """Parameters and running statistics, by Flax's names.

        Returns
        -------
        dict
            Copies of scale, bias, mean and var, those that the layer has.

        Examples
        --------
        >>> import pyreg
        >>> pyreg.BatchNorm(2, use_bias=False).state_dict()["scale"]
        array([1., 1.], dtype=float32)
        """
        return {name: np.array(getattr(self, name)) for name in _STATE if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Take copies of parameters and running statistics, by Flax's names or by PyTorch's.

        Parameters
        ----------
        state : mapping
            PyTorch's names are weight, bias, running_mean, running_var; num_batches_tracked is ignored.

        Raises
        ------
        TypeError, ValueError
            If something is missing or does not fit; nothing changes.

        Examples
        --------
        >>> import numpy as np, pyreg
        >>> layer, other = pyreg.BatchNorm(2), pyreg.BatchNorm(2)
        >>> y = layer(np.array([[1, 10], [3, 30]], np.float32))
        >>> other.load_state_dict(layer.state_dict())
        >>> other.var
        array([1.  , 1.99], dtype=float32)
        """
        _check_state(state)
        given = [name for name in state if name != "num_batches_tracked"]
        wanted = [name for name in _STATE if getattr(self, name) is not None]
        if sorted(names := [str(_TORCH_NAMES.get(name, name)) for name in given]) != sorted(wanted):
            raise ValueError(
                f"state has {sorted(map(str, given))}; wanted {sorted(wanted)} (or PyTorch's names for them)"
            )
        new = {}
        for name, key in zip(names, given, strict=True):
            value = arg.as_array(state[key], name)
            if value.shape != (self.num_features,):
                raise ValueError(f"{name} has shape {value.shape}; wanted ({self.num_features},)")
            arg.check_channels(value, self.num_features, name)
            new[name] = _with_room(value, np.asarray(getattr(self, name)).dtype, name)
        for name, value in new.items():
            setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take the state, not the arrays kept for the backward pass."""
        return {**self.__dict__, "_saved": None}

    def __repr__(self) -> str:
        return f"BatchNorm({self.num_features}, axis={self.axis}, momentum={self.momentum}, epsilon={self.epsilon})"


def _with_room(value: Array, dtype: np.dtype[Any], name: str) -> Array:
    """A copy of another dtype, which has room for its numbers."""
    with np.errstate(over="ignore"):
        new = value.astype(dtype)
    if (np.isinf(new) & ~np.isinf(value)).any():
        raise ValueError(f"{name} has numbers that are too large for {dtype}; wanted the range of the layer's dtype")
    return new


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _optional(value: Any, name: str) -> Any:
    """A parameter as an array; None stays None."""
    return value if value is None or type(value) is np.ndarray else arg.as_array(value, name)


def _cast(gradient: Array, dtype: np.dtype[Any]) -> Array:
    """A gradient in the dtype of its parameter."""
    if gradient.dtype == dtype or not _is_float(dtype):
        return gradient
    with np.errstate(all="ignore"):
        return gradient.astype(dtype)


def _step(momentum: float, old: Array, new: Array) -> Array:
    """A running statistic after a batch."""
    stepped = momentum * old + (1 - momentum) * new
    return stepped if stepped.dtype == old.dtype else stepped.astype(old.dtype)


_STATE = ("scale", "bias", "mean", "var")
_TORCH_NAMES = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
