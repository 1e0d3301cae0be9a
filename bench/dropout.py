"""Dropout against its peers: what is run, what is compared with what, and whether the results are right."""

from importlib.util import find_spec

import numpy as np
from timing import cpus, numpy_dtype

import pyreg

KEY = 0x0123_4567_89AB_CDEF
RATES = (0.1, 0.5)
DTYPES = ("float32", "float64", "float16", "bfloat16")
SIZES = (
    16,  # the cost of a call
    1_000,
    10_000,
    65_536,  # x and y in the second-level cache
    1_000_000,  # in the last-level cache
    16_000_000,  # in memory
)
THREADS = tuple(sorted({1, cpus()}))

PARAMS = {"dtype": DTYPES, "rate": RATES, "size": SIZES, "threads": THREADS}
QUICK = {"dtype": ("float32", "bfloat16"), "rate": (0.1,), "size": (16, 65_536, 1_000_000), "threads": THREADS}
TABLE_BY = ("dtype", "rate")  # a table for each of these; the other parameters and the subject label its rows
PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "flax")

SUBJECTS = ("philox", "threefry")
# For scaling.py and contention.py: the parameter that they sweep, the others, the contenders, and a copy by one thread.
SWEEP, FIXED = "size", {"dtype": "float32", "rate": 0.1}
SWEPT, COPY = ("philox out=", "threefry out="), "copyto"
CONTENTION = (1_000_000, 16_000_000)
# Columns of a table: header, contender, and the contender it is divided by (None: its own time).
# The layer of a framework allocates its result, so it is compared with a call that does too.
COLUMNS = (
    ("out=", "{} out=", None),
    ("/ copyto", "{} out=", "copyto"),
    ("fresh", "{}", None),
    ("/ copy()", "{}", "copy()"),
    ("NumPy /", "NumPy", "{}"),
    ("PyTorch /", "PyTorch", "{}"),
    ("Flax /", "Flax", "{}"),
)
# Columns of the README's table.
MARKDOWN = {
    "`np.copyto`": "copyto",
    "philox, `out=`": "philox out=",
    "threefry, `out=`": "threefry out=",
    "`x.copy()`": "copy()",
    "philox": "philox",
    "threefry": "threefry",
    "NumPy idiom": "NumPy",
    "PyTorch": "PyTorch",
    "Flax": "Flax",
}
NOTES = (
    "NumPy is `x * (rng.random(n, dtype=np.float32) < keep) * (1 / keep)`; it, copyto and copy() use one thread. "
    "PyTorch is `F.dropout`, with as many threads as pyreg. Flax is `nnx.Dropout` under `jax.jit` with a threefry key, "
    "the mask of pyreg's threefry; JAX always uses all CPUs, so it is only in the rows of all threads, and float64 is "
    "off in it."
)


def elements(size, **_):
    return size


def contenders(dtype, rate, size, threads, peers=("NumPy", "PyTorch", "Flax")):
    """The calls to be timed, by name."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(size, np.float32).astype(numpy_dtype(dtype))
    out = np.zeros_like(x)
    keep, scale = 1 - rate, x.dtype.type(1 / (1 - rate))
    pyreg.set_num_threads(threads)
    calls = {
        "copyto": lambda: np.copyto(out, x),
        "philox out=": lambda: pyreg.dropout(x, rate, key=KEY, out=out),
        "threefry out=": lambda: pyreg.dropout(x, rate, key=KEY, impl="threefry", out=out),
        "copy()": x.copy,
        "philox": lambda: pyreg.dropout(x, rate, key=KEY),
        "threefry": lambda: pyreg.dropout(x, rate, key=KEY, impl="threefry"),
    }
    if "NumPy" in peers:
        calls["NumPy"] = lambda: x * (rng.random(size, dtype=np.float32) < keep) * scale
    if "PyTorch" in peers and find_spec("torch"):
        calls["PyTorch"] = torch_call(x, rate, threads)
    if "Flax" in peers and find_spec("flax") and threads == cpus() and dtype != "float64":
        calls["Flax"] = flax_call(x, rate)
    return calls


def torch_call(x, rate, threads):
    import torch

    torch.set_num_threads(threads)
    # PyTorch does not know ml_dtypes' bfloat16, only its bits.
    tensor = torch.from_numpy(x) if x.dtype.kind == "f" else torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return lambda: torch.nn.functional.dropout(tensor, rate)


def flax_function(rate):
    import jax
    from flax import nnx

    return jax.jit(lambda key, x: nnx.Dropout(rate, deterministic=False)(x, rngs=key))


def flax_call(x, rate):
    import jax

    function, key, x = flax_function(rate), jax.random.key(7), jax.numpy.asarray(x)
    return lambda: function(key, x).block_until_ready()


# ---- Check -----------------------------------------------------------------------------------------------------------


def reference(x, mask, rate):
    """Dropout in float64, one rule: kept is divided by the probability of keeping, dropped is 0."""
    y = np.zeros(x.shape, np.float64)
    y[mask] = x[mask].astype(np.float64) / (1 - rate)
    return y


def check(dtype, rate):
    """Raises if a result is wrong.  Yields what was found right."""
    n = 1_000_003  # takes the parallel path, and is no multiple of a tile
    x = np.random.default_rng(1).standard_normal(n, np.float32).astype(numpy_dtype(dtype))
    tolerance = {"float32": 2e-7, "float64": 4e-16, "float16": 2e-3, "bfloat16": 1.2e-2}[dtype]
    for impl in SUBJECTS:
        mask = pyreg.dropout_mask(n, rate, key=KEY, impl=impl)
        sigmas = (mask.mean() - (1 - rate)) / np.sqrt(rate * (1 - rate) / n)
        if abs(sigmas) > 5:
            raise AssertionError(f"{impl} keeps {mask.mean():.5f} at rate {rate}: off by {sigmas:.1f} sigma")
        y = pyreg.dropout(x, rate, key=KEY, impl=impl)
        np.testing.assert_allclose(y.astype(np.float64), reference(x, mask, rate), rtol=tolerance, atol=1e-7)
    yield "values equal the float64 reference, kept share within 5 sigma"

    if find_spec("flax") and dtype != "float64":
        import jax

        key = jax.random.key(7)
        words = np.asarray(jax.random.key_data(key))
        mask = pyreg.dropout_mask(n, rate, key=words, impl="threefry")
        np.testing.assert_array_equal(mask, jax.random.bernoulli(key, 1 - rate, (n,)))
        y = pyreg.dropout(x, rate, key=words, impl="threefry")
        flax = np.asarray(flax_function(rate)(key, x))
        np.testing.assert_array_equal(y.view(np.uint8), flax.view(np.uint8))
        yield "threefry: mask equals jax.random.bernoulli's, values equal Flax's bit for bit"
