"""pyreg.Dropout1d, Dropout2d, Dropout3d, DropPath, WordDropout: what the mask is shared by."""

import copy
import pickle

import numpy as np
import pytest
import reference
from common import DTYPES, normal, same

import pyreg

CHANNELS = [pyreg.Dropout1d, pyreg.Dropout2d, pyreg.Dropout3d]
# How to make a layer; the shape of an input; dims that share one draw.
CASES = [
    (pyreg.Dropout1d, {}, (4, 6, 5), (2,)),
    (pyreg.Dropout1d, {}, (6, 5), (1,)),
    (pyreg.Dropout1d, {"axis": -1}, (4, 5, 6), (1,)),
    (pyreg.Dropout1d, {"axis": 2}, (5, 6), (0,)),
    (pyreg.Dropout2d, {}, (4, 6, 5, 3), (2, 3)),
    (pyreg.Dropout2d, {}, (6, 5, 3), (1, 2)),
    (pyreg.Dropout2d, {"axis": -1}, (4, 5, 3, 6), (1, 2)),
    (pyreg.Dropout2d, {"axis": -1}, (5, 3, 6), (0, 1)),
    (pyreg.Dropout2d, {"axis": 2}, (4, 5, 6, 3), (1, 3)),
    (pyreg.Dropout2d, {"axis": -2}, (5, 6, 3), (0, 2)),
    (pyreg.Dropout3d, {}, (4, 6, 5, 3, 2), (2, 3, 4)),
    (pyreg.Dropout3d, {}, (6, 5, 3, 2), (1, 2, 3)),
    (pyreg.Dropout3d, {"axis": 4}, (4, 5, 3, 2, 6), (1, 2, 3)),
    (pyreg.Dropout3d, {"axis": 4}, (5, 3, 2, 6), (0, 1, 2)),
    (pyreg.DropPath, {}, (20, 3, 5), (1, 2)),
    (pyreg.DropPath, {}, (20,), ()),
    (pyreg.WordDropout, {}, (3, 8, 5), (2,)),
    (pyreg.WordDropout, {}, (8, 5), (1,)),
    (pyreg.WordDropout, {}, (2, 3, 4, 5), (3,)),
]
each_case = pytest.mark.parametrize(("make", "options", "shape", "dims"), CASES)


@each_case
def test_forward_and_backward(make, options, shape, dims):
    x, dy = normal(shape, np.float32), normal(shape, np.float32, seed=1)
    for impl in ("philox", "threefry"):
        layer = make(0.4, rng=1, impl=impl, **options)
        assert isinstance(layer, pyreg.Dropout)
        assert same(layer(x), reference.dropout(x, 0.4, layer.key, impl, broadcast_dims=dims))
        mask = pyreg.dropout_mask(shape, 0.4, key=layer.key, impl=impl, broadcast_dims=dims)
        assert 0 < mask.sum() < mask.size
        assert same(layer.backward(dy), np.where(mask, dy * np.float32(1 / np.float32(0.6)), np.float32(0)))
        assert layer.eval()(x) is x
        assert layer.backward(dy) is dy


@pytest.mark.parametrize(
    ("make", "batched"),  # but for Dropout2d without a batch: PyTorch still takes three dims for (N, C, L)
    [(make, batched) for make in CHANNELS for batched in (True, False) if batched or make is not pyreg.Dropout2d],
)
def test_masks_have_the_structure_of_pytorchs(make, batched):
    """In both, a channel is all kept and scaled, or all dropped, and as often."""
    torch = pytest.importorskip("torch")
    spatial = CHANNELS.index(make) + 1
    shape = ((50,) if batched else ()) + (400,) + (3,) * spatial
    torch.manual_seed(0)
    theirs = getattr(torch.nn, make.__name__)(0.2)(torch.ones(shape)).numpy()
    ours = make(0.2, rng=0)(np.ones(shape, np.float32))
    for y in (ours, theirs):
        channels = y.reshape(-1, 3**spatial)
        assert (channels == channels[:, :1]).all()
        assert set(channels[:, 0]) == {np.float32(0), np.float32(1.25)}
        kept, n = np.count_nonzero(channels[:, 0]), len(channels)
        assert abs(kept - 0.8 * n) < 4 * np.sqrt(0.16 * n)
    assert make().rate == getattr(torch.nn, make.__name__)().p
    assert make().axis == 1


def test_channels_draw_for_themselves():
    """Neither samples nor channels share a draw: all four patterns of two neighbours occur as often as they should."""
    y = pyreg.Dropout2d(0.5, rng=0)(np.ones((200, 100, 2, 2), np.float32))[..., 0, 0] != 0
    for a, b in ((y[1:], y[:-1]), (y[:, 1:], y[:, :-1])):
        both = np.bincount((2 * a + b).ravel(), minlength=4)
        assert (abs(both - a.size / 4) < 4 * np.sqrt(a.size * 3 / 16)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_rates(dtype):
    x = normal((3, 4, 5, 2), dtype)
    for make in (pyreg.Dropout2d, pyreg.DropPath, pyreg.WordDropout):
        layer = make(0.25, rng=2)
        dims = {pyreg.Dropout2d: (2, 3), pyreg.DropPath: (1, 2, 3), pyreg.WordDropout: (3,)}[make]
        assert same(layer(x), reference.dropout(x, 0.25, layer.key, broadcast_dims=dims))
        assert same(make(0.0, rng=2)(x), x)
        assert same(make(1.0, rng=2)(x), np.zeros_like(x))


@pytest.mark.parametrize("make", [pyreg.DropPath, pyreg.WordDropout])
def test_scales(make):
    """In training, in evaluation."""
    x = np.ones((64, 4), np.float32)
    for options, kept, evaluated in (
        ({}, 4 / 3, 1),
        ({"scale_by_keep": False}, 1, 1),
        ({"inverted": False}, 1, 0.75),
    ):
        layer = make(0.25, rng=3, **options)
        assert set(layer(x).ravel()) == {np.float32(0), np.float32(kept)}
        assert set(layer.backward(x).ravel()) == {np.float32(0), np.float32(kept)}
        assert set(layer.eval()(x).ravel()) == {np.float32(evaluated)}
        assert set(layer.backward(x).ravel()) == {np.float32(evaluated)}


def test_not_inverted_channels():
    x = np.ones((50, 8, 3), np.float32)
    layer = pyreg.Dropout1d(0.25, rng=3, inverted=False)
    assert set(layer(x).ravel()) == {0.0, 1.0}
    assert set(layer.eval()(x).ravel()) == {0.75}


def test_word_dropout_of_the_matrix_drops_types():
    """Gal and Ghahramani's embedding dropout: the same word is dropped wherever it occurs."""
    matrix = normal((10, 4), np.float32)
    text = np.array([[1, 2, 1, 3], [3, 1, 2, 2]])
    words = pyreg.WordDropout(0.5, rng=5)(matrix)[text]
    dropped = (words == 0).all(axis=-1)
    assert 0 < dropped.sum() < dropped.size
    for word in range(1, 4):
        assert len(set(dropped[text == word])) == 1


@each_case
def test_state_copy_and_pickle(make, options, shape, dims):
    x = normal(shape, np.float32)
    layer = make(0.5, rng=5, **options)
    layer(x)
    twins = [copy.copy(layer), pickle.loads(pickle.dumps(layer)), make(0.5, **options)]
    twins[-1].load_state_dict(layer.state_dict())
    want = layer(x)
    for twin in twins:
        assert same(twin(x), want)
        assert repr(twin) == repr(layer)


def test_out_and_lists():
    x = np.ones((4, 6, 5))
    layer, out = pyreg.Dropout1d(rng=0), np.empty((4, 6, 5))
    assert layer(x, out=out) is out
    assert same(layer.backward(x.tolist()), out)


@pytest.mark.parametrize("make", CHANNELS)
def test_wrong_number_of_dims(make):
    spatial = CHANNELS.index(make) + 1
    for ndim in (0, spatial, spatial + 3):
        layer = make(rng=0)
        before = layer.state_dict()
        for mode in (True, False):
            with pytest.raises(ValueError, match=f"has {ndim} dims; wanted {spatial + 2}, or {spatial + 1} without"):
                layer.train(mode)(np.ones((2,) * ndim))
        assert layer.state_dict() == before  # no key was drawn
        layer.train()(np.ones((2,) * (spatial + 1)))
        with pytest.raises(ValueError, match=f"has {ndim} dims"):
            layer.backward(np.ones((2,) * ndim))


def test_errors():
    with pytest.raises(ValueError, match=r"axis is 4; wanted a dim of an array with 4 dims"):
        pyreg.Dropout2d(axis=4)
    for axis in (0, -4):
        with pytest.raises(ValueError, match=f"axis is {axis}; wanted the dim of the channels, but dim 0 is the batch"):
            pyreg.Dropout2d(axis=axis)
    with pytest.raises(ValueError, match=r"has 0 dims; wanted a batch of samples, \(N, ...\)"):
        pyreg.DropPath(0.5)(np.float32(1))
    with pytest.raises(ValueError, match=r"has 0 dims; wanted words, \(..., features\)"):
        pyreg.WordDropout(0.5)(np.float32(1))
    for make in (pyreg.Dropout1d, pyreg.DropPath, pyreg.WordDropout):
        with pytest.raises(ValueError, match=r"rate is 1\.5"):
            make(1.5)
        with pytest.raises(ValueError, match="impl is 'x'"):
            make(0.5, impl="x")
        with pytest.raises(TypeError, match="x has dtype int64"):
            make(0.5, rng=0)(np.ones((2, 2), np.int64))


def test_repr():
    assert repr(pyreg.Dropout2d(0.1, axis=-1)) == "Dropout2d(rate=0.1, axis=-1, impl='philox', inverted=True)"
    assert repr(pyreg.DropPath(0.1)) == "DropPath(rate=0.1, scale_by_keep=True, impl='philox', inverted=True)"


@pytest.mark.parametrize(
    ("make", "options", "change"),
    [
        (pyreg.Dropout2d, {}, {"axis": -1}),
        (pyreg.Dropout2d, {"axis": -1}, {"axis": 0}),  # which is wrong, for the next call
        (pyreg.DropPath, {}, {"scale_by_keep": False}),
        (pyreg.WordDropout, {"scale_by_keep": False}, {"scale_by_keep": True}),
        (pyreg.Dropout2d, {}, {"rate": 0.9}),
        (pyreg.DropPath, {"inverted": False}, {"inverted": True}),
        (pyreg.WordDropout, {}, {"impl": "threefry"}),
    ],
)
def test_backward_takes_the_settings_of_its_call(make, options, change):
    x = np.ones((4, 6, 5, 3), np.float32)
    for training in (True, False):
        layer = make(0.4, rng=1, **options).train(training)
        y = layer(x)
        for name, value in change.items():
            setattr(layer, name, value)
        assert same(layer.backward(x), y)


def test_settings_are_checked_when_they_are_used():
    for make, name, bad, error, message in (
        (pyreg.Dropout2d, "axis", 0, ValueError, "axis is 0; wanted the dim of the channels"),
        (pyreg.Dropout2d, "axis", "1", TypeError, "axis is of type str; wanted an int"),
        (pyreg.DropPath, "scale_by_keep", "no", TypeError, "scale_by_keep is of type str"),
        (pyreg.WordDropout, "rate", 2, ValueError, "rate is 2"),
    ):
        x = np.ones((4, 6, 5, 3), np.float32)
        for training in (True, False):
            layer = make(0.4, rng=1).train(training)
            y, state = layer(x), layer.state_dict()
            setattr(layer, name, bad)
            with pytest.raises(error, match=message):
                layer(x)
            assert layer.state_dict() == state
            assert same(layer.backward(x), y)
