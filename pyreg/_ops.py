"""NumPy functions: arguments are checked here, then ``_core`` computes."""

import contextlib
import math
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from numbers import Number
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyreg import _core

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

Array = NDArray[Any]  # of float32, float64, float16 or bfloat16
Key = int | ArrayLike
Dims = int | Sequence[int]
Impl = Literal["philox", "threefry", "threefry_x64"]
Activation = Literal["relu"]

_IMPLS = {"philox": _core.PHILOX, "threefry": _core.THREEFRY, "threefry_x64": _core.THREEFRY_X64}


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    """What an argument is, for a TypeError."""
    return "None" if value is None else f"of type {type(value).__name__}"


def _shown(value: Any) -> str:
    """An argument as text, for a ValueError."""
    try:
        text = str(value) if isinstance(value, Number) else repr(value)
    except Exception:  # of its own, or an int of more digits than Python prints
        text = object.__repr__(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _masked_array() -> Any:
    """numpy.ma.MaskedArray, or no class if nobody has it.  NumPy imports its module when it is first looked at, and a
    signal handler may call us just then."""
    return getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())


def _number(value: Any, name: str, wanted: str) -> float:
    """value as a float; arrays without dims count as numbers, and bools as in Python and Flax; strings do not."""
    try:
        if getattr(value, "ndim", None) == 0 and not isinstance(value, _masked_array()):
            value = value.item()
        if isinstance(value, (str, bytes, bytearray, np.ndarray)):
            raise TypeError
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {_shown(value)}; wanted {wanted}") from None
    except Exception:  # also what its own methods raise
        raise TypeError(f"{name} is {_kind(value)}; wanted {wanted}") from None


def _integer(value: Any, name: str, wanted: str = "an int") -> int:
    """value as an int; arrays without dims count as numbers, and bools as in Python."""
    if type(value) is int:
        return value
    try:
        if isinstance(value, _masked_array()):
            raise TypeError
        return operator.index(value)
    except Exception:
        raise TypeError(f"{name} is {_kind(value)}; wanted {wanted}") from None


def _flag(value: Any, name: str) -> bool:
    """value as a bool; 0 and 1 count as one."""
    if value is True or value is False:
        return value
    if isinstance(value, (int, np.bool_)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} is {_kind(value)}; wanted True or False")


def _is_supported(x: Any) -> bool:
    return x.dtype.name in ("float32", "float64", "float16", "bfloat16")


def _check_dtype(x: Any, name: str = "x") -> None:
    if not _is_supported(x):
        raise TypeError(f"{name} has dtype {x.dtype}; wanted float32, float64, float16 or bfloat16")


def _error_like(error: Exception) -> type[Exception]:
    return TypeError if isinstance(error, TypeError) else ValueError


def _is_masked(value: Any) -> bool:
    """Whether value is a masked array, or a list with one in it."""
    if not isinstance(value, (list, tuple)):
        return isinstance(value, _masked_array())
    kinds = set(map(type, value))  # few, so that a long list of numbers is soon seen through
    nested = (list, tuple, *([masked] if (masked := _masked_array()) else []))
    return any(issubclass(kind, nested) for kind in kinds) and any(map(_is_masked, value))


def _as_array(value: Any, name: str, wanted: str = "an array") -> Array:
    """value as NumPy reads it."""
    if type(value) is np.ndarray:
        return value
    if value is None:
        raise TypeError(f"{name} is None; wanted {wanted}")
    try:
        masked = _is_masked(value)
        if not masked:
            only_dlpack = hasattr(value, "__dlpack__") and not hasattr(value, "__array__")
            return np.from_dlpack(value) if only_dlpack else np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:  # a ragged list, a tensor with a gradient or on a GPU, ...
        raise _error_like(error)(
            f"{name} is {_kind(value)}, of which NumPy makes no array ({error}); wanted {wanted}"
        ) from error
    raise TypeError(
        f"{name} is a masked array, or has one in it; wanted a plain one: {name}.filled(value), "
        f"and for batch-norm mask=~numpy.ma.getmaskarray({name})"
    )


def _as_input(x: Any, name: str = "x") -> tuple[Array, int]:
    """x as an aligned array in native byte order, and the code of its dtype."""
    code = _core.dtype_code(x)
    if code < 0:
        x = _as_array(x, name)
        _check_dtype(x, name)
        if x.dtype.name == "bfloat16":  # of ml_dtypes, known by name: pyreg does not depend on it
            _core.set_bfloat16(x.dtype)
        if not (x.dtype.isnative and x.flags.aligned):
            x = x.astype(x.dtype.newbyteorder("="))
        code = _core.dtype_code(x)
    return x, code


def _overlaps_itself(x: Array) -> bool:
    """Whether two elements of x share memory."""
    if _core.apart(x):
        return False
    reaches = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    extent = sum(map(abs, reaches)) + x.itemsize
    if x.nbytes > extent:
        return True
    marks = np.zeros(extent, np.bool_)  # of each byte, whether an element has it
    start = -sum(min(reach, 0) for reach in reaches)
    np.ndarray((*x.shape, x.itemsize), np.bool_, marks, start, (*x.strides, 1))[...] = True
    return int(np.count_nonzero(marks)) < x.nbytes


def _check_out(out: Any, x: Array, name: str = "x") -> None:
    if not isinstance(out, np.ndarray) or _is_masked(out):
        raise TypeError(f"out is a {type(out).__name__}; wanted a NumPy array")
    if out.shape != x.shape or out.dtype.newbyteorder("=") != x.dtype:
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; wanted those of {name}: {x.shape} and {x.dtype}"
        )
    if not out.flags.writeable:
        raise ValueError("out is read-only; wanted a writable array")
    if _overlaps_itself(out):
        raise ValueError(
            f"out has shape {out.shape} and strides {out.strides}, elements that share memory; wanted each in its place"
        )


def _prepare_out(out: Array, x: Any, inputs: tuple[Any, ...], name: str = "x", values: tuple[Any, ...] = ()) -> Array:
    """Where to write: out, or another array like x for ``_core.deliver`` to copy from.

    inputs and values: what must not be spoiled; out may be one of the inputs, which are arrays like x.
    """
    if _core.can_write(out, x, inputs, values):
        return out
    _check_out(out, x, name)
    if type(out) is not np.ndarray and _core.can_write(out.view(np.ndarray), x, inputs, values):
        return out
    # out is not aligned, in foreign byte order, interleaved, or overlaps an input.  That is not copied instead, because
    # batch-norm's order of additions follows from its strides.
    return _core.empty_like(x)


def _check_rate(rate: float) -> float:
    if type(rate) is float and 0.0 <= rate <= 1.0:
        return rate
    wanted = "a probability of dropping in [0, 1]"
    number = _number(rate, "rate", wanted)
    if not 0.0 <= number <= 1.0:  # also refuses NaN
        raise ValueError(f"rate is {_shown(rate)}; wanted {wanted}")
    return number


def _check_key(key: Any) -> int:
    """key as an int in [0, 2**64)."""
    if type(key) is not int:
        wanted = "an int in [0, 2**64) or a uint32 array of shape (2,)"
        words = _as_array(key, "key", wanted)
        if words.dtype.kind == "u" and words.itemsize == 4 and words.shape == (2,):
            return int(words[0]) << 32 | int(words[1])
        try:
            key = _integer(key, "key")
        except TypeError:
            raise TypeError(
                f"key is {type(key).__name__} of dtype {words.dtype} and shape {words.shape}; wanted {wanted}"
            ) from None
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key is {_shown(key)}; wanted an int in [0, 2**64)")
    return int(key)


def _generator(rng: Any) -> np.random.Generator:
    try:
        if hasattr(rng, "__len__"):  # several seeds
            seeds = _as_array(rng, "rng")
            if seeds.ndim != 1:  # NumPy overflows its stack on a list in itself, or a matrix
                raise TypeError
            return np.random.default_rng(seeds)
        return np.random.default_rng(rng)
    except Exception as error:
        raise _error_like(error)(f"rng is {_shown(rng)}; wanted an int or a numpy.random.Generator") from error


def fresh_key(rng: int | np.random.Generator | None = None) -> int:
    """A key from ``rng`` (int seed or Generator), or from the operating system."""
    if rng is None:
        return int.from_bytes(os.urandom(8), "little")
    if type(rng) is not np.random.Generator:
        rng = _generator(rng)
    return int(rng.integers(1 << 64, dtype=np.uint64))


def _check_impl(impl: str) -> int:
    if isinstance(impl, str) and impl in _IMPLS:
        return _IMPLS[impl]
    raise ValueError(f"impl is {_shown(impl)}; wanted one of {', '.join(map(repr, _IMPLS))}")


def _integers(value: Any, name: str) -> tuple[int, ...]:
    """value, an int or a sequence of ints, as a tuple."""
    if type(value) is int:
        return (value,)
    if type(value) is tuple:
        for n in value:
            if type(n) is not int:
                break
        else:
            return value
    many = type(value) is tuple or getattr(value, "ndim", 0) == 1
    if many or (isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes, bytearray, memoryview))):
        return tuple([n if type(n) is int else _integer(n, f"an element of {name}") for n in value])
    return (_integer(value, name, "an int or a sequence of ints"),)


def _mask_shape(shape: tuple[int, ...], broadcast_dims: Dims) -> tuple[int, ...]:
    """shape with 1 in each broadcast dim; one that is named twice is broadcast once, as in Flax."""
    lengths = list(shape)
    for dim in _integers(broadcast_dims, "broadcast_dims"):
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"broadcast_dims has {_shown(dim)}; wanted dims of an array with {len(shape)} dims")
        lengths[dim] = 1
    return tuple(lengths)


def _check_offset(offset: int, size: int) -> int:
    offset = _integer(offset, "offset")
    if not 0 <= offset <= (1 << 64) - size:
        raise ValueError(f"offset is {_shown(offset)}; wanted an int in [0, 2**64 - {size}]")
    return offset % (1 << 64)  # of an array without elements it may be 2**64


def _mask_strides(shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Index steps of the mask for each dim of shape, 0 where it is broadcast."""
    strides, step = [0] * len(shape), 1
    for dim in range(len(shape) - 1, -1, -1):
        length = mask_shape[dim]
        if length == shape[dim]:
            strides[dim] = step
        step *= length
    return tuple(strides)


# ---- Dropout ---------------------------------------------------------------------------------------------------------


LONG = 1 << 20  # elements; to note the state of a generator takes no time beside them
_NO_DIMS, _NO_OFFSET = (), 0  # the defaults, seen by identity, which is fast; what equals them gives the same result


def _drop_by_fresh_key(
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
    x, code = _as_input(x, name)
    rate = _check_rate(rate)
    generator = _check_impl(impl)
    strides = None
    if broadcast_dims is not _NO_DIMS:
        strides = _mask_strides(x.shape, _mask_shape(x.shape, broadcast_dims))
    if offset is not _NO_OFFSET:
        offset = _check_offset(offset, x.size)
    if key is not None:
        if rng is not None:
            raise TypeError("both key and rng are given; wanted one of them")
        key = _check_key(key)
    elif not 0.0 < rate < 1.0:
        key = 0  # nothing is drawn

    y = _core.empty_like(x) if out is None else _prepare_out(out, x, (x,), name)
    if key is None:
        _drop_by_fresh_key(rng, code, x, y, generator, rate, offset, True, strides)
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
    if deterministic is not False and _flag(deterministic, "deterministic"):
        _check_rate(rate)
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
    shape = _integers(shape, "shape")
    if min(shape, default=0) < 0:
        raise ValueError(f"shape is {_shown(shape)}; wanted lengths of 0 or more")
    n = math.prod(shape) or math.prod(n for n in shape if n)
    if n >= 1 << 63 or len(shape) > _core.MAX_DIMS:
        raise ValueError(
            f"shape is {_shown(shape)}; wanted at most {_core.MAX_DIMS} dims and fewer than 2**63 elements"
        )
    if broadcast_dims is not _NO_DIMS:
        shape = _mask_shape(shape, broadcast_dims)
    rate, key, generator = _check_rate(rate), _check_key(key), _check_impl(impl)
    n = math.prod(shape)
    offset = _check_offset(offset, n)
    packed = _flag(packed, "packed")
    out: Array = np.empty((n + 7) // 8, np.uint8) if packed else np.empty(shape, np.bool_)
    _core.dropout_mask(n, out, packed, generator, key, rate, offset)
    return out


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


def _check_axis(axis: int, ndim: int) -> int:
    if type(axis) is not int:
        axis = _integer(axis, "axis")
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {_shown(axis)}; wanted a dim of an array with {ndim} dims")
    return axis + ndim if axis < 0 else axis


def _check_epsilon(epsilon: float) -> float:
    if type(epsilon) is float and 0.0 <= epsilon < math.inf:
        return epsilon
    wanted = "a finite number of 0 or more"
    number = _number(epsilon, "epsilon", wanted)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"epsilon is {_shown(epsilon)}; wanted {wanted}")
    return number


def _check_activation(activation: Activation | None) -> bool:
    if activation is None:
        return False
    if not isinstance(activation, str) or activation != "relu":
        raise ValueError(f"activation is {_shown(activation)}; wanted None or 'relu'")
    return True


# The four that follow are of NumPy and of JAX arrays.


def _check_elements(x: Any, axis: int) -> None:
    if x.size == 0 and x.shape[axis] != 0:
        raise ValueError(f"x has shape {x.shape}; wanted at least one element in each channel")


def _check_channels(value: Any, channels: int, name: str) -> None:
    if value.shape != (channels,):
        raise ValueError(f"{name} has shape {value.shape}; x has {channels} channels, so wanted ({channels},)")
    if value.dtype.kind not in "iuf" and value.dtype.name != "bfloat16":
        raise TypeError(f"{name} has dtype {value.dtype}; wanted real numbers")


def _check_same(value: Any, x: Any, name: str) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; wanted that of x, {x.dtype}")
    if value.shape != x.shape:
        raise ValueError(f"{name} has shape {value.shape}; wanted that of x, {x.shape}")


def _seen_in(x: Any, mask: Any, broadcast_to: Callable[..., Any] = np.broadcast_to) -> Any:
    """The mask in the shape of x."""
    if mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; wanted bool")
    try:
        return broadcast_to(mask, x.shape)
    except ValueError:
        raise ValueError(f"mask has shape {mask.shape}; wanted one that broadcasts to that of x, {x.shape}") from None


def _check_statistic(value: ArrayLike | None, code: int, channels: int, name: str) -> Any:
    """A parameter or statistic, in the dtype that goes with the data; None stays None."""
    if value is None or _core.is_statistic(value, code, channels):
        return value
    value = _as_array(value, name)
    _check_channels(value, channels, name)
    return np.ascontiguousarray(value, np.float64 if code == _core.F64 else np.float32)


def _check_like(value: ArrayLike, x: Array, name: str) -> Array:
    """An array of the shape and dtype of x, aligned."""
    if _core.is_like(value, x):
        return value  # type: ignore[return-value]
    value, _ = _as_input(value, name)
    _check_same(value, x, name)
    return value


def _check_mask(mask: ArrayLike | None, x: Array, axis: int) -> Array | None:
    """The mask, seen in the shape of x; None stays None."""
    if mask is None:
        return None
    mask = _as_array(mask, "mask")
    seen: Array = _seen_in(x, mask)
    mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    counts = mask.any(axis=tuple(d for d in range(x.ndim) if d != axis))
    if not counts.all():
        raise ValueError(
            f"mask is all false in {np.size(counts) - np.count_nonzero(counts)} channels; wanted true somewhere"
        )
    return seen


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
    x, code = _as_input(x)
    axis = _check_axis(axis, x.ndim)
    relu = _check_activation(activation)
    _check_elements(x, axis)
    channels = x.shape[axis]
    scale = _check_statistic(scale, code, channels, "scale")
    bias = _check_statistic(bias, code, channels, "bias")
    mask = _check_mask(mask, x, axis)
    residual = None if residual is None else _check_like(residual, x, "residual")
    epsilon = _check_epsilon(epsilon)
    y = _core.empty_like(x) if out is None else _prepare_out(out, x, (x, residual), "x", (scale, bias, mask))
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
    x, code = _as_input(x)
    axis = _check_axis(axis, x.ndim)
    relu = _check_activation(activation)
    channels = x.shape[axis]
    if mean is None or var is None:
        raise TypeError("mean or var is None; wanted one value a channel")
    mean = _check_statistic(mean, code, channels, "mean")
    var = _check_statistic(var, code, channels, "var")
    scale = _check_statistic(scale, code, channels, "scale")
    bias = _check_statistic(bias, code, channels, "bias")
    residual = None if residual is None else _check_like(residual, x, "residual")
    epsilon = _check_epsilon(epsilon)
    y = _core.empty_like(x) if out is None else _prepare_out(out, x, (x, residual), "x", (mean, var, scale, bias))
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
    x, code = _as_input(x)
    dy = _check_like(dy, x, "dy")
    axis = _check_axis(axis, x.ndim)
    relu = _check_activation(activation)
    _check_elements(x, axis)
    channels = x.shape[axis]
    if mean is None or var is None:
        raise TypeError("mean or var is None; wanted what batch_norm returned")
    if relu and y is None:
        raise TypeError("y is None; wanted what batch_norm returned, to know where its activation was 0")
    mean = _check_statistic(mean, code, channels, "mean")
    var = _check_statistic(var, code, channels, "var")
    scale = _check_statistic(scale, code, channels, "scale")
    mask = _check_mask(mask, x, axis)
    y = _check_like(y, x, "y") if relu and y is not None else None
    epsilon = _check_epsilon(epsilon)
    dresidual = _core.empty_like(x) if relu else None
    dx = _core.empty_like(x) if out is None else _prepare_out(out, x, (dy, x, y), "x", (mean, var, scale, mask))
    dscale, dbias = _core.batch_norm_backward(
        code, dy, x, axis, epsilon, relu, scale, mask, y, mean, var, dx, dresidual
    )
    dx = _core.deliver(dx, out)
    return (dx, dscale, dbias) if dresidual is None else (dx, dscale, dbias, dresidual)


# ---- Threads ---------------------------------------------------------------------------------------------------------

_MOST_THREADS = 2**31 - 1


def get_num_threads() -> int:
    """Number of threads that the next large call from this thread or task will use."""
    return _core.get_num_threads()


def _check_threads(n: int, wanted: str = "") -> int:
    message = f"number of threads is {_shown(n)}; wanted an int n from 1 to {_MOST_THREADS}{wanted}"
    try:
        number = operator.index(n)
    except TypeError:
        raise TypeError(message) from None
    if isinstance(n, bool):
        raise TypeError(message)
    if not 1 <= number <= _MOST_THREADS:
        raise ValueError(message)
    return number


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for the whole process; ``None`` chooses automatically again.

    Automatic is what ``OMP_NUM_THREADS`` or the number of CPUs gives, at most the CPUs that the calling thread may run
    on and the CPU quota of the container.  A number that OpenMP is given later, as ``threadpoolctl`` does, is a limit
    in any case; but one that equals OpenMP's at import cannot be told from none.  Results never depend on the number.

    The threads that help are shared by all calls, and sleep between them; where the system refuses another one, those
    that there are do the work.  A child made by ``fork()`` starts its own.
    """
    _core.set_num_threads(0 if n is None else _check_threads(n, ", or None for automatic"))


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use ``n`` threads in calls while the context is active: in calls from this thread, or from this asyncio task.

    It is a context variable: tasks and ``asyncio.to_thread`` take over what holds where they are created.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> with pyreg.num_threads(1):
    ...     y = pyreg.dropout(np.ones(8), 0.5)
    """
    number = _core.ask_threads(_check_threads(n))
    try:
        yield
    finally:
        _core.end_threads(number)
