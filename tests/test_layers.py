"""pyreg.Dropout, the layer."""

import copy
import pickle

import numpy as np
import pytest
import reference
from common import normal, same

import pyreg


def test_training_and_evaluation():
    x = normal((50, 20), np.float32)
    layer = pyreg.Dropout(0.4, rng=1)
    assert layer.training
    y = layer(x)
    assert same(y, reference.dropout(x, 0.4, layer.key))
    assert not same(layer(x), y)  # a fresh mask each time
    assert layer.eval() is layer
    assert layer(x) is x
    assert layer.backward(x) is x
    assert layer.train() is layer
    assert not same(layer(x), x)


def test_backward_makes_the_mask_again():
    x, dy = normal((50, 20), np.float32), normal((50, 20), np.float32, seed=1)
    for impl in ("philox", "threefry"):
        layer = pyreg.Dropout(0.4, rng=1, impl=impl, broadcast_dims=(0,))
        layer(x)
        first = layer.key
        assert same(layer.backward(dy), reference.dropout(dy, 0.4, first, impl, broadcast_dims=(0,)))
        assert layer.key == first
        # Nothing but the key is kept: no array is an attribute.
        assert not any(isinstance(v, np.ndarray) for v in vars(layer).values())


def test_backward_needs_a_call():
    with pytest.raises(RuntimeError, match=r"backward\(\) before a call; wanted layer\(x\) first"):
        pyreg.Dropout().backward(np.ones(3))


def test_backward_is_that_of_the_last_call():
    x = np.ones(100)
    layer = pyreg.Dropout(0.5, rng=1)
    y = layer(x)
    assert same(layer.eval().backward(x), y)
    layer(x)
    assert layer.train().backward(x) is x


def test_gradient_by_finite_differences():
    x, dy = normal(30, np.float64), normal(30, np.float64, seed=1)
    layer = pyreg.Dropout(0.3, rng=2)
    layer(x)
    dx, key = layer.backward(dy), layer.key
    for i in range(30):
        h = np.zeros(30)
        h[i] = 1e-6
        numeric = dy @ (pyreg.dropout(x + h, 0.3, key=key) - pyreg.dropout(x - h, 0.3, key=key)) / 2e-6
        assert abs(dx[i] - numeric) < 1e-6


def test_not_inverted():
    x = np.ones(1000, np.float32)
    layer = pyreg.Dropout(0.25, rng=3, inverted=False)
    assert set(layer(x)) == {0.0, 1.0}
    assert set(layer.backward(x)) == {0.0, 1.0}
    layer.eval()
    assert set(layer(x)) == {0.75}
    assert set(layer.backward(x)) == {0.75}
    assert layer(x).dtype == np.float32


def test_out():
    x, out = np.ones(100), np.empty(100)
    layer = pyreg.Dropout(0.5, rng=4)
    for mode in (True, False):
        for inverted in (True, False):
            layer.train(mode).inverted = inverted
            assert layer(x, out=out) is out
            assert layer.backward(x, out=out) is out
    with pytest.raises(ValueError, match="out has shape"):
        layer(x, out=np.empty(3))


def test_state_copy_and_pickle():
    x = np.ones(100)
    layer = pyreg.Dropout(0.5, rng=5)
    layer(x)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), pyreg.Dropout(0.5)]
    twins[-1].load_state_dict(layer.state_dict())
    want = layer(x)
    for twin in twins:
        assert same(twin(x), want)
    layer.load_state_dict({})  # PyTorch's Dropout has no state
    with pytest.raises(ValueError, match=r"state has \['p'\]; wanted 'rng' only"):
        layer.load_state_dict({"p": 0.5})


def test_copies_go_on_by_themselves():
    x = np.ones(100)
    layer = pyreg.Dropout(0.5, rng=5)
    twin = copy.copy(layer)
    first = layer(x)
    assert same(twin(x), first)


def test_a_seed_gives_the_same_layer():
    x = np.ones(100)
    assert same(pyreg.Dropout(rng=6)(x), pyreg.Dropout(rng=6)(x))
    assert not same(pyreg.Dropout()(x), pyreg.Dropout()(x))


def test_errors():
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        pyreg.Dropout(1.5)
    with pytest.raises(ValueError, match="impl is 'x'"):
        pyreg.Dropout(impl="x")
    with pytest.raises(TypeError, match="x has dtype int64"):
        pyreg.Dropout(rng=0)(np.arange(3))
    with pytest.raises(TypeError, match="x has dtype int64"):
        pyreg.Dropout(rng=0).eval()(np.arange(3))


def test_repr():
    assert repr(pyreg.Dropout(0.1)) == "Dropout(rate=0.1, broadcast_dims=(), impl='philox', inverted=True)"
