"""What layers of Keras call on its backend jax."""

from typing import Any

import jax.numpy as jnp
import keras

from pyreg._arguments import JaxImpl
from pyreg._flax import draws, normalises
from pyreg.jax import batch_norm, dropout


def drop(layer: Any, inputs: Any, training: Any = False, *, impl: JaxImpl) -> Any:
    """``keras.layers.Dropout.call``."""
    return _drop(layer, inputs, training, impl, _shared_dims(inputs.shape, layer.noise_shape))


def drop_channels(layer: Any, inputs: Any, training: Any = False, *, impl: JaxImpl) -> Any:
    """``call`` of ``keras.layers.SpatialDropout1D/2D/3D``."""
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    dims = range(2, inputs.ndim) if first else range(1, inputs.ndim - 1)
    return _drop(layer, inputs, training, impl, tuple(dims))


def _drop(layer: Any, inputs: Any, training: Any, impl: JaxImpl, dims: tuple[int, ...] | None) -> Any:
    if dims is None or not (training and layer.rate > 0) or not draws(inputs, layer.rate, impl, "Keras"):
        return type(layer).call(layer, inputs, training=training)
    return dropout(inputs, layer.rate, key=layer.seed_generator.next(), broadcast_dims=dims, impl=impl)


def _shared_dims(shape: tuple[int, ...], noise_shape: tuple[int | None, ...] | None) -> tuple[int, ...] | None:
    """The dims that share a mask of this shape; None if it is no mask of that."""
    if noise_shape is None:
        return ()
    if len(noise_shape) != len(shape) or any(m not in (None, 1, n) for m, n in zip(noise_shape, shape, strict=True)):
        return None
    return tuple(d for d, m in enumerate(noise_shape) if m == 1)


def normalise(layer: Any, inputs: Any, training: Any = None, mask: Any = None, *, impl: JaxImpl) -> Any:
    """``keras.layers.BatchNormalization.call``."""
    del impl  # of dropout
    by_batch = training and layer.trainable and not layer.renorm
    if not by_batch or not normalises(inputs, layer.axis) or (mask is not None and mask.ndim != inputs.ndim - 1):
        return type(layer).call(layer, inputs, training=training, mask=mask)
    some: Any = True
    if mask is not None:
        mask = jnp.expand_dims(jnp.asarray(mask, bool), -1)
        others = tuple(d for d in range(inputs.ndim) if d != layer.axis % inputs.ndim)
        some = mask.any(others, keepdims=True)
        mask = mask | ~some  # of a channel without any element Keras takes mean and variance to be 0
        some = some.reshape(-1)
    y, *statistics = batch_norm(
        inputs.astype(jnp.promote_types(inputs.dtype, layer.compute_dtype)),
        keras.ops.convert_to_tensor(layer.gamma) if layer.scale else None,
        keras.ops.convert_to_tensor(layer.beta) if layer.center else None,
        axis=layer.axis,
        epsilon=layer.epsilon,
        mask=mask,
    )
    for moving, value in zip((layer.moving_mean, layer.moving_variance), statistics, strict=True):
        old = keras.ops.cast(moving, value.dtype)
        moving.assign(old * layer.momentum + jnp.where(some, value, 0) * (1.0 - layer.momentum))
    return y.astype(layer.compute_dtype)
