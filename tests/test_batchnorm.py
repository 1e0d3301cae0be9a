"""pyreg.batch_norm, batch_norm_inference and batch_norm_backward against the naive reference; and the layer."""

import copy
import hashlib
import itertools
import pickle

import numpy as np
import pytest
import reference
from common import DTYPES, layouts, normal, same
from hypothesis import given
from hypothesis import strategies as st

import pyreg
from pyreg import _core

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
# Errors relative to the largest value: rounding of the result for the halves, a few roundings for the others.
TOLERANCE = dict(zip(DTYPES, (6e-7, 4e-14, 6e-4, 5e-3), strict=True))

SHAPES = [  # shape, axis: why
    ((8, 16), -1),
    ((7,), 0),  # n = 1
    ((1, 5), 1),
    ((100, 1), 1),  # one channel
    ((1000, 7), 1),  # short rows go side by side; the last group is not full
    ((300, 15), 1),
    ((300, 17), 1),  # a vector and a bit
    ((130, 1500), 1),  # more columns than one block
    ((700, 33), 1),  # several pieces
    ((3, 4, 5, 6), 1),  # places of a channel side by side
    ((3, 4, 5, 6), 2),
    ((3, 2, 4, 31), 1),  # just not a line
    ((3, 2, 4, 8), 1),  # 32: just a line
    ((5, 30, 7, 7), 1),  # summed as rows, swept as lines
    ((5, 30, 9, 9), 1),  # several lines in a block, a tail
    ((2, 3, 40, 37), 1),
    ((2, 3, 200, 300), 1),  # a line in several pieces
    ((40_000, 3), 1),  # a channel in several pieces
    ((2, 1030, 2), 1),
    ((3, 2, 2, 2, 2, 3, 2, 2), 4),
]


def parameters(channels, dtype, seed=1):
    rng = np.random.default_rng(seed)
    dtype = F64 if dtype == F64 else F32
    return rng.uniform(0.5, 2, channels).astype(dtype), rng.standard_normal(channels).astype(dtype)


def masked_somewhere(shape, axis, seed=2):
    """A mask that is true in each channel."""
    mask = np.random.default_rng(seed).random(shape) < 0.7
    mask[tuple(slice(None) if d == axis % len(shape) else 0 for d in range(len(shape)))] = True
    return mask


def close(got, want, tolerance):
    assert got.shape == want.shape
    got, largest = got.astype(np.float64), np.abs(want).max(initial=1e-300)
    assert np.abs(got - want).max(initial=0) <= tolerance * largest


# ---- Against the definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("masked", [False, True])
def test_definition(isa, dtype, shape, axis, activation, masked):
    x, dy, residual = (normal(shape, dtype, seed) * dtype.type(2) + dtype.type(seed) for seed in (1, 0, 2))
    scale, bias = parameters(shape[axis], dtype)
    options = {"axis": axis, "activation": activation, "epsilon": 1e-3}
    mask = masked_somewhere(shape, axis) if masked else None
    extra = residual if activation else None
    y, mean, var = pyreg.batch_norm(x, scale, bias, mask=mask, residual=extra, **options)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == scale.dtype
    want_y, want_mean, want_var = reference.batch_norm(x, scale, bias, mask=mask, residual=extra, **options)
    of_float = 4e-14 if dtype == F64 else 1e-7
    close(mean, want_mean, of_float)
    close(var, want_var, 2 * of_float)
    close(y, want_y, TOLERANCE[dtype])

    inferred = pyreg.batch_norm_inference(x, mean, var, scale, bias, residual=extra, **options)
    close(inferred, want_y, 2 * TOLERANCE[dtype])

    got = pyreg.batch_norm_backward(dy, x, mean, var, scale, mask=mask, y=y, **options)
    want = reference.batch_norm_backward(dy, x, scale, mask=mask, y=y, **options)
    assert len(got) == (4 if activation else 3)
    tolerances = TOLERANCE[dtype] * 4, 100 * of_float, 100 * of_float, 0
    if x.size > 4 * shape[axis]:  # fewer cancel to nothing
        for g, w, tolerance in zip(got, want, tolerances, strict=False):
            close(g, w, tolerance)


@given(st.sampled_from(DTYPES[:2]), st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_any_shape_and_axis(dtype, shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    x = normal([shape[d] for d in order], dtype).transpose(np.argsort(order))
    y, mean, var = pyreg.batch_norm(x, axis=axis)
    want = reference.batch_norm(x, axis=axis)
    for got, wanted in zip((y, mean, var), want, strict=True):
        close(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_bias_are_optional(dtype):
    x = normal((50, 6), dtype)
    scale, bias = parameters(6, dtype)
    one, zero = np.ones_like(scale), np.zeros_like(bias)
    assert same(pyreg.batch_norm(x)[0], pyreg.batch_norm(x, one, zero)[0])
    assert same(pyreg.batch_norm(x, scale)[0], pyreg.batch_norm(x, scale, zero)[0])
    assert same(pyreg.batch_norm(x, bias=bias)[0], pyreg.batch_norm(x, one, bias)[0])


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((300, 20), 1), ((4, 6, 9, 9), 1)])
def test_halves_are_rounded_once(isa, dtype, shape, axis):
    """The statistics are those of the same numbers in float32, and every element is rounded from the float32 result."""
    x, residual, dy = (normal(shape, dtype, seed) for seed in range(3))
    scale, bias = parameters(shape[axis], dtype)
    options = {"axis": axis, "activation": "relu"}
    y, mean, var = pyreg.batch_norm(x, scale, bias, residual=residual, **options)
    wide_y, wide_mean, wide_var = pyreg.batch_norm(x.astype(F32), scale, bias, residual=residual.astype(F32), **options)
    assert same(mean, wide_mean)
    assert same(var, wide_var)
    assert same(y, wide_y.astype(dtype))
    dx, dscale, dbias, _ = pyreg.batch_norm_backward(dy, x, mean, var, scale, y=y, **options)
    wide = pyreg.batch_norm_backward(dy.astype(F32), x.astype(F32), mean, var, scale, y=y.astype(F32), **options)
    assert same(dscale, wide[1])
    assert same(dbias, wide[2])
    assert same(dx, wide[0].astype(dtype))


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 20), (2, 3, 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_finite_differences(shape, masked):
    x, residual, dy = (normal(shape, F64, seed) for seed in range(3))
    scale, bias = parameters(3, F64)
    mask = masked_somewhere(shape, 1) if masked else None
    options = {"axis": 1, "mask": mask, "activation": "relu", "epsilon": 1e-2}

    def loss(x, scale, bias, residual):
        return (pyreg.batch_norm(x, scale, bias, residual=residual, **options)[0] * dy).sum()

    arguments = [x, scale, bias, residual]
    y, mean, var = pyreg.batch_norm(x, scale, bias, residual=residual, **options)
    gradients = pyreg.batch_norm_backward(dy, x, mean, var, scale, y=y, **options)
    h = 1e-6
    for k, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            ends = []
            for step in (h, -h):
                moved = [a.copy() for a in arguments]
                moved[k][index] += step
                ends.append(loss(*moved))
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(gradient[index], rel=1e-6, abs=1e-7)


# ---- Accuracy ------------------------------------------------------------------------------------------------------


def offset_normal(ratio, shape, axis):
    """Standard deviation about 1, |mean| about ratio, signs by channel."""
    signs = np.resize([1.0, -1.0], shape[axis]) * ratio
    return (
        np.random.default_rng(3).standard_normal(shape) + reference._by_channel(signs, np.empty(shape), axis)
    ).astype(F32)


RATIOS = [1, 30, 900, 1100, 1e4, 1e5, 1e6, 1e7]  # a piece is summed a second time from about 1000 on


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((60_000, 4), 1), ((2000, 40), 1), ((8, 4, 70, 50), 1), ((2, 3, 200_000), 1), ((500, 30, 3, 3), 1)],
)
def test_any_ratio_of_mean_to_deviation(ratio, shape, axis):
    x = offset_normal(ratio, shape, axis)
    scale, bias = parameters(shape[axis], F32)
    y, _, var = pyreg.batch_norm(x, scale, bias, axis=axis)
    want, _, want_var = reference.batch_norm(x, scale, bias, axis=axis)
    assert np.abs(var / want_var - 1).max() < 4e-7
    others = reference._others(x, axis)
    largest = np.abs(want - reference._by_channel(bias, x, axis)).max(others, keepdims=True)
    assert (np.abs(y - want) / np.spacing(largest.astype(F32))).max() < 4
    if ratio <= 1e4:
        dy = normal(shape, F32)
        got = pyreg.batch_norm_backward(dy, x, *pyreg.batch_norm(x, axis=axis)[1:], scale, axis=axis)
        wanted = reference.batch_norm_backward(dy, x, scale, axis=axis)
        for g, w in zip(got, wanted, strict=False):
            assert np.linalg.norm(g - w) < 1e-6 * np.linalg.norm(w)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("shape", "axis"), [((1 << 22, 2), 1), ((16, 2, 512, 512), 1), ((1, 2, 1 << 22), 1)])
def test_any_ratio_in_large_batches(ratio, shape, axis):
    test_any_ratio_of_mean_to_deviation(ratio, shape, axis)


def test_a_ratio_that_changes_within_a_channel():
    """Most of a channel near zero, some of it far away: pieces of both kinds merge."""
    x = normal((100_000, 3), F32)
    x[70_000:, 1] += 1e6
    x[::7, 2] += 3e4
    _, mean, var = pyreg.batch_norm(x)
    _, want_mean, want_var = reference.batch_norm(x)
    np.testing.assert_allclose(mean, want_mean, rtol=1e-7)
    np.testing.assert_allclose(var, want_var, rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("value", [3.3, -1e4, 1e-30])
def test_a_constant_channel_gives_the_bias(dtype, shape, axis, value):
    bias = parameters(shape[axis], dtype)[1]
    y, mean, var = pyreg.batch_norm(np.full(shape, value, dtype), None, bias, axis=axis)
    assert (mean == np.array(value, dtype).astype(mean.dtype)).all()
    assert (var == 0).all()
    want = np.broadcast_to(reference._by_channel(bias, y, axis), shape).astype(bias.dtype).astype(dtype)
    assert same(y, np.ascontiguousarray(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((4096, 5), 1), ((64, 33), 1), ((16, 3, 16, 16), 1), ((8, 24, 2, 4), 1)])
def test_exact_where_the_data_allow_it(isa, dtype, shape, axis):
    """Half of each channel is m + d, half m - d, all small integers: mean m and variance d * d, tolerance 0."""
    c = shape[axis]
    m, d = np.arange(c) % 7 - 3.0, 2.0 ** (np.arange(c) % 3)
    n = np.prod(shape) // c
    signs = np.random.default_rng(4).permuted(np.resize([1.0, -1.0], (c, n)), axis=1)
    x = (m[:, None] + signs * d[:, None]).reshape(c, *(shape[k] for k in range(len(shape)) if k != axis))
    x = np.moveaxis(x, 0, axis).astype(dtype).copy()
    y, mean, var = pyreg.batch_norm(x, axis=axis, epsilon=0)
    assert (mean == m).all()
    assert (var == d * d).all()
    assert (y == np.moveaxis(signs.reshape(np.moveaxis(x, axis, 0).shape), 0, axis).astype(dtype)).all()
    dx, dscale, dbias = pyreg.batch_norm_backward(y, x, mean, var, axis=axis, epsilon=0)
    assert (dscale == n).all()
    assert (dbias == 0).all()
    assert (dx == 0).all()


# ---- Bits ----------------------------------------------------------------------------------------------------------


def all_results(dtype, shape, axis):
    """Every output of the three functions, plain, masked and with the epilogue."""
    x, residual, dy = (normal(shape, dtype, seed) for seed in range(3))
    x[..., -1] += dtype.type(5e3)
    scale, bias = parameters(shape[axis], dtype)
    for options in ({}, {"mask": masked_somewhere(shape, axis)}, {"activation": "relu", "residual": residual}):
        y, mean, var = pyreg.batch_norm(x, scale, bias, axis=axis, **options)
        yield from (y, mean, var)
        options.pop("residual", None)
        yield from pyreg.batch_norm_backward(dy, x, mean, var, scale, axis=axis, y=y, **options)
        options.pop("mask", None)
        yield pyreg.batch_norm_inference(x, mean, var, scale, bias, axis=axis, **options)


DETERMINED = [((40_000, 20), 1), ((150_000, 3), 1), ((16, 64, 20, 21), 1), ((3, 2, 300, 400), 1), ((300, 1200), 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), DETERMINED)
def test_threads(threads, dtype, shape, axis):
    threads(1)
    want = list(all_results(dtype, shape, axis))
    for n in (2, 3, 5, 16):
        threads(n)
        for got, wanted in zip(all_results(dtype, shape, axis), want, strict=True):
            assert same(got, wanted), n


GOLDEN = {  # sha256 of all results: when the order of additions changes, these do, and CHANGELOG says so
    "float32": "febeef86197bfb3f",
    "float64": "ae71628a169c0753",
    "float16": "d7547689cba4d304",
    "bfloat16": "20857d0ee0e8e376",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_golden(isa, dtype):
    digest = hashlib.sha256()
    rng = np.random.default_rng(5)
    for shape, axis in [((5000, 20), 1), ((3000, 3), 1), ((4, 6, 9, 9), 1), ((2, 2, 200, 210), 1), ((90, 8, 2, 3), 1)]:
        x, dy = (rng.integers(-999, 999, shape) / 256 for _ in range(2))  # no library's sampling in the way
        x, dy = x.astype(dtype), dy.astype(dtype)
        scale = (1 + np.arange(shape[axis]) / 8).astype(F64 if dtype == F64 else F32)
        y, mean, var = pyreg.batch_norm(x, scale, -scale, axis=axis, activation="relu", residual=dy)
        gradients = pyreg.batch_norm_backward(dy, x, mean, var, scale, axis=axis, activation="relu", y=y)
        for result in (y, mean, var, *gradients):
            digest.update(result.tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[dtype.name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((70, 33), 1), ((70, 5), 1), ((3, 5, 70), 1), ((9, 4, 2, 11), 1), ((4, 3, 1100), 1)]
)
def test_layouts(isa, dtype, shape, axis):
    """Another layout of x is summed in another order; its alignment, and the layout of other arrays, change no bit."""
    x, residual, dy = (normal(shape, dtype, seed) for seed in range(3))
    scale, bias = parameters(shape[axis], dtype)
    options = {"axis": axis, "activation": "relu"}
    want = pyreg.batch_norm(x, scale, bias, residual=residual, **options)
    want_back = pyreg.batch_norm_backward(dy, x, *want[1:], scale, y=want[0], **options)
    for name, a in layouts(x):
        before = a.copy()
        y, mean, var = pyreg.batch_norm(a, scale, bias, residual=residual, **options)
        close(y, want[0].astype(np.float64), 2 * TOLERANCE[dtype])
        assert same(a, before), name
        if name in ("off the cache line", "odd address"):
            assert same(y, want[0]), name
            assert same(mean, want[1]), name
            assert same(var, want[2]), name
    for (name, a), (_, b), (_, c) in zip(layouts(np.empty_like(x)), layouts(residual), layouts(dy), strict=True):
        got = pyreg.batch_norm(x, scale, bias, residual=b, out=a, **options)
        assert got[0] is a
        assert all(same(g, w) for g, w in zip(got, want, strict=True)), name
        back = pyreg.batch_norm_backward(c, x, *want[1:], scale, y=a, **options)
        for g, w in zip(back, want_back, strict=True):
            close(g, w.astype(np.float64), 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((70, 33), 1), ((4, 30, 7, 7), 1), ((2, 3, 40_000), 1), ((50_000, 5), 1)])
def test_in_place(threads, dtype, shape, axis):
    x, residual, dy = (normal(shape, dtype, seed) for seed in range(3))
    scale, bias = parameters(shape[axis], dtype)
    y, mean, var = pyreg.batch_norm(x, scale, bias, axis=axis, residual=residual)
    for name, a in (("x", x.copy()), ("residual", residual.copy())):
        arguments = {"x": x, "residual": residual, name: a}
        assert same(pyreg.batch_norm(scale=scale, bias=bias, axis=axis, out=a, **arguments)[0], y)
        arguments = {"x": x, "residual": residual, name: a}
        a[...] = {"x": x, "residual": residual}[name]
        inferred = pyreg.batch_norm_inference(x, mean, var, scale, bias, axis=axis, residual=residual)
        pyreg.batch_norm_inference(mean=mean, var=var, scale=scale, bias=bias, axis=axis, out=a, **arguments)
        assert same(a, inferred)
    dx = pyreg.batch_norm_backward(dy, x, mean, var, scale, axis=axis)[0]
    for name, a in (("x", x.copy()), ("dy", dy.copy())):
        arguments = {"x": x, "dy": dy, name: a}
        got = pyreg.batch_norm_backward(mean=mean, var=var, scale=scale, axis=axis, out=a, **arguments)[0]
        assert got is a
        assert same(a, dx)


def test_out_that_partly_overlaps():
    for shift in (1, 3, 5000):
        for sign in (1, -1):
            memory = normal(25_000, F32)
            x, out = (m[:20_000].reshape(-1, 5) for m in (memory[shift:], memory[:-shift])[::sign])
            want = pyreg.batch_norm(x.copy())[0]
            assert same(pyreg.batch_norm(x, out=out)[0], want)
    memory = normal((50, 50), F32)
    want = pyreg.batch_norm(memory.copy(), residual=memory.T.copy())[0]
    assert same(pyreg.batch_norm(memory, residual=memory.T, out=memory)[0], want)


def test_overlap_changes_no_bit():
    """The order of the sums follows from x's strides, so a copy in another layout would not do."""
    for order in "CF":
        memory = np.array(normal((3001, 37), F64) + 5, order=order)
        kept = memory.copy("K")
        for flip in (slice(None), slice(None, None, -1)):
            memory[...] = kept
            want = pyreg.batch_norm(memory[1:][flip])
            got = pyreg.batch_norm(memory[1:][flip], out=memory[:-1])
            assert all(same(g, w) for g, w in zip(got, want, strict=True))


def test_past_the_cache(threads):
    """Large enough to be written around the cache, at an odd place of a cache line."""
    n = 2 * _core.config()["cache_bytes"] // 4 // 48 // 10 * 10
    if n * 48 * 8 > 2**30:
        pytest.skip("the last-level cache is very large")
    x = np.random.default_rng(0).standard_normal(n * 48 + 1, F32)[1:].reshape(n, 48)
    small = pyreg.batch_norm_inference(x[-1000:], np.zeros(48), np.ones(48))
    assert same(pyreg.batch_norm_inference(x, np.zeros(48), np.ones(48))[-1000:], small)
    y, mean, var = pyreg.batch_norm(x)
    close(y[-1000:], reference.normalise(x[-1000:], mean, var), 1e-6)
    dx = pyreg.batch_norm_backward(y, x, mean, var)[0]  # dy = xhat: no gradient is left, up to epsilon
    assert np.abs(dx).max() < 1e-4


# ---- Edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "axis"), [((200, 20), 1), ((2000, 5), 1), ((5, 30, 7, 7), 1), ((2, 3, 2000), 1)])
def test_specials_stay_in_their_channel(isa, dtype, special, shape, axis):
    x, dy = normal(shape, dtype), normal(shape, dtype, 1)
    y, mean, var = pyreg.batch_norm(x, axis=axis)
    dx = pyreg.batch_norm_backward(dy, x, mean, var, axis=axis)[0]
    where = [0] * len(shape)
    where[axis] = 2
    x[tuple(where)] = special
    new_y, new_mean, new_var = pyreg.batch_norm(x, axis=axis)
    new_dx = pyreg.batch_norm_backward(dy, x, new_mean, new_var, axis=axis)[0]
    others = np.arange(shape[axis]) != 2
    for old, new in ((y, new_y), (dx, new_dx)):
        assert np.isnan(np.take(new, 2, axis).astype(F32)).all()
        assert same(np.compress(others, old, axis), np.compress(others, new, axis))
    assert np.isnan(new_var[2])
    assert same(mean[others], new_mean[others])
    assert same(var[others], new_var[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_does_not_count(dtype):
    x = normal((100, 4), dtype)
    mask = np.arange(100)[:, None] < 60
    x[60:] = np.nan
    y, mean, var = pyreg.batch_norm(x, mask=mask)
    alone = pyreg.batch_norm(x[:60].copy())
    np.testing.assert_allclose(mean, alone[1], rtol=1e-6)
    np.testing.assert_allclose(var, alone[2], rtol=1e-6)
    assert not np.isnan(y[:60].astype(F32)).any()
    assert np.isnan(y[60:].astype(F32)).all()
    for shape in ((100, 1), (100, 4)):  # broadcast or not
        assert same(pyreg.batch_norm(x, mask=np.broadcast_to(mask, shape).copy())[1], mean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("shape", "axis"), [((100, 4), 1), ((9000, 4), 1), ((2, 300, 200), 1), ((5, 30, 7, 7), 1), ((2, 3, 40_000), 1)]
)
def test_gradients_beside_what_is_masked(isa, threads, dtype, special, shape, axis):
    """A masked element that is not finite spoils its own y alone, whatever its dy."""
    x, dy = normal(shape, dtype), normal(shape, dtype, 1)
    mask = masked_somewhere(shape, axis)
    x[~mask & (np.random.default_rng(3).random(shape) < 0.2)] = special
    scale = parameters(shape[axis], dtype)[0]
    for count, activation in ((1, None), (3, "relu")):
        threads(count)
        options = {"axis": axis, "mask": mask, "activation": activation}
        y, mean, var = pyreg.batch_norm(x, scale, **options)
        gradients = pyreg.batch_norm_backward(dy, x, mean, var, scale, y=y, **options)
        with np.errstate(invalid="ignore"):
            want = reference.batch_norm_backward(dy, x, scale, y=y, **options)
        tolerances = TOLERANCE[dtype] * 4, 3e-6, 1e-6 if dtype != F64 else 1e-12
        for got, wanted, tolerance in zip(gradients, want, tolerances, strict=False):
            close(got, wanted, tolerance)
        ordinary = np.where(np.isfinite(x.astype(F64)), x, np.zeros_like(x))  # another value there changes only dscale
        others = pyreg.batch_norm_backward(dy, ordinary, mean, var, scale, y=y, **options)
        assert same(gradients[2], others[2])
        dy[~np.isfinite(x.astype(F64))] = 0
        gradients = pyreg.batch_norm_backward(dy, x, mean, var, scale, y=y, **options)
        others = pyreg.batch_norm_backward(dy, ordinary, mean, var, scale, y=y, **options)
        assert all(same(got, wanted) for got, wanted in zip(gradients, others, strict=True))


def far_scaled(shape, axis, spread, dtype):
    """Every second channel has a standard deviation around `spread`, the others one around 1."""
    factors = np.where(np.arange(shape[axis]) % 2, 1.0, spread)
    return (normal(shape, F64) * reference._by_channel(factors, np.empty(shape), axis)).astype(dtype)


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[3]], ids=str)
@pytest.mark.parametrize("spread", [1e18, 1e20, 6e37])
@pytest.mark.parametrize(
    ("shape", "axis"), [((64, 9), 1), ((3000, 5), 1), ((5, 6, 7, 7), 1), ((2, 4, 3000), 1), ((1, 1, 40_000), 1)]
)
@pytest.mark.parametrize("option", ["plain", "masked", "relu"])
def test_squares_that_float32_cannot_hold(threads, dtype, spread, shape, axis, option):
    """A float32 variance beyond 3.4e38 is inf; y and the gradients are right, and other channels keep their bits."""
    x, dy, residual = far_scaled(shape, axis, spread, dtype), normal(shape, dtype, 1), normal(shape, dtype, 2)
    scale, bias = parameters(shape[axis], dtype)
    mask = masked_somewhere(shape, axis) if option == "masked" else None
    activation, residual = ("relu", residual) if option == "relu" else (None, None)
    options = {"axis": axis, "mask": mask, "activation": activation}
    want_y, _, want_var = reference.batch_norm(x, scale, bias, residual=residual, **options)
    for count, factor in ((1, 1e6), (3, 1e-6 * max(1, spread / 1e32))):
        threads(count)
        small = (dy * dtype.type(factor)).astype(dtype)  # but dx no subnormal
        y, mean, var = pyreg.batch_norm(x, scale, bias, residual=residual, **options)
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(var, want_var.astype(F32), rtol=1e-6)
        close(y, want_y, TOLERANCE[dtype])
        got = pyreg.batch_norm_backward(small, x, mean, var, scale, y=y, **options)
        want = reference.batch_norm_backward(small, x, scale, y=y, **options)
        for c in range(shape[axis]):
            close(got[0].take(c, axis), want[0].take(c, axis), 4 * TOLERANCE[dtype])
        close(got[1], want[1], 1e-5)
        close(got[2], want[2], 1e-6)
    ordinary = far_scaled(shape, axis, 1, dtype)
    y_ordinary, mean, var_ordinary = pyreg.batch_norm(ordinary, scale, bias, residual=residual, **options)
    got_ordinary = pyreg.batch_norm_backward(small, ordinary, mean, var_ordinary, scale, y=y_ordinary, **options)
    for a, b in ((y, y_ordinary), (got[0], got_ordinary[0])):
        assert same(a.take(np.arange(1, shape[axis], 2), axis), b.take(np.arange(1, shape[axis], 2), axis))


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[3]], ids=str)
@pytest.mark.parametrize("spread", [1e-17, 1e-20, 1e-30, 1e-36])
@pytest.mark.parametrize(("shape", "axis"), [((64, 9), 1), ((3000, 5), 1), ((2, 4, 3000), 1)])
def test_squares_that_float32_loses(dtype, spread, shape, axis):
    """A float32 variance below 1e-38 is subnormal or 0: without an epsilon all is right all the same."""
    x, dy = far_scaled(shape, axis, spread, dtype), normal(shape, dtype, 1)
    y, mean, var = pyreg.batch_norm(x, axis=axis, epsilon=0)
    close(y, reference.batch_norm(x, axis=axis, epsilon=0)[0], TOLERANCE[dtype])
    got = pyreg.batch_norm_backward(dy, x, mean, var, axis=axis, epsilon=0)
    want = reference.batch_norm_backward(dy, x, axis=axis, epsilon=0)
    for c in range(shape[axis]):
        close(got[0].take(c, axis), want[0].take(c, axis), 4 * TOLERANCE[dtype])
    close(got[1], want[1], 1e-5)
    close(got[2], want[2], 1e-6)


def test_differences_that_float32_cannot_hold():
    x = np.full((1000, 2), -3e38, F32)
    x[0] = 3e38
    y, mean, _ = pyreg.batch_norm(x)
    want, want_mean, _ = reference.batch_norm(x)
    close(y, want, 1e-6)
    close(mean, want_mean, 1e-6)


def test_one_element_a_channel():
    x = normal((1, 5), F32)
    scale, bias = parameters(5, F32)
    y, mean, var = pyreg.batch_norm(x, scale, bias)
    assert same(y[0], bias)
    assert same(mean, x[0])
    assert (var == 0).all()


def test_no_channels():
    x = np.empty((3, 0, 4), F32)
    y, mean, var = pyreg.batch_norm(x, axis=1)
    assert (y.shape, mean.shape, var.shape) == ((3, 0, 4), (0,), (0,))
    dx, dscale, dbias = pyreg.batch_norm_backward(x, x, mean, var, axis=1)
    assert (dx.shape, dscale.shape, dbias.shape) == ((3, 0, 4), (0,), (0,))
    assert pyreg.batch_norm_inference(x, mean, var, axis=1).shape == x.shape


def test_no_elements():
    x = np.empty((0, 3), F32)
    with pytest.raises(ValueError, match=r"x has shape \(0, 3\); wanted at least one element in each channel"):
        pyreg.batch_norm(x)
    with pytest.raises(ValueError, match="at least one element"):
        pyreg.batch_norm_backward(x, x, np.zeros(3), np.ones(3))
    assert pyreg.batch_norm_inference(x, np.zeros(3), np.ones(3)).shape == (0, 3)


def test_lists_and_foreign_byte_order():
    y, mean, var = pyreg.batch_norm([[1.0, 10.0], [3.0, 30.0]])
    assert (mean.tolist(), var.tolist(), y.dtype) == ([2.0, 20.0], [1.0, 100.0], F64)
    x = normal((20, 3), F32)
    want = pyreg.batch_norm(x)[0]
    assert same(pyreg.batch_norm(x.astype(">f4"))[0], want)
    out = np.empty((20, 3), ">f4")
    assert pyreg.batch_norm(x, out=out)[0] is out
    assert (out == want).all()


# ---- Errors --------------------------------------------------------------------------------------------------------

X = np.zeros((4, 3), F32)
V = np.zeros(3, F32)
READ_ONLY = np.zeros((4, 3), F32)
READ_ONLY.flags.writeable = False
BAD = [
    ({"x": X.astype(int)}, TypeError, "x has dtype int64"),
    ({"x": X.astype(complex)}, TypeError, "x has dtype complex128"),
    ({"x": np.float32(1)}, ValueError, "axis is -1; wanted a dim of an array with 0 dims"),
    ({"axis": 2}, ValueError, "axis is 2; wanted a dim of an array with 2 dims"),
    ({"epsilon": -1.0}, ValueError, "epsilon is -1.0"),
    ({"epsilon": float("nan")}, ValueError, "epsilon is nan"),
    ({"scale": np.ones(4)}, ValueError, r"scale has shape \(4,\); x has 3 channels"),
    ({"scale": np.ones(3, complex)}, TypeError, "scale has dtype complex128"),
    ({"activation": "gelu"}, ValueError, "activation is 'gelu'; wanted None or 'relu'"),
    ({"out": np.zeros((3, 4), F32)}, ValueError, r"out has shape \(3, 4\)"),
    ({"out": np.zeros((4, 3))}, ValueError, "out has shape .* and dtype float64"),
    ({"out": READ_ONLY}, ValueError, "out is read-only"),
    ({"out": [0]}, TypeError, "out is a list"),
]
FORWARD = [
    ({"bias": np.ones(2)}, ValueError, r"bias has shape \(2,\); x has 3 channels"),
    ({"residual": np.zeros((4, 4), F32)}, ValueError, r"residual has shape \(4, 4\)"),
    ({"residual": np.zeros((4, 3))}, TypeError, "residual has dtype float64"),
]
MASK = [
    ({"mask": np.ones((4, 3))}, TypeError, "mask has dtype float64; wanted bool"),
    ({"mask": np.ones((4, 2), bool)}, ValueError, r"mask has shape \(4, 2\)"),
    ({"mask": np.zeros((4, 1), bool)}, ValueError, "mask is all false"),
    ({"mask": np.array([True, False, True])}, ValueError, "mask is all false in 1 channels"),
]
GIVEN = [
    ({"mean": np.ones(2)}, ValueError, r"mean has shape \(2,\); x has 3 channels"),
    ({"var": None}, TypeError, "var is None"),
]
BACKWARD = [
    ({"dy": np.zeros((3, 4), F32)}, ValueError, r"dy has shape \(3, 4\)"),
    ({"activation": "relu"}, TypeError, "y is None"),
]


def _fails(function, arguments, change, error, message):
    arguments = {**arguments, **change}
    kept = arguments.get("out")
    before = kept.copy() if isinstance(kept, np.ndarray) else None
    with pytest.raises(error, match=message):
        function(**arguments)
    assert before is None or (kept == before).all()


@pytest.mark.parametrize(("change", "error", "message"), BAD + FORWARD + MASK)
def test_errors_of_forward(change, error, message):
    _fails(pyreg.batch_norm, {"x": X}, change, error, message)


@pytest.mark.parametrize(("change", "error", "message"), BAD + FORWARD + GIVEN)
def test_errors_of_inference(change, error, message):
    _fails(pyreg.batch_norm_inference, {"x": X, "mean": V, "var": V}, change, error, message)


@pytest.mark.parametrize(("change", "error", "message"), BAD[1:] + MASK + GIVEN + BACKWARD)
def test_errors_of_backward(change, error, message):
    x = change.get("x", X)
    _fails(pyreg.batch_norm_backward, {"dy": x, "x": x, "mean": V, "var": V}, change, error, message)


def test_no_memory():
    """Whichever allocation fails, nothing is written, and the next call works."""
    x = normal((4000, 30), F32)
    want, mean, var = pyreg.batch_norm(x)
    calls = [
        lambda out: pyreg.batch_norm(x, out=out),
        lambda out: pyreg.batch_norm_inference(x, mean, var, out=out),
        lambda out: pyreg.batch_norm_backward(x, x, mean, var, out=out),
    ]
    for call in calls:
        for k in itertools.count(1):
            out = np.full_like(x, 7)
            _core.fail_allocation(k)
            try:
                call(out)
            except MemoryError:
                assert (out == 7).all()
            else:
                break
            finally:
                _core.fail_allocation(0)
        assert k > 1
    assert same(pyreg.batch_norm(x)[0], want)


# ---- PyTorch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((64, 30), 1), ((4, 6, 9, 9), 1), ((4, 9, 9, 6), 3), ((2, 3, 40, 40), 1)])
def test_pytorch(dtype, shape, axis):
    torch = pytest.importorskip("torch")
    x, dy = normal(shape, dtype), normal(shape, dtype, 1)
    scale, bias = parameters(shape[axis], dtype)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
    y = torch.nn.functional.batch_norm(tensors[0].movedim(axis, 1), None, None, *tensors[1:], training=True).movedim(
        1, axis
    )
    y.backward(torch.tensor(dy))
    got, mean, var = pyreg.batch_norm(x, scale, bias, axis=axis)
    tolerance = 4e-6 if dtype == F32 else 1e-13
    close(got, y.detach().numpy(), tolerance)
    for g, t in zip(pyreg.batch_norm_backward(dy, x, mean, var, scale, axis=axis), tensors, strict=True):
        close(g, t.grad.numpy(), tolerance)


# ---- The layer -----------------------------------------------------------------------------------------------------


def test_layer_training_and_evaluation():
    layer = pyreg.BatchNorm(3, axis=1, momentum=0.9)
    layer.scale[:], layer.bias[:] = parameters(3, F32)
    mean, var = np.zeros(3), np.ones(3)
    for seed in range(5):
        x = normal((4, 3, 5), F32, seed) * 3 + 1
        y = layer(x)
        want, batch_mean, batch_var = reference.batch_norm(x, layer.scale, layer.bias, axis=1)
        close(y, want, 1e-6)
        mean, var = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * batch_var
    np.testing.assert_allclose(layer.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(layer.var, var, rtol=1e-6)
    layer.eval()
    close(layer(x), reference.normalise(x, mean, var, layer.scale, layer.bias, axis=1), 1e-6)
    assert same(layer.mean, layer.mean)
    np.testing.assert_allclose(layer.mean, mean, rtol=1e-6)  # evaluation does not move them


def test_layer_backward():
    layer = pyreg.BatchNorm(3, axis=1)
    layer.scale[:], _ = parameters(3, F32)
    x, dy = normal((4, 3, 5), F32), normal((4, 3, 5), F32, 1)
    with pytest.raises(RuntimeError, match="before a call"):
        layer.backward(dy)
    layer(x)
    dx = layer.backward(dy)
    want = reference.batch_norm_backward(dy, x, layer.scale, axis=1)
    for got, wanted in zip((dx, layer.grads["scale"], layer.grads["bias"]), want, strict=False):
        close(got, wanted, 1e-6)

    layer.eval()(x)
    dx = layer.backward(dy)
    gain = layer.scale / np.sqrt(layer.var + 1e-5)
    close(dx, dy * gain[:, None].astype(np.float64), 1e-6)
    xhat = reference.normalise(x, layer.mean, layer.var, axis=1)
    close(layer.grads["scale"], (dy * xhat).sum((0, 2)), 1e-5)
    close(layer.grads["bias"], dy.sum((0, 2), dtype=np.float64), 1e-5)


def test_layer_mask():
    layer = pyreg.BatchNorm(3, momentum=0.0)
    x, dy = normal((6, 3), F32), normal((6, 3), F32, 1)
    mask = np.arange(6)[:, None] < 4
    layer(x, mask=mask)
    np.testing.assert_allclose(layer.mean, x[:4].mean(0), rtol=1e-5, atol=1e-6)
    close(layer.backward(dy), reference.batch_norm_backward(dy, x, mask=mask)[0], 1e-6)


def test_layer_without_parameters():
    layer = pyreg.BatchNorm(3, use_scale=False, use_bias=False)
    assert layer.scale is None
    assert layer.bias is None
    assert set(layer.state_dict()) == {"mean", "var"}
    layer(X)
    layer.backward(X)
    assert layer.grads == {}


def test_layer_state():
    layer = pyreg.BatchNorm(3)
    layer(normal((20, 3), F32))
    state = layer.state_dict()
    assert set(state) == {"scale", "bias", "mean", "var"}
    state["mean"][:] = 5  # a copy
    assert (layer.mean != 5).all()
    other = pyreg.BatchNorm(3)
    other.load_state_dict(state)
    assert (other.mean == 5).all()
    torch_names = {
        "weight": V + 1,
        "bias": V + 2,
        "running_mean": V + 3,
        "running_var": V + 4,
        "num_batches_tracked": 9,
    }
    other.load_state_dict(torch_names)
    assert [float(getattr(other, name)[0]) for name in ("scale", "bias", "mean", "var")] == [1, 2, 3, 4]
    for bad, message in (
        ({"scale": V}, "wanted"),
        ({**state, "mean": np.zeros(4)}, r"mean has shape \(4,\); wanted \(3,\)"),
        ({**state, "extra": V}, "extra"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(bad)
        assert float(other.mean[0]) == 3  # nothing changed


def test_layer_against_pytorch():
    torch = pytest.importorskip("torch")
    ours, theirs = pyreg.BatchNorm(6, axis=1, momentum=0.9), torch.nn.BatchNorm2d(6)
    for seed in range(10):
        x = normal((8, 6, 5, 5), F32, seed) * 2 + 1
        close(ours(x), theirs(torch.tensor(x)).detach().numpy(), 4e-6)
    n, rest = 8 * 5 * 5, 0.9**10  # rest: what is left of the first variance, 1
    biased = rest + (theirs.running_var.numpy() - rest) * (n - 1) / n  # each batch's variance is unbiased in PyTorch
    np.testing.assert_allclose(ours.mean, theirs.running_mean.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.var, biased, rtol=1e-6)
    loaded = pyreg.BatchNorm(6, axis=1)
    loaded.load_state_dict({name: value.numpy() for name, value in torch.nn.BatchNorm2d(6).state_dict().items()})
    x = normal((8, 6, 5, 5), F32)
    close(loaded.eval()(x), torch.nn.BatchNorm2d(6).eval()(torch.tensor(x)).detach().numpy(), 1e-6)


def test_layer_copies_and_pickles():
    layer = pyreg.BatchNorm(3, momentum=0.5)
    layer(normal((20, 3), F32))
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(same(getattr(other, name), value) for name, value in layer.state_dict().items())
        before = layer.mean.copy()
        other(normal((20, 3), F32, 1))
        assert same(layer.mean, before)
        assert not same(other.mean, before)
        with pytest.raises(RuntimeError, match="before a call"):
            copy.copy(layer).backward(X)


def test_layer_errors():
    with pytest.raises(ValueError, match="x has 4 channels in dim -1; wanted 3"):
        pyreg.BatchNorm(3)(np.zeros((2, 4), F32))
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        pyreg.BatchNorm(3, momentum=1.5)
    with pytest.raises(ValueError, match="epsilon is -1"):
        pyreg.BatchNorm(3, epsilon=-1)


def test_layer_repr():
    assert repr(pyreg.BatchNorm(3)) == "BatchNorm(3, axis=-1, momentum=0.99, epsilon=1e-05)"


def _scale_step(layer):
    layer.scale -= 0.5


def _running_step(layer):
    layer.mean += 3
    layer.var *= 5


@pytest.mark.parametrize(
    "change",
    [
        _scale_step,
        _running_step,
        lambda layer: setattr(layer, "scale", None),
        lambda layer: setattr(layer, "bias", None),
        lambda layer: setattr(layer, "mean", np.ones(7)),
        lambda layer: setattr(layer, "epsilon", 9.0),
        lambda layer: setattr(layer, "axis", 0),
        lambda layer: setattr(layer, "training", not layer.training),
        lambda layer: layer.load_state_dict({"scale": V, "bias": V, "mean": V, "var": V}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_layer_backward_takes_the_settings_of_its_call(change, training):
    x, dy = normal((3, 4, 3), F32), normal((3, 4, 3), F32, 1)
    layers = [pyreg.BatchNorm(3, axis=2, epsilon=1e-2).train(training) for _ in range(2)]
    for layer in layers:
        layer.scale[:], layer.bias[:] = parameters(3, F32)
        layer(x)
    change(layers[1])
    (dx, grads), (got, got_grads) = ((layer.backward(dy), layer.grads) for layer in layers)
    assert same(got, dx)
    assert set(got_grads) == {"scale", "bias"}
    assert all(same(got_grads[name], grads[name]) for name in grads)
    scale = parameters(3, F32)[0]
    if training:
        close(dx, reference.batch_norm_backward(dy, x, scale, axis=2, epsilon=1e-2)[0], 1e-6)
    else:
        close(dx, dy * (scale / np.sqrt(1.01)).astype(np.float64), 1e-6)


LAYER_FAULTS = [
    ({}, {"x": X.astype(int)}, TypeError, "x has dtype int64"),
    ({}, {"x": X[:, :2]}, ValueError, "x has 2 channels in dim -1; wanted 3"),
    ({}, {"x": X[:0]}, ValueError, "at least one element"),
    ({}, {"x": X, "mask": X > 9}, ValueError, "mask is all false"),
    ({}, {"x": X, "mask": "no"}, TypeError, "mask has dtype <U2; wanted bool"),
    ({"scale": np.ones(4)}, {"x": X}, ValueError, r"scale has shape \(4,\); x has 3 channels"),
    ({"mean": np.ones(1)}, {"x": X}, ValueError, r"mean has shape \(1,\); x has 3 channels"),
    ({"var": np.ones((4, 3))}, {"x": X}, ValueError, r"var has shape \(4, 3\); x has 3 channels"),
    ({"var": None}, {"x": X}, TypeError, "var is None"),
    ({"mean": np.zeros(3, int)}, {"x": X}, TypeError, "mean has dtype int64; wanted a float dtype"),
    ({"momentum": 2}, {"x": X}, ValueError, r"momentum is 2; wanted a weight of the old value in \[0, 1\]"),
    ({"epsilon": -1}, {"x": X}, ValueError, "epsilon is -1; wanted"),
    ({"axis": 2}, {"x": X}, ValueError, "axis is 2; wanted a dim of an array with 2 dims"),
    ({"training": "no"}, {"x": X}, TypeError, "training is of type str"),
]


@pytest.mark.parametrize(("setting", "arguments", "error", "message"), LAYER_FAULTS)
def test_layer_call_that_raises_changes_nothing(setting, arguments, error, message):
    x = normal((4, 3), F32)
    layer = pyreg.BatchNorm(3)
    layer(x)
    dx, state, grads = layer.backward(x), layer.state_dict(), layer.grads
    good = {name: getattr(layer, name) for name in setting}
    for name, value in setting.items():
        setattr(layer, name, value)
    with pytest.raises(error, match=message):
        layer(**arguments)
    for name, value in good.items():
        setattr(layer, name, value)
    assert all(same(value, state[name]) for name, value in layer.state_dict().items())
    for bad in (None, x[:2], x.astype(F64), "no"):
        with pytest.raises((TypeError, ValueError), match="dy "):
            layer.backward(bad)
    assert layer.grads is grads
    assert same(layer.backward(x), dx)


def test_layer_without_memory_changes_nothing():
    x = normal((4000, 30), F32)
    layer, twin = pyreg.BatchNorm(30), pyreg.BatchNorm(30)
    for one in (layer, twin):
        one(x)
    dx, grads = twin.backward(x), layer.grads
    for call in (lambda: layer(x + 1), lambda: layer.backward(x)):
        _core.fail_allocation(1)
        try:
            with pytest.raises(MemoryError):
                call()
        finally:
            _core.fail_allocation(0)
    assert layer.grads is grads
    assert all(same(value, twin.state_dict()[name]) for name, value in layer.state_dict().items())
    assert same(layer.backward(x), dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_layer_gradients_in_evaluation(dtype, axis):
    x, dy = normal((3, 4, 5), dtype), normal((3, 4, 5), dtype, 1)
    channels = x.shape[axis]
    layer = pyreg.BatchNorm(channels, axis=axis).eval()
    layer.scale[:], _ = parameters(channels, F32)
    layer.mean[:], layer.var[:] = (
        normal(channels, F32, 3),
        np.linspace(1e-9, 2, channels),
    )  # xhat: more than float16 holds
    layer.epsilon = 1e-9
    layer(x)
    layer.backward(dy)
    xhat = reference.normalise(x, layer.mean, layer.var, axis=axis, epsilon=1e-9)
    others = reference._others(x, axis)
    want = (dy.astype(F64) * xhat).sum(others)
    np.testing.assert_allclose(layer.grads["scale"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.grads["bias"], dy.astype(F64).sum(others), rtol=1e-5, atol=1e-6)


def test_layer_specials_in_evaluation_stay_in_their_channel():
    x, dy = normal((9, 4), F32), normal((9, 4), F32, 1)
    layer = pyreg.BatchNorm(4, dtype=np.float16).eval()
    layer(x)
    layer.backward(dy)
    want = {name: value.copy() for name, value in layer.grads.items()}
    x[0, 1], dy[0, 1] = np.inf, 0
    dy[:, 2] = 6e4  # the sum is more than float16 holds
    layer(x)
    layer.backward(dy)
    assert layer.grads["scale"].dtype == layer.grads["bias"].dtype == np.float16
    assert np.isnan(layer.grads["scale"][1])
    assert np.isinf(layer.grads["bias"][2])
    for name, columns in (("scale", [0, 3]), ("bias", [0, 3])):
        assert same(layer.grads[name][columns], want[name][columns])


def test_layer_states_that_do_not_fit():
    layer = pyreg.BatchNorm(3)
    layer(normal((20, 3), F32))
    state = layer.state_dict()
    for bad, error, message in (
        ({**state, "mean": V + 1j}, TypeError, "mean has dtype complex64; wanted real numbers"),
        ({**state, "var": ["1", "2", "3"]}, TypeError, "var has dtype <U1"),
        ({**state, "var": V > 0}, TypeError, "var has dtype bool"),
        ({**state, "bias": None}, TypeError, "bias is None"),
        ({**state, "bias": [[1.0], [1.0, 2.0]]}, ValueError, "bias is of type list"),
        ({**state, "bias": np.ma.masked_equal(V, 0)}, TypeError, "bias is a masked array"),
        ({**state, "weight": V}, ValueError, r"state has \['bias', 'mean', 'scale', 'var', 'weight'\]"),
        ({**state, 7: V}, ValueError, r"state has \['7', "),
        (list(state), TypeError, "state is of type list; wanted a mapping"),
        (None, TypeError, "state is None; wanted a mapping"),
    ):
        with pytest.raises(error, match=message):
            layer.load_state_dict(bad)
        assert all(same(value, state[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 3), (40, 3)])
@pytest.mark.parametrize("swept", ["constant", "xhat"])
def test_gradients_that_cancel_near_the_largest_float(shape, swept):
    """dy that batch-norm does not let through gives about 0, although each of the terms overflows."""
    x = normal(shape, F32) * np.float32(0.01)
    y, mean, var = pyreg.batch_norm(x, epsilon=1e-12)
    dy = np.full(shape, 7e37, F32) if swept == "constant" else y * np.float32(1e38)
    dx, dscale, dbias = pyreg.batch_norm_backward(dy, x, mean, var, epsilon=1e-12)
    want, want_dscale, want_dbias, _ = reference.batch_norm_backward(dy, x, epsilon=1e-12)
    assert np.isfinite(dx).all()
    gain = 1 / np.sqrt(var.max() + 1e-12)
    assert np.abs(dx - want).max() <= 1e-6 * gain * np.abs(dy.astype(F64)).max()
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(dscale, want_dscale.astype(F32), rtol=1e-5, atol=1e32)
        np.testing.assert_allclose(dbias, want_dbias.astype(F32), rtol=1e-5, atol=1e32)


def test_gradients_of_large_constants():
    """What is left of dscale by rounding, times 0, is 0."""
    x = np.repeat(normal((1, 50), F32) * np.float32(1e38), 5, axis=0)
    dy = normal(x.shape, F32, 1)
    y, mean, var = pyreg.batch_norm(x, epsilon=1e-12)
    dx, _, dbias = pyreg.batch_norm_backward(dy, x, mean, var, epsilon=1e-12)
    want = (dy - dbias.astype(F64) / 5) * 1e6
    assert (y == 0).all()
    assert np.abs(dx - want).max() < 1e-6 * np.abs(want).max()
