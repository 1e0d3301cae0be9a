"""What the drop-ins for Flax, and those for its relatives, share: the inputs that pyreg takes, and calls of its ops."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pyreg._arguments import Activation, JaxImpl, as_rate, as_relu, is_supported, mask_shape
from pyreg.jax import batch_norm, dropout
from pyreg.jax._primitive import flag

Array = jax.Array


def draws(x: Any, rate: Any, impl: JaxImpl, whose: str = "Flax") -> bool:
    """Whether there is a mask to draw, and pyreg.jax.dropout means by these what Flax's Dropout does.

    It does not where Flax's keep probability would decide the dtype of the draw or of the result, or that is weak;
    philox is another mask, anyhow.  whose: the framework that does not check the rate.
    """
    scalar = isinstance(rate, (np.ndarray, jax.Array)) and rate.ndim == 0 and not isinstance(rate, jax.core.Tracer)
    if not (isinstance(rate, numbers.Real) or scalar):
        return False
    if as_rate_for(whose, rate) in (0, 1) or not (hasattr(x, "dtype") and is_supported(x)):
        return False
    return impl == "philox" or (
        (isinstance(rate, (int, float)) or (rate.dtype == np.float32 and not flag("jax_enable_x64")))
        and jnp.result_type(x, rate) == x.dtype
        and not getattr(x, "weak_type", False)
    )


def draws_traced(x: Any, rate: Any, impl: JaxImpl) -> bool:
    """The same of a rate that is known when the program runs; a framework that divides by 1 - rate, and so rounds once,
    then has values within one unit in the last place."""
    drawn = impl == "philox" or rate.dtype == jnp.result_type(float)  # whose dtype jax.random.bernoulli draws in
    return drawn and draws(x, 0.5, impl) and rate.ndim == 0 and bool(jnp.result_type(x, rate) == x.dtype)


def as_rate_for(whose: str, rate: Any) -> float:
    """The rate of a layer that a framework does not check."""
    try:
        return as_rate(rate)
    except ValueError as error:
        raise ValueError(f"{error} ({whose} does not check it, pyreg does)") from None


def draws_weights(given: dict[str, Any]) -> bool:
    """Whether attention with these arguments, by Flax's names, has a mask to draw."""
    off = given["deterministic"] or given["dropout_rng"] is None
    return not off and as_rate_for("Flax", given["dropout_rate"]) not in (0, 1)


def drop_weights(weights: Array, dtype: Any, given: dict[str, Any], impl: JaxImpl) -> Array:
    """Dropout of attention weights (..., heads, queries, keys), for queries and values of this dtype.

    With `broadcast_dropout` all but the last two dims share a mask.  Flax multiplies by 1 / keep, rounded to `dtype`;
    bfloat16's shows the rounding.
    """
    rate, key, broadcast = given["dropout_rate"], given["dropout_rng"], given["broadcast_dropout"]
    if broadcast or dtype == jnp.bfloat16 or dtype != weights.dtype:
        shape = (1,) * (weights.ndim - 2) + weights.shape[-2:] if broadcast else weights.shape
        return weights * dropout(jnp.ones(shape, dtype), rate, key=key, impl=impl)
    return dropout(weights, rate, key=key, impl=impl)


def activate(y: Array, activation: Activation | None) -> Array:
    return jax.nn.relu(y) if as_relu(activation) else y


def keep_whole(drop: Callable[[Array], Array], inputs: Any, dims: Sequence[int]) -> Array:
    """Dropout without a scale: the inputs where a dropout with a mask that is shared along `dims` keeps ones."""
    return jnp.where(drop(jnp.ones(mask_shape(jnp.shape(inputs), tuple(dims)))) != 0, inputs, 0)


def normalises(x: Any, axis: Any) -> bool:
    """Whether pyreg.jax.batch_norm takes this input."""
    return isinstance(axis, int) and is_supported(x) and x.size != 0


def normalise(layer: Any, x: Any, scale: Any, bias: Any, mask: Any) -> tuple[Array, Array, Array]:
    """Batch-norm of x by its own statistics, with what a layer of either family is set to."""
    return batch_norm(
        x,
        scale,
        bias,
        axis=layer.axis,
        epsilon=layer.epsilon,
        mask=None if mask is None else jnp.asarray(mask, bool),
        activation=getattr(layer, "activation", None),  # which Flax's own layers have not
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
    )


def step(momentum: float, old: Array, new: Array) -> Array:
    """A running statistic after a batch."""
    return momentum * old + (1 - momentum) * new
