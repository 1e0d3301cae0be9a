"""What pyreg should compute, in plain NumPy: naive, in wide types, sharing nothing with the kernels."""

import math
from fractions import Fraction

import numpy as np

MASK32 = np.uint64(0xFFFFFFFF)


# ---- Generators (Salmon et al., SC 2011): arrays of uint64 that hold 32-bit words ----------------------------------


def philox4x32_10(counter, key):
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ np.uint64(k0), p1 & MASK32, p0 >> 32 ^ c3 ^ np.uint64(k1), p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def threefry2x32_20(counter, key):
    x0, x1 = (np.asarray(c, np.uint64) for c in counter)
    ks = [int(key[0]), int(key[1]), int(key[0]) ^ int(key[1]) ^ 0x1BD11BDA]
    x0, x1 = x0 + np.uint64(ks[0]) & MASK32, x1 + np.uint64(ks[1]) & MASK32
    for r in range(20):
        n = (13, 15, 26, 6, 17, 29, 16, 24)[r % 8]
        x0 = x0 + x1 & MASK32
        x1 = (x1 << n | x1 >> (32 - n)) & MASK32 ^ x0
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
