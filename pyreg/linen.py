"""Drop-ins for Flax's linen: the same arguments, variables, random streams and numbers, computed by pyreg's kernels.

Each class is a subclass of Flax's that changes the computation only.  Where there is nothing for a kernel to do, or
something to complain about, Flax's own code answers.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen import dtypes

from pyreg._arguments import Activation, JaxImpl
from pyreg._flax import activate, draws, draws_weights, drop_weights, normalise, normalises, step
from pyreg.jax import dropout

__all__ = ["BatchNorm", "Dropout", "dot_product_attention"]

# Without Flax's wrapper, which counts a call by super() as another one: for interceptors and captured intermediates.
_flax_dropout, _flax_batch_norm = (inspect.unwrap(layer.__call__) for layer in (linen.Dropout, linen.BatchNorm))


class Dropout(linen.Dropout):
    """`flax.linen.Dropout`: for the same stream the same values and gradients, bit for bit.

    Parameters
    ----------
    rate, broadcast_dims, deterministic, rng_collection
        As for Flax's class.  A rate outside [0, 1] is an error here.
    impl : {"auto", "philox"}
        ``"auto"``: Flax's mask.  ``"philox"``: another one for the same key, several times faster; see
        :func:`pyreg.jax.dropout`.

    Examples
    --------
    >>> import jax, pyreg.linen
    >>> layer = pyreg.linen.Dropout(0.5, deterministic=False)
    >>> y = layer.apply({}, jax.numpy.ones((2, 3)), rngs={"dropout": jax.random.key(0)})
    """

    impl: JaxImpl = dataclasses.field(default="auto", kw_only=True)

    @linen.compact
    def __call__(self, inputs: Any, deterministic: bool | None = None, rng: jax.Array | None = None) -> jax.Array:
        """Dropout of ``inputs``, as Flax's; ``rng`` is a key to use instead of the stream's."""
        off = linen.merge_param("deterministic", self.deterministic, deterministic)
        if off or not draws(inputs, self.rate, self.impl):
            return _flax_dropout(self, inputs, deterministic, rng)
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return dropout(inputs, self.rate, key=key, broadcast_dims=self.broadcast_dims, impl=self.impl)


class BatchNorm(linen.BatchNorm):
    """`flax.linen.BatchNorm`, with mean and variance that are right at any ratio of mean to standard deviation.

    Parameters
    ----------
    use_running_average, axis, momentum, epsilon, dtype, ...
        As for Flax's class; ``use_fast_variance`` makes no difference.  Devices of ``axis_name`` are pooled by their
        number of elements, also where a mask makes these differ.
    activation : {None, "relu"}
        Applied to the result, in the same sweep.

    Examples
    --------
    >>> import jax, pyreg.linen
    >>> layer = pyreg.linen.BatchNorm(use_running_average=False)
    >>> x = jax.numpy.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, updates = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    """

    activation: Activation | None = dataclasses.field(default=None, kw_only=True)

    @linen.compact
    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: jax.Array | None = None) -> jax.Array:
        """Batch-norm of ``x``, as Flax's: by the batch's statistics, or by the running ones."""
        by_running = linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        if by_running or self.is_initializing() or not self.force_float32_reductions or not normalises(x, self.axis):
            return activate(_flax_batch_norm(self, x, use_running_average, mask=mask), self.activation)
        channels = (x.shape[self.axis],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", self.scale_init, channels, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, channels, self.param_dtype) if self.use_bias else None
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        y, mean, var = normalise(self, jnp.asarray(x, jnp.promote_types(x.dtype, dtype)), scale, bias, mask)
        statistics = jnp.promote_types(x.dtype if self.dtype is None else self.dtype, jnp.float32)
        for running, new in ((running_mean, mean), (running_var, var)):
            running.value = step(self.momentum, running.value, new.astype(statistics))
        return y.astype(dtype)


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
    module: linen.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    *,
    impl: JaxImpl = "auto",
) -> jax.Array:
    """`flax.linen.dot_product_attention` with pyreg's dropout: an ``attention_fn`` of linen's attention modules.

    Parameters
    ----------
    query : jax.Array, shape (..., queries, heads, channels)
    key : jax.Array, shape (..., keys, heads, channels)
    value : jax.Array, shape (..., keys, heads, value_channels)
    bias, mask, broadcast_dropout, dropout_rng, ...
        As for Flax's function.
    impl : {"auto", "philox"}
        As for :class:`Dropout`.

    Returns
    -------
    jax.Array, shape (..., queries, heads, value_channels)
        For the same key, Flax's bits.

    Examples
    --------
    >>> import pyreg.linen
    >>> from flax import linen
    >>> layer = linen.MultiHeadDotProductAttention(
    ...     2, dropout_rate=0.1, deterministic=False, attention_fn=pyreg.linen.dot_product_attention
    ... )
    """
    given: dict[str, Any] = dict(locals())  # Flax's arguments, by name
    del given["impl"]
    einsums = (qk_attn_weights_einsum, attn_weights_value_einsum)
    refused = any(einsums) and (precision or not all(einsums))  # by Flax
    if not draws_weights(given) or einsum_dot_general is not None or refused:
        return linen.dot_product_attention(**given)
    einsum = functools.partial(jnp.einsum, precision=precision)

    def weighted_sum(dims: str, weights: jax.Array, value: jax.Array) -> jax.Array:
        return (attn_weights_value_einsum or einsum)(dims, drop_weights(weights, value.dtype, given, impl), value)

    own = {"qk_attn_weights_einsum": qk_attn_weights_einsum or einsum, "attn_weights_value_einsum": weighted_sum}
    return linen.dot_product_attention(**given | own | {"deterministic": True, "precision": None})
