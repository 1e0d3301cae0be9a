"""Layers of Flax's nnx whose numbers pyreg's kernels compute."""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pyreg import _arguments as arg
from pyreg._arguments import Activation, JaxImpl
from pyreg._flax import activate, draws, keep_whole, normalise, normalises, step
from pyreg.jax import dropout

Streams = nnx.Rngs | nnx.RngStream | jax.Array


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout`: for the same stream the same values and gradients, bit for bit.

    Parameters
    ----------
    rate, broadcast_dims, deterministic, rng_collection, rngs
        As for Flax's class.  A rate outside [0, 1] is an error here.
    impl : {"auto", "philox"}
        ``"auto"``: Flax's mask.  ``"philox"``: another one for the same key, several times faster; see
        :func:`pyreg.jax.dropout`.

    Raises
    ------
    ValueError
        If ``impl`` is out of range; when the layer is called, also if ``rate`` is.

    Examples
    --------
    >>> import jax, pyreg.nnx
    >>> from flax import nnx
    >>> layer = pyreg.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    >>> y = layer(jax.numpy.ones((2, 3)))
    >>> bool((y == nnx.Dropout(0.5, rngs=nnx.Rngs(0))(jax.numpy.ones((2, 3)))).all())
    True
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        impl: JaxImpl = "auto",
    ) -> None:
        arg.check_jax_impl(impl)
        super().__init__(
            rate,
            broadcast_dims=broadcast_dims,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
        )
        self.impl = impl

    def __call__(self, inputs: Any, *, deterministic: bool | None = None, rngs: Streams | None = None) -> jax.Array:
        """Dropout of ``inputs``, as Flax's: what is given here goes before what the constructor was given."""
        return self._drop(inputs, self.broadcast_dims, deterministic, rngs)

    def _drop(self, inputs: Any, dims: Sequence[int], deterministic: bool | None, rngs: Streams | None) -> jax.Array:
        """Dropout with a mask that is shared along `dims`."""
        off = self.deterministic if deterministic is None else deterministic
        stream = self.rngs if rngs is None else rngs
        if off is None or off or not isinstance(stream, Streams) or not draws(inputs, self.rate, self.impl):
            if dims is self.broadcast_dims:
                return super().__call__(inputs, deterministic=deterministic, rngs=rngs)
            layer: Any = SimpleNamespace(**vars(self) | {"broadcast_dims": dims})  # a layer takes long to make
            return nnx.Dropout.__call__(layer, inputs, deterministic=deterministic, rngs=rngs)
        if isinstance(stream, nnx.Rngs):
            stream = stream[self.rng_collection]
        key = stream() if isinstance(stream, nnx.RngStream) else stream
        return dropout(inputs, self.rate, key=key, broadcast_dims=dims, impl=self.impl)


class _SharedDropout(Dropout):
    """Which dims share a mask follows from the number of dims of an input."""

    def __init__(
        self,
        rate: float,
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        impl: JaxImpl = "auto",
    ) -> None:
        super().__init__(rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs, impl=impl)

    def __call__(self, inputs: Any, *, deterministic: bool | None = None, rngs: Streams | None = None) -> jax.Array:
        """As :class:`Dropout`'s."""
        return self._drop(inputs, self._shared_dims(jnp.ndim(inputs)), deterministic, rngs)

    @abstractmethod
    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        """Dims of an input along which the mask is shared; raises if there can be no such input."""


class _ChannelDropout(_SharedDropout):
    _spatial: int

    def __init__(self, rate: float, *, axis: int = -1, **options: Any) -> None:
        super().__init__(rate, **options)
        self.axis = axis
        arg.as_channel_axis(axis, self._spatial)

    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        return arg.dims_of_channel(ndim, self.axis, self._spatial)


class Dropout1d(_ChannelDropout):
    """Dropout of whole channels of sequences: the numbers of `flax.nnx.Dropout` with ``broadcast_dims=(1,)``.

    Inputs have shape (N, L, C), or (L, C) without a batch; any other number of dims is a ValueError.

    Parameters
    ----------
    rate, deterministic, rng_collection, rngs, impl
        As for :class:`Dropout`.
    axis : int
        The dim that counts the channels in a batch: 1 for PyTorch's (N, C, L) and (C, L).

    Raises
    ------
    ValueError
        As :class:`Dropout`, or if ``axis`` is no dim of an input, or an input has another number of dims.

    See Also
    --------
    pyreg.Dropout1d : the same for NumPy.

    Examples
    --------
    >>> import jax, pyreg.nnx
    >>> from flax import nnx
    >>> pyreg.nnx.Dropout1d(0.5, rngs=nnx.Rngs(0))(jax.numpy.ones((3, 4)))
    Array([[2., 0., 2., 0.],
           [2., 0., 2., 0.],
           [2., 0., 2., 0.]], dtype=float32)
    """

    _spatial = 1


class Dropout2d(_ChannelDropout):
    """Dropout of whole channels of images: the numbers of `flax.nnx.Dropout` with ``broadcast_dims=(1, 2)``.

    Inputs have shape (N, H, W, C), or (H, W, C) without a batch; the rest is as in :class:`Dropout1d`.

    Parameters
    ----------
    rate, axis, ...
        As for :class:`Dropout1d`.

    Raises
    ------
    ValueError
        As :class:`Dropout`, or if ``axis`` is no dim of an input, or an input has another number of dims.

    Examples
    --------
    >>> import jax, pyreg.nnx
    >>> from flax import nnx
    >>> x = jax.numpy.ones((8, 4, 4, 16))
    >>> y = pyreg.nnx.Dropout2d(0.5, rngs=nnx.Rngs(0))(x)
    >>> bool((y == nnx.Dropout(0.5, broadcast_dims=(1, 2), rngs=nnx.Rngs(0))(x)).all())
    True
    """

    _spatial = 2


class Dropout3d(_ChannelDropout):
    """Dropout of whole channels of volumes: the numbers of `flax.nnx.Dropout` with ``broadcast_dims=(1, 2, 3)``.

    Inputs have shape (N, D, H, W, C), or (D, H, W, C) without a batch; the rest is as in :class:`Dropout1d`.

    Parameters
    ----------
    rate, axis, ...
        As for :class:`Dropout1d`.

    Raises
    ------
    ValueError
        As :class:`Dropout`, or if ``axis`` is no dim of an input, or an input has another number of dims.

    Examples
    --------
    >>> import jax, pyreg.nnx
    >>> from flax import nnx
    >>> x = jax.numpy.ones((8, 2, 4, 4, 16))
    >>> y = pyreg.nnx.Dropout3d(0.5, rngs=nnx.Rngs(0))(x)
    >>> bool((y == nnx.Dropout(0.5, broadcast_dims=(1, 2, 3), rngs=nnx.Rngs(0))(x)).all())
    True
    """

    _spatial = 3


class _WholeDropout(_SharedDropout):
    def __init__(self, rate: float, *, scale_by_keep: bool = True, **options: Any) -> None:
        super().__init__(rate, **options)
        self.scale_by_keep = scale_by_keep

    def __call__(self, inputs: Any, **options: Any) -> jax.Array:
        """As :class:`Dropout`'s."""
        if self.scale_by_keep:
            return super().__call__(inputs, **options)
        drop = functools.partial(super().__call__, **options)
        return keep_whole(drop, inputs, self._shared_dims(jnp.ndim(inputs)))


class DropPath(_WholeDropout):
    """Stochastic depth: drops whole samples, (N, ...), of what a residual branch adds; timm's DropPath.

    Parameters
    ----------
    rate, deterministic, rng_collection, rngs, impl
        As for :class:`Dropout`.
    scale_by_keep : bool
        If false, kept samples are not scaled.

    Raises
    ------
    ValueError
        As :class:`Dropout`, or if an input has no dims.

    See Also
    --------
    pyreg.DropPath : the same for NumPy.

    Examples
    --------
    >>> import jax, pyreg.nnx
    >>> from flax import nnx
    >>> x, branch = jax.numpy.zeros((4, 2)), jax.numpy.ones((4, 2))
    >>> x + pyreg.nnx.DropPath(0.5, rngs=nnx.Rngs(0))(branch)
    Array([[2., 2.],
           [0., 0.],
           [2., 2.],
           [0., 0.]], dtype=float32)
    """

    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        return arg.dims_of_sample(ndim)


class WordDropout(_WholeDropout):
    """Drops whole words of embedded text, (..., length, features): all features of a position, or none.

    Parameters
    ----------
    rate, deterministic, rng_collection, rngs, impl
        As for :class:`Dropout`.
    scale_by_keep : bool
        If false, kept words are not scaled.

    Raises
    ------
    ValueError
        As :class:`Dropout`, or if an input has no dims.

    See Also
    --------
    pyreg.WordDropout : the same for NumPy, with references.

    Examples
    --------
    >>> import jax, pyreg.nnx
    >>> from flax import nnx
    >>> pyreg.nnx.WordDropout(0.5, rngs=nnx.Rngs(0))(jax.numpy.ones((4, 2)))
    Array([[2., 2.],
           [0., 0.],
           [2., 2.],
           [0., 0.]], dtype=float32)
    """

    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        return arg.dims_of_word(ndim)


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, with mean and variance that are right at any ratio of mean to standard deviation.

    Parameters
    ----------
    num_features, use_running_average, axis, momentum, epsilon, dtype, ...
        As for Flax's class; ``use_fast_variance`` makes no difference.  Devices of ``axis_name`` are pooled by their
        number of elements, also where a mask makes these differ.
    activation : {None, "relu"}
        Applied to the result, in the same sweep.

    Raises
    ------
    ValueError
        If ``activation`` is out of range, or an input has another number of channels.

    Examples
    --------
    >>> import jax, pyreg.nnx
    >>> from flax import nnx
    >>> layer = pyreg.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
    >>> y = layer(jax.numpy.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> layer.mean[...], layer.var[...]
    (Array([0.2, 2. ], dtype=float32), Array([ 1. , 10.9], dtype=float32))
    """

    def __init__(self, num_features: int, *, activation: Activation | None = None, **options: Any) -> None:
        arg.as_relu(activation)
        super().__init__(num_features, **options)
        self.activation = activation

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: jax.Array | None = None) -> jax.Array:
        """Batch-norm of ``x``, as Flax's: by the batch's statistics, or by the running ones."""
        by_running = self.use_running_average if use_running_average is None else use_running_average
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        a, _, _, scale, bias = self.promote_dtype((x, self.mean[...], self.var[...], scale, bias), dtype=self.dtype)
        if by_running is None or by_running or not normalises(a, self.axis):
            return activate(super().__call__(x, use_running_average, mask=mask), self.activation)
        y, mean, var = normalise(self, a, scale, bias, mask)
        for running, new in ((self.mean, mean), (self.var, var)):
            value = step(self.momentum, running[...], new)
            running[...] = jax.lax.stop_gradient(value) if running._can_update else value  # as Flax: not into a ref
        return y
