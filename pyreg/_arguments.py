"""Arguments of the functions and layers for NumPy, JAX and Flax: conversions and checks, each in one place.

``as_x`` converts a value, and raises if there is no such x; ``check_x`` only raises.
"""

import math
import operator
import sys
from collections.abc import Callable, Sequence, Set
from numbers import Number
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyreg import _core

Array = NDArray[Any]  # of float32, float64, float16 or bfloat16
Key = int | ArrayLike
Dims = int | Sequence[int]
Impl = Literal["philox", "threefry", "threefry_x64"]
JaxImpl = Literal["auto", "philox"]
Activation = Literal["relu"]

_GENERATORS = {"philox": _core.PHILOX, "threefry": _core.THREEFRY, "threefry_x64": _core.THREEFRY_X64}


# ---- Errors, numbers and names ---------------------------------------------------------------------------------------


def kind(value: Any) -> str:
    """What an argument is, for a TypeError."""
    return "None" if value is None else f"of type {type(value).__name__}"


def shown(value: Any) -> str:
    """An argument as text, for a ValueError."""
    try:
        text = str(value) if isinstance(value, Number) else repr(value)
    except Exception:  # of its own, or an int of more digits than Python prints
        text = object.__repr__(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def error_like(error: Exception) -> type[Exception]:
    """The class of the error that takes the place of one that NumPy or a value raised."""
    return TypeError if isinstance(error, TypeError) else ValueError


def _masked_array() -> Any:
    """numpy.ma.MaskedArray, or no class if nobody has it.  NumPy imports its module when it is first looked at, and a
    signal handler may call us just then."""
    return getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())


def as_number(value: Any, name: str, wanted: str) -> float:
    """value as a float; arrays without dims count as numbers, and bools as in Python and Flax; strings do not."""
    try:
        if getattr(value, "ndim", None) == 0 and not isinstance(value, _masked_array()):
            value = value.item()
        if isinstance(value, (str, bytes, bytearray, np.ndarray)):
            raise TypeError
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {shown(value)}; wanted {wanted}") from None
    except Exception:  # also what its own methods raise
        raise TypeError(f"{name} is {kind(value)}; wanted {wanted}") from None


def _as_number_up_to(highest: float, value: Any, name: str, wanted: str) -> float:
    number = as_number(value, name, wanted)
    if not 0.0 <= number <= highest:  # also refuses NaN
        raise ValueError(f"{name} is {shown(value)}; wanted {wanted}")
    return number


def as_integer(value: Any, name: str, wanted: str = "an int") -> int:
    """value as an int; arrays without dims count as numbers, and bools as in Python."""
    if type(value) is int:
        return value
    try:
        if isinstance(value, _masked_array()):
            raise TypeError
        return int(operator.index(value))
    except Exception:
        raise TypeError(f"{name} is {kind(value)}; wanted {wanted}") from None


def as_flag(value: Any, name: str) -> bool:
    """value as a bool; 0 and 1 count as one."""
    if value is True or value is False:
        return value
    if isinstance(value, (int, np.bool_)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} is {kind(value)}; wanted True or False")


def as_integers(value: Any, name: str) -> tuple[int, ...]:
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
        return tuple([n if type(n) is int else as_integer(n, f"an element of {name}") for n in value])
    return (as_integer(value, name, "an int or a sequence of ints"),)


def as_rate(rate: Any) -> float:
    if type(rate) is float and 0.0 <= rate <= 1.0:
        return rate
    return _as_number_up_to(1.0, rate, "rate", "a probability of dropping in [0, 1]")


def as_momentum(momentum: Any) -> float:
    if type(momentum) is float and 0.0 <= momentum <= 1.0:
        return momentum
    return _as_number_up_to(1.0, momentum, "momentum", "a weight of the old value in [0, 1]")


def as_epsilon(epsilon: Any) -> float:
    if type(epsilon) is float and 0.0 <= epsilon < math.inf:
        return epsilon
    return _as_number_up_to(sys.float_info.max, epsilon, "epsilon", "a finite number of 0 or more")


def check_choice(value: Any, name: str, *choices: str | None) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        texts = list(map(repr, choices))
        wanted = " or ".join(texts) if len(texts) == 2 else f"one of {', '.join(texts)}"
        raise ValueError(f"{name} is {shown(value)}; wanted {wanted}")


def check_jax_impl(impl: Any) -> None:
    check_choice(impl, "impl", "auto", "philox")


def as_generator(impl: Any) -> int:
    """The code of the generator of masks."""
    if type(impl) is not str or impl not in _GENERATORS:
        check_choice(impl, "impl", *_GENERATORS)
    return _GENERATORS[impl]


def as_relu(activation: Any) -> bool:
    """Whether the activation is a ReLU; if not, it is None."""
    check_choice(activation, "activation", None, "relu")
    return activation is not None


# ---- Arrays ----------------------------------------------------------------------------------------------------------


def is_supported(x: Any) -> bool:
    return x.dtype.name in ("float32", "float64", "float16", "bfloat16")


def check_dtype(x: Any, name: str = "x") -> None:
    if not is_supported(x):
        raise TypeError(f"{name} has dtype {x.dtype}; wanted float32, float64, float16 or bfloat16")


def _is_masked(value: Any) -> bool:
    """Whether value is a masked array, or a list with one in it."""
    if not isinstance(value, (list, tuple)):
        return isinstance(value, _masked_array())
    kinds = set(map(type, value))  # few, so that a long list of numbers is soon seen through
    nested = (list, tuple, *([masked] if (masked := _masked_array()) else []))
    return any(issubclass(kind, nested) for kind in kinds) and any(map(_is_masked, value))


def as_array(value: Any, name: str, wanted: str = "an array") -> Array:
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
        raise error_like(error)(
            f"{name} is {kind(value)}, of which NumPy makes no array ({error}); wanted {wanted}"
        ) from error
    raise TypeError(
        f"{name} is a masked array, or has one in it; wanted a plain one: {name}.filled(value), "
        f"and for batch-norm mask=~numpy.ma.getmaskarray({name})"
    )


def as_input(x: Any, name: str = "x") -> tuple[Array, int]:
    """x as an aligned array in native byte order, and the code of its dtype."""
    code = _core.dtype_code(x)
    if code < 0:
        x = as_array(x, name)
        check_dtype(x, name)
        if x.dtype.name == "bfloat16":  # of ml_dtypes, known by name: pyreg does not depend on it
            _core.set_bfloat16(x.dtype)
        if not (x.dtype.isnative and x.flags.aligned):
            x = x.astype(x.dtype.newbyteorder("="))
        code = _core.dtype_code(x)
    return x, code


# ---- Where to write --------------------------------------------------------------------------------------------------


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


def check_out(out: Any, x: Array, name: str = "x") -> None:
    if not isinstance(out, np.ndarray) or _is_masked(out):
        raise TypeError(f"out is a {type(out).__name__}; wanted a NumPy array")
    if out.shape != x.shape or out.dtype.num != x.dtype.num:  # in any byte order
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; wanted those of {name}: {x.shape} and {x.dtype}"
        )
    if not out.flags.writeable:
        raise ValueError("out is read-only; wanted a writable array")
    if _overlaps_itself(out):
        raise ValueError(
            f"out has shape {out.shape} and strides {out.strides}, elements that share memory; wanted each in its place"
        )


def prepare_out(out: Array, x: Any, inputs: tuple[Any, ...], name: str = "x", values: tuple[Any, ...] = ()) -> Array:
    """Where to write: out, or another array like x for ``_core.deliver`` to copy from.

    inputs and values: what must not be spoiled; out may be one of the inputs, which are arrays like x.
    """
    if _core.can_write(out, x, inputs, values):
        return out
    check_out(out, x, name)
    if type(out) is not np.ndarray and _core.can_write(out.view(np.ndarray), x, inputs, values):
        return out
    # out is not aligned, in foreign byte order, interleaved, or overlaps an input.  That is not copied instead, because
    # batch-norm's order of additions follows from its strides.
    return _core.empty_like(x)


# ---- Dropout ---------------------------------------------------------------------------------------------------------

NO_DIMS = ()  # the default, seen by identity, which is fast; what equals it gives the same result


def as_key(key: Any) -> int:
    """key as an int in [0, 2**64)."""
    if type(key) is not int:
        wanted = "an int in [0, 2**64) or a uint32 array of shape (2,)"
        words = as_array(key, "key", wanted)
        if words.dtype.kind == "u" and words.itemsize == 4 and words.shape == (2,):
            return int(words[0]) << 32 | int(words[1])
        try:
            key = as_integer(key, "key")
        except TypeError:
            raise TypeError(
                f"key is {type(key).__name__} of dtype {words.dtype} and shape {words.shape}; wanted {wanted}"
            ) from None
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key is {shown(key)}; wanted an int in [0, 2**64)")
    return key  # type: ignore[no-any-return]


def as_rng(rng: Any) -> np.random.Generator:
    try:
        if hasattr(rng, "__len__"):  # several seeds
            seeds = as_array(rng, "rng")
            if seeds.ndim != 1:  # NumPy overflows its stack on a list in itself, or a matrix
                raise TypeError
            return np.random.default_rng(seeds)
        return np.random.default_rng(rng)
    except Exception as error:
        raise error_like(error)(f"rng is {shown(rng)}; wanted an int or a numpy.random.Generator") from error


def mask_shape(shape: tuple[int, ...], broadcast_dims: Dims) -> tuple[int, ...]:
    """shape with 1 in each broadcast dim; one that is named twice is broadcast once, as in Flax."""
    lengths = list(shape)
    for dim in as_integers(broadcast_dims, "broadcast_dims"):
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"broadcast_dims has {shown(dim)}; wanted dims of an array with {len(shape)} dims")
        lengths[dim] = 1
    return tuple(lengths)


def as_offset(offset: int, size: int) -> int:
    offset = as_integer(offset, "offset")
    if not 0 <= offset <= (1 << 64) - size:
        raise ValueError(f"offset is {shown(offset)}; wanted an int in [0, 2**64 - {size}]")
    return offset % (1 << 64)  # of an array without elements it may be 2**64


def packed_bytes(bits: int) -> int:
    return (bits + 7) // 8


def as_mask_strides(shape: tuple[int, ...], broadcast_dims: Dims) -> tuple[int, ...]:
    return mask_strides(shape, mask_shape(shape, broadcast_dims))


def mask_strides(shape: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Index steps, for each dim of an array of that shape, of a mask with these lengths: 0 where it is broadcast."""
    strides, step = [0] * len(shape), 1
    for dim in range(len(shape) - 1, -1, -1):
        if lengths[dim] == shape[dim]:
            strides[dim] = step
        step *= lengths[dim]
    return tuple(strides)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


def as_axis(axis: int, ndim: int) -> int:
    if type(axis) is not int:
        axis = as_integer(axis, "axis")
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {shown(axis)}; wanted a dim of an array with {ndim} dims")
    return axis + ndim if axis < 0 else axis


def as_norm(ndim: int, axis: int, epsilon: float, activation: Any) -> tuple[int, float, bool]:
    """The dim of the channels, epsilon, and whether there is a ReLU."""
    return as_axis(axis, ndim), as_epsilon(epsilon), activation is not None and as_relu(activation)


def check_given(value: Any, name: str) -> None:
    if value is None:
        raise TypeError(f"{name} is None; wanted one value per channel")


# The next four take arrays of NumPy and of JAX.


def check_elements(x: Any, axis: int) -> None:
    if x.size == 0 and x.shape[axis] != 0:
        raise ValueError(f"x has shape {x.shape}; wanted at least one element in each channel")


def check_channels(value: Any, channels: int, name: str) -> None:
    if value.shape != (channels,):
        raise ValueError(f"{name} has shape {value.shape}; x has {channels} channels, so wanted ({channels},)")
    if value.dtype.kind not in "iuf" and value.dtype.name != "bfloat16":
        raise TypeError(f"{name} has dtype {value.dtype}; wanted real numbers")


def check_same(value: Any, x: Any, name: str) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; wanted that of x, {x.dtype}")
    if value.shape != x.shape:
        raise ValueError(f"{name} has shape {value.shape}; wanted that of x, {x.shape}")


def spread_mask(x: Any, mask: Any, broadcast_to: Callable[..., Any] = np.broadcast_to) -> Any:
    """The mask, seen in the shape of x."""
    if mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; wanted bool")
    try:
        return broadcast_to(mask, x.shape)
    except ValueError:
        raise ValueError(f"mask has shape {mask.shape}; wanted one that broadcasts to that of x, {x.shape}") from None


def as_statistic(value: ArrayLike, code: int, channels: int, name: str) -> Any:
    """A parameter or statistic, in the dtype that goes with the data."""
    if _core.is_statistic(value, code, channels):
        return value
    check_given(value, name)
    value = as_array(value, name)
    check_channels(value, channels, name)
    return np.ascontiguousarray(value, np.float64 if code == _core.F64 else np.float32)


def as_like(value: ArrayLike, x: Array, name: str) -> Array:
    """An array of the shape and dtype of x, aligned."""
    if _core.is_like(value, x):
        return value  # type: ignore[return-value]
    value, _ = as_input(value, name)
    check_same(value, x, name)
    return value


def as_mask(mask: ArrayLike, x: Array, axis: int) -> Array:
    """The mask, seen in the shape of x."""
    mask = as_array(mask, "mask")
    seen: Array = spread_mask(x, mask)
    mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    counts = mask.any(axis=tuple(d for d in range(x.ndim) if d != axis))
    if not counts.all():
        raise ValueError(
            f"mask is all false in {np.size(counts) - np.count_nonzero(counts)} channels; wanted true somewhere"
        )
    return seen


# ---- The dims that share a mask where whole channels, samples or words are dropped -----------------------------------


def as_channel_axis(axis: int, spatial: int) -> int:
    """``axis`` of a batch of arrays with so many spatial dims, counted from the front."""
    counted = as_axis(axis, spatial + 2)
    if counted == 0:
        raise ValueError(f"axis is {axis}; wanted the dim of the channels, but dim 0 is the batch")
    return counted


def dims_of_channel(ndim: int, axis: int, spatial: int) -> tuple[int, ...]:
    """The spatial dims; ``axis`` is that of the channels in a batch, one more than without the dim of the batch."""
    axis = as_channel_axis(axis, spatial)
    batch = ndim - spatial - 1
    if batch not in (0, 1):
        raise ValueError(f"the array has {ndim} dims; wanted {spatial + 2}, or {spatial + 1} without a batch")
    return tuple(d for d in range(batch, ndim) if d != axis - 1 + batch)


def dims_of_sample(ndim: int) -> tuple[int, ...]:
    """All but the first, which counts the samples."""
    if ndim == 0:
        raise ValueError("the array has 0 dims; wanted a batch of samples, (N, ...)")
    return tuple(range(1, ndim))


def dims_of_word(ndim: int) -> tuple[int, ...]:
    """The last: the features of a word."""
    if ndim == 0:
        raise ValueError("the array has 0 dims; wanted words, (..., features)")
    return (ndim - 1,)


# ---- Threads ---------------------------------------------------------------------------------------------------------

_MOST_THREADS = 2**31 - 1


def as_threads(n: int, wanted: str = "") -> int:
    message = f"number of threads is {shown(n)}; wanted an int n from 1 to {_MOST_THREADS}{wanted}"
    if isinstance(n, bool | np.bool_):
        raise TypeError(message)
    try:
        number = operator.index(n)
    except TypeError:
        raise TypeError(message) from None
    if not 1 <= number <= _MOST_THREADS:
        raise ValueError(message)
    return number
