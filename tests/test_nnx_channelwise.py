"""pyreg.nnx.Dropout1d, Dropout2d, Dropout3d, DropPath, WordDropout against Flax's Dropout with broadcast_dims."""

import numpy as np
import pytest
from common import normal, same

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
import pyreg  # noqa: E402
import pyreg.nnx as ours  # noqa: E402

# How to make a layer; the shape of an input; dims that share one draw.
CASES = [
    (ours.Dropout1d, {}, (3, 5, 6), (1,)),
    (ours.Dropout1d, {}, (5, 6), (0,)),
    (ours.Dropout1d, {"axis": 1}, (6, 5), (1,)),
    (ours.Dropout2d, {}, (3, 5, 3, 6), (1, 2)),
    (ours.Dropout2d, {"axis": 1}, (3, 6, 5, 3), (2, 3)),
    (ours.Dropout3d, {}, (3, 5, 3, 2, 6), (1, 2, 3)),
    (ours.Dropout3d, {}, (5, 3, 2, 6), (0, 1, 2)),
    (ours.DropPath, {}, (20, 3, 2), (1, 2)),
    (ours.WordDropout, {}, (4, 5, 3), (2,)),
]
each_case = pytest.mark.parametrize(("make", "options", "shape", "dims"), CASES)


@each_case
def test_the_numbers_of_flax(make, options, shape, dims):
    x = normal(shape, np.float32)
    layer, flax = make(0.5, rngs=nnx.Rngs(0), **options), nnx.Dropout(0.5, broadcast_dims=dims, rngs=nnx.Rngs(0))
    for _ in range(2):
        got = np.asarray(layer(jax.numpy.asarray(x)))
        assert same(got, np.asarray(flax(jax.numpy.asarray(x))))
        assert (got == 0).any()
    layer.eval()
    assert layer(x) is x
    state, flax_state = (jax.tree.structure(nnx.to_pure_dict(nnx.state(a))) for a in (layer, flax))
    assert state == flax_state  # checkpoints fit


@each_case
def test_philox_is_the_mask_of_numpy(make, options, shape, dims):
    x, key = normal(shape, np.float32), jax.random.key(3)
    got = make(0.4, impl="philox", **options)(jax.numpy.asarray(x), rngs=key)
    assert same(np.asarray(got), pyreg.dropout(x, 0.4, key=np.asarray(jax.random.key_data(key)), broadcast_dims=dims))


def test_jit_and_gradient():
    x = normal((2, 3, 4, 5), np.float32)

    @nnx.jit
    def value_and_gradient(layer, x):
        return nnx.value_and_grad(lambda layer, x: (layer(x) ** 2).sum(), argnums=1)(layer, x)

    layer, flax = ours.Dropout2d(0.4, rngs=nnx.Rngs(0)), nnx.Dropout(0.4, broadcast_dims=(1, 2), rngs=nnx.Rngs(0))
    for _ in range(2):
        (y, g), (y_flax, g_flax) = value_and_gradient(layer, x), value_and_gradient(flax, x)
        np.testing.assert_allclose(y, y_flax, rtol=1e-6)
        assert same(np.asarray(g), np.asarray(g_flax))


@pytest.mark.parametrize("make", [ours.DropPath, ours.WordDropout])
def test_without_scale(make):
    x = jax.numpy.asarray(normal((30, 4), np.float16)).at[:, 0].set(np.nan)
    kept = np.asarray(make(0.25, rngs=nnx.Rngs(1))(jax.numpy.ones((30, 4)))) != 0
    assert 0 < kept.sum() < kept.size
    layer = make(0.25, rngs=nnx.Rngs(1), scale_by_keep=False)
    assert same(np.asarray(layer(x)), np.where(kept, x, np.float16(0)))
    assert same(np.asarray(layer(x, deterministic=True)), np.asarray(x))


def test_where_flax_computes():
    """A rate that is not a plain number, nothing to draw, nothing to draw from."""
    x = jax.numpy.ones((10, 3))
    rate, key = np.float32(0.5), jax.random.key(0)
    got, flax = ours.DropPath(rate), nnx.Dropout(rate, broadcast_dims=(1,))
    assert same(np.asarray(got(x, rngs=key)), np.asarray(flax(x, rngs=key)))
    assert ours.DropPath(0.5)(x, deterministic=True) is x
    assert not ours.DropPath(1.0, rngs=nnx.Rngs(0))(x).any()
    with pytest.raises(ValueError, match="no `rngs` argument"):
        ours.DropPath(0.5)(x)


def test_convert_and_revert_leave_them_alone():
    model = nnx.Sequential(nnx.Dropout(0.5), ours.Dropout2d(0.5))
    kinds = [type(layer) for layer in ours.revert(ours.convert(model)).layers]
    assert kinds == [nnx.Dropout, ours.Dropout2d]


def test_errors():
    with pytest.raises(ValueError, match="axis is 0; wanted the dim of the channels"):
        ours.Dropout2d(0.5, axis=0)
    with pytest.raises(ValueError, match="has 2 dims; wanted 4, or 3 without"):
        ours.Dropout2d(0.5, rngs=nnx.Rngs(0))(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="has 0 dims; wanted a batch"):
        ours.DropPath(0.5, rngs=nnx.Rngs(0))(np.float32(1))
    with pytest.raises(ValueError, match="impl is 'x'"):
        ours.WordDropout(0.5, impl="x")
    with pytest.raises(TypeError, match="broadcast_dims"):
        ours.Dropout1d(0.5, broadcast_dims=(1,))
