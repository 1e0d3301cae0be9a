"""Drop-ins for Flax's nnx: the same arguments, state, random streams and numbers, computed by pyreg's kernels.

Each class is a subclass of Flax's that changes the computation only.  Where there is nothing for a kernel to do, or
something to complain about, Flax's own code answers.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import attention, dtypes

from pyreg import _ops, channelwise
from pyreg._flax import Activation, Impl, activate, check_rate, draws, drop_weights, normalises, step
from pyreg.jax import batch_norm, dropout
from pyreg.jax._dropout import check_impl

__all__ = [
    "BatchNorm",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "WordDropout",
    "convert",
    "dot_product_attention",
    "revert",
]

Model = TypeVar("Model")


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout`: for the same stream the same values and gradients, bit for bit.

    Parameters
    ----------
    rate, broadcast_dims, deterministic, rng_collection, rngs
        As for Flax's class.  A rate outside [0, 1] is an error here.
    impl : {"auto", "philox"}
        ``"auto"``: Flax's mask.  ``"philox"``: another one for the same key, several times faster; see
        :func:`pyreg.jax.dropout`.

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
        impl: Impl = "auto",
    ) -> None:
        check_impl(impl)
        super().__init__(
            rate,
            broadcast_dims=broadcast_dims,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
        )
        self.impl = impl

    def __call__(
        self,
        inputs: Any,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Dropout of ``inputs``, as Flax's: what is given here goes before what the constructor was given."""
        off = self.deterministic if deterministic is None else deterministic
        stream = self.rngs if rngs is None else rngs
        if off is None or off or not isinstance(stream, _SOURCES) or not draws(inputs, self.rate, self.impl):
            return super().__call__(inputs, deterministic=deterministic, rngs=rngs)
        if isinstance(stream, nnx.Rngs):
            stream = stream[self.rng_collection]
        key = stream() if isinstance(stream, nnx.RngStream) else stream
        return dropout(inputs, self.rate, key=key, broadcast_dims=self.broadcast_dims, impl=self.impl)


_SOURCES = (nnx.Rngs, nnx.RngStream, jax.Array)


class _SharedDropout(Dropout):
    """Which dims share a mask follows from the number of dims of an input."""

    def __init__(
        self,
        rate: float,
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs, impl=impl)

    def __call__(
        self,
        inputs: Any,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """As :class:`Dropout`'s."""
        layer = Dropout(
            self.rate,
            broadcast_dims=self._shared_dims(jnp.ndim(inputs)),
            deterministic=self.deterministic,
            rng_collection=self.rng_collection,
            impl=self.impl,
        )
        return layer(inputs, deterministic=deterministic, rngs=self.rngs if rngs is None else rngs)

    @abstractmethod
    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        """Dims of an input along which the mask is shared; raises if there can be no such input."""


class _ChannelDropout(_SharedDropout):
    _spatial: int

    def __init__(self, rate: float, *, axis: int = -1, **options: Any) -> None:
        super().__init__(rate, **options)
        self.axis = axis
        channelwise.channel_axis(axis, self._spatial)

    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        return channelwise.dims_of_channel(ndim, channelwise.channel_axis(self.axis, self._spatial), self._spatial)


class Dropout1d(_ChannelDropout):
    """Dropout of whole channels of sequences: the numbers of `flax.nnx.Dropout` with ``broadcast_dims=(1,)``.

    Inputs have shape (N, L, C), or (L, C) without a batch; any other number of dims is a ValueError.

    Parameters
    ----------
    rate, deterministic, rng_collection, rngs, impl
        As for :class:`Dropout`.
    axis : int
        The dim that counts the channels in a batch: 1 for PyTorch's (N, C, L) and (C, L).

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
        shape = _ops._mask_shape(jnp.shape(inputs), self._shared_dims(jnp.ndim(inputs)))
        return jnp.where(super().__call__(jnp.ones(shape), **options) != 0, inputs, 0)


class DropPath(_WholeDropout):
    """Stochastic depth: drops whole samples, (N, ...), of what a residual branch adds; timm's DropPath.

    Parameters
    ----------
    rate, deterministic, rng_collection, rngs, impl
        As for :class:`Dropout`.
    scale_by_keep : bool
        If false, kept samples are not scaled.

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
        return channelwise.dims_of_sample(ndim)


class WordDropout(_WholeDropout):
    """Drops whole words of embedded text, (..., length, features): all features of a position, or none.

    Parameters
    ----------
    rate, deterministic, rng_collection, rngs, impl
        As for :class:`Dropout`.
    scale_by_keep : bool
        If false, kept words are not scaled.

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
        return channelwise.dims_of_word(ndim)


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, with mean and variance that are right at any ratio of mean to standard deviation.

    Parameters
    ----------
    num_features, use_running_average, axis, momentum, epsilon, dtype, ...
        As for Flax's class; ``use_fast_variance`` makes no difference.  Devices of ``axis_name`` are pooled by their
        number of elements, also where a mask makes these differ.
    activation : {None, "relu"}
        Applied to the result, in the same sweep.

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
        _ops._check_activation(activation)
        super().__init__(num_features, **options)
        self.activation = activation

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: jax.Array | None = None) -> jax.Array:
        """Batch-norm of ``x``, as Flax's: by the batch's statistics, or by the running ones."""
        by_running = self.use_running_average if use_running_average is None else use_running_average
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        a, _, _, scale, bias = self.promote_dtype((x, self.mean[...], self.var[...], scale, bias), dtype=self.dtype)
        if by_running is None or by_running or not normalises(a, self.axis):
            return activate(super().__call__(x, use_running_average, mask=mask), self.activation)
        y, mean, var = batch_norm(
            a,
            scale,
            bias,
            axis=self.axis,
            epsilon=self.epsilon,
            mask=None if mask is None else jnp.asarray(mask, bool),
            activation=self.activation,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )
        for running, new in ((self.mean, mean), (self.var, var)):
            value = step(self.momentum, running[...], new)
            running[...] = jax.lax.stop_gradient(value) if running._can_update else value  # as Flax: not into a ref
        return y


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
    impl: Impl = "auto",
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

    Examples
    --------
    >>> import pyreg.nnx
    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...     2, 8, dropout_rate=0.1, decode=False, attention_fn=pyreg.nnx.dot_product_attention, rngs=nnx.Rngs(0)
    ... )
    """
    rest: dict[str, Any] = {
        "bias": bias,
        "mask": mask,
        "dropout_rate": dropout_rate,
        "precision": precision,
        "module": module,
        "promote_dtype": promote_dtype,
        "is_causal": is_causal,
    }
    if (
        deterministic
        or dropout_rng is None
        or check_rate(dropout_rate) in (0, 1)
        or not _fit(*map(jnp.shape, (query, key, value)))
    ):
        return nnx.dot_product_attention(
            query,
            key,
            value,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            deterministic=deterministic,
            dtype=dtype,
            **rest,
        )
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    weights = attention.dot_product_attention_weights(query, key, deterministic=True, dtype=query.dtype, **rest)
    weights = drop_weights(weights, query.dtype, dropout_rate, dropout_rng, broadcast_dropout, impl)
    return _weighted_sum(weights, value, functools.partial(jnp.einsum, precision=precision))


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


# ---- A whole model ---------------------------------------------------------------------------------------------------


def convert(model: Model, *, impl: Impl = "auto") -> Model:
    """Make every Flax Dropout and BatchNorm in a model pyreg's, in place.

    Parameters, running statistics, random streams and what the layers are set to stay as they are, and so do paths in
    the model's state and checkpoints.  Attention that uses `flax.nnx.dot_product_attention` uses pyreg's.  Subclasses
    of Flax's layers, which may compute something else, and other attention functions are left alone.

    Parameters
    ----------
    model : flax.nnx.Module
        Or any nest of lists, dicts and modules.
    impl : {"auto", "philox"}
        The mask of all of the model's dropout: see :class:`Dropout`.

    Returns
    -------
    The model itself.

    See Also
    --------
    revert

    Examples
    --------
    >>> import pyreg.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(4, 16, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    >>> type(pyreg.nnx.convert(model).layers[1])
    <class 'pyreg.nnx.Dropout'>
    """
    check_impl(impl)
    for node in _nodes(model):
        if type(node) is nnx.BatchNorm:
            _become(node, BatchNorm).activation = None
        if type(node) is nnx.Dropout:
            _become(node, Dropout)
        if isinstance(node, Dropout):
            node.impl = impl
        if isinstance(node, nnx.MultiHeadAttention):
            node.attention_fn = _attention(node.attention_fn, _ATTENTION[impl])
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`, in place: every pyreg Dropout and BatchNorm in a model becomes Flax's.

    Layers that Flax has no counterpart of, such as :class:`Dropout2d`, stay.

    Parameters
    ----------
    model : flax.nnx.Module

    Returns
    -------
    The model itself.

    Raises
    ------
    ValueError
        If a BatchNorm has an activation, which Flax's has not; nothing has changed then.
    """
    nodes = list(_nodes(model))
    for node in nodes:
        if type(node) is BatchNorm and node.activation is not None:
            raise ValueError(f"a BatchNorm has activation {node.activation!r}; wanted None, as Flax's has none")
    for node in nodes:
        if type(node) is BatchNorm:
            del node.activation
            _become(node, nnx.BatchNorm)
        if type(node) is Dropout:
            del node.impl
            _become(node, nnx.Dropout)
        if isinstance(node, nnx.MultiHeadAttention):
            node.attention_fn = _attention(node.attention_fn, nnx.dot_product_attention)
    return model


def _become(node: Any, kind: type) -> Any:
    """Another class for the same object: wherever the model refers to it, and with the same state."""
    object.__setattr__(node, "__class__", kind)
    return node


def _nodes(model: Any) -> list[Any]:
    return [node for _, node in nnx.iter_graph(model)]


def _philox_attention(*args: Any, **options: Any) -> jax.Array:
    return dot_product_attention(*args, impl="philox", **options)


_ATTENTION = {"auto": dot_product_attention, "philox": _philox_attention}  # functions: copies of a model share them


def _attention(function: Any, wanted: Callable[..., Any]) -> Any:
    """`wanted` for Flax's attention function or ours, with what a partial binds; another function as it is."""
    base = function.func if isinstance(function, functools.partial) else function
    if base not in (nnx.dot_product_attention, *_ATTENTION.values()):
        return function
    if base is function:
        return wanted
    bound = {name: value for name, value in function.keywords.items() if name != "impl"}
    return functools.partial(wanted, *function.args, **bound) if function.args or bound else wanted
