"""Dropout against its peers: what is run, what is compared with what, and whether the results are right."""

import functools
from importlib.util import find_spec

import numpy as np

import pyreg
from bench.cases import normal
from bench.machine import cpus

KEY = 0x0123_4567_89AB_CDEF
TABLE_BY = ("dtype", "rate")
PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "flax")
PEERS = ("NumPy", "PyTorch", "Flax")
SUBJECTS = ("philox", "threefry")
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
# Columns of the table in the documentation.
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


def elements(shape):
    return int(shape)


def contenders(dtype, shape, threads, rate=0.1, peers=()):
    """The calls to be timed, by name."""
    rng = np.random.default_rng(0)
    x = normal(elements(shape), dtype)
    out = np.zeros_like(x)
    keep, scale = 1 - rate, x.dtype.type(1 / (1 - rate))
    pyreg.set_num_threads(threads)
    calls = {
        "copy": lambda: pyreg.dropout(x, 0.0, out=out),
        "copyto": lambda: np.copyto(out, x),
        "philox out=": lambda: pyreg.dropout(x, rate, key=KEY, out=out),
        "threefry out=": lambda: pyreg.dropout(x, rate, key=KEY, impl="threefry", out=out),
        "copy()": x.copy,
        "philox": lambda: pyreg.dropout(x, rate, key=KEY),
        "threefry": lambda: pyreg.dropout(x, rate, key=KEY, impl="threefry"),
    }
    if "NumPy" in peers:
        calls["NumPy"] = lambda: x * (rng.random(x.size, dtype=np.float32) < keep) * scale
    if "PyTorch" in peers:
        calls["PyTorch"] = torch_call(x, rate, threads)
    if "Flax" in peers and threads == cpus() and dtype != "float64":
        calls["Flax"] = flax_call(x, rate)
    return calls


def torch_call(x, rate, threads):
    import torch

    torch.set_num_threads(threads)
    # PyTorch does not know the bfloat16 of ml_dtypes, but the bits are the same.
    tensor = torch.from_numpy(x) if x.dtype.kind == "f" else torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return lambda: torch.nn.functional.dropout(tensor, rate)


@functools.cache  # it keeps what was compiled
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
    """Dropout in float64: what is kept is divided by the probability of keeping; what is dropped is 0."""
    y = np.zeros(x.shape, np.float64)
    y[mask] = x[mask].astype(np.float64) / (1 - rate)
    return y


def check(dtype, rate):
    """Raises if a result is wrong.  Yields what was found right."""
    n = 1_000_003  # enough to be shared among threads, and no multiple of a tile
    x = normal(n, dtype)
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
