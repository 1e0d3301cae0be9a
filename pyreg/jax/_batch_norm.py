"""Batch-norm as JAX primitives: forward and backward are kernels, other derivatives JAX operations.

forward   x, scale, bias, epsilon, mask, residual                                     -> y, mean, low, var
tangent   dx, dscale, dbias, dresidual; x, mean, var, scale, epsilon, mask, y         -> dy, dmean, dlow, dvar
backward  its transpose: dy, dmean, dlow, dvar; x, mean, var, scale, epsilon, mask, y -> dx, dscale, dbias, dresidual

Of data far from zero float32 may hold the mean to no more than a good part of a standard deviation.  low is what it
lacks; statistics that are pooled over devices want it.  Its derivatives are taken to be 0.

What is absent has no elements: a mask or a residual that was not given, y without a ReLU, y where statistics alone are
wanted.  The options say what is there.

Behind batch dims, which come from vmap and are problems of their own, x and what is like it have the array's dims;
statistics and parameters have one, in float64 for float64 data, else in float32; epsilon is a number of _numbers.py.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad
from jax.sharding import NamedSharding, PartitionSpec

from pyreg import _arguments as arg
from pyreg import _core
from pyreg._arguments import Activation
from pyreg.jax import _numbers, _primitive

__all__ = ["batch_norm", "batch_norm_inference"]

Array = jax.Array


class Options(NamedTuple):
    """The parameters of the primitives."""

    axis: int  # of the array's dims, from 0
    relu: bool
    masked: bool  # there is a mask
    residual: bool  # there is a residual
    written: bool = True  # false: there is no y, but statistics alone

    @property
    def for_pooling(self) -> "Options":
        """Of the call that makes the statistics of a part."""
        return self._replace(relu=False, residual=False, written=False)


def _absent(like: Any, dtype: Any) -> Array:
    """What takes the place of an absent array; `like`: values per channel."""
    return jnp.zeros((*like.shape[:-1], 0), dtype)


# ---- Formulas: one problem, in the precision of the statistics -------------------------------------------------------


def _others(ndim: int, o: Options) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d != o.axis)


def _along(values: Any, x: Any, o: Options) -> Any:
    """A value per channel, seen in the shape of x."""
    return jnp.expand_dims(values, _others(x.ndim, o))


def _statistics_dtype(x: Any) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _wide(x: Any) -> Any:
    return x.astype(_statistics_dtype(x))


def _sum(values: Array, o: Options, mask: Array | None = None) -> Array:
    return jnp.sum(values, _others(values.ndim, o), where=mask if o.masked else None)


def _count(x: Array, mask: Array, o: Options) -> Array:
    """Elements of each channel that its statistics are of."""
    if o.masked:
        return _sum(mask.astype(_statistics_dtype(x)), o)
    n = math.prod(x.shape[d] for d in _others(x.ndim, o))
    return jnp.full(x.shape[o.axis], n, _statistics_dtype(x))


def _weight(x: Array, _: Any, mask: Any, *, o: Options) -> Array:
    """The share of elements of each channel that its statistics are of."""
    every = math.prod(x.shape[d] for d in _others(x.ndim, o))
    return _count(x, mask, o) / jnp.full(x.shape[o.axis], every, _statistics_dtype(x))


def _statistics(x: Array, mask: Array, o: Options) -> tuple[Array, Array, Array]:
    """Mean, what it lacks (which is not known here), and variance."""
    n, wide = _count(x, mask, o), _wide(x)
    mean = _sum(wide, o, mask) / n
    return mean, jnp.zeros_like(mean), _sum((wide - _along(mean, x, o)) ** 2, o, mask) / n


def _add(a: Array, small: Array) -> tuple[Array, Array]:
    """The rounded sum, and what it lacks (Dekker, 1971)."""
    total = a + small
    return total, jnp.where(jnp.isfinite(total), (a - total) + small, 0)


POOLED = 2.0**-12  # as many parts as this may have means near the largest number


def _pool(weight: Array, statistics: Sequence[Array], psum: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """Mean, what it lacks, and variance of all parts from those of each and their shares of elements, in two sums.

    The first gives a guess of the mean that all parts know; the second what the mean differs from it, and the variance
    (Chan, Golub and LeVeque, 1979).  The guess is within half a unit in the last place, or nearly: so differences to it
    are of the order of a standard deviation where float32 can tell the data apart at all.
    """
    mean, low, var = (jnp.where(weight > 0, a, 0) for a in statistics)  # a part may have nothing
    scaled = mean * POOLED  # so that no sum of means overflows
    (w, w_rest), (m, m_rest) = _split_digits(weight), _split_digits(scaled)
    rest = jnp.where(jnp.isfinite(mean), w * m_rest + w_rest * m + w_rest * m_rest + weight * low * POOLED, 0)
    total, large, small = lax.stop_gradient(psum(jnp.stack([weight, w * m, rest])))
    guess = (large + small) / total / POOLED
    d = (mean - guess) + low
    total, shift, square, within = psum(jnp.stack([weight, weight * d, weight * d**2, weight * var]))
    shift = shift / total
    between = square / total - shift**2
    between = between + lax.stop_gradient(jnp.maximum(-between, 0))  # rounding may have left less than 0
    pooled, pooled_low = _add(guess, shift)
    return jnp.where(jnp.isfinite(guess), pooled, guess), pooled_low, within / total + between


def _split_digits(a: Array) -> tuple[Array, Array]:
    """a as the sum of two: its first third of binary digits, whose products are exact, and so are sums of a few of
    these; and the rest."""
    info = jnp.finfo(a.dtype)
    first = lax.reduce_precision(a, info.nexp, info.nmant // 3)
    return first, a - first


def _normalise(
    x: Array, scale: Any, bias: Any, epsilon: Any, residual: Any, mean: Array, low: Any, var: Array, *, o: Options
) -> Array:
    """epsilon: as a number."""
    gain = scale * lax.rsqrt(var + epsilon)
    centred = _wide(x) - _along(mean, x, o)
    if low is not None:
        centred = centred - _along(low, x, o)
    y = centred * _along(gain, x, o) + _along(bias, x, o)
    if o.residual:
        y = y + _wide(residual)
    return (jnp.maximum(y, 0) if o.relu else y).astype(x.dtype)


def _forward(
    x: Array, scale: Array, bias: Array, epsilon: Array, mask: Array, residual: Array, *, o: Options
) -> list[Array]:
    mean, low, var = _statistics(x, mask, o)
    if not o.written:
        return [_absent(mean, x.dtype), mean, low, var]
    number = _numbers.read(epsilon, var.dtype)
    return [_normalise(x, scale, bias, number, residual, mean, None, var, o=o), mean, low, var]


def _from_mean(x: Array, mean: Array, mask: Array, o: Options) -> tuple[Array, Array]:
    """Elements of each channel, and x - mean, 0 for masked elements that are not finite.

    Of statistics alone a part may have no elements: then 1 for 0, and no masked element counts; NaN would spread
    through derivatives, even times 0.
    """
    n, centred = _count(x, mask, o), _wide(x) - _along(mean, x, o)
    if not o.masked:
        return n, centred
    counts = mask | jnp.isfinite(centred) if o.written else mask
    return (n if o.written else jnp.maximum(n, 1)), jnp.where(counts, centred, 0)


def _rstd(var: Array, epsilon: Array) -> Array:
    return lax.rsqrt(var + _numbers.read(epsilon, var.dtype))


def _tangent(
    dx: Array, dscale: Array, dbias: Array, dresidual: Array, x: Array, *known: Array, o: Options
) -> list[Array]:
    mean, var, scale, epsilon, mask, y = known
    (n, centred), rstd, dx = _from_mean(x, mean, mask, o), _rstd(var, epsilon), _wide(dx)
    centred = centred - _along(_sum(centred, o, mask) / n, x, o)
    if o.masked and not o.written:
        centred = jnp.where(mask, centred, 0)
    dmean, dvar = _sum(dx, o, mask) / n, 2 * _sum(dx * centred, o, mask) / n
    dlow = jnp.zeros_like(dmean)
    if not o.written:
        return [_absent(mean, x.dtype), dmean, dlow, dvar]
    dgain = dscale * rstd - scale * rstd**3 * dvar / 2
    dy = (dx - _along(dmean, x, o)) * _along(scale * rstd, x, o) + centred * _along(dgain, x, o) + _along(dbias, x, o)
    if o.residual:
        dy = dy + _wide(dresidual)
    return [(jnp.where(y > 0, dy, 0) if o.relu else dy).astype(x.dtype), dmean, dlow, dvar]


def _backward(
    dy: Array, dmean: Array, _: Array, dvar: Array, x: Array, *known: Array, o: Options, psum: Any = lambda sums: sums
) -> list[Array]:
    """psum: sums, of a list, over the shards of the channels' elements."""
    mean, var, scale, epsilon, mask, y = known
    (n, centred), rstd = _from_mean(x, mean, mask, o), _rstd(var, epsilon)
    absent = _absent(mean, x.dtype)

    def through_statistics(constant: Array, slope: Array) -> Array:
        values = _along(constant, x, o) + _along(slope, x, o) * centred
        return jnp.where(mask, values, 0) if o.masked else values

    if not o.written:
        centred = centred - _along(_sum(centred, o, mask) / n, x, o)
        dx, none = through_statistics(dmean / n, 2 * dvar / n), jnp.zeros_like(scale)
        return [dx.astype(x.dtype), none, none, absent]
    g = jnp.where(y > 0, _wide(dy), 0) if o.relu else _wide(dy)
    counted = jnp.where(mask | jnp.isfinite(x), g, 0) if o.masked else g
    sums = [n, _sum(centred, o, mask), _sum(counted * centred, o), _sum(counted, o), _sum(g, o)]
    n, correction, product, total, dbias = psum(sums)
    correction = correction / n  # what the mean lacks
    dscale = (product - correction * total) * rstd
    centred = centred - _along(correction, x, o)
    constant, slope = (dmean - scale * rstd * dbias) / n, (2 * dvar - scale * rstd**2 * dscale) / n
    dx = _along(scale * rstd, x, o) * g + through_statistics(constant, slope)
    return [dx.astype(x.dtype), dscale, dbias, g.astype(x.dtype) if o.residual else absent]


def _problems(one: Callable[..., Any]) -> Callable[..., Any]:
    """The formula for operands with batch dims."""

    def many(*args: Array, o: Options, **options: Any) -> Any:
        function = functools.partial(one, o=o, **options)
        for _ in range(args[1].ndim - 1):  # the second operand of every primitive is a value per channel
            function = jax.vmap(function)
        return function(*args)

    return many


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def _native_forward(*args: Array, o: Options, reuse: bool = False) -> list[Array]:
    del reuse  # the backward pass wants x
    results = _abstract_forward(*map(jax.typeof, args), o=o)
    return list(jax.ffi.ffi_call("pyreg_batch_norm_forward_v2", results)(*args, axis=o.axis, relu=o.relu))


def _native_backward(
    dy: Array, dmean: Array, dlow: Array, dvar: Array, *known: Array, o: Options, reuse: bool = False
) -> list[Array]:
    results = _abstract_backward(*map(jax.typeof, (dy, dmean, dlow, dvar, *known)), o=o)
    call = jax.ffi.ffi_call("pyreg_batch_norm_backward_v2", results, input_output_aliases={0: 0} if reuse else {})
    return list(call(dy, dmean, dvar, *known, axis=o.axis))


def _number(words: Any) -> float:
    return float(words[:2].copy().view("<f8")[0])


def _callback_forward(
    x: Any, scale: Any, bias: Any, epsilon: Any, mask: Any, residual: Any, *, o: Options
) -> list[Any]:
    y, low, code = np.empty_like(x), np.empty_like(scale), arg.as_input(x)[1]
    mask, residual = mask if o.masked else None, residual if o.residual else None
    mean, var = _core.batch_norm(code, x, o.axis, _number(epsilon), o.relu, scale, bias, mask, residual, y, low)
    return [y if o.written else y.ravel()[:0], mean, low, var]


def _callback_backward(dy: Any, dmean: Any, _: Any, dvar: Any, x: Any, *known: Any, o: Options) -> list[Any]:
    mean, var, scale, epsilon, mask, y = known
    mask, y = mask if o.masked else None, y if o.relu else None
    dx, dresidual, code = np.empty_like(x), np.empty_like(x) if o.residual else None, arg.as_input(x)[1]
    dscale, dbias = _core.batch_norm_backward(
        code, dy, x, o.axis, _number(epsilon), o.relu, scale, mask, y, mean, var, dx, dresidual, dmean, dvar
    )
    return [dx, dscale, dbias, dx.ravel()[:0] if dresidual is None else dresidual]


# ---- Shards ----------------------------------------------------------------------------------------------------------


def _dims(x: Any, values: Any, o: Options) -> tuple[list[str], list[str], list[str], list[str]]:
    """Names of the dims of x, of values per channel, of epsilon, and of what is absent."""
    batch = len(values.shape) - 1
    full = [f"x{d}" for d in range(len(x.shape))]
    return full, [*full[:batch], full[batch + o.axis]], [*full[:batch], "words"], [*full[:batch], "none"]


def _forward_names(x: Any, scale: Any, *_: Any, o: Options) -> tuple[list[list[str]], list[list[str]]]:
    full, values, words, none = _dims(x, scale, o)
    operands = [full, values, values, words, full if o.masked else none, full if o.residual else none]
    return operands, [full if o.written else none, values, values, values]


def _backward_names(
    dy: Any, dmean: Any, dlow: Any, dvar: Any, x: Any, *_: Any, o: Options
) -> tuple[list[list[str]], list[list[str]]]:
    full, values, words, none = _dims(x, dmean, o)
    known = [full, values, values, values, words, full if o.masked else none, full if o.relu else none]
    return [full, values, values, values, *known], [full, values, values, full if o.residual else none]


def _cut(axes: dict[str, Any], x: Any, scale: Any, o: Options) -> tuple[str, ...]:
    """Mesh axes that cut the elements of a channel."""
    full, values, *_ = _dims(x, scale, o)
    of = [axes[name] for name in full if name in axes and name not in values]
    return tuple(axis for a in of for axis in (a if isinstance(a, tuple) else (a,)))


def _shard_forward(axes: dict[str, Any], _: Any, *args: Array, o: Options) -> list[Array]:
    x, scale, bias, epsilon, mask, residual = args
    cut = _cut(axes, x, scale, o)
    if not cut:
        return _native_forward(*args, o=o)
    y, *statistics = _native_forward(x, scale, bias, epsilon, mask, _absent(scale, x.dtype), o=o.for_pooling)
    weight = _problems(_weight)(x, scale, mask, o=o)
    pooled = _pool(weight, statistics, lambda a: lax.psum(a, cut))
    if o.written:
        number = _numbers.read(epsilon, scale.dtype)
        y = _problems(_normalise)(x, scale, bias, number, residual, *pooled, o=o)
    return [y, *pooled]


def _shard_backward(axes: dict[str, Any], _: Any, *args: Array, o: Options) -> list[Array]:
    cut = _cut(axes, args[4], args[1], o)
    if not cut:
        return _native_backward(*args, o=o)
    results: list[Array] = _problems(_backward)(*args, o=o, psum=lambda a: lax.psum(jnp.stack(a), cut))
    return results


# ---- The primitives --------------------------------------------------------------------------------------------------


def _plain(a: Any) -> Any:
    return a.update(weak_type=False)


def _values_of(x: Any, like: Any, o: Options) -> Any:
    """The type of statistics of x: where its channels are, they are, too."""
    sharding, batch = x.sharding, len(like.shape) - 1
    if sharding.mesh.empty:
        return _plain(like)
    spec = PartitionSpec(*sharding.spec[:batch], sharding.spec[batch + o.axis])
    return like.update(weak_type=False, sharding=NamedSharding(sharding.mesh, spec))


def _like_x(x: Any, values: Any, present: bool) -> Any:
    """The type of a result like x, or of one that is absent."""
    if present:
        return _plain(x)
    batch = len(values.shape) - 1
    sharding = values.sharding.update(spec=PartitionSpec(*values.sharding.spec[:batch], None))
    return values.update(shape=(*values.shape[:batch], 0), dtype=x.dtype, sharding=sharding, weak_type=False)


def _abstract_forward(x: Any, scale: Any, *_: Any, o: Options) -> list[Any]:
    values = _values_of(x, scale, o)
    return [_like_x(x, values, o.written), values, values, values]


def _abstract_tangent(*args: Any, o: Options) -> list[Any]:
    return _abstract_forward(args[4], args[7], o=o)


def _abstract_backward(*args: Any, o: Options) -> list[Any]:
    x, scale = args[4], _plain(args[7])
    return [_plain(x), scale, scale, _like_x(x, scale, o.residual)]


forward_p = _primitive.define(
    "pyreg_batch_norm_forward",
    _abstract_forward,
    _problems(_forward),
    _native_forward,
    _callback_forward,
    _primitive.Partition(_forward_names, _shard_forward, even=True),
)
tangent_p = _primitive.define("pyreg_batch_norm_tangent", _abstract_tangent, _problems(_tangent))
backward_p = _primitive.define(
    "pyreg_batch_norm_backward",
    _abstract_backward,
    _problems(_backward),
    _native_backward,
    _callback_backward,
    _primitive.Partition(_backward_names, _shard_backward, even=True),
    lambda o: o.written,
)


def _is_smooth(operand: Any) -> bool:
    """Has it derivatives?  The mask and epsilon have none."""
    return bool(jnp.issubdtype(operand.dtype, jnp.floating))


def _placed(result: Array, wanted: Any) -> Array:
    """Under an explicit mesh: the result where its type says."""
    sharding = wanted.sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(result).sharding == sharding:
        return result
    placed: Array = jax.sharding.reshard(result, sharding)
    return placed


def _smooth(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The operands that have derivatives, and their tangents as arrays."""
    keep = [_is_smooth(p) for p in primals]
    chosen = itertools.compress(tangents, keep)
    return list(itertools.compress(primals, keep)), list(map(ad.instantiate_zeros, chosen))


def _forward_jvp(primals: Any, tangents: Any, *, o: Options) -> Any:
    x, scale, _, epsilon, mask, _ = primals
    y, mean, low, var = forward_p.bind(*primals, o=o)
    known = x, mean, var, scale, epsilon, mask, y if o.relu else _absent(scale, x.dtype)
    return [y, mean, low, var], tangent_p.bind(*_smooth(primals, tangents)[1], *known, o=o)


def _jvp_of(formula: Callable[..., Any], abstract: Callable[..., Any]) -> Callable[..., Any]:
    def rule(primals: Any, tangents: Any, *, o: Options) -> Any:
        def function(*smooth: Any) -> Any:
            left = iter(smooth)
            results = _problems(formula)(*[next(left) if _is_smooth(p) else p for p in primals], o=o)
            return list(map(_placed, results, abstract(*map(jax.typeof, primals), o=o)))

        return jax.jvp(function, *_smooth(primals, tangents))

    return rule


def _transpose_by(primitive: Any) -> Callable[..., Any]:
    """The first four operands are linear; `primitive` is the transpose."""

    def rule(cotangents: Any, *args: Any, o: Options) -> list[Any]:
        linear, known = args[:4], args[4:]
        gradients = primitive.bind(*map(ad.instantiate_zeros, cotangents), *known, o=o)
        wanted = [g if ad.is_undefined_primal(a) else None for g, a in zip(gradients, linear, strict=True)]
        return [*wanted, *[None] * len(known)]

    return rule


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _jvp_of(_tangent, _abstract_tangent)
ad.primitive_jvps[backward_p] = _jvp_of(_backward, _abstract_backward)
ad.primitive_transposes[tangent_p] = _transpose_by(backward_p)
ad.primitive_transposes[backward_p] = _transpose_by(tangent_p)


# ---- The functions ---------------------------------------------------------------------------------------------------


def _as_values(value: Any, x: Any, axis: int, default: float, name: str) -> Any:
    """A value per channel, in the dtype of statistics."""
    channels = x.shape[axis]
    value = jnp.full(channels, default) if value is None else jnp.asarray(value)
    arg.check_channels(value, channels, name)
    return value.astype(_statistics_dtype(x))


def _as_mask(mask: Any, x: Array) -> Any:
    return np.zeros(0, bool) if mask is None else arg.spread_mask(x, jnp.asarray(mask), jnp.broadcast_to)


def _as_residual(residual: Any, x: Array) -> Any:
    if residual is None:
        return np.zeros(0, x.dtype)
    residual = jnp.asarray(residual)
    arg.check_same(residual, x, "residual")
    return residual


def batch_norm(
    x: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    mask: jax.typing.ArrayLike | None = None,
    activation: Activation | None = None,
    residual: jax.typing.ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> tuple[Array, Array, Array]:
    """Normalise each channel by its own mean and variance.

    ``y = (x - mean) / sqrt(var + epsilon) * scale + bias``, then ``y + residual`` if given, then ``max(y, 0)`` if
    ``activation="relu"``.  Works under every transform of JAX, with derivatives of ``y``, ``mean`` and ``var`` of every
    order.  Where ``x`` is sharded under `jax.jit`, the statistics are those of the whole array.

    Parameters
    ----------
    x : array_like
        float32, float64, float16 or bfloat16, of one or more dims.
    scale, bias : array_like, shape (channels,), optional
        By default 1 and 0.
    axis : int
        The dim that counts the channels.
    epsilon : float
        Added to the variance.
    mask : array_like of bool, optional
        Broadcasts to the shape of ``x``: mean and variance are those of the elements where it is true; NaN for a
        channel where it never is.
    activation : {None, "relu"}
        Applied last.
    residual : array_like, optional
        Shape and dtype of ``x``; added before the activation.
    axis_name : hashable or tuple of hashables, optional
        Inside `jax.shard_map`, `jax.pmap` or `jax.vmap`: the axes whose statistics are taken together.
    axis_index_groups : list of lists of int, optional
        Groups of that axis, each taken together by itself, as in `jax.lax.psum`.

    Returns
    -------
    y : jax.Array
        Shape and dtype of ``x``.
    mean, var : jax.Array, shape (channels,)
        The biased variance.  float64 for float64 data, else float32.

    Raises
    ------
    TypeError
        If an array has another dtype.
    ValueError
        If shapes do not fit, a channel has no element, or an option is out of range.

    Notes
    -----
    Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate shift",
    ICML 2015.  Statistics of several devices are pooled by their number of elements, after Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Examples
    --------
    >>> import jax, pyreg.jax
    >>> y, mean, var = pyreg.jax.batch_norm(jax.numpy.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> mean, var
    (Array([ 2., 20.], dtype=float32), Array([  1., 100.], dtype=float32))
    """
    x = _primitive.check_array(x)
    axis, epsilon, relu = arg.as_norm(x.ndim, axis, epsilon, activation)
    arg.check_elements(x, axis)
    scale, bias = _as_values(scale, x, axis, 1, "scale"), _as_values(bias, x, axis, 0, "bias")
    o = Options(axis, relu, mask is not None, residual is not None)
    optional = _as_mask(mask, x), _as_residual(residual, x)
    a, scale, bias, words, mask, residual = _primitive.vary_alike(x, scale, bias, _numbers.words_of(epsilon), *optional)
    if axis_name is None:
        y, mean, _, var = forward_p.bind(a, scale, bias, words, mask, residual, o=o)
        return y, mean, var
    if not o.masked and x.size == x.shape[axis]:  # as where vmap maps over all other dims: no work for a kernel
        mean = _wide(a).reshape(-1)
        statistics = [mean, jnp.zeros_like(mean), jnp.zeros_like(mean)]
    else:
        statistics = forward_p.bind(a, scale, bias, words, mask, np.zeros(0, x.dtype), o=o.for_pooling)[1:]
    psum = functools.partial(lax.psum, axis_name=axis_name, axis_index_groups=axis_index_groups)
    mean, low, var = _pool(_weight(a, scale, mask, o=o), statistics, psum)
    return _normalise(a, scale, bias, epsilon, residual, mean, low, var, o=o), mean, var


def batch_norm_inference(
    x: jax.typing.ArrayLike,
    mean: jax.typing.ArrayLike,
    var: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    activation: Activation | None = None,
    residual: jax.typing.ArrayLike | None = None,
) -> Array:
    """Normalise each channel by a given mean and variance.

    JAX operations and no kernel: one sweep, that XLA fuses with what is around it.

    Parameters
    ----------
    x : array_like
        float32, float64, float16 or bfloat16, of one or more dims.
    mean, var : array_like, shape (channels,)
        For example running averages of what :func:`batch_norm` returned.
    scale, bias, axis, epsilon, activation, residual
        As in :func:`batch_norm`.

    Returns
    -------
    jax.Array
        Shape and dtype of ``x``.

    Raises
    ------
    TypeError
        If an array has another dtype.
    ValueError
        If shapes do not fit, or an option is out of range.

    Examples
    --------
    >>> import jax, pyreg.jax
    >>> x = jax.numpy.array([[1.0, 10.0]])
    >>> pyreg.jax.batch_norm_inference(x, [0, 10], [4, 1], epsilon=0)
    Array([[0.5, 0. ]], dtype=float32)
    """
    x = _primitive.check_array(x)
    axis, epsilon, relu = arg.as_norm(x.ndim, axis, epsilon, activation)
    arg.check_given(mean, "mean")
    arg.check_given(var, "var")
    given = ((mean, 0, "mean"), (var, 1, "var"), (scale, 1, "scale"), (bias, 0, "bias"))
    means, variances, scales, biases = (_as_values(v, x, axis, default, name) for v, default, name in given)
    o = Options(axis, relu, False, residual is not None)
    return _normalise(x, scales, biases, epsilon, _as_residual(residual, x), means, None, variances, o=o)
