"""Keras's layers, made with pyreg's computation."""

from typing import Any

import keras

from pyreg._arguments import JaxImpl
from pyreg.keras._convert import convert


def Dropout(
    rate: float, noise_shape: Any = None, seed: int | None = None, *, impl: JaxImpl = "auto", **options: Any
) -> keras.layers.Dropout:
    """A `keras.layers.Dropout` that pyreg computes: on jax, for the same seed the same values and gradients.

    Parameters
    ----------
    rate, noise_shape, seed, **options
        As for Keras's class.
    impl : {"auto", "philox"}
        As for :func:`convert`.

    Returns
    -------
    keras.layers.Dropout

    Raises
    ------
    ValueError
        If ``impl`` is out of range; else as Keras's class.

    Examples
    --------
    >>> import keras, numpy as np, pyreg.keras
    >>> x = np.ones((2, 3), np.float32)
    >>> ours, theirs = pyreg.keras.Dropout(0.5, seed=7), keras.layers.Dropout(0.5, seed=7)
    >>> bool((ours(x, training=True) == theirs(x, training=True)).all())
    True
    """
    return convert(keras.layers.Dropout(rate, noise_shape, seed, **options), impl=impl)


def SpatialDropout1D(rate: float, *, impl: JaxImpl = "auto", **options: Any) -> keras.layers.SpatialDropout1D:
    """A `keras.layers.SpatialDropout1D`, which drops whole channels of (samples, length, channels), by pyreg.

    Parameters
    ----------
    rate, **options
        As for Keras's class.
    impl : {"auto", "philox"}
        As for :func:`convert`.

    Returns
    -------
    keras.layers.SpatialDropout1D

    Raises
    ------
    ValueError
        If ``impl`` is out of range; else as Keras's class.

    Examples
    --------
    >>> import numpy as np, pyreg.keras
    >>> y = pyreg.keras.SpatialDropout1D(0.5)(np.ones((2, 5, 3), np.float32), training=True)
    >>> bool((y == y[:, :1]).all())
    True
    """
    return convert(keras.layers.SpatialDropout1D(rate, **options), impl=impl)


def SpatialDropout2D(rate: float, *, impl: JaxImpl = "auto", **options: Any) -> keras.layers.SpatialDropout2D:
    """A `keras.layers.SpatialDropout2D`, which drops whole channels of images, by pyreg.

    Parameters
    ----------
    rate, impl, **options
        As for :func:`SpatialDropout1D`, and ``data_format`` as for Keras's class.

    Returns
    -------
    keras.layers.SpatialDropout2D

    Raises
    ------
    ValueError
        If ``impl`` is out of range; else as Keras's class.

    Examples
    --------
    >>> import numpy as np, pyreg.keras
    >>> y = pyreg.keras.SpatialDropout2D(0.5)(np.ones((2, 5, 5, 3), np.float32), training=True)
    >>> bool((y == y[:, :1, :1]).all())
    True
    """
    return convert(keras.layers.SpatialDropout2D(rate, **options), impl=impl)


def SpatialDropout3D(rate: float, *, impl: JaxImpl = "auto", **options: Any) -> keras.layers.SpatialDropout3D:
    """A `keras.layers.SpatialDropout3D`, which drops whole channels of volumes, by pyreg.

    Parameters
    ----------
    rate, impl, **options
        As for :func:`SpatialDropout1D`, and ``data_format`` as for Keras's class.

    Returns
    -------
    keras.layers.SpatialDropout3D

    Raises
    ------
    ValueError
        If ``impl`` is out of range; else as Keras's class.

    Examples
    --------
    >>> import numpy as np, pyreg.keras
    >>> y = pyreg.keras.SpatialDropout3D(0.5)(np.ones((2, 4, 5, 5, 3), np.float32), training=True)
    >>> bool((y == y[:, :1, :1, :1]).all())
    True
    """
    return convert(keras.layers.SpatialDropout3D(rate, **options), impl=impl)


def BatchNormalization(axis: int = -1, **options: Any) -> keras.layers.BatchNormalization:
    """A `keras.layers.BatchNormalization` whose mean and variance are right at any ratio of mean to deviation.

    Parameters
    ----------
    axis, **options
        As for Keras's class.  ``synchronized=True``, which Keras has on TensorFlow alone, is an error of Keras's: on
        jax, the statistics of an array that is sharded are those of the whole array.  With ``renorm=True`` Keras's own
        code computes, and on the backend torch also with a mask.

    Returns
    -------
    keras.layers.BatchNormalization

    Raises
    ------
    ValueError
        As Keras's class.

    Examples
    --------
    >>> import numpy as np, pyreg.keras
    >>> layer = pyreg.keras.BatchNormalization(momentum=0.9)
    >>> y = layer(np.array([[1.0, 10.0], [3.0, 30.0]], np.float32), training=True)
    >>> np.asarray(layer.moving_mean)
    array([0.2, 2. ], dtype=float32)
    """
    return convert(keras.layers.BatchNormalization(axis, **options))
