"""NumPy functions: arguments are converted, then ``_core`` computes."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pyreg import _arguments as arg
from pyreg import _core
from pyreg._arguments import Activation, Array, Dims, Impl, Key

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "dropout",
    "dropout_backward",
    "dropout_mask",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
]


# ---- Dropout ---------------------------------------------------------------------------------------------------------

LONG = 1 << 20  # elements; to note the state of a generator takes no time beside them
_NO_OFFSET = 0  # the default, seen by identity, as arg.NO_DIMS is


def fresh_key(rng: int | np.random.Generator | None = None) -> int:
    """A key from ``rng`` (int seed or Generator), or from the operating system."""
    if rng is None:
        return int.from_bytes(os.urandom(8), "little")
    if type(rng) is not np.random.Generator:
        rng = arg.as_rng(rng)
    return int(rng.integers(1 << 64, dtype=np.uint64))


def drop_by_fresh_key(
    rng: int | np.random.Generator | None,
    code: int,
    x: Array,
    y: Array,
    generator: int,
    rate: float,
    offset: int,
    scaled: bool,
    strides: tuple[int, ...] | None,
) -> int:
    """y = dropout(x) by a key that is drawn here, and returned; if that raises, it is as if none had been drawn."""
    source = rng.bit_generator if isinstance(rng, np.random.Generator) else None
    state = None if source is None or (x.size < LONG and type(source) in _CAN_GO_BACK) else source.state
    key = fresh_key(rng)
    try:
        _core.dropout(code, x, y, generator, key, rate, offset, scaled, strides)
    except BaseException:
        if source is not None:
            source.state = _state_before_a_key(source) if state is None else state
        raise
    return key


_CAN_GO_BACK = (np.random.PCG64, np.random.PCG64DXSM)  # a key is one step of theirs


def _state_before_a_key(source: Any) -> Any:
    now = source.state
    source.advance(-1)  # forgets half a draw that is left over, which a key does not touch
    return {**source.state, "has_uint32": now["has_uint32"], "uinteger": now["uinteger"]}


def _apply(
    x: ArrayLike,
    rate: float,
    key: Key | None,
    rng: int | np.random.Generator | None,
    broadcast_dims: Dims,
    impl: Impl,
    offset: int,
    out: Array | None,
    name: str = "x",
) -> Array:
    x, code = arg.as_input(x, name)
    rate, generator = arg.as_rate(rate), arg.as_generator(impl)
    strides = None if broadcast_dims is arg.NO_DIMS else arg.as_mask_strides(x.shape, broadcast_dims)
    if offset is not _NO_OFFSET:
        offset = arg.as_offset(offset, math.prod(arg.mask_shape(x.shape, broadcast_dims)))
    if key is not None:
        if rng is not None:
            raise TypeError("both key and rng are given; wanted one of them")
        key = arg.as_key(key)
    elif not 0.0 < rate < 1.0:
        key = 0  # nothing is drawn

    y = _core.empty_like(x) if out is None else arg.prepare_out(out, x, (x,), name)
    if key is None:
        drop_by_fresh_key(rng, code, x, y, generator, rate, offset, True, strides)
    else:
        _core.dropout(code, x, y, generator, key, rate, offset, True, strides)
    return _core.deliver(y, out)


def dropout(
    x: ArrayLike,
    rate: float = 0.5,
    *,
    key: Key | None = None,
    rng: int | np.random.Generator | None = None,
    deterministic: bool = False,
    broadcast_dims: Dims = (),
    impl: Impl = "philox",
    offset: int = 0,
    out: Array | None = None,
) -> Array:
    """Set elements to zero at random and scale the others by ``1 / (1 - rate)``.

    Which elements are dropped is a function of the key, the rate and the element's index in C order, and of nothing
    else: not of the number of threads, the machine, or the memory layout of ``x``.

    Parameters
    ----------
    x : array_like
        float32, float64, float16 or bfloat16, of any shape and memory layout.
    rate : float
        Probability of dropping an element, in [0, 1].
    key : int or array of uint32, shape (2,), optional
        An int in [0, 2**64), or the two words ``[high, low]`` as ``jax.random.key_data`` gives them.
    rng : int or numpy.random.Generator, optional
        Where a fresh key is drawn from, unless the call raises.  Without ``key`` and ``rng`` the operating system gives
        one.
    deterministic : bool
        If true, return a copy of ``x``.
    broadcast_dims : int or sequence of int
        Dims along which the mask is shared; negative ones count from the end.  One that is named twice counts once.
    impl : {"philox", "threefry", "threefry_x64"}
        Generator of the mask.  ``"philox"`` is the fast one.  ``"threefry"`` gives the mask of ``jax.random.bernoulli``
        and so of Flax's Dropout for the same key, ``"threefry_x64"`` the one they give with ``jax_enable_x64``.
    offset : int
        Index of the first element: a part of a larger array can be processed alone with the mask of the whole.
    out : ndarray, optional
        Where to write the result; may be ``x`` itself, or overlap it.  Its elements may not share memory.

    Returns
    -------
    ndarray
        Shape and dtype of ``x``; kept values are those of Flax bit for bit.  An ndarray also for a subclass of it.

    Raises
    ------
    TypeError
        If ``x`` has another dtype or is a masked array, an argument is of another type, or both ``key`` and ``rng`` are
        given.
    ValueError
        If ``rate``, ``key``, ``offset``, ``impl`` or ``broadcast_dims`` is out of range, or ``out`` does not fit.
    KeyboardInterrupt
        On Ctrl-C; ``out`` is then partly written.

    Notes
    -----
    Inverted dropout, Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    JMLR 15 (2014).  A dropped NaN or Inf becomes 0 too.

    Values equal Flax's for every array but one of a single element outside ``jax.jit``, where XLA divides by
    ``1 - rate`` instead of multiplying by the reciprocal; and but for subnormal results, which XLA flushes to zero.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> pyreg.dropout(np.ones(8, np.float32), 0.5, key=7)
    array([2., 2., 0., 2., 2., 2., 2., 0.], dtype=float32)
    """
    if deterministic is not False and arg.as_flag(deterministic, "deterministic"):
        arg.as_rate(rate)
        rate = 0.0
    return _apply(x, rate, key, rng, broadcast_dims, impl, offset, out)


def dropout_backward(
    dy: ArrayLike,
    rate: float = 0.5,
    *,
    key: Key,
    broadcast_dims: Dims = (),
    impl: Impl = "philox",
    offset: int = 0,
    out: Array | None = None,
) -> Array:
    """Gradient of :func:`dropout` with respect to ``x``: the same mask, made again from the key, and the same scale.

    Parameters
    ----------
    dy : array_like
        Gradient with respect to the output, of the same shape.
    rate, key, broadcast_dims, impl, offset
        As given to :func:`dropout`.
    out : ndarray, optional
        Where to write the result; may be ``dy`` itself.

    Returns
    -------
    ndarray
        ``dx``, shape and dtype of ``dy``.

    Raises
    ------
    TypeError, ValueError, KeyboardInterrupt
        As :func:`dropout`.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> pyreg.dropout_backward(np.ones(8, np.float32), 0.5, key=7)
    array([2., 2., 0., 2., 2., 2., 2., 0.], dtype=float32)
    """
    if key is None:
        raise TypeError("key is None; wanted the key that the forward pass used")
    return _apply(dy, rate, key, None, broadcast_dims, impl, offset, out, "dy")


def dropout_mask(
    shape: int | Sequence[int],
    rate: float = 0.5,
    *,
    key: Key,
    broadcast_dims: Dims = (),
    impl: Impl = "philox",
    offset: int = 0,
    packed: bool = False,
) -> Array:
    """The mask that :func:`dropout` uses: true where an element is kept.

    Parameters
    ----------
    shape : int or tuple of int
        Shape of the array that the mask is for.
    rate, key, broadcast_dims, impl, offset
        As in :func:`dropout`.
    packed : bool
        If true, return the mask in C order as bits, least significant bit first (``bitorder="little"`` of
        ``numpy.unpackbits``), spare bits 0.

    Returns
    -------
    ndarray
        bool, of ``shape`` with 1 in each broadcast dim; or uint8, shape ``((n + 7) // 8,)``, if packed.

    Raises
    ------
    TypeError
        If an argument is of another type.
    ValueError
        If an option is out of range, or ``shape`` has a negative length or 2**63 elements and more.
    MemoryError
        If there is no memory for the mask.

    Examples
    --------
    >>> import pyreg
    >>> pyreg.dropout_mask(8, 0.5, key=7)
    array([ True,  True, False,  True,  True,  True,  True, False])
    >>> pyreg.dropout_mask(8, 0.5, key=7, packed=True)
    array([123], dtype=uint8)
    """
    shape = arg.as_integers(shape, "shape")
    if min(shape, default=0) < 0:
        raise ValueError(f"shape is {arg.shown(shape)}; wanted lengths of 0 or more")
    n = math.prod(shape) or math.prod(n for n in shape if n)
    if n >= 1 << 63 or len(shape) > _core.MAX_DIMS:
        raise ValueError(
            f"shape is {arg.shown(shape)}; wanted at most {_core.MAX_DIMS} dims and fewer than 2**63 elements"
        )
    shape = arg.mask_shape(shape, broadcast_dims)
    rate, key, generator = arg.as_rate(rate), arg.as_key(key), arg.as_generator(impl)
    n = math.prod(shape)
    offset = arg.as_offset(offset, n)
    packed = arg.as_flag(packed, "packed")
    out: Array = np.empty(arg.packed_bytes(n), np.uint8) if packed else np.empty(shape, np.bool_)
    _core.dropout_mask(n, out, packed, generator, key, rate, offset)
    return out


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Normalise each channel by its own mean and variance.

    ``y = (x - mean) / sqrt(var + epsilon) * scale + bias``, then ``y + residual`` if given, then ``max(y, 0)`` if
    ``activation="relu"``: in one pass over memory.  The statistics are right at any ratio of mean to standard
    deviation, and no bit depends on the number of threads or the instruction set.

    Parameters
    ----------
    x : array_like
        float32, float64, float16 or bfloat16, of one or more dims and any memory layout.
    scale, bias : array_like, shape (channels,), optional
        By default 1 and 0.
    axis : int
        The dim that counts the channels.
    epsilon : float
        Added to the variance.
    mask : array_like of bool, optional
        Broadcasts to the shape of ``x``: mean and variance are those of the elements where it is true.
    activation : {None, "relu"}
        Applied last.
    residual : array_like, optional
        Shape and dtype of ``x``; added before the activation.
    out : ndarray, optional
        Where to write ``y``; may be ``x`` or ``residual`` itself, or overlap any argument.  Its elements may not share
        memory.

    Returns
    -------
    y : ndarray
        Shape and dtype of ``x``.
    mean, var : ndarray, shape (channels,)
        The biased variance.  float64 for float64 data, else float32.

    Raises
    ------
    TypeError
        If an array has another dtype or is a masked one (whose mask would not count: ``mask`` does), or an argument is
        of another type.
    ValueError
        If shapes do not fit, a channel has no element or none where ``mask`` is true, or an option is out of range.
    KeyboardInterrupt
        On Ctrl-C; ``out`` is then partly written.

    Notes
    -----
    Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate shift",
    ICML 2015.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> y, mean, var = pyreg.batch_norm(np.array([[1, 10], [3, 30]], np.float32))
    >>> mean, var
    (array([ 2., 20.], dtype=float32), array([  1., 100.], dtype=float32))
    >>> y.round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """
    x, code = arg.as_input(x)
    axis, epsilon, relu = arg.as_norm(x.ndim, axis, epsilon, activation)
    arg.check_elements(x, axis)
    channels = x.shape[axis]
    scale = None if scale is None else arg.as_statistic(scale, code, channels, "scale")
    bias = None if bias is None else arg.as_statistic(bias, code, channels, "bias")
    mask = None if mask is None else arg.as_mask(mask, x, axis)
    residual = None if residual is None else arg.as_like(residual, x, "residual")
    y = _core.empty_like(x) if out is None else arg.prepare_out(out, x, (x, residual), "x", (scale, bias, mask))
    mean, var = _core.batch_norm(code, x, axis, epsilon, relu, scale, bias, mask, residual, y)
    return _core.deliver(y, out), mean, var


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each channel by a given mean and variance.

    Parameters
    ----------
    x : array_like
        float32, float64, float16 or bfloat16, of one or more dims and any memory layout.
    mean, var : array_like, shape (channels,)
        For example running averages of what :func:`batch_norm` returned.
    scale, bias, axis, epsilon, activation, residual, out
        As in :func:`batch_norm`.

    Returns
    -------
    ndarray
        Shape and dtype of ``x``.

    Raises
    ------
    TypeError, ValueError, KeyboardInterrupt
        As :func:`batch_norm`; ``x`` may have no elements.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> pyreg.batch_norm_inference(np.array([[1.0, 10.0]]), [0, 10], [4, 1], epsilon=0)
    array([[0.5, 0. ]])
    """
    x, code = arg.as_input(x)
    axis, epsilon, relu = arg.as_norm(x.ndim, axis, epsilon, activation)
    channels = x.shape[axis]
    mean = arg.as_statistic(mean, code, channels, "mean")
    var = arg.as_statistic(var, code, channels, "var")
    scale = None if scale is None else arg.as_statistic(scale, code, channels, "scale")
    bias = None if bias is None else arg.as_statistic(bias, code, channels, "bias")
    residual = None if residual is None else arg.as_like(residual, x, "residual")
    y = _core.empty_like(x) if out is None else arg.prepare_out(out, x, (x, residual), "x", (mean, var, scale, bias))
    _core.batch_norm_inference(code, x, axis, epsilon, relu, scale, bias, residual, mean, var, y)
    return _core.deliver(y, out)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    activation: Activation | None = None,
    y: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """Gradients of :func:`batch_norm` with respect to ``x``, ``scale`` and ``bias``.

    Parameters
    ----------
    dy : array_like
        Gradient with respect to ``y``.
    x, mean, var, scale, axis, epsilon, mask, activation
        What :func:`batch_norm` was given and returned.  The mean is refined from ``x``: where it is many standard
        deviations from zero, float32 cannot hold it well enough.
    y : array_like, optional
        What the forward pass returned; wanted if ``activation`` is given.
    out : ndarray, optional
        Where to write ``dx``; may be ``dy`` or ``x`` itself.

    Returns
    -------
    dx : ndarray
        Shape and dtype of ``x``.
    dscale, dbias : ndarray, shape (channels,)
        float64 for float64 data, else float32.
    dresidual : ndarray
        Only if ``activation`` is given: the gradient with respect to ``residual``, ``dy`` where ``y > 0`` and 0
        elsewhere.  (Without activation it is ``dy``.)

    Raises
    ------
    TypeError, ValueError, KeyboardInterrupt
        As :func:`batch_norm`.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, var = pyreg.batch_norm(x)
    >>> dx, dscale, dbias = pyreg.batch_norm_backward(np.ones_like(x), x, mean, var)
    >>> dbias
    array([3.])
    """
    x, code = arg.as_input(x)
    axis, epsilon, relu = arg.as_norm(x.ndim, axis, epsilon, activation)
    dy = arg.as_like(dy, x, "dy")
    arg.check_elements(x, axis)
    channels = x.shape[axis]
    if relu and y is None:
        raise TypeError("y is None; wanted what batch_norm returned, to know where its activation was 0")
    mean = arg.as_statistic(mean, code, channels, "mean")
    var = arg.as_statistic(var, code, channels, "var")
    scale = None if scale is None else arg.as_statistic(scale, code, channels, "scale")
    mask = None if mask is None else arg.as_mask(mask, x, axis)
    y = arg.as_like(y, x, "y") if relu and y is not None else None
    dresidual = _core.empty_like(x) if relu else None
    dx = _core.empty_like(x) if out is None else arg.prepare_out(out, x, (dy, x, y), "x", (mean, var, scale, mask))
    dscale, dbias = _core.batch_norm_backward(
        code, dy, x, axis, epsilon, relu, scale, mask, y, mean, var, dx, dresidual
    )
    dx = _core.deliver(dx, out)
    return (dx, dscale, dbias) if dresidual is None else (dx, dscale, dbias, dresidual)


# ---- Threads ---------------------------------------------------------------------------------------------------------


def get_num_threads() -> int:
    """Number of threads that the next large call from this thread or task will use.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import pyreg
    >>> pyreg.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for the whole process; ``None`` chooses automatically again.

    Automatic is what ``OMP_NUM_THREADS`` or the number of CPUs gives, at most the CPUs that the calling thread may run
    on and the CPU quota of the container.  A number that OpenMP is given later, as ``threadpoolctl`` does, is a limit
    in any case; but one that equals OpenMP's at import cannot be told from none.  Results never depend on the number.

    The threads that help are shared by all calls, and sleep between them; where the system refuses another one, those
    that there are do the work.  A child made by ``fork()`` starts its own.

    Parameters
    ----------
    n : int or None
        At least 1; ``None`` is automatic.

    Raises
    ------
    TypeError, ValueError
        If ``n`` is no such number.

    Examples
    --------
    >>> import pyreg
    >>> pyreg.set_num_threads(2)
    >>> pyreg.get_num_threads()
    2
    >>> pyreg.set_num_threads(None)
    """
    _core.set_num_threads(0 if n is None else arg.as_threads(n, ", or None for automatic"))


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use ``n`` threads in calls while the context is active: in calls from this thread, or from this asyncio task.

    It is a context variable: tasks and ``asyncio.to_thread`` take over what holds where they are created.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        If ``n`` is no such number.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> with pyreg.num_threads(1):
    ...     y = pyreg.dropout(np.ones(8), 0.5)
    """
    number = _core.ask_threads(arg.as_threads(n))
    try:
        yield
    finally:
        _core.end_threads(number)
