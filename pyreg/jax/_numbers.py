"""Numbers as operands of kernels: with another rate or epsilon a compiled program stays the same one.

A double has no place in a program without x64, so numbers travel as uint32: the two words of the double, low one first,
for kernels; and the float32 nearest to it, for JAX operations.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pyreg import _core
from pyreg._arguments import as_input

Array = jax.Array


@functools.lru_cache(maxsize=4096)
def words_of(number: float) -> Any:
    """uint32, shape (3,)."""
    with np.errstate(over="ignore"):
        words = np.concatenate([np.array([number], "<f8").view("<u4"), np.array([number], "<f4").view("<u4")])
    words.flags.writeable = False
    return words


def read(words: Array, dtype: Any) -> Array:
    """The number in words (..., 3), as float32 or float64."""
    return read_double(words[..., :2]) if dtype == jnp.float64 else lax.bitcast_convert_type(words[..., 2], jnp.float32)


def read_double(words: Array) -> Array:
    """Words (..., 2) of a double as float64, with x64 on."""
    return lax.bitcast_convert_type(words, jnp.float64)


# ---- The rate of dropout ---------------------------------------------------------------------------------------------

RATE, SCALE, LIMIT, SCALE32, COUNT = slice(0, 2), slice(2, 4), slice(4, 6), 6, 7  # csrc/ffi.c has the first two


@functools.lru_cache(maxsize=4096)
def of_rate(rate: float, dtype: Any, generator: str, x64: bool) -> Any:
    """What a mask and x need to know of the rate, uint32, shape (COUNT,): the rate; the scale of kept elements; and,
    for JAX operations, the limit that draws are compared with, and the scale as float32."""
    scale = _core.dropout_scale(as_input(np.zeros(0, dtype))[1], rate)
    keep = 1.0 - rate
    if generator == "philox":
        limit = round(rate * 2.0**64)
    elif generator == "threefry":
        limit = math.ceil(float(np.float32(keep)) * 2.0**23)
    elif generator == "threefry_x64":
        limit = math.ceil(keep * 2.0**52)
    else:  # jax.random.bernoulli takes the probability itself
        words = words_of(keep)
        limit = int(words[:2].view("<u8")[0]) if x64 else int(words[2])
    numbers = np.concatenate(
        [words_of(rate)[:2], words_of(scale)[:2], np.array([limit], "<u8").view("<u4"), words_of(scale)[2:]]
    )
    numbers.flags.writeable = False
    return numbers


def of_traced_rate(rate: Array, dtype: Any, generator: str, x64: bool) -> Array:
    """The same for a rate that is known when the program runs, a float32 or, with x64, float64 scalar."""
    rate = lax.stop_gradient(rate)
    rate = jnp.where(jnp.isnan(rate), 2, rate).astype(rate.dtype)  # drops all, as NaN does in Flax
    keep = 1 - rate
    inside = jnp.clip(keep, 0, 1)
    if generator == "philox":
        limit = _fixed_point(jnp.clip(rate, 0, 1 - float(jnp.finfo(rate.dtype).epsneg)))
    elif generator == "threefry":
        limit = _pair(jnp.ceil(inside.astype(jnp.float32) * 2.0**23))
    elif generator == "threefry_x64":
        limit = _pair(jnp.ceil(inside.astype(jnp.float64) * 2.0**52))
    else:
        limit = lax.bitcast_convert_type(keep.astype(jnp.float64 if x64 else jnp.float32), jnp.uint32)
        limit = limit if x64 else jnp.stack([limit, jnp.zeros_like(limit)])
    scale = _scale(keep, dtype)
    scale32 = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    return jnp.concatenate([_double_words(rate), _double_words(scale), limit, scale32[None]])


def drops_all(numbers: Array) -> Array:
    """Whether the rate is 1 or more; philox's limit has no room for that."""
    return lax.ge(lax.bitcast_convert_type(numbers[1], jnp.int32), np.int32(0x3FF00000))


def scale_of(numbers: Array, dtype: Any) -> Array:
    """Of kept elements, in the precision of the computation."""
    if dtype == jnp.float64:
        return read_double(numbers[..., SCALE])
    return lax.bitcast_convert_type(numbers[..., SCALE32], jnp.float32)


def probability_of(numbers: Array, x64: bool) -> Array:
    """1 - rate, as jax.random.bernoulli takes it."""
    words = numbers[LIMIT]
    return read_double(words) if x64 else lax.bitcast_convert_type(words[0], jnp.float32)


def _scale(keep: Array, dtype: Any) -> Array:
    """pyreg_dropout_scale in csrc/pyreg.h, for a traced rate.  The barrier keeps XLA from leaving a rounding out."""
    if dtype == jnp.float64:
        return 1 / keep.astype(jnp.float64)
    rounded = lax.optimization_barrier(keep.astype(dtype)).astype(jnp.float32)
    scale = 1 / rounded
    if dtype == jnp.float16:
        scale = lax.optimization_barrier(scale.astype(jnp.float16)).astype(jnp.float32)
    return jnp.asarray(scale)


def _pair(whole: Array) -> Array:
    """A whole number in [0, 2**64) as two words."""
    high = jnp.floor(whole * 2.0**-32)
    return jnp.stack([(whole - high * 2.0**32).astype(jnp.uint32), high.astype(jnp.uint32)])


def _fixed_point(rate: Array) -> Array:
    """rate * 2**64, rounded to an integer (to even), as two words, for a rate in [0, 1)."""
    high = jnp.floor(rate * 2.0**32)
    low = jnp.round((rate * 2.0**32 - high) * 2.0**32)  # all products are exact
    carry = low >= 2.0**32
    words = [jnp.where(carry, 0, low), high + carry.astype(high.dtype)]
    return jnp.stack([w.astype(jnp.uint32) for w in words])


def _double_words(number: Array) -> Array:
    """The words of a number as a double, low one first; a subnormal float32 becomes 0."""
    if number.dtype == jnp.float64:
        return lax.bitcast_convert_type(number, jnp.uint32)
    bits = lax.bitcast_convert_type(number, jnp.uint32)
    exponent, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    wide = jnp.where(exponent == 0xFF, 0x7FF, exponent + (1023 - 127)).astype(jnp.uint32)
    high = bits & np.uint32(1 << 31) | wide << 20 | fraction >> 3
    return jnp.where(exponent == 0, 0, jnp.stack([fraction << 29, high])).astype(jnp.uint32)
