"""Dropout as a JAX primitive: linear in x for a given key, and only the key is kept for the backward pass.

Operands: x (batch..., inner...), and the key's words (batch..., words) with 1 in place of a batch dim that shares its
mask.  Batch dims come from vmap; an element's index in the mask counts over the inner dims only.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from pyreg import _core, _ops
from pyreg.jax import _primitive
from pyreg.jax._random import threefry2x32

__all__ = ["dropout"]

Impl = Literal["auto", "philox"]


class Mask(NamedTuple):
    """The parameters of the primitive: which elements are dropped, but for the key."""

    rate: float
    generator: str  # "philox", "threefry", "threefry_x64"; or "jax": jax.random.bernoulli draws
    broadcast: tuple[bool, ...]  # for each inner dim
    key_impl: Any = None  # of "jax"
    partitionable: bool = True  # of "jax": jax_threefry_partitionable
    shared: bool = False  # by a forward and a backward pass


# ---- In JAX operations -----------------------------------------------------------------------------------------------


def _draw(words: jax.Array, mask: Mask, shape: tuple[int, ...]) -> jax.Array:
    """The mask for one key, true where an element is kept."""
    if mask.generator == "philox":
        return _philox(words, mask.rate, shape)
    if mask.generator == "jax":
        with jax.threefry_partitionable(mask.partitionable):
            return jax.random.bernoulli(jax.random.wrap_key_data(words, impl=mask.key_impl), 1.0 - mask.rate, shape)
    return _threefry(words, mask.rate, shape, mask.generator == "threefry_x64")


def _threefry(words: jax.Array, rate: float, shape: tuple[int, ...], x64: bool) -> jax.Array:
    """The mask defined as PYREG_THREEFRY in csrc/pyreg.h."""
    n = math.prod(shape)
    if isinstance(n, int) and n > 1 << 32:
        raise ValueError(f"the mask has {n} elements; wanted at most 2**32 where XLA cannot call pyreg's kernels")
    index = jnp.arange(n, dtype=jnp.uint32)
    a, b = threefry2x32(words[0], words[1], jnp.zeros_like(index), index)
    keep = 1.0 - rate
    if x64:
        kept = (a.astype(jnp.uint64) << 32 | b) >> 12 < np.uint64(math.ceil(keep * 2.0**52))
    else:
        kept = (a ^ b) >> 9 < np.uint32(math.ceil(float(np.float32(keep)) * 2.0**23))
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


def _philox(words: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """The mask defined as philox-v1 in csrc/pyreg.h: digit p of 32 elements' numbers is a word."""
    limit = round(rate * 2.0**64)
    n = math.prod(shape)
    digits = f"{limit:064b}".rstrip("0")
    group = jnp.arange((n + 31) // 32, dtype=jnp.uint32)
    block = jnp.arange((len(digits) + 3) // 4, dtype=jnp.uint32)[:, None]  # all at once: each is much to compile
    zero = jnp.zeros_like(group)
    drawn = _philox_block(words, (group, zero, block, zero))
    less = zero  # than limit, by the digits behind the present one
    for p in reversed(range(len(digits))):
        digit = drawn[p % 4][p // 4]
        less = ~digit | less if digits[p] == "1" else ~digit & less
    kept = ~less[:, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return kept.astype(bool).reshape(-1)[:n].reshape(shape)


def _reference(x: jax.Array, words: jax.Array, *, mask: Mask) -> list[jax.Array]:
    batch = x.ndim - len(mask.broadcast)
    shape = _mask_shape(x.shape[batch:], mask)
    shared = tuple(d for d in range(batch) if words.shape[d] == 1)

    def draw(words: jax.Array) -> jax.Array:
        return _draw(words, mask, shape)

    for _ in range(batch - len(shared)):
        draw = jax.vmap(draw)
    keep = jnp.expand_dims(draw(jnp.squeeze(words, shared)), shared)
    return [lax.select(jnp.broadcast_to(keep, x.shape), x / (1.0 - mask.rate), jnp.zeros_like(x))]


def _mask_shape(inner: Sequence[int], mask: Mask) -> tuple[int, ...]:
    return tuple(1 if shared else n for n, shared in zip(inner, mask.broadcast, strict=True))


# ---- By kernel -------------------------------------------------------------------------------------------------------


def _native(x: jax.Array, words: jax.Array, *, reuse: bool, mask: Mask) -> Sequence[jax.Array]:
    whole = _mask_shape(x.shape[x.ndim - len(mask.broadcast) :], mask)
    window, attributes = _window((0,) * len(whole), whole), _attributes(mask)
    if not mask.shared or mask.generator == "philox":  # whose bits cost no more than to read them
        return _call("pyreg_dropout_v1", x, words, window, reuse=reuse, **attributes)
    # The bits alone are one operation in forward and backward pass, so a program that has both makes them once.
    packed = jax.ShapeDtypeStruct((*words.shape[:-1], (math.prod(whole) + 7) // 8), jnp.uint8)
    bits = jax.ffi.ffi_call("pyreg_dropout_mask_v1", packed)(words, window, **attributes)
    return _call("pyreg_dropout_packed_v1", x, bits, window, reuse=reuse, rate=mask.rate)


def _as_array(values: Sequence[Any]) -> jax.Array:
    """As int32; a symbolic dim is what it will be."""
    return jnp.stack([jnp.asarray(n, jnp.int32) for n in values]) if len(values) else jnp.zeros(0, jnp.int32)


def _window(start: Sequence[Any], whole: Sequence[Any]) -> jax.Array:
    """Where the inner dims of x begin in the array that the mask is for, and the mask's shape."""
    return jnp.stack([_as_array(start), _as_array(whole)])


def _attributes(mask: Mask) -> dict[str, Any]:
    return {"generator": _ops._IMPLS[mask.generator], "rate": mask.rate}


def _call(name: str, x: jax.Array, *operands: jax.Array, reuse: bool, **attributes: Any) -> Sequence[jax.Array]:
    """reuse: write over x if XLA can."""
    call = jax.ffi.ffi_call(name, [jax.typeof(x)], input_output_aliases={0: 0} if reuse else {})
    y: Sequence[jax.Array] = call(x, *operands, **attributes)
    return y


def _names(x: Any, words: Any, *, mask: Mask) -> tuple[list[list[str]], list[list[str]]]:
    """A batch dim of the key is cut as that of x, unless all of x's share one key."""
    dims = [f"x{d}" for d in range(len(x.shape))]
    keys = [dims[d] if n == x.shape[d] else f"shared{d}" for d, n in enumerate(words.shape[:-1])]
    return [dims, [*keys, "words"]], [dims]


def _shard(axes: dict[str, Any], avals: Any, x: jax.Array, words: jax.Array, *, mask: Mask) -> Sequence[jax.Array]:
    batch = x.ndim - len(mask.broadcast)
    start = [lax.axis_index(axes[f"x{d}"]) * x.shape[d] if f"x{d}" in axes else 0 for d in range(batch, x.ndim)]
    window = _window(start, _mask_shape(avals[0].shape[batch:], mask))
    return _call("pyreg_dropout_v1", x, words, window, reuse=False, **_attributes(mask))


def _callback(x: Any, words: Any, *, mask: Mask) -> list[Any]:
    x, words = np.asarray(x), np.asarray(words)
    y = np.empty_like(x)
    batch = x.ndim - len(mask.broadcast)
    strides = _ops._mask_strides(x.shape[batch:], _mask_shape(x.shape[batch:], mask))
    for at in np.ndindex(words.shape[:-1]):
        mine = (*(slice(None) if n == 1 else j for n, j in zip(words.shape[:-1], at, strict=True)), ...)  # ...: a view
        a, key = x[mine], _ops._check_key(words[at])
        all_strides = (0,) * (a.ndim - len(strides)) + strides
        code = _ops._as_input(a)[1]
        _core.dropout(code, a, y[mine], _ops._IMPLS[mask.generator], key, mask.rate, 0, True, all_strides)
    return [y]


# ---- The primitive ---------------------------------------------------------------------------------------------------


def _abstract(x: Any, words: Any, *, mask: Mask) -> list[Any]:
    return [x.update(weak_type=False)]


dropout_p = _primitive.define(
    "pyreg_dropout",
    _abstract,
    _reference,
    _native,
    _callback,
    _primitive.Partition(_names, _shard),
    lambda mask: mask.generator != "jax",
    lambda operand: operand == 0,
)


def _jvp(primals: Any, tangents: Any, *, mask: Mask) -> Any:
    dx, words = tangents[0], primals[1]
    if type(dx) is ad.Zero:
        return dropout_p.bind(*primals, mask=mask), [dx]
    mask = mask._replace(shared=True)
    return dropout_p.bind(*primals, mask=mask), dropout_p.bind(dx, words, mask=mask)


def _transpose(cotangents: Any, x: Any, words: Any, **params: Any) -> Any:
    (dy,) = cotangents
    return [ad.Zero(x.aval) if type(dy) is ad.Zero else dropout_p.bind(dy, words, **params)[0], None]


ad.primitive_jvps[dropout_p] = _jvp
ad.primitive_transposes[dropout_p] = _transpose


# ---- The function ----------------------------------------------------------------------------------------------------


def _words_of(given: Any, impl: Impl) -> tuple[jax.Array, str, Any]:
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
    if impl == "philox":
        words = jax.random.key_data(key) if key_impl == "threefry2x32" else jax.random.bits(key, (2,), jnp.uint32)
        return words, "philox", None
    if key_impl == "threefry2x32" and _primitive.flag("jax_threefry_partitionable"):
        return jax.random.key_data(key), "threefry_x64" if _primitive.flag("jax_enable_x64") else "threefry", None
    return jax.random.key_data(key), "jax", key_impl


def check_impl(impl: Impl) -> None:
    if impl not in ("auto", "philox"):
        raise ValueError(f"impl is {impl!r}; wanted 'auto' or 'philox'")


def dropout(
    x: jax.typing.ArrayLike,
    rate: float = 0.5,
    *,
    key: jax.Array,
    deterministic: bool = False,
    broadcast_dims: int | Sequence[int] = (),
    impl: Impl = "auto",
) -> jax.Array:
    """Set elements to zero at random and scale the others by ``1 / (1 - rate)``.

    With ``impl="auto"`` the result and its gradients are those of Flax's Dropout for the same key, bit for bit.  Works
    under every transform of JAX; a sharded array stays where it is and gets the mask of the whole.  The backward pass
    keeps the key and nothing else.

    Parameters
    ----------
    x : array_like
        float32, float64, float16 or bfloat16, of any shape.
    rate : float
        Probability of dropping an element, in [0, 1]; a number, not a traced value.
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
    Array([2., 0., 0., 0., 2., 2., 2., 0.], dtype=float32)
    """
    if isinstance(rate, jax.core.Tracer):
        raise TypeError("rate is a traced value; wanted a number (static_argnames of jax.jit keeps it one)")
    rate = _ops._check_rate(rate)
    check_impl(impl)
    x = _primitive.check_array(x)
    mask_shape = _ops._mask_shape(x.shape, broadcast_dims)
    if deterministic or rate == 0.0:
        return x
    if rate == 1.0:
        return jnp.zeros_like(x)
    words, generator, key_impl = _words_of(key, impl)
    broadcast = tuple(m == 1 for m in mask_shape)
    mask = Mask(rate, generator, broadcast, key_impl, _primitive.flag("jax_threefry_partitionable"))
    x, words = _primitive.vary_alike(x, words)
    y: jax.Array = dropout_p.bind(x, words, mask=mask)[0]
    return y
