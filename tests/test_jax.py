"""impl="threefry" gives the masks and values of jax.random.bernoulli and of Flax's own Dropout, bit for bit."""

import json
import math
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from common import bits, same
from hypothesis import given
from hypothesis import strategies as st

import pyreg

ROWS = json.loads((Path(__file__).parent / "data" / "jax_masks.json").read_text())["rows"]


def as_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def impl(x64):
    return "threefry_x64" if x64 else "threefry"


@pytest.mark.parametrize("x64", [False, True])
def test_recorded_masks(isa, x64):
    rows = [row for row in ROWS if row["kind"] == "mask" and row["x64"] == x64]
    assert len(rows) > 200
    for row in rows:
        key = np.array(row["key"], np.uint32)
        got = pyreg.dropout_mask(tuple(row["shape"]), row["rate"], key=key, impl=impl(x64), packed=True)
        assert got.tobytes().hex() == row["mask"], row


@pytest.mark.parametrize("x64", [False, True])
def test_recorded_values(isa, x64):
    rows = [row for row in ROWS if row["kind"] == "dropout" and row["x64"] == x64]
    assert len(rows) > 100
    for row in rows:
        x = np.linspace(-3, 3, int(np.prod(row["shape"]))).reshape(row["shape"]).astype(as_dtype(row["dtype"]))
        key = np.array(row["key"], np.uint32)
        got = pyreg.dropout(x, row["rate"], key=key, impl=impl(x64), broadcast_dims=tuple(row["broadcast_dims"]))
        assert got.tobytes().hex() == row["value_bits"], row


# ---- Against the installed JAX and Flax ------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
rates = st.one_of(st.sampled_from([0.1, 0.5, 1 / 3, 0.9, 1e-4, 1e-9, 1 - 1e-6]), st.floats(1e-12, 1 - 1e-12))
shapes = st.sampled_from([(), (1,), (7,), (0, 3), (3, 5), (257,), (2, 3, 5)])  # few: JAX compiles for each


def test_bernoulli(x64):
    jax = pytest.importorskip("jax")

    @given(seed=seeds, rate=rates, shape=shapes)
    def check(seed, rate, shape):
        key = jax.random.key(seed)
        want = np.asarray(jax.random.bernoulli(key, 1.0 - rate, shape))
        got = pyreg.dropout_mask(shape, rate, key=np.asarray(jax.random.key_data(key)), impl=impl(x64))
        assert (got == want).all()

    check()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_flax(x64, dtype):
    from jaxcommon import eager_flax_dropout, jax  # skips where JAX or Flax is missing

    if dtype == "float64" and not x64:
        pytest.skip("without x64 JAX has no float64")

    # Not one element alone: there XLA outside jit divides by 1 - rate, while else it multiplies by the reciprocal.
    @given(seed=seeds, rate=rates, shape=shapes.filter(lambda shape: math.prod(shape) != 1), data=st.data())
    def check(seed, rate, shape, data):
        dims = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1))))
        x = np.random.default_rng(seed).standard_normal(shape).astype(as_dtype(dtype))
        key = jax.random.key(seed)
        want = np.asarray(eager_flax_dropout(rate, dims)(jax.numpy.asarray(x), key))
        words = np.asarray(jax.random.key_data(key))
        got = pyreg.dropout(x, rate, key=words, impl=impl(x64), broadcast_dims=dims)
        tiny = np.abs(want.astype(np.float64)) < ml_dtypes.finfo(got.dtype).smallest_normal  # XLA flushes these
        assert got.dtype == want.dtype
        assert (bits(got) == bits(want))[~tiny].all()

    check()


def test_flax_large(x64):
    jax = pytest.importorskip("jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nnx = pytest.importorskip("flax.nnx")
    x = np.random.default_rng(0).standard_normal((1000, 1031)).astype(np.float32)
    key = jax.random.key(5)
    want = np.asarray(jax.jit(lambda x, key: nnx.Dropout(0.1, deterministic=False)(x, rngs=key))(x, key))
    assert same(pyreg.dropout(x, 0.1, key=np.asarray(jax.random.key_data(key)), impl=impl(x64)), want)
