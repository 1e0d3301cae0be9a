"""Names that the tests of pyreg.jax share.  Tests that import it are skipped where JAX or Flax is missing."""

import warnings

import numpy as np
import pytest
from common import bits

jax = pytest.importorskip("jax")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages, while they are imported
    nnx = pytest.importorskip("flax.nnx")


def has_key_impl(name):
    try:
        jax.random.key(0, impl=name)
    except ValueError:
        return False
    return True


KEY_IMPLS = ["threefry2x32", "rbg", "unsafe_rbg", "threefry4x32", "philox2x32", "philox4x32"]  # the last from JAX 0.10
KEY_IMPLS = [name for name in KEY_IMPLS if has_key_impl(name)]


def flax_dropout(rate, dims=()):
    """Flax's Dropout as a function of x and a key."""
    layer = nnx.Dropout(rate, broadcast_dims=dims, deterministic=False)
    return lambda x, key: layer(x, rngs=key)


def assert_same(got, want):
    """Two trees of arrays are equal in every bit, in shape and in dtype."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(bits(a), bits(b))
