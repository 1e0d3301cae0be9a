"""What pyreg should compute, in plain NumPy: naive, in wide types, sharing nothing with the kernels."""

import math
from fractions import Fraction

import numpy as np

HALF, MASK32 = np.uint64(32), np.uint64(0xFFFFFFFF)  # NumPy 1 makes floats of a uint64 and an int


# ---- Generators (Salmon et al., SC 2011): arrays of uint64 that hold 32-bit words ----------------------------------


def philox4x32_10(counter, key):
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = p1 >> HALF ^ c1 ^ np.uint64(k0), p1 & MASK32, p0 >> HALF ^ c3 ^ np.uint64(k1), p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def threefry2x32_20(counter, key):
    x0, x1 = (np.asarray(c, np.uint64) for c in counter)
    ks = [int(key[0]), int(key[1]), int(key[0]) ^ int(key[1]) ^ 0x1BD11BDA]
    x0, x1 = x0 + np.uint64(ks[0]) & MASK32, x1 + np.uint64(ks[1]) & MASK32
    for r in range(20):
        n = (13, 15, 26, 6, 17, 29, 16, 24)[r % 8]
        x0 = x0 + x1 & MASK32
        x1 = (x1 << np.uint64(n) | x1 >> np.uint64(32 - n)) & MASK32 ^ x0
        if r % 4 == 3:
            s = r // 4 + 1
            x0, x1 = x0 + np.uint64(ks[s % 3]) & MASK32, x1 + np.uint64(ks[(s + 1) % 3] + s) & MASK32
    return x0, x1


# ---- Masks -----------------------------------------------------------------------------------------------------------


def _indices(n, offset):
    return (np.arange(n, dtype=np.uint64) + np.uint64(offset)).astype(np.uint64)


def philox_uniform(n, key, offset=0):
    """u of each element, times 2**64: digit p is bit i % 32 of word p % 4 at counter (i / 32, p / 4)."""
    i = _indices(n, offset)
    block, bit = i // np.uint64(32), i % np.uint64(32)
    u = np.zeros(n, np.uint64)
    for q in range(16):
        for word in philox4x32_10((block & MASK32, block >> 32, q, 0), key):
            u = u << 1 | word >> bit & 1
    return u


def mask(n, rate, key, impl="philox", offset=0):
    """True where kept."""
    key = divmod(key, 2**32) if isinstance(key, int) else key
    if rate in (0, 1):
        return np.full(n, rate == 0)
    if impl == "philox":
        limit = round(Fraction(rate) * 2**64)
        return philox_uniform(n, key, offset) >= np.uint64(limit)
    i = _indices(n, offset)
    a, b = threefry2x32_20((i >> 32, i & MASK32), key)
    if impl == "threefry":
        return (a ^ b) >> 9 < np.uint64(math.ceil(float(np.float32(1 - rate)) * 2**23))
    return (a << 32 | b) >> 12 < np.uint64(math.ceil((1 - rate) * 2**52))


# ---- Values ----------------------------------------------------------------------------------------------------------


def scale(dtype, rate):
    """1 / (1 - rate) as XLA rounds it for the dtype."""
    if dtype == np.float64:
        return 1 / np.float64(1 - rate)
    keep = np.float32(np.asarray(1 - rate).astype(dtype))
    with np.errstate(divide="ignore", over="ignore"):
        s = np.float32(1) / keep
        return np.float32(s.astype(np.float16)) if dtype == np.float16 else s


def dropout(x, rate, key, impl="philox", offset=0, broadcast_dims=(), scaled=True):
    shape = list(x.shape)
    for d in broadcast_dims:
        shape[d] = 1
    keep = mask(math.prod(shape), rate, key, impl, offset).reshape(shape)
    if rate in (0, 1):
        return np.where(keep, x, x.dtype.type(0))
    wide = x.astype(np.float32) if x.dtype.itemsize == 2 else x
    with np.errstate(all="ignore"):
        y = (wide * (scale(x.dtype, rate) if scaled else wide.dtype.type(1))).astype(x.dtype)
    return np.where(keep, y, x.dtype.type(0))


# ---- Batch-norm (Ioffe and Szegedy, ICML 2015), in float64 -----------------------------------------------------------


def _by_channel(values, x, axis):
    """One value a channel, in a shape that broadcasts against x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(values, np.float64).reshape(shape)


def _others(x, axis):
    return tuple(d for d in range(x.ndim) if d != axis % x.ndim)


def batch_statistics(x, axis, mask=None):
    """Mean and biased variance of each channel, each taken after subtracting a first mean: right to a few ulp."""
    x, others = x.astype(np.float64), _others(x, axis)
    counts = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    n = counts.sum(others)
    mean = np.where(counts, x, 0).sum(others) / n
    mean += np.where(counts, x - _by_channel(mean, x, axis), 0).sum(others) / n
    d = np.where(counts, x - _by_channel(mean, x, axis), 0)
    return mean, (d * d).sum(others) / n, n


def normalise(x, mean, var, scale=None, bias=None, axis=-1, epsilon=1e-5, activation=None, residual=None):
    x = x.astype(np.float64)
    gain = (1 if scale is None else scale) / np.sqrt(np.asarray(var, np.float64) + epsilon)
    y = (x - _by_channel(mean, x, axis)) * _by_channel(gain, x, axis)
    if bias is not None:
        y = y + _by_channel(bias, x, axis)
    if residual is not None:
        y = y + residual.astype(np.float64)
    return np.maximum(y, 0) if activation == "relu" else y


def batch_norm(x, scale=None, bias=None, axis=-1, epsilon=1e-5, mask=None, activation=None, residual=None):
    mean, var, _ = batch_statistics(x, axis, mask)
    return normalise(x, mean, var, scale, bias, axis, epsilon, activation, residual), mean, var


def batch_norm_backward(dy, x, scale=None, axis=-1, epsilon=1e-5, mask=None, activation=None, y=None):
    """dx, dscale, dbias, dresidual.  What is masked and not finite adds nothing to dscale."""
    mean, var, n = batch_statistics(x, axis, mask)
    xhat, dy = normalise(x, mean, var, axis=axis, epsilon=epsilon), dy.astype(np.float64)
    if mask is not None:
        xhat = np.where(mask | np.isfinite(xhat), xhat, 0)
    if activation == "relu":
        dy = np.where(y.astype(np.float64) > 0, dy, 0)
    others = _others(x, axis)
    dbias, dscale = dy.sum(others), (dy * xhat).sum(others)
    through_statistics = _by_channel(dbias / n, x, axis) + xhat * _by_channel(dscale / n, x, axis)
    if mask is not None:
        through_statistics = np.where(mask, through_statistics, 0)
    gain = (1 if scale is None else scale) / np.sqrt(var + epsilon)
    return _by_channel(gain, x, axis) * (dy - through_statistics), dscale, dbias, dy
