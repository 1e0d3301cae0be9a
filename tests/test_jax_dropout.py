"""pyreg.jax.dropout against Flax's own Dropout under every transform, on each backend; then what it promises itself."""

import functools
import hashlib
import importlib.util
import math

import ml_dtypes
import numpy as np
import pytest
from common import normal, python
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxcommon import CHECKPOINTS, EXPORTABLE, KEY_IMPLS, assert_same, eager_flax_dropout, flax_dropout, jax
from test_dropout import GOLDEN, KEY
from test_jax import rates, seeds, shapes

import pyreg
import pyreg.jax
from pyreg.jax import _backend

jnp, lax = jax.numpy, jax.lax
checkify, jet = pytest.importorskip("jax.experimental.checkify"), pytest.importorskip("jax.experimental.jet")
HAS_FLATBUFFERS = importlib.util.find_spec("flatbuffers") is not None  # else JAX exports, but not to bytes


def dropout(rate, dims=(), impl="auto"):
    """The op as a function of x and a key, as flax_dropout makes one."""
    return lambda x, key: pyreg.jax.dropout(x, rate, key=key, broadcast_dims=dims, impl=impl)


# ---- Programs --------------------------------------------------------------------------------------------------------
# Each is a function of d(x, key), x and key, and gives the same bits for pyreg's d and for the one it is compared with.
# x holds small integers and the scale is 4, so that sums are exact in any order.

RATE = 0.75


def integers(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32))


def weights(x):
    return integers(x.shape, seed=1)


def loss(d, power=2):
    """A scalar with other second derivatives in each element, linear in none."""
    return lambda x, key: (d(x, key) ** power * weights(x)).sum()


def fixed(d, key):
    return lambda x: d(x, key)


def other(key, i):
    """Another key, for less compilation than jax.random.fold_in."""
    return jax.random.wrap_key_data(jax.random.key_data(key) + jnp.uint32(i), impl=jax.random.key_impl(key))


def keys(key, *shape):
    words = jax.random.key_data(key)
    words = words + jnp.arange(1, math.prod(shape) + 1, dtype=jnp.uint32).reshape(*shape, 1)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))


def layers(d):
    """Matrix products between two dropouts."""

    def model(x, key):
        w = integers((x.shape[-1], 5), seed=2)
        return (d(d(x, key) @ w, other(key, 1)) ** 2).sum()

    return model


def scan(d, x, key):
    return lax.scan(lambda x, key: ((y := d(x, key) + 1), y), x, keys(key, 3))


def while_loop(d, x, key):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, d(s[1], other(key, s[0])) + 1), (0, x))


def fori_loop(d, x, key, n=3):
    return lax.fori_loop(0, n, lambda i, x: d(x, other(key, i)) + 1, x)


def cond(d, x, key, yes=True):
    return lax.cond(yes, d, lambda x, _: x + 1, x, key)


def switch(d, x, key, i):
    return lax.switch(i, [lambda x: x, fixed(d, key), lambda x: d(d(x, key), other(key, 1))], x)


DERIVATIVES = {"fwd": jax.jacfwd, "rev": jax.jacrev}

PROGRAMS = {
    "eager": lambda d, x, k: d(x, k),
    "jit": lambda d, x, k: jax.jit(d)(x, k),
    "jit, key inside": lambda d, x, k: jax.jit(lambda x, i: d(x, other(k, i)))(x, 7),
    "jit in jit": lambda d, x, k: jax.jit(lambda x: jax.jit(d)(x, k) + jax.jit(d)(x, other(k, 1)))(x),
    "disable_jit": lambda d, x, k: jax.disable_jit()(d)(x, k),
    "debug_nans": lambda d, x, k: jax.debug_nans(True)(lambda x: (d(x, k), jax.jit(d)(x, k)))(x),
    "eval_shape": lambda d, x, k: [jnp.zeros(a.shape, a.dtype) for a in [jax.eval_shape(d, x, k)]],
    "ahead of time": lambda d, x, k: jax.jit(d).lower(x, k).compile()(x, k),
    "ahead of time, traced": lambda d, x, k: jax.jit(d).trace(x, k).lower().compile()(x, k),
    "donation": lambda d, x, k: jax.jit(d, donate_argnums=0)(x + 0, k),
    "donation of a chain": lambda d, x, k: jax.jit(lambda x: d(d(x, k), other(k, 1)), donate_argnums=0)(x + 0),
    "input used again": lambda d, x, k: jax.jit(lambda x: (d(x, k), x, d(x, k) + x))(x),
    # Derivatives
    "grad": lambda d, x, k: jax.grad(loss(d))(x, k),
    "jit of grad": lambda d, x, k: jax.jit(jax.grad(loss(d)))(x, k),
    "grad of jit": lambda d, x, k: jax.grad(jax.jit(loss(d)))(x, k),
    "grad of grad": lambda d, x, k: jax.grad(lambda x: jax.grad(loss(d, 3))(x, k).sum())(x),
    "value_and_grad": lambda d, x, k: jax.value_and_grad(loss(d))(x, k),
    "value_and_grad of a model": lambda d, x, k: jax.jit(jax.grad(layers(d)))(x, k),
    "jvp": lambda d, x, k: jax.jvp(fixed(d, k), (x,), (weights(x),)),
    "jvp of jit": lambda d, x, k: jax.jvp(jax.jit(fixed(d, k)), (x,), (weights(x),)),
    "vjp": lambda d, x, k: jax.vjp(fixed(d, k), x)[1](weights(x)),
    "linearize": lambda d, x, k: [(y, f(weights(x))) for y, f in [jax.linearize(fixed(d, k), x)]],
    "linear_transpose": lambda d, x, k: jax.linear_transpose(fixed(d, k), x)(weights(x)),
    **{f"jac{a}": lambda d, x, k, f=f: f(d)(x, k) for a, f in DERIVATIVES.items()},
    **{
        f"hessian {b}-{a}": lambda d, x, k, f=f, g=g: g(f(loss(d, 3)))(x[0], k)
        for a, f in DERIVATIVES.items()
        for b, g in DERIVATIVES.items()
    },
    "hessian": lambda d, x, k: jax.jit(jax.hessian(loss(d, 3)))(x[0], k),
    "derivative by a zero": lambda d, x, k: jax.grad(lambda x, z: (d(x, k) + 0 * d(z, k)).sum(), (0, 1))(x, x),
    # Batches
    "vmap of x": lambda d, x, k: jax.vmap(d, (0, None))(x, k),
    "vmap of keys": lambda d, x, k: jax.vmap(d, (None, 0))(x, keys(k, 3)),
    "vmap of both": lambda d, x, k: jax.vmap(d)(x, keys(k, 4)),
    "vmap of one": lambda d, x, k: jax.vmap(d)(x[:1], keys(k, 1)),
    "vmap of none": lambda d, x, k: jax.vmap(d)(x[:0], keys(k, 4)[:0]),
    "vmap, other axes": lambda d, x, k: jax.vmap(d, (1, 0), 1)(x, keys(k, 6)),
    "vmap, last axes": lambda d, x, k: jax.vmap(d, (-1, 0), -1)(jnp.stack([x, x + 1]), keys(k, 6)),
    "vmap, axis of keys": lambda d, x, k: jax.vmap(lambda x, k: jax.vmap(d, (None, 0))(x, k), (0, 1))(x, keys(k, 2, 4)),
    "vmap of keys in x": lambda d, x, k: jax.vmap(jax.vmap(d, (0, None)), (None, 0))(x, keys(k, 3)),
    "vmap of x in keys": lambda d, x, k: jax.vmap(jax.vmap(d, (None, 0)), (0, None))(x, keys(k, 3)),
    "vmap of both in x": lambda d, x, k: jax.vmap(jax.vmap(d, (0, None)), (1, 0))(jnp.stack([x, x + 1]), keys(k, 4)),
    "vmap of x in both": lambda d, x, k: jax.vmap(jax.vmap(d), (0, None))(jnp.stack([x, x + 1]), keys(k, 4)),
    "vmap of both twice": lambda d, x, k: jax.vmap(jax.vmap(d))(jnp.stack([x, x + 1]), keys(k, 2, 4)),
    "vmap, three deep": lambda d, x, k: jax.vmap(jax.vmap(jax.vmap(d), (0, None)), (0, 1))(
        jnp.stack([jnp.stack([x, x + 1, x + 2])] * 2), keys(k, 4, 2)
    ),
    "vmap of jit": lambda d, x, k: jax.vmap(jax.jit(d), (0, None))(x, k),
    "jit of vmap": lambda d, x, k: jax.jit(jax.vmap(d))(x, keys(k, 4)),
    "vmap of grad": lambda d, x, k: jax.vmap(jax.grad(loss(d)))(x, keys(k, 4)),
    "vmap of grad by keys": lambda d, x, k: jax.vmap(jax.grad(loss(d)), (None, 0))(x, keys(k, 3)),
    "grad of vmap": lambda d, x, k: jax.grad(lambda x: (jax.vmap(d)(x, keys(k, 4)) ** 2).sum())(x),
    "grad of vmap by keys": lambda d, x, k: jax.grad(lambda x: (jax.vmap(d, (None, 0))(x, keys(k, 3)) ** 2).sum())(x),
    "grad of vmap by axis": lambda d, x, k: jax.grad(lambda x: (jax.vmap(d, (1, 0), 1)(x, keys(k, 6)) ** 2).sum())(x),
    "vmap of jvp": lambda d, x, k: jax.vmap(lambda x, k: jax.jvp(fixed(d, k), (x,), (weights(x),)))(x, keys(k, 4)),
    "jvp of vmap": lambda d, x, k: jax.jvp(lambda x: jax.vmap(d)(x, keys(k, 4)), (x,), (weights(x),)),
    "vmap of hessian": lambda d, x, k: jax.vmap(jax.hessian(loss(d, 3)))(x, keys(k, 4)),
    # Control flow
    "scan": scan,
    "grad of scan": lambda d, x, k: jax.grad(lambda x: (scan(d, x, k)[0] ** 2).sum())(x),
    "scan of grad": lambda d, x, k: scan(jax.grad(loss(d)), x, k),
    "vmap of scan": lambda d, x, k: jax.vmap(functools.partial(scan, d))(x, keys(k, 4)),
    "while_loop": while_loop,
    "jvp of while_loop": lambda d, x, k: jax.jvp(lambda x: while_loop(d, x, k)[1], (x,), (weights(x),)),
    "vmap of while_loop": lambda d, x, k: jax.vmap(functools.partial(while_loop, d), (0, None))(x, k),
    "fori_loop": fori_loop,
    "fori_loop, traced end": lambda d, x, k: jax.jit(functools.partial(fori_loop, d))(x, k, 3),
    "grad of fori_loop": lambda d, x, k: jax.grad(lambda x: (fori_loop(d, x, k) ** 2).sum())(x),
    "cond": lambda d, x, k: jax.jit(functools.partial(cond, d))(x, k, True),
    "grad of cond": lambda d, x, k: jax.grad(lambda x: (cond(d, x, k, x[0, 0] < 9) ** 2).sum())(x),
    "vmap of cond": lambda d, x, k: jax.vmap(functools.partial(cond, d))(x, keys(k, 4), jnp.arange(4) % 2 == 0),
    "switch": lambda d, x, k: [f(x, k, i) for f in [jax.jit(functools.partial(switch, d))] for i in range(3)],
    "map": lambda d, x, k: lax.map(lambda k: d(x, k), keys(k, 3)),
    "map batch_size": lambda d, x, k: lax.map(lambda xk: d(*xk), (x, keys(k, 4)), batch_size=3),
    "grad of map": lambda d, x, k: jax.grad(
        lambda x: (lax.map(lambda k: d(x, k), keys(k, 4), batch_size=3) ** 2).sum()
    )(x),
    # Recomputation
    "checkpoint": lambda d, x, k: jax.grad(jax.checkpoint(loss(d)))(x, k),
    **{
        f"jit of checkpoint{name}": lambda d, x, k, options=options: jax.jit(
            jax.grad(lambda x: (jax.checkpoint(d, **options)(d(x, k), other(k, 1)) ** 2).sum())
        )(x)
        for name, options in CHECKPOINTS.items()
    },
    "checkpoint in scan": lambda d, x, k: jax.grad(lambda x: (scan(jax.checkpoint(d), x, k)[0] ** 2).sum())(x),
}


def masked(rate, dims):
    """What impl="philox" is, from pyreg.dropout_mask."""

    def d(x, key):
        def draw(words):
            return pyreg.dropout_mask(x.shape, rate, key=np.asarray(words), broadcast_dims=dims)

        result = jax.ShapeDtypeStruct(draw(np.zeros(2, np.uint32)).shape, bool)
        keep = jax.pure_callback(draw, result, jax.random.key_data(key), vmap_method="sequential")
        return jnp.where(keep, x / (1 - rate), 0)

    return d


KINDS = {  # pyreg's, and the one it is compared with
    "auto": (dropout(RATE), flax_dropout(RATE)),
    "philox": (dropout(RATE, -1, "philox"), masked(RATE, -1)),
    "broadcast": (dropout(RATE, (0,)), flax_dropout(RATE, (0,))),
}


@functools.cache
def expected(kind, name):
    return PROGRAMS[name](KINDS[kind][1], integers((4, 6)), jax.random.key(3))


# How a mask is drawn matters where there are batches of them, and not to the rules of differentiation.
MASKS = ["eager", "jit", "donation", "input used again", "grad", "jvp", "linear_transpose", "scan", "map batch_size"]
MASKS += [name for name in PROGRAMS if name.startswith("vmap")]


@pytest.mark.few_by_jax(kind=["auto"], name=MASKS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("auto", name) for name in PROGRAMS]
    + [("philox", name) for name in MASKS]
    + [("broadcast", name) for name in ("eager", "grad", "vmap of both", "vmap of grad by keys")],
)
def test_program(jax_backend, kind, name):
    assert_same(PROGRAMS[name](KINDS[kind][0], integers((4, 6)), jax.random.key(3)), expected(kind, name))


@pytest.mark.parametrize("kind", ["auto", "philox"])
def test_export(jax_backend, kind):
    if jax_backend == "callback":
        pytest.skip("JAX does not export callbacks")
    d, same_as = KINDS[kind]
    x, key, (rows,) = integers((4, 6)), jax.random.key(3), jax.export.symbolic_shape("rows")
    for spec in (x, jax.ShapeDtypeStruct((rows, 6), x.dtype)):
        exported = jax.export.export(jax.jit(d), disabled_checks=EXPORTABLE)(spec, key)
        if HAS_FLATBUFFERS:
            exported = jax.export.deserialize(exported.serialize(vjp_order=1))
        for n in (4,) if spec is x else (2, 3):
            got, want = (jax.jit(value_and_vjp(f))(x[:n], key, weights(x[:n])) for f in (exported.call, same_as))
            assert_same(got, want)


def test_backend(jax_backend):
    """The programs run on the backend that they are meant to, and show_config says so."""
    text = jax.jit(dropout(0.1)).lower(integers(8), jax.random.key(0)).as_text()
    assert ("pyreg_dropout_v2" in text) == (jax_backend == "ffi")
    assert ("callback" in text) == (jax_backend == "callback")
    assert pyreg.show_config("dicts")["jax"].startswith(jax_backend)


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_a_threefry_mask_is_drawn_once_for_both_passes(jax_backend, impl):
    def calls(f):
        text = jax.jit(f).lower(integers((4, 6)), jax.random.key(0)).compile().as_text()
        return [text.count(f'"pyreg_dropout{name}_v2"') for name in ("", "_mask", "_packed")]

    d, ffi = dropout(RATE, (), impl), jax_backend == "ffi"
    assert calls(d) == [ffi, 0, 0]
    assert calls(jax.value_and_grad(loss(d))) == ([2 * ffi, 0, 0] if impl == "philox" else [0, ffi, 2 * ffi])


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_operands_of_programs_are_not_written_over(impl):
    """XLA would copy them first."""
    d = dropout(RATE, (), impl)
    for f in (d, lambda x, key: jax.vjp(fixed(d, key), x)[1](x)):
        assert "output_operand_alias" not in jax.jit(f).lower(integers((4, 6)), jax.random.key(0)).as_text()


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_results_of_operations_are_written_over(impl):
    """Where nothing else needs them; else XLA copies."""
    d = dropout(RATE, (), impl)
    x, key = integers((40, 60)), jax.random.key(0)

    def program(x, key):
        a = x + 1
        return d(a, key), a

    assert "output_operand_alias" in jax.jit(program).lower(x, key).as_text()
    y, a = jax.jit(program)(x, key)
    assert_same(a, x + 1)
    assert_same(y, d(x + 1, key))


# ---- Values ----------------------------------------------------------------------------------------------------------


def as_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def value_and_vjp(d):
    def run(x, key, dy):  # outside jit, the value that comes with a vjp has been divided, in Flax
        return d(x, key), jax.vjp(fixed(d, key), x)[1](dy)[0]

    return run


@pytest.mark.parametrize("how", ["eager", "jit"])
def test_flax(x64, how):
    """The values and gradients of Flax's Dropout, whatever the arguments."""
    transform, flax = (jax.jit, flax_dropout) if how == "jit" else (lambda f: f, eager_flax_dropout)

    @settings(max_examples=10)  # each compiles
    @given(seed=seeds, rate=rates, shape=shapes, partitionable=st.booleans(), data=st.data())
    def check(seed, rate, shape, partitionable, data):
        # Not one element alone: there XLA outside jit divides by 1 - rate, while else it multiplies by the reciprocal.
        assume(how == "jit" or math.prod(shape) != 1)
        dims = tuple(data.draw(st.sets(st.integers(-len(shape), len(shape) - 1)))) if shape else ()
        dtype = as_dtype(data.draw(st.sampled_from(["float32", "float16", "bfloat16"] + ["float64"] * x64)))
        assume(dtype != np.float16 or 1 - rate > 2e-5)  # else the scale is infinite, and Flax's gradient 0 * inf
        impl = data.draw(st.sampled_from(KEY_IMPLS))
        x, dy = (jnp.asarray(normal(shape, dtype, seed=seed + i)) for i in range(2))
        key = jax.random.key(seed, impl=impl)
        with jax.threefry_partitionable(partitionable):
            got, want = (transform(value_and_vjp(d))(x, key, dy) for d in (dropout(rate, dims), flax(rate, dims)))
        assert_same(got, want)

    check()


@pytest.mark.few_by_jax(shape=[(), (0, 3), (1, 1, 1)])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (1, 1, 1)], ids=str)
def test_smallest(jax_backend, shape):
    x = jnp.asarray(normal(shape, np.float32))
    ops = [jax.jit(value_and_vjp(d)) for d in (dropout(0.5), flax_dropout(0.5), dropout(0.5, (), "philox"))]
    for seed in range(6):  # some keep an element, some drop it
        key = jax.random.key(seed)
        got, want, philox = (op(x, key, x) for op in ops)
        assert_same(got, want)
        assert_same(philox, (pyreg.dropout(np.asarray(x), 0.5, key=words(key)),) * 2)


@pytest.mark.few_by_jax(dtype=["float32", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_special_values(jax_backend, dtype):
    """Dropped ones become +0, whatever they were; the others overflow, or not, as in Flax."""
    dtype, key = as_dtype(dtype), jax.random.key(1)
    info = ml_dtypes.finfo(dtype)
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, info.max, info.min, info.smallest_normal, -1] * 8, dtype)
    with jax.enable_x64(dtype == np.float64):
        for d, same_as in ((dropout(0.4), flax_dropout(0.4)), (dropout(0.4, (), "philox"), masked(0.4, ()))):
            assert_same(jax.jit(d)(x, key), jax.jit(same_as)(x, key))


def test_draws_next_to_the_threshold(x64, jax_backend):
    """Random masks hardly ever meet it: one draw in 2**23, or 2**52."""
    key, x, digits = jax.random.key(3), jnp.ones(64), 52 if x64 else 23
    draws = jax.random.bits(key, x.shape, "uint64" if x64 else "uint32")
    draw = int(draws.max()) >> (8 * draws.itemsize - digits)
    for keep in (draw, draw + 2**-20, draw + 0.5):  # the second is rounded to the first
        rate = 1 - keep / 2**digits
        assert_same(jax.jit(dropout(rate))(x, key), jax.jit(flax_dropout(rate))(x, key))


def test_large(x64, jax_backend):
    if jax_backend == "callback":
        pytest.skip("deadlocks where XLA has one thread, because its arguments wait for the thread that it blocks")
    x, key = jnp.asarray(normal((1000, 1031), np.float32)), jax.random.key(5)
    assert_same(jax.jit(dropout(0.1))(x, key), jax.jit(flax_dropout(0.1))(x, key))


# ---- Keys ------------------------------------------------------------------------------------------------------------


def words(key):
    return np.asarray(jax.random.key_data(key))


RBG = ["eager", "jit of grad", "vmap of keys", "vmap of x", "vmap of both", "scan"]  # its vmap is like no other's


@pytest.mark.parametrize(
    ("impl", "name"), [(impl, name) for impl in KEY_IMPLS[1:] for name in (RBG if impl == "rbg" else RBG[1:3])]
)
def test_key_implementations(impl, name):
    x, key = integers((4, 6)), jax.random.key(9, impl=impl)
    got, want = (PROGRAMS[name](d(RATE), x, key) for d in (dropout, flax_dropout))
    assert_same(got, want)


@pytest.mark.parametrize("impl", KEY_IMPLS)
def test_raw_keys(impl):
    x = integers((4, 6))
    with jax.default_prng_impl(impl):
        key, raw = jax.random.key(9), jax.random.PRNGKey(9)
        want = dropout(RATE)(x, key)
        assert_same(want, flax_dropout(RATE)(x, raw))
        for given in (raw, np.asarray(raw)):
            assert_same(dropout(RATE)(x, given), want)
            assert_same(dropout(RATE, (), "philox")(x, given), dropout(RATE, (), "philox")(x, key))
        assert_same(jax.vmap(dropout(RATE), (None, 0))(x, raw[None]), want[None])


# ---- impl="philox" ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_philox_is_the_numpy_function(jax_backend, dtype):
    cases = [
        (0.1, (3, 5, 7), ()),
        (1 / 3, (3, 5, 7), (0, -1)),
        (0.5, (1000,), 0),
        (1e-9, (65,), ()),
        (2**-40, (33,), ()),
    ]
    if jax_backend == "jax" and dtype != "float32":
        del cases[1:]  # the mask is the same for all
    with jax.enable_x64(dtype == "float64"):
        for rate, shape, dims in cases:
            x, dy = (normal(shape, as_dtype(dtype), seed) for seed in range(2))
            op = jax.jit(value_and_vjp(dropout(rate, dims, "philox")))
            for key in (jax.random.key(2**31 + 5), jax.random.wrap_key_data(np.array([2**32 - 1, 7], np.uint32))):
                want = tuple(pyreg.dropout(a, rate, key=words(key), broadcast_dims=dims) for a in (x, dy))
                assert_same(op(x, key, dy), want)


@pytest.mark.parametrize("impl", [name for name in KEY_IMPLS if name != "threefry2x32"])
def test_philox_with_other_keys(impl):
    x, key = normal((40,), np.float32), jax.random.key(4, impl=impl)
    want = pyreg.dropout(x, 0.3, key=np.asarray(jax.random.bits(key, (2,), np.uint32)))
    assert_same(dropout(0.3, (), "philox")(x, key), want)


@pytest.mark.few_by_jax(rate=list(GOLDEN)[:2])
@pytest.mark.parametrize("rate", GOLDEN)
def test_golden_masks_of_philox_v1(jax_backend, rate):
    y = dropout(rate, (), "philox")(np.ones(100_000, np.float32), np.array(divmod(KEY, 2**32), np.uint32))
    assert hashlib.sha256(np.packbits(np.asarray(y) != 0, bitorder="little").tobytes()).hexdigest() == GOLDEN[rate]


# ---- The function ----------------------------------------------------------------------------------------------------


def test_nothing_to_drop():
    x = jnp.asarray([1.0, jnp.nan, -0.0])
    assert pyreg.jax.dropout(x, 0.0, key=None) is x
    assert pyreg.jax.dropout(x, 0, key=None) is x
    assert pyreg.jax.dropout(x, 0.5, key=None, deterministic=True) is x
    assert pyreg.jax.dropout(x, 1.0, key=None, deterministic=True) is x


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_everything_is_dropped(impl):
    x = jnp.asarray([1.0, jnp.nan, jnp.inf, -0.0])
    assert_same(pyreg.jax.dropout(x, 1.0, key=None, impl=impl), jnp.zeros(4))
    assert_same(jax.grad(lambda x: pyreg.jax.dropout(x, 1, key=None, impl=impl).sum())(x), jnp.zeros(4))


def test_results_are_not_weak():
    y = pyreg.jax.dropout(2.0, 0.5, key=jax.random.key(0))
    assert y.dtype == np.float32
    assert not y.weak_type


def test_rates_that_are_not_floats():
    x, key = integers(40), jax.random.key(0)
    for rate in (np.float32(0.25), np.float64(0.25), jnp.float32(0.25)):
        assert_same(dropout(rate)(x, key), dropout(0.25)(x, key))


@pytest.mark.parametrize("impl", ["auto", "philox"])
@pytest.mark.parametrize("transform", ["", "jit"])
def test_the_key_is_all_that_is_kept(impl, transform):
    x, key, f = integers((40, 60)), jax.random.key(0), dropout(0.1, (), impl)
    f = getattr(jax, transform)(f) if transform else f
    assert [a.nbytes for a in jax.tree.leaves(jax.vjp(fixed(f, key), x)[1])] == [8]


def test_debug_nans_finds_one(jax_backend):
    x, key = jnp.ones(8), jax.random.key(0)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        dropout(0.1)(x.at[:].set(jnp.nan), key)


ERRORS = {
    "rate is 1.5; wanted a probability": (ValueError, {"rate": 1.5}),
    "rate is -0.1; wanted a probability": (ValueError, {"rate": -0.1}),
    "rate is nan; wanted a probability": (ValueError, {"rate": math.nan}),
    "impl is 'threefry'; wanted 'auto' or 'philox'": (ValueError, {"impl": "threefry"}),
    "impl is 1; wanted 'auto' or 'philox'": (ValueError, {"impl": 1}),
    "x has dtype int32; wanted float32, float64": (TypeError, {"x": np.ones(3, np.int32)}),
    "x has dtype bool; wanted float32, float64": (TypeError, {"x": np.ones(3, bool)}),
    "x has dtype complex64; wanted float32, float64": (TypeError, {"x": np.ones(3, np.complex64)}),
    "broadcast_dims has 1; wanted dims of an array with 1 dims": (ValueError, {"broadcast_dims": 1}),
    "broadcast_dims has -2; wanted dims of an array with 1 dims": (ValueError, {"broadcast_dims": (0, -2)}),
    "key is NoneType; wanted a key of jax.random.key": (TypeError, {"key": None}),
    "key is int; wanted a key of jax.random.key": (TypeError, {"key": 0}),
    "key has dtype float32 and shape \\(2,\\); wanted one key": (TypeError, {"key": np.ones(2, np.float32)}),
    "key has dtype uint32 and shape \\(3, 2\\); wanted one key": (TypeError, {"key": np.ones((3, 2), np.uint32)}),
    "key has shape \\(3,\\); wanted one key; jax.vmap": (
        ValueError,
        {"key": ...},
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    error, arguments = ERRORS[message]
    arguments = {"x": np.ones(3, np.float32), "rate": 0.5, "key": jax.random.key(0)} | arguments
    if arguments["key"] is ...:
        arguments["key"] = keys(jax.random.key(0), 3)
    x = arguments.pop("x")
    with pytest.raises(error, match=message):
        pyreg.jax.dropout(x, **arguments)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda x: pyreg.jax.dropout(x, **arguments), x)


# ---- Backends --------------------------------------------------------------------------------------------------------


@pytest.fixture
def choose(monkeypatch):
    """The backend is chosen anew, from the environment that the test sets."""

    def refuse(*args, **kwargs):
        raise ValueError("no such version\nand more")

    monkeypatch.setattr(_backend, "_chosen", None)
    monkeypatch.setattr(_backend, "_registered", False)
    yield lambda value, refused: (
        monkeypatch.setenv(_backend.VARIABLE, value),
        monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse) if refused else None,
        jax.clear_caches(),
    )
    monkeypatch.undo()
    jax.clear_caches()


def test_bad_backend(choose):
    choose("gpu", refused=False)
    x, key = jnp.ones(8), jax.random.key(0)
    with pytest.raises(ValueError, match=f"{_backend.VARIABLE} is 'gpu'; wanted auto, ffi, jax, callback"):
        dropout(0.5)(x, key)


@pytest.mark.parametrize("name", ["jax", "callback"])
def test_backend_by_name(choose, name):
    choose(name, refused=True)
    x, key = jnp.ones(8), jax.random.key(0)
    assert_same(dropout(0.5)(x, key), flax_dropout(0.5)(x, key))
    assert pyreg.show_config("dicts")["jax"] == f"{name}: by {_backend.VARIABLE}"


def test_refused_handler(choose):
    choose("auto", refused=True)
    x, key = integers((4, 6)), jax.random.key(0)
    with pytest.warns(RuntimeWarning) as warned:
        assert_same(dropout(RATE)(x, key), flax_dropout(RATE)(x, key))
    message = "pyreg.jax computes with slower JAX operations, because XLA refused its handler (no such version)"
    assert [str(w.message) for w in warned] == [message]
    assert_same(jax.grad(loss(dropout(RATE)))(x, key), jax.grad(loss(flax_dropout(RATE)))(x, key))  # warns no more
    assert "XLA refused its handler" in pyreg.show_config("dicts")["jax"]


def test_refused_handler_that_was_asked_for(choose):
    choose("ffi", refused=True)
    x, key = jnp.ones(8), jax.random.key(0)
    with pytest.raises(RuntimeError, match=f"{_backend.VARIABLE} is 'ffi', but XLA refused its handler"):
        dropout(0.5)(x, key)


def test_import():
    """pyreg does not import JAX; pyreg.jax does not start XLA, and chooses a backend when an op is lowered."""
    code = """
import sys, pyreg
assert "jax" not in sys.modules
print(pyreg.show_config("dicts")["jax"])
import jax
import pyreg.jax
jax.config.update("jax_num_cpu_devices", 3)  # which JAX refuses once it has started
print(pyreg.show_config("dicts")["jax"])
pyreg.jax.dropout(jax.numpy.ones(8), key=jax.random.key(0))
print(pyreg.show_config("dicts")["jax"])
"""
    config = ["not used yet", "not used yet", "ffi: XLA calls pyreg's kernels"]
    assert python(code, warnings="ignore").split("\n") == config


def test_an_empty_backend_is_none(choose):
    choose("", refused=False)
    assert_same(dropout(0.5)(jnp.ones(8), jax.random.key(0)), flax_dropout(0.5)(jnp.ones(8), jax.random.key(0)))


# ---- What else JAX does with an op -----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_key_reuse(impl):
    """A key is used up, as by Flax's layer, in a program and outside."""
    x, key = jnp.ones(16), jax.random.key(0)

    def twice(x, key):
        return pyreg.jax.dropout(pyreg.jax.dropout(x, key=key, impl=impl), key=key, impl=impl)

    with jax.debug_key_reuse(True):
        for f in (twice, jax.jit(twice), jax.grad(lambda x, key: twice(x, key).sum())):
            with pytest.raises(jax.errors.KeyReuseError):
                f(x, jax.random.clone(key))
        first, second = jax.random.split(key)
        y = pyreg.jax.dropout(pyreg.jax.dropout(x, key=first, impl=impl), key=second, impl=impl)
        jax.grad(lambda x: pyreg.jax.dropout(x, key=jax.random.key(2), impl=impl).sum())(x)
        for name in KEY_IMPLS:
            pyreg.jax.dropout(x, key=jax.random.key(0, impl=name), impl=impl)
    assert_same(y, pyreg.jax.dropout(pyreg.jax.dropout(x, key=first, impl=impl), key=second, impl=impl))


def test_taylor_series():
    """Of a function of the op by jet: the op is linear."""
    x, term = integers(32), jnp.linspace(0, 1, 32)
    drop = functools.partial(pyreg.jax.dropout, rate=0.25, key=jax.random.key(0))
    value, series = jet.jet(lambda x: drop(x) ** 2, (x,), ([term, 0 * term],))
    np.testing.assert_allclose(value, drop(x) ** 2, rtol=1e-6)
    np.testing.assert_allclose(series[0], 2 * drop(x) * drop(term), rtol=1e-6)
    np.testing.assert_allclose(series[1], 2 * drop(term) ** 2, rtol=1e-6)


def test_nan_checks():
    drop = checkify.checkify(functools.partial(pyreg.jax.dropout, key=jax.random.key(0)), errors=checkify.nan_checks)
    for f in (drop, jax.jit(drop)):
        assert f(jnp.ones(8))[0].get() is None
        assert "nan generated by primitive: pyreg_dropout" in f(jnp.full(8, jnp.nan))[0].get()


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_strict_options(jax_backend, impl):
    """JAX promotes neither ranks nor dtypes."""
    x, key = jnp.ones((4, 6)), jax.random.key(0)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.bfloat16):

            def loss(x, rate):
                return pyreg.jax.dropout(x, rate, key=key, impl=impl, broadcast_dims=1).sum()

            jax.value_and_grad(loss)(x.astype(dtype), 0.25)
            jax.jit(jax.grad(loss, (0, 1)))(x.astype(dtype), jnp.float32(0.25))


def test_long_dims():
    """Lowers; nothing is allocated."""
    f = jax.jit(lambda x: pyreg.jax.dropout(x, 0.3, key=jax.random.key(0)))
    for shape in ((2**31,), (3, 2**31), (2**33 + 1,)):
        text = f.lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16)).as_text()
        assert "pyreg_dropout_v2" in text


def test_dims_by_any_integer():
    x, key = jnp.ones((4, 3)), jax.random.key(0)
    want = pyreg.jax.dropout(x, key=key, broadcast_dims=(0,))
    for dims in (0, np.int64(0), np.array([0]), [np.int32(-2)], -2):
        assert_same(pyreg.jax.dropout(x, key=key, broadcast_dims=dims), want)
