"""Names that the tests share."""

import ml_dtypes
import numpy as np

from pyreg import _core

DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
IMPLS = ["philox", "threefry", "threefry_x64"]
ISAS = _core.isa_available()
TILE, GROUP, CHUNK = 4096, 512, 65536  # of csrc: where the loops change gear


def bits(x):
    """x as unsigned integers: equal only if every bit is."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bool((bits(a) == bits(b)).all())


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
