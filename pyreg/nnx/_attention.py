"""Attention of Flax's nnx with pyreg's dropout."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import attention, dtypes

from pyreg._arguments import JaxImpl
from pyreg._flax import draws_weights, drop_weights


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
    is_causal: bool = False,
    *,
    impl: JaxImpl = "auto",
) -> jax.Array:
    """`flax.nnx.dot_product_attention` with pyreg's dropout: ``attention_fn`` of `flax.nnx.MultiHeadAttention`.

    Parameters
    ----------
    query : jax.Array, shape (..., queries, heads, channels)
    key : jax.Array, shape (..., keys, key_heads, channels)
    value : jax.Array, shape (..., keys, key_heads, value_channels)
    bias, mask, broadcast_dropout, dropout_rng, ...
        As for Flax's function.
    impl : {"auto", "philox"}
        As for :class:`Dropout`.

    Returns
    -------
    jax.Array, shape (..., queries, heads, value_channels)
        For the same key, Flax's bits.

    Raises
    ------
    ValueError
        If ``dropout_rate`` or ``impl`` is out of range; else as Flax's function.

    Examples
    --------
    >>> import pyreg.nnx
    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...     2, 8, dropout_rate=0.1, decode=False, attention_fn=pyreg.nnx.dot_product_attention, rngs=nnx.Rngs(0)
    ... )
    """
    given: dict[str, Any] = dict(locals())  # Flax's arguments, by name
    del given["impl"]
    if not draws_weights(given) or not _fit(*map(jnp.shape, (query, key, value))):
        return nnx.dot_product_attention(**given)
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    known = given | {"query": query, "key": key, "dtype": query.dtype, "deterministic": True}
    del known["value"]
    weights = drop_weights(attention.dot_product_attention_weights(**known), query.dtype, given, impl)
    return _weighted_sum(weights, value, functools.partial(jnp.einsum, precision=precision))


def philox_attention(*args: Any, **options: Any) -> jax.Array:
    return dot_product_attention(*args, impl="philox", **options)


def _fit(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> bool:
    """Whether Flax takes a value of this shape.  Whether it takes the key, its own code says."""
    return query[:-3] == value[:-3] and key[:-2] == value[:-2] and query[-2] % value[-2] == 0


def _weighted_sum(weights: jax.Array, value: jax.Array, einsum: Callable[..., jax.Array]) -> jax.Array:
    """Attention's result (..., queries, heads, channels); value (..., keys, heads, channels) may have fewer heads."""
    heads, value_heads = weights.shape[-3], value.shape[-2]
    if heads == value_heads:
        return einsum("...hqk,...khd->...qhd", weights, value)
    weights = weights.reshape(*weights.shape[:-3], value_heads, heads // value_heads, *weights.shape[-2:])
    y = einsum("...hgqk,...khd->...qhgd", weights, value)
    return y.reshape(*y.shape[:-3], heads, y.shape[-1])
