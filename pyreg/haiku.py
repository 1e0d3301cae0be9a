"""Drop-ins for Haiku: the same arguments, parameters, state and numbers, computed by pyreg's kernels.

Where there is nothing for a kernel to do, or something to complain about, Haiku's own code answers.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from pyreg._arguments import JaxImpl, check_jax_impl, is_supported
from pyreg._extras import needs

with needs("haiku", "jax", "haiku"):
    import haiku as hk
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pyreg import _flax
    from pyreg.jax import batch_norm
    from pyreg.jax import dropout as jax_dropout

__all__ = ["BatchNorm", "dropout"]


def __dir__() -> list[str]:
    return __all__


# Without Haiku's wrapper, which counts a call by super() as another one: for interceptors.
_haiku_batch_norm = inspect.unwrap(hk.BatchNorm.__call__)


def dropout(
    rng: jax.Array,
    rate: Any,
    x: jax.Array,
    broadcast_dims: Sequence[int] = (),
    *,
    impl: JaxImpl = "auto",
) -> jax.Array:
    """`haiku.dropout`: for the same key the same values and gradients, bit for bit.

    Parameters
    ----------
    rng : jax.Array
        A key, such as `haiku.next_rng_key` returns.
    rate : float or scalar array
        Probability of dropping an element, in [0, 1).  A traced value, of a schedule, is not checked; it gives Haiku's
        mask and, because Haiku then divides by ``1 - rate``, values within one unit in the last place of Haiku's.
    x : jax.Array
        Of any shape and dtype that Haiku takes; float32, float64, float16 and bfloat16 go to pyreg's kernel.
    broadcast_dims : sequence of int
        Dims along which the mask is shared.
    impl : {"auto", "philox"}
        ``"auto"``: Haiku's mask.  ``"philox"``: another one for the same key, several times faster; see
        :func:`pyreg.jax.dropout`.

    Returns
    -------
    jax.Array
        Shape and dtype of ``x``.  What is dropped is +0, where Haiku may have -0.

    Raises
    ------
    ValueError
        If ``rate``, ``impl`` or ``broadcast_dims`` is out of range.

    Examples
    --------
    >>> import haiku as hk, jax, pyreg.haiku
    >>> key, x = jax.random.key(0), jax.numpy.ones((2, 3))
    >>> bool((pyreg.haiku.dropout(key, 0.5, x) == hk.dropout(key, 0.5, x)).all())
    True
    """
    check_jax_impl(impl)
    if isinstance(rate, jax.core.Tracer):
        ours = _flax.draws_traced(x, rate, impl)
    else:
        known = np.asarray(rate) if isinstance(rate, jax.Array) else rate  # inside jit JAX's comparisons are traced
        ours = not (known < 0 or known >= 1) and _flax.draws(x, rate, impl, "Haiku")
    if not ours:
        return hk.dropout(rng, rate, x, broadcast_dims)
    return jax_dropout(x, rate, key=rng, broadcast_dims=tuple(broadcast_dims), impl=impl)


class BatchNorm(hk.BatchNorm):
    """`haiku.BatchNorm`, with mean and variance that are right at any ratio of mean to standard deviation.

    Parameters
    ----------
    create_scale, create_offset, decay_rate, eps, scale_init, offset_init, axis, cross_replica_axis, ...
        As for Haiku's class.  Where ``axis`` leaves other than one dim, Haiku's own code computes.

    Raises
    ------
    ValueError
        As Haiku's class.

    Examples
    --------
    >>> import haiku as hk, jax, pyreg.haiku
    >>> f = hk.transform_with_state(lambda x: pyreg.haiku.BatchNorm(True, True, 0.9)(x, is_training=True))
    >>> x = jax.numpy.array([[1.0, 10.0], [3.0, 30.0]])
    >>> params, state = f.init(None, x)
    >>> y, state = f.apply(params, state, None, x)
    >>> sorted(state)
    ['batch_norm/~/mean_ema', 'batch_norm/~/var_ema']
    """

    def __call__(
        self,
        inputs: jax.Array,
        is_training: bool,
        test_local_stats: bool = False,
        scale: jax.Array | None = None,
        offset: jax.Array | None = None,
    ) -> jax.Array:
        """Batch-norm of ``inputs``, as Haiku's: by the batch's statistics, or by the averages of earlier batches."""
        channel = _channel(self, inputs)
        given_twice = (self.create_scale and scale is not None) or (self.create_offset and offset is not None)
        if not (is_training or test_local_stats) or given_twice or channel is None:
            return _haiku_batch_norm(self, inputs, is_training, test_local_stats, scale, offset)
        shape = tuple(n if d == channel else 1 for d, n in enumerate(inputs.shape))
        own = scale is None and offset is None
        if self.create_scale:
            scale = hk.get_parameter("scale", shape, inputs.dtype, self.scale_init)
        if self.create_offset:
            offset = hk.get_parameter("offset", shape, inputs.dtype, self.offset_init)
        given = [value for value in (scale, offset) if value is not None]
        y, *statistics = batch_norm(
            inputs.astype(jnp.result_type(inputs, *given)),
            scale.reshape(-1) if own and scale is not None else None,
            offset.reshape(-1) if own and offset is not None else None,
            axis=channel,
            epsilon=self.eps,
            axis_name=self.cross_replica_axis,
            axis_index_groups=self.cross_replica_axis_index_groups,
        )
        if not own:  # they may have the shape of the inputs
            y = y * (1 if scale is None else scale) + (0 if offset is None else offset)
        if is_training:
            for average, value in zip((self.mean_ema, self.var_ema), statistics, strict=True):
                average(value.reshape(shape).astype(inputs.dtype))
        return y


def _channel(layer: hk.BatchNorm, inputs: jax.Array) -> int | None:
    """The one dim whose statistics are wanted, if there is a kernel for that.  (Haiku counts calls of methods.)"""
    if not is_supported(inputs) or inputs.size == 0:
        return None
    dims = set(range(inputs.ndim))
    if layer.axis is not None:
        left = dims - set(layer.axis)
        return left.pop() if len(left) == 1 and dims.issuperset(layer.axis) else None
    channel = layer.channel_index + inputs.ndim * (layer.channel_index < 0)
    return channel if channel in dims else None
