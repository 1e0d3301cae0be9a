"""pyreg.haiku against Haiku: the function, the module, training, saved parameters and state."""

import inspect
import pickle
import warnings

import numpy as np
import pytest
import reference
from common import in_threads, normal
from jaxcommon import INPUTS, assert_same, eagerly, jax, outcome

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages, while they are imported
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

import pyreg.haiku
import pyreg.jax

jnp = jax.numpy
KEY = jax.random.key(3)
FUNCTIONS = (hk.dropout, pyreg.haiku.dropout)
CLASSES = (hk.BatchNorm, pyreg.haiku.BatchNorm)


def positive_zeros(tree):
    """What Haiku drops may be -0."""
    return jax.tree.map(lambda y: y + jnp.zeros((), y.dtype), tree)


def assert_same_outcome(ours, theirs):
    if isinstance(theirs, str) or isinstance(ours, str):
        assert ours == theirs
    else:
        assert_same(ours, theirs)


# ---- Dropout ---------------------------------------------------------------------------------------------------------


def test_signatures():
    want, got = (inspect.signature(f).parameters for f in FUNCTIONS)
    assert [*got] == [*want, "impl"]
    assert [(p.kind, p.default) for p in got.values()][:-1] == [(p.kind, p.default) for p in want.values()]
    for name in ("__init__", "__call__"):
        want, got = (inspect.signature(getattr(kind, name)).parameters for kind in CLASSES)
        assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in want.values()]


DRAWN = {
    "plain": lambda drop, x: drop(KEY, 0.37, x),
    "shared": lambda drop, x: drop(KEY, 0.37, x, (0, -1)),
    "vmap": lambda drop, x: jax.vmap(lambda key, row: drop(key, 0.37, row))(jax.random.split(KEY, len(x)), x),
    "vmap over keys": lambda drop, x: jax.vmap(lambda key: drop(key, 0.37, x))(jax.random.split(KEY, 3)),
    "grad": lambda drop, x: jax.grad(lambda x: (drop(KEY, 0.37, x) * jnp.cos(x)).sum())(x),
    "transformed": lambda drop, x: hk.transform(lambda x: drop(hk.next_rng_key(), 0.37, x)).apply({}, KEY, x),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("compiled", [False, True])
def test_numbers(name, compiled):
    x = jnp.asarray(normal((40, 7), np.float32))
    draw = DRAWN[name]
    ours = (jax.jit(draw, static_argnums=0) if compiled else draw)(pyreg.haiku.dropout, x)
    theirs = (jax.jit if compiled else eagerly)(draw, static_argnums=0)(hk.dropout, x)
    if name == "grad" and not compiled:
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)  # where XLA truly divides
    else:
        assert_same(positive_zeros(ours), positive_zeros(theirs))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_dtypes(x64, dtype):
    x = jnp.asarray(normal((300,), np.float32)).astype(dtype if x64 or dtype != "float64" else "float32")
    for rate in (0.9127555772777217, np.float16(0.3)):
        theirs, ours = (jax.jit(drop, static_argnums=1)(KEY, rate, x) for drop in FUNCTIONS)
        assert_same(positive_zeros(ours), positive_zeros(theirs))


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name):
    for rate in (0.5, 0.0, 1.0, 1.5, -0.5, None):
        theirs, ours = (outcome(lambda: drop(KEY, rate, INPUTS[name])) for drop in FUNCTIONS)  # noqa: B023
        assert_same_outcome(ours, theirs)


def test_keys():
    x = jnp.ones((4, 5))
    for key in (jax.random.PRNGKey(4), jax.random.key(5, impl="rbg"), np.zeros(2, np.uint32)):
        assert_same(*(drop(key, 0.5, x) for drop in FUNCTIONS))
    with pytest.raises(TypeError, match="key is NoneType; wanted a key"):
        pyreg.haiku.dropout(None, 0.5, x)


def test_a_traced_rate():
    """Haiku's mask; it truly divides then."""
    x = jnp.asarray(normal((40, 7), np.float32))
    for rate in (0.2, 0.7):
        theirs, ours = (jax.jit(drop)(KEY, rate, x) for drop in FUNCTIONS)
        np.testing.assert_array_equal(ours == 0, theirs == 0)
        np.testing.assert_allclose(ours, theirs, rtol=3e-7)
    rate = jnp.bfloat16(0.4)  # in whose dtype Haiku draws
    assert_same(*(jax.jit(drop)(KEY, rate, x) for drop in FUNCTIONS))


def test_an_array_as_rate_inside_jit():
    """Which is known there."""
    x = jnp.asarray(normal((40, 7), np.float32))
    for rate in (jnp.float32(0.4), jnp.bfloat16(0.4), jnp.float32(0)):
        theirs, ours = (jax.jit(lambda x: drop(KEY, rate, x))(x) for drop in FUNCTIONS)  # noqa: B023
        assert_same(positive_zeros(ours), positive_zeros(theirs))


def test_philox_and_errors():
    x = jnp.asarray(normal((40, 7), np.float32))
    want = pyreg.jax.dropout(x, 0.3, key=KEY, broadcast_dims=(0,), impl="philox")
    assert_same(pyreg.haiku.dropout(KEY, 0.3, x, [0], impl="philox"), want)
    with pytest.raises(ValueError, match="impl is 'x'; wanted 'auto' or 'philox'"):
        pyreg.haiku.dropout(KEY, 0.3, x, impl="x")
    with pytest.raises(ValueError, match="broadcast_dims has 2; wanted dims of an array with 2 dims"):
        pyreg.haiku.dropout(KEY, 0.3, x, (2,))


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


def transformed(kind, *, call=None, **options):
    options = {"create_scale": True, "create_offset": True, "decay_rate": 0.9} | options
    return hk.transform_with_state(lambda x, train, **given: kind(**options)(x, train, **(call or {}), **given))


def trained(model, x, steps=2):
    """What init gives, and what some steps make of it with a gradient; then by the averages."""
    params, state = first = jax.jit(model.init, static_argnums=2)(KEY, x, True)

    @jax.jit
    def step(params, state, x):
        def loss(params, x):
            y, new = model.apply(params, state, None, x, True)
            return (y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), (y, new)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    results = [first]
    for i in range(steps):
        (_, (y, state)), gradients = step(params, state, x + i)
        results.append((y, state, gradients))
    return [*results, model.apply(params, state, None, x, False)]


def assert_close(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((8, 3), "float32", {}),
        ((4, 3, 5, 2), "float32", {"data_format": "NCHW", "create_scale": False, "eps": 1e-3}),
        ((4, 5, 3), "float32", {"axis": [0, 1], "create_offset": False, "scale_init": hk.initializers.RandomNormal()}),
        ((4, 5, 3), "float32", {"axis": (0,)}),  # Haiku's
        ((16, 3), "float16", {}),
        ((16, 3), "bfloat16", {}),
    ],
)
def test_batch_norm(shape, dtype, options):
    x = jnp.asarray(2 * normal(shape, np.float32) + 1).astype(dtype)
    theirs, ours = (trained(transformed(kind, **options), x) for kind in CLASSES)
    assert_close(ours, theirs, 2e-5 if dtype == "float32" else 0.1)


def test_scale_and_offset_of_a_call():
    x, given = jnp.asarray(normal((8, 3), np.float32)), jnp.asarray(normal((8, 3), np.float32, 1))
    for scale, offset in ((given, given[:1]), (given, None), (None, given), (jnp.float32(2), given)):
        own = {"create_scale": False, "create_offset": offset is None}
        call = {"scale": scale, "offset": offset}
        models = [transformed(kind, call=call, **own) for kind in CLASSES]
        assert_close(*(trained(model, x, 1) for model in models), 1e-5)


def test_test_local_stats():
    x = jnp.asarray(normal((8, 3), np.float32))
    results = []
    for kind in CLASSES:
        model = transformed(kind, call={"test_local_stats": True})
        params, state = model.init(KEY, x, True)
        y, after = model.apply(params, state, None, x, False)
        assert_same(after, state)
        results.append(y)
    assert_close(*results, 1e-5)


def test_far_from_zero():
    """Against float64, where Haiku's variance is far off."""
    x = normal((64, 3), np.float32) + np.float32(1e4)
    want, mean, var = reference.batch_norm(x, np.ones(3), np.zeros(3), axis=-1)
    errors = []
    for kind in CLASSES:
        y, state, _ = trained(transformed(kind), jnp.asarray(x), 1)[1]
        errors.append(np.abs(np.asarray(y) - want).max())
    assert errors[1] < 1e-4 < 0.01 < errors[0]
    np.testing.assert_allclose(state["batch_norm/~/mean_ema"]["average"][0], mean, rtol=1e-6)
    np.testing.assert_allclose(state["batch_norm/~/var_ema"]["average"][0], var, rtol=1e-5)


def test_several_replicas():
    x = jnp.asarray(normal((4, 6, 3), np.float32) + np.arange(4, dtype=np.float32)[:, None, None])
    for options in ({}, {"cross_replica_axis_index_groups": [[0, 1], [2, 3]]}):
        results = []
        for kind in CLASSES:
            model = transformed(kind, cross_replica_axis="replicas", **options)
            params, state = transformed(kind).init(KEY, x[0], True)
            if options:
                with pytest.raises(NotImplementedError):  # vmap knows no groups: they reach JAX
                    jax.vmap(lambda x: model.apply(params, state, None, x, True), axis_name="replicas")(x)  # noqa: B023
            else:
                run = jax.vmap(lambda x: model.apply(params, state, None, x, True), axis_name="replicas")  # noqa: B023
                results.append(jax.jit(run)(x))
        if results:
            assert_close(*results, 1e-5)


def test_batch_norm_that_is_haiku_s():
    """Nothing to compute, other dtypes, what Haiku refuses."""
    given = {"call": {"scale": jnp.ones(3)}}
    for x, options in (
        (jnp.ones((0, 3)), {}),
        (jnp.ones((4, 3), jnp.complex64), {"create_scale": False, "create_offset": False}),
        (jnp.ones((4, 3)), given),
        (jnp.ones(3), {"data_format": "channels_first"}),
        (jnp.ones((4, 3)), {"axis": [0, 1]}),
    ):
        theirs, ours = (
            outcome(lambda: transformed(kind, **options).init(KEY, x, True))  # noqa: B023
            for kind in CLASSES
        )
        assert_same_outcome(ours, theirs)


def test_a_call_is_one_call():
    """For interceptors."""
    counts = []
    for kind in CLASSES:
        calls = []

        def intercept(call, args, kwargs, context):
            calls.append((context.method_name, getattr(context.module, "name", "")))  # noqa: B023
            return call(*args, **kwargs)

        with hk.intercept_methods(intercept):
            params, state = transformed(kind).init(KEY, jnp.ones((4, 3)), True)
            transformed(kind).apply(params, state, None, jnp.ones((4, 3)), False)
        counts.append(calls)
    assert counts[0] == counts[1]


def test_mixed_precision():
    jmp = pytest.importorskip("jmp")
    policy = jmp.get_policy("params=float32,compute=float16,output=float32")
    x, results = jnp.asarray(normal((16, 3), np.float32)), []
    for kind in CLASSES:
        hk.mixed_precision.set_policy(kind, policy)
        results.append(trained(transformed(kind), x, 1))
        hk.mixed_precision.clear_policy(kind)
    assert_close(*reversed(results), 0.05)


# ---- Training --------------------------------------------------------------------------------------------------------


def network(drop, norm, x, train):
    for width in (16, 8):
        x = jax.nn.relu(norm(True, True, 0.9)(hk.Linear(width)(x), train))
        x = drop(hk.next_rng_key(), 0.2, x) if train else x
    return hk.Linear(1)(x)


def test_training_and_saved_parameters():
    """What one trains the other loads; parameters and state have the same names, shapes and dtypes."""
    data = jnp.asarray(normal((5, 12, 6), np.float32))
    models = [
        hk.transform_with_state(lambda x, train, pair=pair: network(*pair, x, train))
        for pair in zip(FUNCTIONS, CLASSES, strict=True)
    ]
    results = []
    for model in models:
        params, state = jax.jit(model.init, static_argnums=2)(KEY, data[0], True)

        @jax.jit
        def step(params, state, x, key):
            def loss(params):
                y, new = model.apply(params, state, key, x, True)  # noqa: B023
                return ((y[:, 0] - x[:, 0]) ** 2).mean(), new

            (_, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), new

        for i, x in enumerate(data):
            params, state = step(params, state, x, jax.random.fold_in(KEY, i))
        results.append((params, state))
    assert_close(*results, 1e-4)
    for saved, model in zip(results, reversed(models), strict=True):
        loaded = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, saved)))
        y, _ = model.apply(*loaded, None, data[0], False)
        assert np.isfinite(y).all()
        other, _ = models[1 - models.index(model)].apply(*saved, None, data[0], False)
        assert_close(y, other, 1e-6)


def test_threads():
    x = jnp.asarray(normal((50,), np.float32))
    want = eagerly(hk.dropout, static_argnums=1)(KEY, 0.3, x)
    in_threads(lambda _: [assert_same(pyreg.haiku.dropout(KEY, 0.3, x), want) for _ in range(20)], 4)
