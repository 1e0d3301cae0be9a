"""pyreg.jax.dropout with a rate that is known when the program runs, and what new rates cost."""

import functools

import ml_dtypes
import numpy as np
import pytest
from common import normal
from hypothesis import given
from hypothesis import strategies as st
from jaxcommon import assert_same, auto_mesh, jax, put, run_cases

import pyreg.jax
from pyreg import _core
from pyreg.jax import _numbers, dropout

jnp, lax = jax.numpy, jax.lax
IMPLS = ["auto", "philox"]
RATES = np.float32([0, 1e-30, 1e-9, 0.1, 0.3, 0.5, 0.9, 1 - 2**-24, 1])
KEY = jax.random.key(3)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def x_of(dtype=np.float32, n=3000):
    return jnp.asarray(normal(n, dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_as_with_the_number(jax_backend, impl, dtype):
    x = x_of(dtype)
    f = jax.jit(lambda x, rate: dropout(x, rate, key=KEY, impl=impl))
    for rate in RATES:
        want = jax.jit(functools.partial(dropout, rate=float(rate), key=KEY, impl=impl))(x)
        assert_same(f(x, rate), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_as_with_the_number_in_float64(x64, impl):
    x = x_of(np.float64 if x64 else np.float32)
    f = jax.jit(lambda x, rate: dropout(x, rate, key=KEY, impl=impl))
    for rate in (0.1, 1 / 3, 1 - 2**-53, 2.0**-60, 1e-300):
        rate = rate if x64 else float(np.float32(rate))
        want = jax.jit(functools.partial(dropout, rate=rate, key=KEY, impl=impl))(x)
        assert_same(f(x, rate), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_out_of_range(jax_backend, impl):
    """As Flax's formula: kept where a uniform number is below 1 - rate, and divided by that."""
    x = x_of(n=100)
    f = jax.jit(lambda x, rate: dropout(x, rate, key=KEY, impl=impl))
    for rate in (-1.0, -0.25, -1e30):
        np.testing.assert_allclose(f(x, rate), x / np.float32(1 - rate), rtol=2e-7)
    for rate in (1.5, 1e30, np.inf, np.nan):
        y = np.asarray(f(x, rate))
        assert not y.any()
        assert not np.signbit(y).any()


@given(rate=st.floats(0, 1, width=32, exclude_max=True))
def test_numbers(rate):
    """What is made of a traced rate is what is made of a number."""
    for generator in ("philox", "threefry"):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            got = np.asarray(_numbers.of_traced_rate(jnp.float32(rate), jnp.dtype(dtype), generator, False))
            number = rate if rate >= 2.0**-126 else 0.0  # XLA flushes subnormals to 0
            np.testing.assert_array_equal(got, _numbers.of_rate(number, jnp.dtype(dtype), generator, False))


def test_scale_is_the_kernels():
    assert [_core.dropout_scale(_core.F32, r) for r in (0, 0.5, 0.1)] == [1, 2, float(1 / np.float32(0.9))]


@pytest.mark.parametrize("impl", IMPLS)
def test_vmap(jax_backend, impl):
    x, rates, keys = x_of(n=600), jnp.asarray(RATES[:4]), jax.random.split(KEY, 4)
    drop = functools.partial(dropout, impl=impl)
    one = [drop(x, float(r), key=KEY) for r in rates]
    assert_same(jax.vmap(lambda r: drop(x, r, key=KEY))(rates), jnp.stack(one))
    both = jax.vmap(lambda r, k: drop(x, r, key=k))(rates, keys)
    assert_same(both, jnp.stack([drop(x, float(r), key=k) for r, k in zip(rates, keys, strict=True)]))
    nested = jax.vmap(lambda k: jax.vmap(lambda r: drop(x, r, key=k))(rates))(keys)
    assert_same(nested, jnp.stack([jnp.stack([drop(x, float(r), key=k) for r in rates]) for k in keys]))


@pytest.mark.parametrize("impl", IMPLS)
def test_schedule(jax_backend, impl):
    """In a scan, and gradients there."""
    x, rates = x_of(n=600), jnp.asarray(RATES[3:7])

    def loss(x, rates):
        return lax.scan(lambda c, r: (c + (dropout(x, r, key=KEY, impl=impl) ** 2).sum(), None), 0.0, rates)[0]

    want = sum(2 * dropout(dropout(x, float(r), key=KEY, impl=impl), float(r), key=KEY, impl=impl) for r in rates)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x, rates), want, rtol=1e-6)


def test_derivative_by_the_rate():
    """That of x / (1 - rate) where it is kept; other elements do not depend on the rate."""
    x = x_of(n=600)

    def plain(x, rate, kept):
        return (jnp.where(kept, x / (1 - rate), 0) ** 2).sum()

    def ours(x, rate):
        return (dropout(x, rate, key=KEY) ** 2).sum()

    for rate in (0.0, 0.25, 0.9):
        kept = dropout(jnp.ones(600), rate, key=KEY) > 0
        want = jax.grad(plain, (0, 1))(x, rate, kept)
        for got in (jax.grad(ours, (0, 1))(x, rate), jax.jacfwd(ours, (0, 1))(x, rate)):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert jax.grad(ours, 1)(x, 1.0) == 0
    np.testing.assert_allclose(
        jax.hessian(ours, 1)(x, 0.25), jax.hessian(plain, 1)(x, 0.25, dropout(jnp.ones(600), 0.25, key=KEY) > 0), 1e-5
    )


@case
def sharded():
    x, mesh = x_of(n=(8, 12)), auto_mesh()
    f = jax.jit(lambda x, rate: dropout(x, rate, key=KEY))
    for rate in (0.0, 0.25, 1.0):
        want = dropout(x, rate, key=KEY)
        for spec in (("a", "b"), (None, ("a", "b"))):
            assert_same(f(put(x, mesh, *spec), rate), want)


def test_sharded():
    run_cases("test_jax_rate", ["sharded"])


def test_new_numbers_compile_nothing():
    """Outside jit, too."""
    x, compiled = jnp.ones((40, 3)), []

    def listen(event, *args, **kwargs):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def run(rate, epsilon):
        dropout(x, rate, key=KEY)
        pyreg.jax.batch_norm(x, epsilon=epsilon)

    run(0.11, 1e-3)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for k in range(5):
            run(0.2 + k / 10, 1e-3 * (k + 2))
        assert compiled == []
        dropout(jnp.ones(41), 0.5, key=KEY)
        assert compiled != []
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        (np.float32([0.1, 0.2]), ValueError, r"rate has shape \(2,\); wanted one number"),
        (np.bool_(True), TypeError, "rate has dtype bool; wanted a real number"),
        (np.complex64(1), TypeError, "rate has dtype complex64; wanted a real number"),
    ],
)
def test_errors(rate, error, message):
    with pytest.raises(error, match=message):
        jax.jit(lambda rate: dropout(jnp.ones(3), rate, key=KEY))(rate)
