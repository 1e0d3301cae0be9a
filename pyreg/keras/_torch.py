"""What layers of Keras call on its backend torch."""

from typing import Any

import keras
import torch

from pyreg._arguments import JaxImpl
from pyreg.torch import _batch_norm, dropout


def drop(layer: Any, inputs: Any, training: Any = False, *, impl: JaxImpl) -> Any:
    """``keras.layers.Dropout.call``.  With a seed or a mask of its own shape it is Keras's."""
    del impl  # there is one mask
    ours = training and 0 < layer.rate < 1 and layer.noise_shape is None
    if not ours or layer.seed_generator.get_config()["seed"] is not None:
        return type(layer).call(layer, inputs, training=training)
    return dropout(inputs, float(layer.rate))


def normalise(layer: Any, inputs: Any, training: Any = None, mask: Any = None, *, impl: JaxImpl) -> Any:
    """``keras.layers.BatchNormalization.call``."""
    del impl  # of dropout
    if training and layer.trainable and not layer.renorm and mask is None and inputs.dim() > 1:
        x = inputs.to(torch.promote_types(inputs.dtype, getattr(torch, layer.compute_dtype))).movedim(layer.axis, 1)
        gamma = keras.ops.convert_to_tensor(layer.gamma) if layer.scale else None
        beta = keras.ops.convert_to_tensor(layer.beta) if layer.center else None
        if _batch_norm.takes(x, None, None, gamma, beta, layer.epsilon):
            y, *statistics = _batch_norm.with_statistics(x, gamma, beta, layer.epsilon)
            for moving, value in zip((layer.moving_mean, layer.moving_variance), statistics, strict=True):
                old = keras.ops.cast(moving, keras.backend.standardize_dtype(value.dtype))
                moving.assign(old * layer.momentum + value * (1.0 - layer.momentum))
            return keras.ops.cast(y.movedim(1, layer.axis), layer.compute_dtype)
    return type(layer).call(layer, inputs, training=training, mask=mask)
