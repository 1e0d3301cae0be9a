"""Dropout as a JAX primitive: linear in x for a given key, and only the key is kept for the backward pass.

Operands: x (batch..., inner...); the key's words (batch..., words); and, unless the rate is a parameter, what there is
to know of it (batch..., numbers), of _numbers.py; the last two with 1 in place of a batch dim that shares them.  Batch
dims come from vmap; an element's index in the mask counts over the inner dims only.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from pyreg import _arguments as arg
from pyreg import _core
from pyreg._arguments import JaxImpl
from pyreg.jax import _numbers, _primitive
from pyreg.jax._random import threefry2x32

__all__ = ["dropout"]


class Mask(NamedTuple):
    """The parameters of the primitive: which elements are dropped, but for the key."""

    rate: float | None  # None: an operand says it
    generator: str  # "philox", "threefry", "threefry_x64"; or "jax": jax.random.bernoulli draws
    broadcast: tuple[bool, ...]  # for each inner dim
    key_impl: Any = None  # of "jax"
    partitionable: bool = True  # of "jax": jax_threefry_partitionable
    x64: bool = False  # of "jax": jax_enable_x64

    def numbers(self, x: Any, words: Any) -> Any:
        """What there is to know of the rate, as the operand that belongs to these."""
        assert self.rate is not None
        numbers = _numbers.of_rate(self.rate, x.dtype, self.generator, self.x64)
        return numbers.reshape((1,) * (len(words.shape) - 1) + numbers.shape)

    shared: bool = False  # by a forward and a backward pass


def _with_numbers(function: Any, stack: Any = jnp.stack) -> Any:
    """function(x, words, numbers) for operands that may lack the numbers.  `stack` makes an array of scalars: what a
    partitioned program calls must have no array inside."""

    @functools.wraps(function)
    def of(x: Any, words: Any, *numbers: Any, mask: Mask, **options: Any) -> Any:
        if mask.rate is not None:
            known = mask.numbers(x, words)
            numbers = (stack([*known.flat]).reshape(known.shape),)
        return function(x, words, *numbers, mask=mask, **options)

    return of


# ---- In JAX operations -----------------------------------------------------------------------------------------------


def _draw(words: jax.Array, numbers: jax.Array, mask: Mask, shape: tuple[int, ...]) -> jax.Array:
    """The mask for one key and rate, true where an element is kept."""
    if mask.generator == "philox":
        return _philox(words, numbers, shape)
    if mask.generator == "jax":
        with jax.threefry_partitionable(mask.partitionable):
            key = jax.random.wrap_key_data(words, impl=mask.key_impl)
            return jax.random.bernoulli(key, _numbers.probability_of(numbers, mask.x64), shape)
    return _threefry(words, numbers, shape, mask.generator == "threefry_x64")


def _threefry(words: jax.Array, numbers: jax.Array, shape: tuple[int, ...], x64: bool) -> jax.Array:
    """The mask defined as PYREG_THREEFRY in csrc/pyreg.h."""
    n = math.prod(shape)
    if isinstance(n, int) and n > 1 << 32:
        raise ValueError(f"the mask has {n} elements; wanted at most 2**32 where XLA cannot call pyreg's kernels")
    index = jnp.arange(n, dtype=jnp.uint32)
    a, b = threefry2x32(words[0], words[1], jnp.zeros_like(index), index)
    low, high = numbers[_numbers.LIMIT]
    kept: jax.Array
    if x64:
        limit = high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)
        kept = (a.astype(jnp.uint64) << 32 | b.astype(jnp.uint64)) >> 12 < limit
    else:
        kept = (a ^ b) >> 9 < low
    return kept.reshape(shape)


def _multiply(a: int, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """High and low word of the product of two 32-bit words."""
    a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a1 * b0 + (a0 * b0 >> 16)
    carry = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + (middle >> 16) + (carry >> 16), np.uint32(a) * b


def _philox_block(words: jax.Array, counter: Sequence[jax.Array]) -> list[jax.Array]:
    """Philox4x32-10 of Salmon et al., 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = words[0], words[1]
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + np.uint32(0x9E3779B9), k1 + np.uint32(0xBB67AE85)
    return [c0, c1, c2, c3]


def _philox(words: jax.Array, numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask defined as philox-v1 in csrc/pyreg.h: digit p of 32 elements' numbers is a word."""
    n = math.prod(shape)
    group = jnp.arange((n + 31) // 32, dtype=jnp.uint32)
    zero = jnp.zeros_like(group)
    low, high = numbers[_numbers.LIMIT]

    def tied(state: Any) -> Any:
        block, _, equal = state
        return (block < 16) & jnp.any(equal != 0)

    def compare(state: Any) -> Any:
        """Four more digits."""
        block, less, equal = state
        drawn = _philox_block(words, (group, zero, jnp.broadcast_to(block, group.shape), zero))
        limit = jnp.where(block < 8, high, low) << block % 8 * 4
        for p, digit in enumerate(drawn):
            own = -(limit >> (31 - p) & 1)
            less, equal = less | equal & own & ~digit, equal & ~(digit ^ own)
        return block + 1, less, equal

    _, less, _ = lax.while_loop(tied, compare, (jnp.uint32(0), zero, ~zero))
    kept = ~less[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None] & 1
    return kept.astype(bool).reshape(-1)[:n].reshape(shape) & ~_numbers.drops_all(numbers)


@_with_numbers
def _reference(x: jax.Array, words: jax.Array, numbers: jax.Array, *, mask: Mask) -> list[jax.Array]:
    batch = x.ndim - len(mask.broadcast)
    shape = _mask_shape(x.shape[batch:], mask)
    draw = functools.partial(_draw, mask=mask, shape=shape)
    shared = []
    for d in reversed(range(batch)):
        own = tuple(None if a.shape[d] == 1 else 0 for a in (words, numbers))
        if own == (None, None):
            shared.append(d)
        else:
            draw = jax.vmap(draw, own)
    keep = jnp.expand_dims(draw(*(_without_ones(a) for a in (words, numbers))), shared)
    scale = _numbers.scale_of(numbers, x.dtype)
    scale = jnp.broadcast_to(jnp.expand_dims(scale, tuple(range(batch, x.ndim))), x.shape)
    scaled = (x.astype(scale.dtype) * scale).astype(x.dtype)
    return [lax.select(jnp.broadcast_to(keep, x.shape), scaled, jnp.zeros_like(x))]


def _without_ones(rows: jax.Array) -> jax.Array:
    return jnp.squeeze(rows, tuple(d for d in range(rows.ndim - 1) if rows.shape[d] == 1))


def _mask_shape(inner: Sequence[int], mask: Mask) -> tuple[int, ...]:
    return tuple(1 if shared else n for n, shared in zip(inner, mask.broadcast, strict=True))


# ---- By kernel -------------------------------------------------------------------------------------------------------


@_with_numbers
def _native(x: jax.Array, words: jax.Array, numbers: jax.Array, *, reuse: bool, mask: Mask) -> Sequence[jax.Array]:
    whole = _mask_shape(x.shape[x.ndim - len(mask.broadcast) :], mask)
    window, generator = _window((0,) * len(whole), whole), arg.as_generator(mask.generator)
    if not mask.shared or mask.generator == "philox":  # whose bits cost no more than to read them
        return _call("pyreg_dropout_v2", x, words, numbers, window, reuse=reuse, generator=generator)
    # The bits alone are one operation in forward and backward pass, so a program that has both makes them once.
    batch = tuple(n if n != 1 else m for n, m in zip(words.shape[:-1], numbers.shape[:-1], strict=True))
    packed = jax.ShapeDtypeStruct((*batch, arg.packed_bytes(math.prod(whole))), jnp.uint8)
    bits = jax.ffi.ffi_call("pyreg_dropout_mask_v2", packed)(words, numbers, window, generator=generator)
    return _call("pyreg_dropout_packed_v2", x, bits, numbers, window, reuse=reuse)


def _window(shard: Sequence[Any], whole: Sequence[Any]) -> jax.Array:
    """How many shards lie in front of this one in each inner dim, and the mask's shape: low words, high words."""
    low = [n & 0xFFFFFFFF if isinstance(n, int) else n for n in whole]
    high = [n >> 32 if isinstance(n, int) else 0 for n in whole]
    return jnp.stack([_as_uint32(row) for row in (shard, low, high)])


def _as_uint32(values: Sequence[Any]) -> jax.Array:
    """A symbolic dim is what it will be."""
    words = [np.uint32(n) if isinstance(n, int) else jnp.asarray(n).astype(jnp.uint32) for n in values]
    return jnp.stack(words) if words else jnp.zeros(0, jnp.uint32)


def _call(name: str, x: jax.Array, *operands: jax.Array, reuse: bool, **attributes: Any) -> Sequence[jax.Array]:
    """reuse: write over x if XLA can."""
    call = jax.ffi.ffi_call(name, [jax.typeof(x)], input_output_aliases={0: 0} if reuse else {})
    y: Sequence[jax.Array] = call(x, *operands, **attributes)
    return y


def _names(x: Any, words: Any, *numbers: Any, mask: Mask) -> tuple[list[list[str]], list[list[str]]]:
    """A batch dim of the key or the rate is cut as that of x, unless all of x's share one."""
    dims = [f"x{d}" for d in range(len(x.shape))]

    def rows(a: Any, name: str) -> list[str]:
        return [*(dims[d] if n == x.shape[d] else f"{name}{d}" for d, n in enumerate(a.shape[:-1])), name]

    return [dims, rows(words, "words"), *(rows(a, "numbers") for a in numbers)], [dims]


def _shard(axes: dict[str, Any], avals: Any, *operands: jax.Array, mask: Mask) -> Sequence[jax.Array]:
    @_with_numbers
    def of(x: jax.Array, words: jax.Array, numbers: jax.Array, *, mask: Mask) -> Sequence[jax.Array]:
        batch = x.ndim - len(mask.broadcast)
        shard = [lax.axis_index(axes[f"x{d}"]) if f"x{d}" in axes else 0 for d in range(batch, x.ndim)]
        window = _window(shard, _mask_shape(avals[0].shape[batch:], mask))
        return _call(
            "pyreg_dropout_v2", x, words, numbers, window, reuse=False, generator=arg.as_generator(mask.generator)
        )

    return cast(Sequence[jax.Array], of(*operands, mask=mask))


@functools.partial(_with_numbers, stack=np.stack)
def _callback(x: Any, words: Any, numbers: Any, *, mask: Mask) -> list[Any]:
    y, strides = np.empty_like(x), arg.mask_strides(x.shape, _mask_shape(x.shape, mask))
    rate, scale = numbers[:4].copy().view("<f8")
    code, generator, inside = arg.as_input(x)[1], arg.as_generator(mask.generator), min(max(rate, 0.0), 1.0)
    _core.dropout(code, x, y, generator, arg.as_key(words), inside, 0, True, strides, float(scale))
    return [y]


# ---- The primitive ---------------------------------------------------------------------------------------------------


def _abstract(x: Any, *_: Any, mask: Mask) -> list[Any]:
    return [x.update(weak_type=False)]


def _outside_jit(x: Any, words: Any, *numbers: Any, mask: Mask) -> Any:
    """One program serves all rates."""
    if mask.rate is not None:
        numbers, mask = (mask.numbers(x, words),), mask._replace(rate=None)
    return (x, words, *numbers), {"mask": mask}


def _jet(primals: Any, series: Any, *, mask: Mask) -> Any:
    """Linear in x: of each term by itself."""
    x, *known = primals
    y = dropout_p.bind(x, *known, mask=mask)
    return y, [[dropout_p.bind(term, *known, mask=mask)[0] for term in series[0]]]


dropout_p = _primitive.define(
    "pyreg_dropout",
    _abstract,
    _reference,
    _native,
    _callback,
    _primitive.Partition(_names, _shard),
    lambda mask: mask.generator != "jax",
    lambda operand: operand == 0,
    _jet,
    _outside_jit,
)


def _jvp(primals: Any, tangents: Any, *, mask: Mask) -> Any:
    dx, known = tangents[0], primals[1:]
    if type(dx) is ad.Zero:
        return dropout_p.bind(*primals, mask=mask), [dx]
    mask = mask._replace(shared=True)
    return dropout_p.bind(*primals, mask=mask), dropout_p.bind(dx, *known, mask=mask)


def _transpose(cotangents: Any, x: Any, *known: Any, **params: Any) -> Any:
    (dy,) = cotangents
    return [ad.Zero(x.aval) if type(dy) is ad.Zero else dropout_p.bind(dy, *known, **params)[0], *[None] * len(known)]


ad.primitive_jvps[dropout_p] = _jvp
ad.primitive_transposes[dropout_p] = _transpose


# ---- The function ----------------------------------------------------------------------------------------------------


def _words_of(given: Any, impl: JaxImpl) -> tuple[jax.Array, str, Any]:
    """The key's words, which generator draws, and the key implementation if that is jax's own."""
    if not isinstance(given, (jax.Array, np.ndarray)):
        raise TypeError(f"key is {type(given).__name__}; wanted a key of jax.random.key, or its words as uint32")
    key = jnp.asarray(given)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim != 1:
            raise TypeError(
                f"key has dtype {key.dtype} and shape {key.shape}; wanted one key of jax.random.key, or words"
            )
        key = jax.random.wrap_key_data(key)
    if key.ndim != 0:
        raise ValueError(f"key has shape {key.shape}; wanted one key; jax.vmap maps over keys")
    key_impl = jax.random.key_impl(key)
    if impl == "philox" and key_impl != "threefry2x32":
        return jax.random.bits(key, (2,), jnp.uint32), "philox", None
    if _primitive.flag("jax_debug_key_reuse"):
        jax.random.bits(key, (0,))  # uses the key up in the eyes of JAX, which sees no key in its words
    if impl == "philox":
        return jax.random.key_data(key), "philox", None
    if key_impl == "threefry2x32" and _primitive.flag("jax_threefry_partitionable"):
        return jax.random.key_data(key), "threefry_x64" if _primitive.flag("jax_enable_x64") else "threefry", None
    return jax.random.key_data(key), "jax", key_impl


def dropout(
    x: jax.typing.ArrayLike,
    rate: jax.typing.ArrayLike = 0.5,
    *,
    key: jax.Array,
    deterministic: bool = False,
    broadcast_dims: int | Sequence[int] = (),
    impl: JaxImpl = "auto",
) -> jax.Array:
    """Set elements to zero at random and scale the others by ``1 / (1 - rate)``.

    With ``impl="auto"`` the result and its gradients are those of Flax's Dropout for the same key, bit for bit.  Works
    under every transform of JAX; a sharded array stays where it is and gets the mask of the whole.  The backward pass
    keeps the key and nothing else.

    Parameters
    ----------
    x : array_like
        float32, float64, float16 or bfloat16, of any shape.
    rate : float or scalar array
        Probability of dropping an element, in [0, 1].  A traced value, of a schedule inside `jax.jit`, is not checked:
        below 0 all elements are kept, and scaled as the formula says; above 1, and for NaN, none is.
    key : jax.Array
        A key of `jax.random.key` with any implementation, or its words (`jax.random.PRNGKey`).
    deterministic : bool
        If true, return ``x`` itself.
    broadcast_dims : int or sequence of int
        Dims along which the mask is shared; negative ones count from the end.
    impl : {"auto", "philox"}
        ``"auto"``: the mask of `jax.random.bernoulli` for this key.  ``"philox"``: pyreg's own, several times faster;
        for a threefry key it is the mask of :func:`pyreg.dropout` with ``key=jax.random.key_data(key)``.

    Returns
    -------
    jax.Array
        Shape and dtype of ``x``.

    Raises
    ------
    TypeError
        If ``x`` has another dtype, or ``key`` is not a key.
    ValueError
        If ``rate``, ``impl`` or ``broadcast_dims`` is out of range, or ``key`` is an array of keys.

    Notes
    -----
    Keys of other implementations than threefry, and threefry with ``jax_threefry_partitionable`` off, are drawn by
    `jax.random` itself.

    Examples
    --------
    >>> import jax, pyreg.jax
    >>> x = jax.numpy.ones(8)
    >>> pyreg.jax.dropout(x, 0.5, key=jax.random.key(0))
    Array([0., 0., 2., 2., 0., 2., 2., 0.], dtype=float32)
    """
    traced = _check_traced(rate) if isinstance(rate, jax.core.Tracer) else None
    known = arg.as_rate(rate) if traced is None else None
    arg.check_jax_impl(impl)
    x = _primitive.check_array(x)
    broadcast = tuple(n == 1 for n in arg.mask_shape(x.shape, broadcast_dims))
    if deterministic or known == 0.0:
        return x
    if known == 1.0:
        return jnp.zeros_like(x)
    words, generator, key_impl = _words_of(key, impl)
    x64 = _primitive.flag("jax_enable_x64")
    mask = Mask(known, generator, broadcast, key_impl, _primitive.flag("jax_threefry_partitionable"), x64)
    numbers = [] if traced is None else [_numbers.of_traced_rate(traced, x.dtype, generator, x64)]
    operands = _primitive.vary_alike(x, words, *numbers)
    y: jax.Array = dropout_p.bind(*operands, mask=mask)[0]
    return y if traced is None else _with_derivative(y, traced)


def _check_traced(rate: Any) -> Any:
    """A traced rate as float32, or, with x64, float64."""
    if rate.ndim != 0:
        raise ValueError(f"rate has shape {rate.shape}; wanted one number; jax.vmap maps over rates")
    if not (jnp.issubdtype(rate.dtype, jnp.floating) or jnp.issubdtype(rate.dtype, jnp.integer)):
        raise TypeError(f"rate has dtype {rate.dtype}; wanted a real number")
    return rate if rate.dtype == jnp.float64 else rate.astype(jnp.float32)


@jax.custom_jvp
def _with_derivative(y: jax.Array, rate: jax.Array) -> jax.Array:
    """y, as a function of the rate, too: its kept elements are x / (1 - rate)."""
    return y


def _with_derivative_jvp(primals: Any, tangents: Any) -> Any:
    (y, rate), (dy, drate) = primals, tangents
    none = jax.custom_derivatives.SymbolicZero
    if type(drate) is none:
        return y, dy
    y, keep = _with_derivative(y, rate), 1 - rate
    of_rate = y * jnp.where(keep > 0, drate / jnp.where(keep > 0, keep, 1), 0).astype(y.dtype)
    return y, of_rate if type(dy) is none else dy + of_rate


_with_derivative.defjvp(_with_derivative_jvp, symbolic_zeros=True)
