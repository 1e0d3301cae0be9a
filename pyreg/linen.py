"""Drop-ins for Flax's linen: the same arguments, variables, random streams and numbers, computed by pyreg's kernels.

Each class is a subclass of Flax's that changes the computation only.  Where there is nothing for a kernel to do, or
something to complain about, Flax's own code answers.
"""

import contextlib
import dataclasses
import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from pyreg import _arguments as arg
from pyreg._arguments import Activation, JaxImpl
from pyreg._extras import needs

with needs("flax", "jax", "flax"):
    import jax
    import jax.numpy as jnp
    from flax import linen
    from flax.linen import dtypes

    from pyreg._flax import activate, draws, draws_weights, drop_weights, keep_whole, normalise, normalises, step
    from pyreg.jax import dropout

__all__ = [
    "BatchNorm",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "WordDropout",
    "accelerate",
    "dot_product_attention",
]


def __dir__() -> list[str]:
    return __all__


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

    Raises
    ------
    ValueError
        When the layer is called, if ``rate``, ``impl`` or ``broadcast_dims`` is out of range.

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
        return _drop(self, inputs, self.broadcast_dims, self.impl, deterministic, rng)


def _drop(
    layer: Any, inputs: Any, dims: Sequence[int], impl: JaxImpl, deterministic: bool | None, rng: jax.Array | None
) -> jax.Array:
    """Dropout by a layer of Flax's or ours, with a mask that is shared along `dims`."""
    off = linen.merge_param("deterministic", layer.deterministic, deterministic)
    if off or not draws(inputs, layer.rate, impl):
        read = {name: getattr(layer, name) for name in ("rate", "deterministic", "rng_collection", "make_rng")}
        return _flax_dropout(SimpleNamespace(**read, broadcast_dims=dims), inputs, deterministic, rng)
    key = layer.make_rng(layer.rng_collection) if rng is None else rng
    return dropout(inputs, layer.rate, key=key, broadcast_dims=dims, impl=impl)


class _SharedDropout(linen.Module):
    """Which dims share a mask follows from the number of dims of an input."""

    rate: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    impl: JaxImpl = dataclasses.field(default="auto", kw_only=True)

    @linen.compact
    def __call__(self, inputs: Any, deterministic: bool | None = None, rng: jax.Array | None = None) -> jax.Array:
        """As :class:`Dropout`'s."""
        return _drop(self, inputs, self._shared_dims(jnp.ndim(inputs)), self.impl, deterministic, rng)

    @abstractmethod
    @linen.nowrap
    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        """Dims of an input along which the mask is shared; raises if there can be no such input."""


class _ChannelDropout(_SharedDropout):
    axis: int = dataclasses.field(default=-1, kw_only=True)

    @linen.nowrap
    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        return arg.dims_of_channel(ndim, self.axis, self._spatial())

    @staticmethod
    @abstractmethod
    def _spatial() -> int:
        """How many dims a channel has."""


class Dropout1d(_ChannelDropout):
    """Dropout of whole channels of sequences: the numbers of `flax.linen.Dropout` with ``broadcast_dims=(1,)``.

    Inputs have shape (N, L, C), or (L, C) without a batch; any other number of dims is a ValueError.

    Parameters
    ----------
    rate, deterministic, rng_collection, impl
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
    >>> import jax, pyreg.linen
    >>> layer = pyreg.linen.Dropout1d(0.5, deterministic=False)
    >>> y = layer.apply({}, jax.numpy.ones((3, 4)), rngs={"dropout": jax.random.key(0)})
    >>> bool((y == y[0]).all())
    True
    """

    @staticmethod
    def _spatial() -> int:
        return 1


class Dropout2d(_ChannelDropout):
    """Dropout of whole channels of images: the numbers of `flax.linen.Dropout` with ``broadcast_dims=(1, 2)``.

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
    >>> import jax, pyreg.linen
    >>> layer = pyreg.linen.Dropout2d(0.5, deterministic=False)
    >>> y = layer.apply({}, jax.numpy.ones((8, 4, 4, 16)), rngs={"dropout": jax.random.key(0)})
    >>> bool((y == y[:, :1, :1]).all())
    True
    """

    @staticmethod
    def _spatial() -> int:
        return 2


class Dropout3d(_ChannelDropout):
    """Dropout of whole channels of volumes: the numbers of `flax.linen.Dropout` with ``broadcast_dims=(1, 2, 3)``.

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
    >>> import jax, pyreg.linen
    >>> layer = pyreg.linen.Dropout3d(0.5, deterministic=False)
    >>> y = layer.apply({}, jax.numpy.ones((8, 2, 4, 4, 16)), rngs={"dropout": jax.random.key(0)})
    >>> bool((y == y[:, :1, :1, :1]).all())
    True
    """

    @staticmethod
    def _spatial() -> int:
        return 3


class _WholeDropout(_SharedDropout):
    scale_by_keep: bool = dataclasses.field(default=True, kw_only=True)

    @linen.compact
    def __call__(self, inputs: Any, deterministic: bool | None = None, rng: jax.Array | None = None) -> jax.Array:
        """As :class:`Dropout`'s."""
        dims = self._shared_dims(jnp.ndim(inputs))
        if self.scale_by_keep:
            return _drop(self, inputs, dims, self.impl, deterministic, rng)
        return keep_whole(lambda ones: _drop(self, ones, dims, self.impl, deterministic, rng), inputs, dims)


class DropPath(_WholeDropout):
    """Stochastic depth: drops whole samples, (N, ...), of what a residual branch adds; timm's DropPath.

    Parameters
    ----------
    rate, deterministic, rng_collection, impl
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
    >>> import jax, pyreg.linen
    >>> layer, branch = pyreg.linen.DropPath(0.5, deterministic=False), jax.numpy.ones((4, 2))
    >>> y = layer.apply({}, branch, rngs={"dropout": jax.random.key(0)})
    >>> bool((y[:, 0] == y[:, 1]).all())
    True
    """

    @linen.nowrap
    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        return arg.dims_of_sample(ndim)


class WordDropout(_WholeDropout):
    """Drops whole words of embedded text, (..., length, features): all features of a position, or none.

    Parameters
    ----------
    rate, deterministic, rng_collection, impl
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
    >>> import jax, pyreg.linen
    >>> layer = pyreg.linen.WordDropout(0.5, deterministic=False)
    >>> y = layer.apply({}, jax.numpy.ones((3, 4, 2)), rngs={"dropout": jax.random.key(0)})
    >>> bool((y[..., 0] == y[..., 1]).all())
    True
    """

    @linen.nowrap
    def _shared_dims(self, ndim: int) -> tuple[int, ...]:
        return arg.dims_of_word(ndim)


class BatchNorm(linen.BatchNorm):
    """`flax.linen.BatchNorm`, with mean and variance that are right at any ratio of mean to standard deviation.

    Parameters
    ----------
    use_running_average, axis, momentum, epsilon, dtype, ...
        As for Flax's class; ``use_fast_variance`` makes no difference.  Devices of ``axis_name`` are pooled by their
        number of elements, also where a mask makes these differ.
    activation : {None, "relu"}
        Applied to the result, in the same sweep.

    Raises
    ------
    ValueError
        If ``activation`` is out of range.

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
        return _normalise(self, x, use_running_average, mask, self.activation)


def _normalise(
    layer: Any, x: Any, use_running_average: bool | None, mask: jax.Array | None, activation: Activation | None
) -> jax.Array:
    """Batch-norm by a layer of Flax's or ours."""
    by_running = linen.merge_param("use_running_average", layer.use_running_average, use_running_average)
    if by_running or layer.is_initializing() or not layer.force_float32_reductions or not normalises(x, layer.axis):
        return activate(_flax_batch_norm(layer, x, use_running_average, mask=mask), activation)
    channels = (x.shape[layer.axis],)
    running_mean = layer.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
    running_var = layer.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
    scale = layer.param("scale", layer.scale_init, channels, layer.param_dtype) if layer.use_scale else None
    bias = layer.param("bias", layer.bias_init, channels, layer.param_dtype) if layer.use_bias else None
    dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=layer.dtype)
    y, mean, var = normalise(layer, jnp.asarray(x, jnp.promote_types(x.dtype, dtype)), scale, bias, mask)
    statistics = jnp.promote_types(x.dtype if layer.dtype is None else layer.dtype, jnp.float32)
    for running, new in ((running_mean, mean), (running_var, var)):
        running.value = step(layer.momentum, running.value, new.astype(statistics))
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

    Raises
    ------
    ValueError
        If ``dropout_rate`` or ``impl`` is out of range; else as Flax's function.

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


@contextlib.contextmanager
def accelerate(*, impl: JaxImpl = "auto") -> Iterator[None]:
    """Let pyreg compute the dropout, batch-norm and attention of models that are written with Flax's own layers.

    Inside the ``with`` block, Flax's ``Dropout`` and ``BatchNorm``, and ``MultiHeadDotProductAttention`` that uses
    Flax's ``dot_product_attention``, give the numbers of pyreg's.  Variables, random streams and checkpoints stay as
    they were.  Subclasses of ``Dropout`` and ``BatchNorm`` are left alone.

    Parameters
    ----------
    impl : {"auto", "philox"}
        As for :class:`Dropout`.

    Raises
    ------
    ValueError
        If ``impl`` is out of range.

    Notes
    -----
    What `jax.jit` has traced stays as it was traced: enter the block inside of the function that is jitted, or around
    its first call.

    Examples
    --------
    >>> import jax, pyreg.linen
    >>> from flax import linen
    >>> layer, x = linen.Dropout(0.5, deterministic=False), jax.numpy.ones((2, 3))
    >>> with pyreg.linen.accelerate():
    ...     y = layer.apply({}, x, rngs={"dropout": jax.random.key(0)})
    """
    arg.check_jax_impl(impl)
    attend = _ATTENTION[impl]

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: linen.module.InterceptorContext) -> Any:
        layer = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if type(layer) is linen.Dropout:
            return _intercepted_dropout(layer, impl, *args, **kwargs)
        if type(layer) is linen.BatchNorm:
            return _intercepted_batch_norm(layer, *args, **kwargs)
        if getattr(layer, "attention_fn", None) is not linen.dot_product_attention:
            return call(*args, **kwargs)
        object.__setattr__(layer, "attention_fn", attend)  # of this call's own copy of the module
        try:
            return call(*args, **kwargs)
        finally:
            object.__setattr__(layer, "attention_fn", linen.dot_product_attention)

    with linen.intercept_methods(intercept):
        yield


_ATTENTION = {"auto": dot_product_attention, "philox": functools.partial(dot_product_attention, impl="philox")}


def _intercepted_dropout(
    layer: Any, impl: JaxImpl, inputs: Any, deterministic: bool | None = None, rng: jax.Array | None = None
) -> jax.Array:
    return _drop(layer, inputs, layer.broadcast_dims, impl, deterministic, rng)


def _intercepted_batch_norm(
    layer: Any, x: Any, use_running_average: bool | None = None, *, mask: jax.Array | None = None
) -> jax.Array:
    return _normalise(layer, x, use_running_average, mask, None)
