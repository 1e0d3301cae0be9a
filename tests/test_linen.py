"""pyreg.linen against Flax's linen: layers, attention, and models with either."""

import functools
import inspect
import warnings
from typing import Any

import jaxcommon
import ml_dtypes
import numpy as np
import pytest
import reference
from common import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxcommon import INPUTS, assert_same, jax, outcome, ulps
from test_batchnorm import offset_normal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages, while they are imported
    linen = pytest.importorskip("flax.linen")
    serialization = pytest.importorskip("flax.serialization")

import pyreg.jax
import pyreg.linen

jnp = jax.numpy
FAMILIES = (linen, pyreg.linen)
assert_alike = functools.partial(jaxcommon.assert_alike, families=FAMILIES)
assert_alike_or_wrong = functools.partial(jaxcommon.assert_alike_or_wrong, families=FAMILIES)
HALF = 0.5  # whose scale is exact, so that it is the same if XLA divides, as it may outside jit
KEY = jax.random.key(0)
RNGS = {"params": KEY, "dropout": jax.random.key(1), "noise": jax.random.key(2)}
apart = jax.lax.optimization_barrier


# ---- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dropout", "BatchNorm"])
def test_signatures(name):
    theirs, ours = (getattr(family, name) for family in FAMILIES)
    assert issubclass(ours, theirs)
    want, got = (inspect.signature(layer).parameters for layer in (theirs, ours))
    assert set(got) - set(want) <= {"impl", "activation"}
    kept = {key: got[key] for key in want}
    assert [(p.kind, p.default) for p in kept.values()] == [(p.kind, p.default) for p in want.values()]
    assert list(kept) == [key for key in got if key in want]
    want, got = (inspect.signature(layer.__call__).parameters for layer in (theirs, ours))
    assert [(p.name, p.kind, p.default) for p in got.values()] == [(p.name, p.kind, p.default) for p in want.values()]


def test_signature_of_attention():
    want, got = (inspect.signature(family.dot_product_attention).parameters for family in FAMILIES)
    assert list(got) == [*want, "impl"]
    assert [p.default for p in got.values()][:-1] == [p.default for p in want.values()]


def test_arguments_by_position():
    assert_alike(lambda f: f.Dropout(HALF, (0,), False, "noise").apply({}, jnp.ones((4, 5)), rngs=RNGS))
    assert_alike(lambda f: f.Dropout(HALF).apply({}, jnp.ones((4, 5)), False, jax.random.key(3)))


@pytest.mark.parametrize("at_call", [None, False, True])
@pytest.mark.parametrize("at_construction", [None, False, True])
@pytest.mark.parametrize("rngs", [RNGS, {"dropout": KEY}, {"params": KEY}, {}], ids=["all", "own", "params", "none"])
def test_deterministic(at_construction, at_call, rngs):
    """Either or both given or none; and which stream is drawn from, or missing."""

    def run(family):
        layer = family.Dropout(HALF, deterministic=at_construction)
        return layer.apply({}, jnp.ones((4, 5)), deterministic=at_call, rngs=rngs)

    assert_alike_or_wrong(run)


KEYS = {
    "key": jax.random.key(3),
    "legacy key": jax.random.PRNGKey(4),
    "rbg key": jax.random.key(5, impl="rbg"),
    "words": np.zeros(2, np.uint32),
    "int": 3,
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("how", ["stream", "argument"])
def test_keys(name, how):
    def run(family):
        layer, x = family.Dropout(HALF, deterministic=False, rng_collection="noise"), jnp.ones((4, 5))
        if how == "stream":
            return layer.apply({}, x, rngs={"noise": KEYS[name], "dropout": KEY})
        return layer.apply({}, x, rng=KEYS[name], rngs=RNGS)

    theirs, ours = (outcome(run, family) for family in FAMILIES)
    if isinstance(theirs, str):
        assert isinstance(ours, str)  # in words of ours
    else:
        assert_same(ours, theirs)


HALVES = jnp.ones((4, 5), jnp.float16), jnp.ones((4, 5), jnp.bfloat16)


@pytest.mark.parametrize("x", [*HALVES, *INPUTS.values()], ids=[*("float16", "bfloat16"), *INPUTS])
@pytest.mark.parametrize("rate", [HALF, 0.0, 1.0, np.float32(0.5)])
def test_inputs(x, rate):
    def run(family):
        y = family.Dropout(rate, deterministic=False).apply({}, x, rngs=RNGS)
        return y, jnp.bool(getattr(y, "weak_type", False))

    assert_alike_or_wrong(run)


@pytest.mark.parametrize("dims", [(0,), (-1,), (0, 2), [0, 1, 2]])
def test_broadcast_dims(dims):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    assert_alike(lambda f: f.Dropout(HALF, broadcast_dims=dims, deterministic=False).apply({}, x, rngs=RNGS))


@pytest.mark.parametrize("rate", [1.5, -0.5, float("nan")])
def test_rates_that_flax_takes(rate):
    x = jnp.ones((1, 4, 5))
    for call in (
        lambda: pyreg.linen.Dropout(rate, deterministic=False).apply({}, x, rngs=RNGS),
        lambda: pyreg.linen.dot_product_attention(x, x, x, dropout_rng=KEY, dropout_rate=rate),
    ):
        with pytest.raises(ValueError, match=r"rate is .*; wanted a probability .* in \[0, 1\] \(Flax does not check"):
            call()
    assert pyreg.linen.Dropout(rate, deterministic=True).apply({}, x) is x


def test_options_are_checked():
    x = jnp.ones((4, 5))
    with pytest.raises(ValueError, match="impl is 'threefry'; wanted 'auto' or 'philox'"):
        pyreg.linen.Dropout(0.5, deterministic=False, impl="threefry").apply({}, x, rngs=RNGS)
    with pytest.raises(ValueError, match="activation is 'gelu'; wanted None or 'relu'"):
        pyreg.linen.BatchNorm(True, activation="gelu").init(KEY, x)


def test_philox():
    x = jnp.ones((20, 5))

    class Drawn(linen.Module):
        @linen.compact
        def __call__(self):
            return self.make_rng("dropout")

    key = Drawn().apply({}, rngs=RNGS)
    y = pyreg.linen.Dropout(0.3, (0,), False, impl="philox").apply({}, x, rngs=RNGS)
    assert_same(y, pyreg.jax.dropout(x, 0.3, key=key, broadcast_dims=(0,), impl="philox"))
    assert (y != pyreg.linen.Dropout(0.3, (0,), False).apply({}, x, rngs=RNGS)).any()


# ---- Whole channels, samples and words -------------------------------------------------------------------------------

SHARED = [  # how to make a layer; the shape of an input; dims that share one draw
    ("Dropout1d", {}, (3, 5, 6), (1,)),
    ("Dropout1d", {"axis": 1}, (6, 5), (1,)),
    ("Dropout2d", {}, (3, 5, 3, 6), (1, 2)),
    ("Dropout2d", {"axis": 1}, (3, 6, 5, 3), (2, 3)),
    ("Dropout3d", {}, (5, 3, 2, 6), (0, 1, 2)),
    ("DropPath", {}, (20, 3, 2), (1, 2)),
    ("WordDropout", {}, (4, 5, 3), (2,)),
]


@pytest.mark.parametrize(("name", "options", "shape", "dims"), SHARED)
@pytest.mark.parametrize("rate", [HALF, 1.0])
def test_shared_masks(name, options, shape, dims, rate):
    """Flax's numbers with `broadcast_dims`, also where Flax computes; and philox."""
    x, make = jnp.asarray(normal(shape, np.float32)), getattr(pyreg.linen, name)
    layer = make(rate, rng_collection="noise", **options)
    got = layer.apply({}, x, False, rngs=RNGS)
    assert_same(got, linen.Dropout(rate, dims, False, "noise").apply({}, x, rngs=RNGS))
    assert_same(layer.apply({}, x, False, KEY), linen.Dropout(rate, dims, False).apply({}, x, rng=KEY))
    weak = jnp.full(shape, 2.0)  # for Flax
    assert_same(layer.apply({}, weak, False, KEY), linen.Dropout(rate, dims, False).apply({}, weak, rng=KEY))
    assert make(rate, True, **options).apply({}, x) is x
    philox = make(rate, False, **options, impl="philox").apply({}, x, rng=KEY)
    assert_same(philox, pyreg.jax.dropout(x, rate, key=KEY, broadcast_dims=dims, impl="philox"))


@pytest.mark.parametrize("name", ["DropPath", "WordDropout"])
def test_without_scale(name):
    x = jnp.asarray(normal((30, 4), np.float16)).at[:, 0].set(np.nan)
    layer = getattr(pyreg.linen, name)(0.25, scale_by_keep=False)
    kept = np.asarray(pyreg.linen.Dropout(0.25, (1,)).apply({}, jnp.ones((30, 4)), False, KEY)) != 0
    assert 0 < kept.sum() < kept.size
    assert_same(layer.apply({}, x, False, KEY), np.where(kept, x, np.float16(0)))
    assert_same(layer.apply({}, x, True), x)


def test_errors_of_shared_masks():
    with pytest.raises(ValueError, match="axis is 0; wanted the dim of the channels"):
        pyreg.linen.Dropout2d(0.5, axis=0).apply({}, jnp.ones((1, 2, 3, 4)), False, KEY)
    with pytest.raises(ValueError, match="has 2 dims; wanted 4, or 3 without"):
        pyreg.linen.Dropout2d(0.5).apply({}, jnp.ones((2, 3)), False, KEY)
    with pytest.raises(ValueError, match="has 0 dims; wanted a batch"):
        pyreg.linen.DropPath(0.5).apply({}, jnp.float32(1), False, KEY)
    with pytest.raises(TypeError, match="broadcast_dims"):
        pyreg.linen.Dropout1d(0.5, broadcast_dims=(1,))


# ---- Models with Flax's own layers -----------------------------------------------------------------------------------


class Own(linen.Module):
    """Attention, dropout and batch-norm of one family, or Flax's."""

    family: Any = linen

    @linen.compact
    def __call__(self, x, train=True):
        options = {} if self.family is linen else {"attention_fn": self.family.dot_product_attention}
        y = linen.MultiHeadDotProductAttention(2, dropout_rate=0.3, deterministic=not train, name="a", **options)(x)
        y = self.family.Dropout(0.3, deterministic=not train, name="b")(x + apart(y))
        return self.family.BatchNorm(use_running_average=not train, momentum=0.9, name="c")(apart(y))


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_accelerate(impl):
    x, model = jnp.asarray(normal((3, 5, 8), np.float32)), Own()
    variables = model.init(RNGS, x)

    def run(model):
        return model.apply(variables, x, rngs=RNGS, mutable=["batch_stats"])

    stock, want = run(model), run(Own(pyreg.linen))
    with pyreg.linen.accelerate(impl=impl):
        got = run(model)
        assert_same(model.init(RNGS, x), variables)
        assert_same(model.apply(variables, x, False), Own(pyreg.linen).apply(variables, x, False))
    if impl == "auto":
        assert_same(got, want)
    else:
        assert not np.allclose(got[0], want[0])
    assert_same(run(model), stock)  # the end of the block is the end of it


def test_accelerate_leaves_others_alone():
    class Other(linen.Dropout):
        pass

    def attention(*args, **options):
        raise AssertionError("called")

    x = jnp.ones((2, 3, 8))
    want = linen.Dropout(HALF).apply({}, x, False, KEY)
    with pyreg.linen.accelerate(impl="philox"):
        assert_same(Other(HALF).apply({}, x, False, KEY), want)
        with pytest.raises(AssertionError, match="called"):
            linen.MultiHeadDotProductAttention(2, attention_fn=attention).init(RNGS, x)
        bound = linen.MultiHeadDotProductAttention(2)
        bound = bound.bind(bound.init(RNGS, x))
        bound(x)
        assert bound.attention_fn is linen.dot_product_attention
    with pytest.raises(ValueError, match="impl is 'x'"), pyreg.linen.accelerate(impl="x"):
        pass


# ---- Models ----------------------------------------------------------------------------------------------------------

WIDTH = 6
rates = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 1.0])
leaves = st.one_of(
    st.sampled_from(["linear", "norm", "relu"]).map(lambda kind: (kind,)),
    st.tuples(st.just("dropout"), rates, st.sampled_from([(), (0,), (-1,)]), st.sampled_from(["dropout", "noise"])),
)
models = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda layers: ("mixed", *layers)),
        inner.map(lambda layer: ("residual", layer)),
        inner.map(lambda layer: ("twice", layer)),
    ),
    max_leaves=6,
)


class Model(linen.Module):
    """Layers in the order of a specification, with Flax's dropout or ours."""

    spec: tuple
    family: str = "flax"

    @linen.compact
    def __call__(self, x):
        kind, *args = self.spec
        inner = [Model(spec, self.family) for spec in args if kind in ("mixed", "residual", "twice")]
        dropout = pyreg.linen.Dropout if self.family == "pyreg" else linen.Dropout
        match kind:
            case "linear":
                x = linen.Dense(WIDTH)(x)
            case "norm":
                x = linen.LayerNorm()(x)
            case "relu":
                x = jax.nn.relu(x)
            case "dropout":
                x = dropout(args[0], args[1], rng_collection=args[2])(x, deterministic=False)
            case "residual":  # apart: else XLA may fuse Flax's product with the sum, and round once
                x = x + apart(inner[0](x))
            case "twice":
                x = inner[0](inner[0](x))
            case "mixed":
                x = linen.Sequential(inner)(x)
        return x


@functools.partial(jax.jit, static_argnums=0)
def derivative(model, params, x, rngs):
    def loss(params, x):
        y = model.apply(params, x, rngs=rngs)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, grads


@settings(max_examples=8)
@given(models, st.integers(0, 9))
def test_random_models(spec, seed):
    theirs, ours = Model(spec), Model(spec, "pyreg")
    x = jnp.asarray(normal((3, WIDTH), np.float32, seed))
    params = theirs.init(RNGS, x)
    assert_same(ours.init(RNGS, x), params)
    for i in range(2):
        rngs = {name: jax.random.fold_in(key, i) for name, key in RNGS.items()}
        assert_same(derivative(ours, params, x, rngs), derivative(theirs, params, x, rngs))


def test_training():
    """Fifty steps give the same parameters, bit for bit."""
    drop = ("dropout", 0.2, (), "dropout")
    spec = ("mixed", ("linear",), ("relu",), drop, ("mixed", ("linear",), drop), ("linear",))
    data = normal((50, 8, WIDTH), np.float32)

    def train(model):
        params = model.init(RNGS, data[0])

        @jax.jit
        def step(params, batch, key):
            grads = jax.grad(lambda p: ((model.apply(p, batch, rngs={"dropout": key}) - batch[::-1]) ** 2).mean())(
                params
            )
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        for i, batch in enumerate(data):
            params = step(params, batch, jax.random.key(i))
        return params

    assert_same(train(Model(spec, "pyreg")), train(Model(spec)))


class Block(linen.Module):
    """Two dropouts as a linen model has them, for transforms of modules."""

    family: str
    static: bool = False

    def setup(self):
        kind = pyreg.linen.Dropout if self.family == "pyreg" else linen.Dropout
        self.first, self.second = kind(HALF), kind(0.75, rng_collection="noise")

    def __call__(self, x, deterministic=False):
        return self.second(self.first(x, deterministic), deterministic)

    def carried(self, x, _):
        return self(x), x


def lifted(family, transform, *args, method="__call__", **apply):
    model = transform(Block)(family)
    return model.apply({}, *args, rngs=RNGS, method=method, **apply)


STREAMS = {"dropout": True, "noise": False}
PROGRAMS = {
    "apply": lambda f, x: lifted(f, lambda b: b, x),
    "jit of apply": lambda f, x: jax.jit(lambda x: lifted(f, lambda b: b, x))(x),
    "jit": lambda f, x: lifted(f, linen.jit, x),
    "vmap": lambda f, x: lifted(f, lambda b: linen.vmap(b, split_rngs=STREAMS, variable_axes={}), x),
    "scan": lambda f, x: lifted(
        f,
        lambda b: linen.scan(b, split_rngs=STREAMS, variable_axes={}, length=3, methods=["carried"]),
        x,
        None,
        method="carried",
    ),
    "remat": lambda f, x: jax.grad(
        lambda x: (lifted(f, lambda b: linen.remat(b, static_argnums=2), x, False) ** 2).sum()
    )(x),
    "grad": lambda f, x: jax.grad(lambda x: (lifted(f, lambda b: b, x) ** 2).sum())(x),
    "bind": lambda f, x: Block(f).bind({}, rngs=RNGS)(x),
    "clone and copy": lambda f, x: Block(f).clone(static=True).copy(name="a").apply({}, x, rngs=RNGS),
    "deterministic": lambda f, x: lifted(f, lambda b: b, x, True),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
    x = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (4, 6)).astype(np.float32))
    assert_same(PROGRAMS[name]("pyreg", x), PROGRAMS[name]("flax", x))


@pytest.mark.parametrize("training", [True, False])
def test_a_call_is_one_call(training):
    """For interceptors, captured intermediates and summaries."""
    x = jnp.ones((4, 5))

    def run(family):
        calls = []

        def intercept(next_function, args, kwargs, context):
            calls.append(f"{type(context.module).__name__}.{context.method_name}")
            return next_function(*args, **kwargs)

        drop = family.Dropout(HALF, deterministic=not training)
        norm = family.BatchNorm(use_running_average=not training)
        both = linen.Sequential([drop, norm])
        with linen.intercept_methods(intercept):
            variables = both.init(RNGS, x)
            _, seen = both.apply(
                variables, x, rngs=RNGS, capture_intermediates=True, mutable=["intermediates", "batch_stats"]
            )
        return calls, jax.tree.map(jnp.shape, seen["intermediates"])

    theirs, ours = (run(family) for family in FAMILIES)
    assert ours == theirs
    assert "BatchNorm.__call__" in ours[0]


def test_summary():
    x = jnp.ones((4, 5))
    models = [linen.Sequential([f.Dropout(HALF, deterministic=True), f.BatchNorm(True)]) for f in FAMILIES]
    theirs, ours = (model.tabulate(RNGS, x, console_kwargs={"width": 120}) for model in models)
    assert ours == theirs


# ---- Attention -------------------------------------------------------------------------------------------------------


def operands(batch=(2,), dtype=jnp.float32):
    shapes = [(*batch, 5, 4, 6), (*batch, 7, 4, 6), (*batch, 7, 4, 3)]
    return [jnp.asarray(normal(shape, np.float32, i), dtype) for i, shape in enumerate(shapes)]


def einsum(dims, *args):
    return jnp.einsum(dims, *args) * 2


BIAS, MASK = normal((2, 4, 5, 7), np.float32, 9), np.random.default_rng(0).random((2, 4, 5, 7)) < 0.7
OWN = {"qk_attn_weights_einsum": einsum, "attn_weights_value_einsum": einsum}
ATTENTION = {  # options, and how the operands look
    "plain": ({}, {}),
    "float16": ({}, {"dtype": jnp.float16}),
    "bfloat16": ({}, {"dtype": jnp.bfloat16}),
    "to bfloat16": ({"dtype": jnp.bfloat16}, {}),
    "bias and mask": ({"bias": BIAS, "mask": MASK}, {}),
    "precision": ({"precision": "highest"}, {}),
    "no batch": ({}, {"batch": ()}),
    "wide softmax, float16": ({"force_fp32_for_softmax": True}, {"dtype": jnp.float16}),
    "wide softmax, bfloat16": ({"force_fp32_for_softmax": True}, {"dtype": jnp.bfloat16}),
    "wide softmax": ({"force_fp32_for_softmax": True}, {}),
    "own einsums": (OWN, {}),
    "own einsums, bfloat16": (OWN, {"dtype": jnp.bfloat16}),
    "own dot_general": ({"einsum_dot_general": jax.lax.dot_general}, {}),
}


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, broadcast):
    options, shape = ATTENTION[name]
    options = {**options, "dropout_rng": jax.random.key(3), "broadcast_dropout": broadcast}
    rate = 0.1 if broadcast else 0.3
    assert_alike(lambda f: f.dot_product_attention(*operands(**shape), dropout_rate=rate, **options))


@pytest.mark.parametrize("name", ["plain", "wide softmax, bfloat16"])
def test_gradient_of_attention(name):
    options, shape = ATTENTION[name]
    options = {**options, "dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "broadcast_dropout": False}

    def run(family):
        y, vjp = jax.vjp(functools.partial(family.dot_product_attention, **options), *operands(**shape))
        return vjp(y)

    assert_alike(run)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": jnp.bfloat16, "broadcast_dropout": False},
        {"dtype": jnp.float16, "force_fp32_for_softmax": True},
        {"qk_attn_weights_einsum_cls": lambda: einsum, "attn_weights_value_einsum_cls": lambda: einsum},
        {"decode": True},
    ],
    ids=lambda o: ", ".join(o),
)
def test_attention_layer(options):
    x = jnp.asarray(normal((3, 5, 4), np.float32))

    def run(family):
        layer = linen.MultiHeadDotProductAttention(
            2, dropout_rate=0.5, deterministic=False, attention_fn=family.dot_product_attention, **options
        )
        variables = layer.init(RNGS, x)
        inputs = x[:, :1] if "decode" in options else x
        y = layer.apply(variables, inputs, rngs=RNGS, sow_weights=True, mutable=["intermediates", "cache"])
        return y, layer.clone(deterministic=True).apply(variables, inputs, mutable=["cache"])

    assert_alike(run)


Q, K, V = operands()
ONE = {"dropout_rate": 0.5, "dropout_rng": KEY}
WRONG = {
    "no key": lambda f: f(Q, K, V, dropout_rate=0.5),
    "rate 1": lambda f: f(Q, K, V, dropout_rate=1.0, dropout_rng=KEY),
    "rate 0": lambda f: f(Q, K, V, dropout_rate=0.0, dropout_rng=KEY),
    "deterministic": lambda f: f(Q, K, V, **ONE, deterministic=True),
    "batch dims of v": lambda f: f(Q, K, V[:1], **ONE),
    "rank of v": lambda f: f(Q, K, V[0], **ONE),
    "length of v": lambda f: f(Q, K, V[:, :1], **ONE),
    "heads of v": lambda f: f(Q, K, V[:, :, :1], **ONE),
    "depth of k": lambda f: f(Q, K[..., :3], V, **ONE),
    "one einsum": lambda f: f(Q, K, V, **ONE, qk_attn_weights_einsum=einsum),
    "the other einsum": lambda f: f(Q, K, V, **ONE, attn_weights_value_einsum=einsum),
    "precision and einsums": lambda f: f(Q, K, V, **ONE, **OWN, precision="highest"),
    "dot_general and einsums": lambda f: f(Q, K, V, **ONE, **OWN, einsum_dot_general=jax.lax.dot_general),
}


@pytest.mark.parametrize("name", WRONG)
def test_attention_complains_as_flax_does(name):
    assert_alike_or_wrong(lambda family: WRONG[name](family.dot_product_attention))


@pytest.mark.parametrize("broadcast", [True, False])
def test_attention_with_philox(broadcast):
    rate, key = 0.3, jax.random.key(5)
    y = pyreg.linen.dot_product_attention(
        Q, K, V, dropout_rng=key, dropout_rate=rate, broadcast_dropout=broadcast, impl="philox"
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", Q, K) / np.sqrt(6))
    shape = (1, 1, 5, 7) if broadcast else weights.shape
    multiplier = pyreg.jax.dropout(jnp.ones(shape), rate, key=key, impl="philox")
    np.testing.assert_allclose(y, jnp.einsum("bhqk,bkhd->bqhd", weights * multiplier, V), rtol=1e-4, atol=1e-6)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


def norm(family, x, options, **call):
    """Result, running statistics, and the layer's parameters."""
    layer = family.BatchNorm(**{"momentum": 0.9, "use_running_average": False, **options})
    variables = layer.init(KEY, x)
    params = jax.tree.map(lambda p: jnp.asarray(normal(p.shape, np.float32) + 2, p.dtype), variables.get("params", {}))
    variables = {"params": params, "batch_stats": variables["batch_stats"]}
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **call)
    return y, updates["batch_stats"], params


OPTIONS = {
    "plain": {},
    "channels first": {"axis": 1},
    "first axis": {"axis": 0},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_bias": False, "use_scale": False},
    "momentum and epsilon": {"momentum": 0.3, "epsilon": 0.1},
    "slow variance": {"use_fast_variance": False},
}


@pytest.mark.parametrize(
    ("name", "masked"),
    [(name, "") for name in OPTIONS]
    + [("plain", "masked"), ("neither", "masked"), ("channels first", "masked"), ("plain", "masked by slices")],
)
def test_batch_norm(name, masked):
    """Values and running statistics: within 4 ulp of float64, and never further from it than Flax by one more."""
    options, shape = OPTIONS[name], (3, 3, 3) if "axis" in OPTIONS[name] else (8, 5, 3)
    x, mask = normal(shape, np.float32) + 1, np.arange(np.prod(shape)).reshape(shape) % 5 > 1
    axis, m = options.get("axis", -1), options.get("momentum", 0.9)
    if masked != "masked":
        mask = mask.take([0], (axis + 1) % 3) if masked else None
    theirs, ours = (norm(family, jnp.asarray(x), options, mask=mask) for family in FAMILIES)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    scale, bias = (ours[2].get(k) for k in ("scale", "bias"))
    want, mean, var = reference.batch_norm(x, scale, bias, axis, options.get("epsilon", 1e-5), mask)
    assert ulps(ours[0], want) <= min(4, ulps(theirs[0], want) + 1)
    for k, new, start in (("mean", mean, 0), ("var", var, 1)):
        np.testing.assert_allclose(ours[1][k], m * start + (1 - m) * new, rtol=3e-7, atol=1e-7)
        np.testing.assert_allclose(ours[1][k], theirs[1][k], rtol=1e-6, atol=1e-6)
    if mask is not None:
        assert_same(norm(pyreg.linen, jnp.asarray(x), options, mask=mask.astype(np.int32)), ours)


def test_statistics_far_from_zero():
    """Where Flax's variance is wrong."""
    x = offset_normal(1e4, (4096, 2), 1)
    theirs, ours = (norm(family, jnp.asarray(x), {"momentum": 0.0}) for family in FAMILIES)
    want, mean, var = reference.batch_norm(x, ours[2]["scale"], ours[2]["bias"])
    np.testing.assert_allclose(ours[1]["mean"], mean, rtol=1e-7)
    np.testing.assert_allclose(ours[1]["var"], var, rtol=1e-6)
    assert ulps(ours[0], want) < 4
    assert ulps(theirs[0], want) > 1000


TYPES = [
    {},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"param_dtype": jnp.float16, "dtype": jnp.float16},
    {"force_float32_reductions": False, "param_dtype": jnp.float16},
]


@pytest.mark.parametrize("options", TYPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32], ids=lambda d: d.__name__)
def test_dtypes_of_batch_norm(dtype, options):
    x = jnp.asarray(normal((40, 3), np.float32) * 4 + 2).astype(dtype)
    theirs, ours = (norm(family, x, options) for family in FAMILIES)
    assert jax.tree.map(lambda a: (a.dtype, a.weak_type), ours) == jax.tree.map(
        lambda a: (a.dtype, a.weak_type), theirs
    )
    a, b = (np.asarray(y[0], np.float64) for y in (ours, theirs))
    np.testing.assert_allclose(a, b, atol=2 * float(jnp.finfo(ours[0].dtype).eps) * np.abs(b).max())
    for name in ("mean", "var"):
        np.testing.assert_allclose(ours[1][name], theirs[1][name], rtol=1e-5, atol=1e-5)


def test_result_is_rounded_once():
    """With a narrow dtype the data stay as they are, as in Flax, and the result is rounded."""
    x = normal((64, 3), np.float32) + 100  # which bfloat16 would round to a half
    y, _, params = norm(pyreg.linen, jnp.asarray(x), {"dtype": jnp.bfloat16})
    want = reference.batch_norm(x, params["scale"], params["bias"])[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("x64", [True], indirect=True)
def test_wide_batch_norm(x64):
    for dtype in (np.float64, np.float32):
        for options in ({}, {"dtype": jnp.float32}, {"param_dtype": jnp.float64}, {"dtype": jnp.float64}):
            x = jnp.asarray(normal((40, 3), dtype) + 1)
            theirs, ours = (norm(family, x, options) for family in FAMILIES)
            assert jax.tree.map(jnp.result_type, ours) == jax.tree.map(jnp.result_type, theirs)
            tolerance = 1e-12 if dtype == np.float64 and "dtype" not in options else 1e-5
            np.testing.assert_allclose(ours[0], theirs[0], rtol=tolerance, atol=tolerance)


HANDED_OVER = {  # to Flax
    "tuple of axes": (jnp.asarray(normal((4, 5, 3), np.float32)), {"axis": (0, -1)}, {}),
    "complex": (jnp.asarray(normal((8, 3), np.float32) + 1j), {}, {}),
    "integers": (jnp.arange(24).reshape(8, 3) % 5, {}, {}),
    "running": (jnp.asarray(normal((8, 3), np.float32)), {"use_running_average": True}, {}),
    "empty": (jnp.ones((0, 3)), {}, {}),
    "neither given": (jnp.ones((8, 3)), {"use_running_average": None}, {}),
    "both given": (jnp.ones((8, 3)), {}, {"use_running_average": True}),
    "narrow reductions": (jnp.ones((8, 3)), {"force_float32_reductions": False}, {}),
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_batch_norm_that_is_flax_s(name):
    x, options, call = HANDED_OVER[name]
    assert_alike_or_wrong(lambda family: norm(family, x, options, **call))


def test_statistics_must_be_mutable():
    x = jnp.ones((8, 3))

    def run(family):
        layer = family.BatchNorm(use_running_average=False)
        return layer.apply(layer.init(KEY, x), x)

    theirs, ours = (outcome(run, family) for family in FAMILIES)
    assert isinstance(ours, str)
    assert ours == theirs


@pytest.mark.parametrize("by_running", [False, True])
def test_activation(by_running):
    """Values, and gradients by all that has one."""
    x, weights = (jnp.asarray(normal((8, 3), np.float32, seed)) for seed in (0, 1))

    def run(layer, after):
        variables = layer.init(KEY, x)

        def loss(params, x):
            y, _ = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return (after(y) * weights).sum(), after(y)

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
        return [y, *jax.tree.leaves(grads)]

    got = run(pyreg.linen.BatchNorm(by_running, activation="relu"), lambda y: y)
    assert (np.asarray(got[0]) == 0).any()
    for a, b in zip(got, run(linen.BatchNorm(by_running), jax.nn.relu), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert (pyreg.linen.BatchNorm(by_running, activation="relu").init_with_output(KEY, x)[0] >= 0).all()


def test_axis_name():
    """In linen.vmap; and an axis that is not there while the layer is initialised."""
    x = jnp.asarray(normal((4, 8, 3), np.float32) + np.arange(4, dtype=np.float32)[:, None, None])

    def run(family):
        class Parts(linen.Module):
            @linen.compact
            def __call__(self, x):
                options = {"variable_axes": {"params": None, "batch_stats": None}, "split_rngs": {"params": False}}
                layer = linen.vmap(family.BatchNorm, **options, axis_name="parts")
                return layer(use_running_average=False, momentum=0.9, axis_name="parts")(x)

        variables = Parts().init(KEY, x)

        def loss(x):
            y, new = Parts().apply(variables, x, mutable=["batch_stats"])
            return (y**3).sum(), (y, new)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(x)

    theirs, ours = (run(family) for family in FAMILIES)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


class Convolution(linen.Module):
    """A model with all of it, by either family."""

    family: str

    @linen.compact
    def __call__(self, x, train):
        family = pyreg.linen if self.family == "pyreg" else linen
        for _ in range(2):
            x = linen.Dense(4)(x)
            x = family.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = jax.nn.relu(x)
            x = family.Dropout(0.2, deterministic=not train)(x)
        return x


def test_checkpoints(tmp_path):
    """What one family saves the other loads: as bytes, and with orbax."""
    x = jnp.asarray(normal((8, 4), np.float32))
    models = [Convolution(family) for family in ("flax", "pyreg")]
    theirs, ours = (model.init(RNGS, x, True) for model in models)
    assert_same(ours, theirs)
    flax, pyregs = zip(models, (theirs, ours), strict=True)
    for (source, saved), (target, like) in ((flax, pyregs), (pyregs, flax)):
        _, new = source.apply(saved, x, True, rngs=RNGS, mutable=["batch_stats"])
        saved = {**saved, **new}
        loaded = serialization.from_bytes(like, serialization.to_bytes(saved))
        assert_same(loaded, saved)
        assert_same(target.apply(loaded, x, False), source.apply(saved, x, False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orbax = pytest.importorskip("orbax.checkpoint")
            with orbax.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / target.family, saved)
                checkpointer.wait_until_finished()
                assert_same(checkpointer.restore(tmp_path / target.family, like), saved)


@settings(max_examples=6)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.data(),
    st.floats(-50, 50),
    st.sampled_from([np.float32, np.float16]),
)
def test_random_batch_norm(shape, data, offset, dtype):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = (normal(shape, np.float32) + offset).astype(dtype)
    theirs, ours = (norm(family, jnp.asarray(x), {"axis": axis, "momentum": 0.0}) for family in FAMILIES)
    want, mean, var = reference.batch_norm(x, ours[2]["scale"], ours[2]["bias"], axis=axis)
    assert ours[0].dtype == theirs[0].dtype
    assert ulps(ours[0], want) <= min(4, ulps(theirs[0], want) + 1)
    np.testing.assert_allclose(ours[1]["mean"], mean, rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(ours[1]["var"], var, rtol=1e-6, atol=1e-7)
