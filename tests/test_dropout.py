"""pyreg.dropout, dropout_backward and dropout_mask against the naive reference."""

import hashlib
import itertools
import math
import time

import ml_dtypes
import numpy as np
import pytest
import reference
from common import CHUNK, DTYPES, GROUP, IMPLS, TILE, bits, layouts, normal, same
from hypothesis import given
from hypothesis import strategies as st

import pyreg
from pyreg import _core

KEY = 0x0123_4567_89AB_CDEF
RATES = [0.5, 0.25, 0.75, 0.1, 1 / 3, 0.9, 1e-4, 1 - 1e-6, 2**-64, 5e-324, 1 - 2**-53]
SIZES = [0, 1, 31, 32, 33, GROUP - 1, GROUP, GROUP + 1, TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1]


# ---- Which elements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rate", RATES)
def test_mask_is_the_definition(isa, impl, rate):
    n = 20_000
    assert (pyreg.dropout_mask(n, rate, key=KEY, impl=impl) == reference.mask(n, rate, KEY, impl)).all()


@pytest.mark.parametrize("impl", IMPLS)
@given(rate=st.floats(0, 1), key=st.integers(0, 2**64 - 1), n=st.integers(0, 2000), offset=st.integers(0, 2**64 - 2000))
def test_mask_of_anything(impl, rate, key, n, offset):
    got = pyreg.dropout_mask(n, rate, key=key, impl=impl, offset=offset)
    assert (got == reference.mask(n, rate, key, impl, offset)).all()


def test_ties_are_resolved(isa):
    """Rates a little above k / 256: elements whose first eight digits are those of k are decided by later ones."""
    n = 1 << 17
    u = reference.philox_uniform(n, divmod(KEY, 2**32))
    for digits in (8, 12, 16, 20, 24):  # ties that end where the tables of digits do
        chosen = u[u % (1 << 40) > 1 << 20][:3]
        for value in chosen:
            rate = float(int(value) >> (64 - digits) << (64 - digits)) / 2**64 + 2.0 ** -(digits + 2)
            keep = u >= np.uint64(int(rate * 2**64))
            assert (pyreg.dropout_mask(n, rate, key=KEY) == keep).all()


def test_deep_ties():
    """Rates that agree with an element's own number in 30 to 52 digits."""
    u = reference.philox_uniform(4096, divmod(KEY, 2**32))
    for i in range(0, 4096, 41):
        for digits in (30, 40, 52):
            rate = float(int(u[i]) >> (64 - digits) << (64 - digits)) / 2**64
            limit = np.uint64(int(rate * 2**64))
            assert (pyreg.dropout_mask(4096, rate, key=KEY) == (u >= limit)).all()
            above = np.nextafter(rate, 1)
            assert (pyreg.dropout_mask(4096, above, key=KEY) == (u >= np.uint64(int(above * 2**64)))).all()


def test_higher_rate_drops_a_superset():
    rates = sorted([*RATES, *np.linspace(0, 1, 41)])
    masks = [pyreg.dropout_mask(50_000, rate, key=KEY) for rate in rates]
    for less, more in itertools.pairwise(masks):
        assert not (more & ~less).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("base", [0, 2**31, 2**32, 2**33, 2**37, 2**62, 2**63, 2**64 - 20_000])
def test_parts_equal_the_whole(isa, impl, base):
    """2**37: there the low half of Philox's counter overflows."""
    n, before = 12_000, 6_000 if 0 < base < 2**64 - 20_000 else 0
    x = normal(n, np.float32)
    whole = pyreg.dropout(x, 0.1, key=KEY, impl=impl, offset=base - before)
    assert same(whole, reference.dropout(x, 0.1, KEY, impl, base - before))
    cuts = [0, 1, 63, 600, 601, 5_999, 6_000, 6_001, 10_000, n]
    for a, b in itertools.pairwise(cuts):
        assert same(pyreg.dropout(x[a:b], 0.1, key=KEY, impl=impl, offset=base - before + a), whole[a:b])


def test_packed_mask_is_the_mask():
    for n in SIZES:
        for rate in (0, 0.1, 1):
            for offset in (0, 5, 32, 2**40 + 1):
                mask = pyreg.dropout_mask(n, rate, key=KEY, offset=offset)
                packed = pyreg.dropout_mask(n, rate, key=KEY, offset=offset, packed=True)
                assert packed.tobytes() == np.packbits(mask, bitorder="little").tobytes()


GOLDEN = {  # sha256 of 100,000 packed mask bits: a change of these is a change of the name "philox-v1"
    0.5: "5f785ad35cba3441d33e5d320f678ead2977f06beb7a7d82a7a911c23003d41e",
    0.1: "8e2d660e4c9280b6eb9d7a9df078a11ce9470f44fd079c4f57c706fca0e5afdb",
    1 / 3: "1302e0a7f4022c39a46832da394b7bcc128099c613ae92fab7c2095a1615a2bf",
    0.999: "b9803f8f20376220f750f6776d70ed2d6ba6e35ae081e0f1e3dcf0f64176b01d",
}


@pytest.mark.parametrize("rate", GOLDEN)
def test_golden_masks_of_philox_v1(isa, rate):
    packed = pyreg.dropout_mask(100_000, rate, key=KEY, packed=True)
    assert hashlib.sha256(packed.tobytes()).hexdigest() == GOLDEN[rate]


# ---- What values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_small_size_and_offset(isa, dtype, impl):
    """All sizes 0 .. 600 and offsets 0 .. 63 against one reference: each ISA, each dtype, each generator."""
    x = normal(700, dtype)
    drop = reference.dropout(x, 0.1, KEY, impl) == 0
    kept = (x.astype(np.float32 if dtype.itemsize == 2 else dtype) * reference.scale(dtype, 0.1)).astype(dtype)
    out = np.empty_like(x)
    for offset in range(64):
        want = np.where(drop[offset : offset + 600], dtype.type(0), kept[:600])
        for n in range(601):
            got = pyreg.dropout(x[:n], 0.1, key=KEY, impl=impl, offset=offset, out=out[:n])
            assert (bits(got) == bits(want[:n])).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # by NumPy's casts of signalling NaNs on arm64
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_half_pattern(isa, dtype):
    """All 65,536: kept without scaling they do not change, scaled they are rounded once from the float product."""
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    number = ~np.isnan(x.astype(np.float32))
    plain = pyreg.Dropout(1e-30, rng=0, inverted=False)(x)
    assert (bits(plain) == bits(x))[number].all()
    assert np.isnan(plain[~number].astype(np.float32)).all()
    for rate in (0.1, 0.5, 0.99, 0.9999):
        got = pyreg.dropout(x, rate, key=KEY)
        want = reference.dropout(x, rate, KEY)
        assert (bits(got) == bits(want))[number].all()
        kept = pyreg.dropout_mask(x.shape, rate, key=KEY)
        assert (np.isnan(got.astype(np.float32)) == (kept & np.isnan(want.astype(np.float32)))).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_half_scale(isa, dtype):
    """All values of 1 - rate in [0.5, 1] that the dtype tells apart, times every pattern with a few exponents."""
    one = int(np.ones(1, dtype).view(np.uint16)[0])
    step = 1 << 7 if dtype == ml_dtypes.bfloat16 else 1 << 10  # patterns from 0.5 to 1
    patterns = np.arange(one - 2 * step, one + 2 * step, dtype=np.uint16)
    x = np.concatenate([patterns, np.arange(2 * step, dtype=np.uint16)]).view(dtype)  # and subnormals
    for keep in np.arange(one - step, one, 1 if step < 1024 else 7, dtype=np.uint16).view(dtype):
        rate = 1 - float(keep)
        assert same(pyreg.dropout(x, rate, key=KEY), reference.dropout(x, rate, KEY))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_specials(isa, dtype):
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    specials = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, tiny, -tiny, 1.0], dtype)
    x = np.tile(specials, 500)
    got = pyreg.dropout(x, 0.3, key=KEY)
    keep = pyreg.dropout_mask(x.shape, 0.3, key=KEY)
    assert (bits(got[~keep]) == 0).all()  # +0, also for NaN and Inf
    want = reference.dropout(x, 0.3, KEY)
    nan = np.isnan(want.astype(np.float64))
    assert (bits(got) == bits(want))[~nan].all()
    assert np.isnan(got[nan].astype(np.float64)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rates_zero_and_one_draw_nothing(dtype):
    x = np.arange(1, 200).astype(dtype)
    x[:2] = np.nan, -0.0
    assert same(pyreg.dropout(x, 0.0), x)
    assert same(pyreg.dropout(x, 0.7, deterministic=True), x)
    assert not bits(pyreg.dropout(x, 1.0)).any()
    strided = np.empty(398, dtype)[::2]
    assert same(pyreg.dropout(x, 0.0, out=strided), x)
    assert not bits(pyreg.dropout(x, 1.0, out=strided)).any()
    assert not np.shares_memory(pyreg.dropout(x, 0.0), x)


@given(
    st.sampled_from(DTYPES), st.sampled_from(IMPLS), st.floats(0, 1), st.lists(st.integers(0, 6), max_size=5), st.data()
)
def test_broadcast_dims(dtype, impl, rate, shape, data):
    dims = data.draw(st.sets(st.integers(-len(shape), len(shape) - 1))) if shape else ()
    x = normal(shape, dtype)
    got = pyreg.dropout(x, rate, key=KEY, impl=impl, broadcast_dims=tuple(dims))
    assert same(got, reference.dropout(x, rate, KEY, impl, broadcast_dims=dims))
    mask = pyreg.dropout_mask(tuple(shape), rate, key=KEY, impl=impl, broadcast_dims=tuple(dims))
    assert mask.shape == tuple(1 if d in dims or d - len(shape) in dims else n for d, n in enumerate(shape))
    assert (bits(got)[~np.broadcast_to(mask, x.shape)] == 0).all()


@pytest.mark.parametrize("impl", ["philox", "threefry"])
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((40, 50, 7, 7), (2, 3)),  # short runs of one bit
        ((7, 90, GROUP - 1), 2),
        ((7, 90, GROUP), 2),  # rows of one bit
        ((3, TILE + 5), 1),
        ((2, 1, 300, 200), (2, 3)),  # ... in several chunks
        ((2, 9000, 3), 1),  # short runs of the same bits
        ((3, 40, 6, 33), (1, 2)),
        ((5, 70, GROUP - 1), 1),
        ((5, 70, GROUP), 1),  # rows of the same bits
        ((33, TILE + 5), 0),  # ... that take turns
        ((3, 4, 70_000), (0, 1)),
        ((3, 40, 6, 33), (0, 2)),
        ((3, 40, 6, 33), (1, 3)),
    ],
)
def test_broadcast_where_loops_change_gear(threads, impl, shape, dims):
    x = normal(shape, np.float32)
    dims = (dims,) if isinstance(dims, int) else dims
    for offset in (0, 77):
        want = reference.dropout(x, 0.3, KEY, impl, offset, dims)
        kwargs = {"key": KEY, "impl": impl, "broadcast_dims": dims, "offset": offset}
        for n in (1, 3):
            threads(n)
            assert same(pyreg.dropout(x, 0.3, **kwargs), want)
        shifted = np.empty(x.size + 3, np.float32)[3:].reshape(shape)
        assert same(pyreg.dropout(x, 0.3, out=shifted, **kwargs), want)
        last = np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0)
        assert same(pyreg.dropout(last, 0.3, **kwargs), want)


def test_forward_backward_and_mask_agree():
    x = np.ones((33, 70), np.float32)
    kwargs = {"key": KEY, "broadcast_dims": (0,), "offset": 11, "impl": "threefry"}
    y = pyreg.dropout(x, 0.4, **kwargs)
    assert same(y, pyreg.dropout_backward(x, 0.4, **kwargs))
    assert ((y != 0) == pyreg.dropout_mask(x.shape, 0.4, **kwargs)).all()


# ---- Any array -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["philox", "threefry"])
@pytest.mark.parametrize("shape", [(70, 33), (3, 5, 700), (9, 4, 2, 11), (2, 9000), (1500, 3), (2, 1, 50, 1, 7)])
def test_layouts(isa, dtype, impl, shape):
    x = normal(shape, dtype)
    for dims in ((), (0,), (-1,), (0, -1)):
        want = reference.dropout(x, 0.2, KEY, impl, broadcast_dims=dims)
        for name, a in layouts(x):
            kwargs = {"key": KEY, "impl": impl, "broadcast_dims": dims}
            before = a.copy()
            assert same(pyreg.dropout(a, 0.2, **kwargs), want), name
            assert same(a, before), name
            for out_name, out in layouts(np.empty_like(x)):
                assert pyreg.dropout(a, 0.2, out=out, **kwargs) is out
                assert same(out, want), (name, out_name)
            pyreg.dropout(a, 0.2, out=a, **kwargs)
            assert same(a, want), f"{name} in place"


@given(
    st.sampled_from(DTYPES[:1] + DTYPES[2:3]),
    st.sampled_from(IMPLS),
    st.lists(st.integers(1, 40), min_size=2, max_size=4).filter(lambda shape: math.prod(shape) <= 60_000),
    st.data(),
)
def test_any_order_of_dims(dtype, impl, shape, data):
    """Memory in another order than the mask's bits, which decides how rows are made of dims."""
    order = data.draw(st.permutations(range(len(shape))))
    flips = tuple(slice(None, None, data.draw(st.sampled_from((1, -1)))) for _ in shape)
    dims = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), max_size=2)))
    memory = normal([shape[d] for d in order], dtype)
    x = memory.transpose(np.argsort(order))[flips]
    kwargs = {"key": KEY, "impl": impl, "broadcast_dims": dims}
    want = reference.dropout(x, 0.2, KEY, impl, broadcast_dims=dims)
    assert same(pyreg.dropout(x, 0.2, **kwargs), want)
    assert same(pyreg.dropout(x, 0.2, out=np.empty(shape, dtype), **kwargs), want)
    assert same(
        pyreg.dropout(np.ascontiguousarray(x), 0.2, out=memory.transpose(np.argsort(order))[flips], **kwargs), want
    )


def best_time(work):
    times = []
    for _ in range(7):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", [(3, 1, 2, 0), (3, 2, 1, 0), (0, 1, 3, 2), (1, 0, 2, 3)])
def test_no_order_of_dims_is_far_slower(threads, impl, order):
    """Bits of a group were made again for each few elements: up to 400 ns per element, 100 times as long as to copy x
    into C order, drop there, and copy the result back.  Now it is 0.7 to 1.3 times as long."""
    threads(1)
    x = normal([(32, 28, 28, 24)[d] for d in order], np.float32).transpose(np.argsort(order))
    out = np.empty_like(x)

    def by_copies():
        dense = np.ascontiguousarray(x)
        out[...] = pyreg.dropout(dense, 0.1, key=KEY, impl=impl, out=dense)

    strided = best_time(lambda: pyreg.dropout(x, 0.1, key=KEY, impl=impl, out=out))
    assert strided < 3 * best_time(by_copies)


def test_zero_strides():
    row = normal(50, np.float32)
    x = np.broadcast_to(row, (40, 50))
    assert same(pyreg.dropout(x, 0.2, key=KEY), reference.dropout(x, 0.2, KEY))
    x = np.broadcast_to(row[:, None], (50, 600))
    assert same(pyreg.dropout(x, 0.2, key=KEY), reference.dropout(x, 0.2, KEY))


def test_fresh_output_keeps_the_layout():
    assert pyreg.dropout(np.asfortranarray(np.ones((3, 4))), 0.5, key=1).flags.f_contiguous


def test_out_that_partly_overlaps():
    for shift in (1, 3, 64, 5000):
        for sign in (1, -1):
            memory = normal(20_000, np.float32)
            x, out = (memory[shift:], memory[:-shift])[::sign]
            want = reference.dropout(x.copy(), 0.2, KEY)
            assert same(pyreg.dropout(x, 0.2, key=KEY, out=out), want)
    memory = normal((100, 100), np.float32)
    want = reference.dropout(memory.copy(), 0.2, KEY)
    assert same(pyreg.dropout(memory, 0.2, key=KEY, out=memory.T), want)


def test_scalars_lists_and_empty_arrays():
    assert pyreg.dropout(np.float32(3), 0.0).shape == ()
    assert float(pyreg.dropout(3.0, 0.5, key=KEY)) in (0.0, 6.0)
    assert pyreg.dropout([1.0, 2.0], 0.0).tolist() == [1.0, 2.0]
    for shape in ((0,), (3, 0, 2)):
        assert pyreg.dropout(np.ones(shape), 0.5, key=KEY).shape == shape
        assert pyreg.dropout_mask(shape, 0.5, key=KEY).shape == shape


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
def test_foreign_byte_order(dtype):
    x = normal(100, np.float64).astype(dtype)
    native = x.astype(x.dtype.newbyteorder("="))
    want = reference.dropout(native, 0.2, KEY)
    assert same(pyreg.dropout(x, 0.2, key=KEY), want)
    out = np.empty_like(x)
    pyreg.dropout(x, 0.2, key=KEY, out=out)
    assert (out == want).all()


# ---- Same bits on any number of threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["philox", "threefry"])
def test_threads(threads, dtype, impl):
    shape = (1500, 1021)  # large enough for several threads
    x = normal(shape, dtype)
    want = reference.dropout(x, 0.1, KEY, impl)
    for n in (1, 2, 3, 5, 16):
        threads(n)
        assert pyreg.get_num_threads() == n
        for name, a in layouts(x):
            assert same(pyreg.dropout(a, 0.1, key=KEY, impl=impl), want), (n, name)
        a = x.copy()
        assert same(pyreg.dropout(a, 0.1, key=KEY, impl=impl, out=a), want)


def test_past_the_cache(threads):
    """Streaming stores, fresh and into out= at every alignment, give the bits of ordinary ones."""
    n = _core.config()["cache_bytes"] // 8 + 100_001
    x = normal(n, np.float32)
    parts = [pyreg.dropout(x[a : a + CHUNK], 0.1, key=KEY, offset=a) for a in range(0, n, CHUNK)]
    want = np.concatenate(parts)
    memory = np.empty(n + 16, np.float32)
    for count in (1, 3):
        threads(count)
        for shift in range(16):
            assert same(pyreg.dropout(x, 0.1, key=KEY, out=memory[shift : shift + n]), want)
        assert same(pyreg.dropout(x, 0.1, key=KEY), want)


@pytest.mark.slow
def test_more_than_2_to_32_elements():
    n = 2**32 + 5
    x = np.ones(n, ml_dtypes.bfloat16)
    pyreg.dropout(x, 0.25, key=KEY, out=x)
    for at in (0, 2**31 - 100, 2**32 - 100):
        want = reference.dropout(np.ones(105, x.dtype), 0.25, KEY, offset=at)
        assert same(x[at : at + 105], want)


# ---- Keys ----------------------------------------------------------------------------------------------------------


def test_forms_of_a_key():
    x = np.ones(100, np.float32)
    want = pyreg.dropout(x, 0.5, key=KEY)
    words = np.array([KEY >> 32, KEY & 0xFFFFFFFF], np.uint32)
    assert same(pyreg.dropout(x, 0.5, key=words), want)
    assert same(pyreg.dropout(x, 0.5, key=np.uint64(KEY)), want)


def test_fresh_keys():
    x = np.ones(1000, np.float32)
    assert not same(pyreg.dropout(x), pyreg.dropout(x))
    assert same(pyreg.dropout(x, rng=3), pyreg.dropout(x, rng=3))
    rng = np.random.default_rng(3)
    first = pyreg.dropout(x, rng=rng)
    assert same(first, pyreg.dropout(x, rng=3))
    assert not same(first, pyreg.dropout(x, rng=rng))


# ---- Errors: before anything is written ----------------------------------------------------------------------------

ERRORS = [
    ({"rate": -0.1}, ValueError, r"rate is -0.1; wanted a probability"),
    ({"rate": 1.0000001}, ValueError, r"rate is 1.0000001"),
    ({"rate": math.nan}, ValueError, r"rate is nan"),
    ({"rate": 2, "deterministic": True}, ValueError, r"rate is 2"),
    ({"x": np.ones(4, np.int32)}, TypeError, r"x has dtype int32; wanted float32"),
    ({"x": np.ones(4, bool)}, TypeError, r"x has dtype bool"),
    ({"x": np.ones(4, np.complex64)}, TypeError, r"x has dtype complex64"),
    ({"x": np.ones(4, np.longdouble)}, TypeError, r"x has dtype (float128|longdouble)"),
    ({"x": np.ones(4, object)}, TypeError, r"x has dtype object"),
    ({"x": [1, 2]}, TypeError, r"x has dtype int64"),
    ({"out": np.ones(5)}, ValueError, r"out has shape \(5,\) and dtype float64; wanted those of x: \(4,\) and float64"),
    ({"out": np.ones((4, 1))}, ValueError, r"out has shape \(4, 1\)"),
    ({"out": np.ones(4, np.float32)}, ValueError, r"out has shape \(4,\) and dtype float32"),
    ({"out": [1.0] * 4}, TypeError, r"out is a list; wanted a NumPy array"),
    ({"out": np.broadcast_to(np.ones(1), 4)}, ValueError, r"out is read-only"),
    ({"key": -1}, ValueError, r"key is -1; wanted an int in \[0, 2\*\*64\)"),
    ({"key": 2**64}, ValueError, r"key is 18446744073709551616"),
    ({"key": 1.5}, TypeError, r"key is float of dtype float64 and shape \(\); wanted an int"),
    ({"key": np.zeros(3, np.uint32)}, TypeError, r"shape \(3,\)"),
    ({"key": np.zeros(2, np.int64)}, TypeError, r"of dtype int64 and shape \(2,\)"),
    ({"key": 1, "rng": 2}, TypeError, r"both key and rng are given"),
    ({"impl": "mersenne"}, ValueError, r"impl is 'mersenne'; wanted one of 'philox', 'threefry', 'threefry_x64'"),
    ({"impl": []}, ValueError, r"impl is \[\]"),
    ({"broadcast_dims": (1,)}, ValueError, r"broadcast_dims has 1; wanted dims of an array with 1 dims"),
    ({"broadcast_dims": -2}, ValueError, r"broadcast_dims has -2"),
    ({"offset": -1}, ValueError, r"offset is -1; wanted an int in \[0, 2\*\*64 - 4\]"),
    ({"offset": 2**64 - 3}, ValueError, r"offset is 18446744073709551613"),
    ({"offset": 1.5}, TypeError, r"float"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change, error, message):
    kwargs = {"x": np.ones(4), "rate": 0.5, "out": None, **change}
    out = kwargs["out"]
    before = out.copy() if isinstance(out, np.ndarray) else None
    if out is None:
        kwargs["out"] = out = np.full(np.shape(kwargs["x"]), 7, getattr(kwargs["x"], "dtype", int))
        before = out.copy()
    with pytest.raises(error, match=message):
        pyreg.dropout(kwargs.pop("x"), kwargs.pop("rate"), **kwargs)
    assert before is None or (np.asarray(out) == before).all()


def test_errors_of_read_only_in_place():
    x = np.ones(4)
    x.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        pyreg.dropout(x, 0.5, out=x)


def test_errors_of_backward_and_mask():
    with pytest.raises(TypeError, match="dy has dtype int64"):
        pyreg.dropout_backward(np.ones(3, np.int64), key=1)
    with pytest.raises(TypeError, match="key is None"):
        pyreg.dropout_backward(np.ones(3), key=None)
    with pytest.raises(TypeError, match="key"):
        pyreg.dropout_mask(3, key=None)
    with pytest.raises(ValueError, match=r"shape is \(3, -1\)"):
        pyreg.dropout_mask((3, -1), key=1)
    with pytest.raises(ValueError, match="rate is 3"):
        pyreg.dropout_mask(3, 3, key=1)
