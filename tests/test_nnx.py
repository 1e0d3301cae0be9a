"""pyreg.nnx against Flax's nnx: layers, attention, and whole models that are converted and reverted."""

import copy
import functools
import inspect
import pickle
import warnings

import jaxcommon
import ml_dtypes
import numpy as np
import pytest
import reference
from common import normal, python, xla_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxcommon import INPUTS as COMMON_INPUTS
from jaxcommon import assert_same, jax, nnx, outcome, ulps
from test_batchnorm import offset_normal

import pyreg.jax
import pyreg.nnx

jnp = jax.numpy
FAMILIES = (nnx, pyreg.nnx)
assert_alike = functools.partial(jaxcommon.assert_alike, families=FAMILIES)
assert_alike_or_wrong = functools.partial(jaxcommon.assert_alike_or_wrong, families=FAMILIES)
HALF = 0.5  # whose scale is exact, so that it is the same if XLA divides, as it may outside jit


def raw(tree):
    """A tree of arrays, with the words of its keys."""
    words = jax.random.key_data
    return jax.tree.map(lambda a: words(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, tree)


def state(model):
    """With the types and metadata of all variables, which are part of the tree's structure."""
    return raw(nnx.state(model))


def pair(make):
    """Flax's model, and the same one converted."""
    return make(), pyreg.nnx.convert(make())


# ---- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dropout", "BatchNorm"])
def test_signatures(name):
    theirs, ours = (getattr(family, name) for family in FAMILIES)
    assert issubclass(ours, theirs)
    for method in ("__init__", "__call__", "set_view"):
        want, got = (dict(inspect.signature(getattr(layer, method)).parameters) for layer in (theirs, ours))
        options = got.pop("options", None)  # BatchNorm's go to Flax
        extra = set(got) - set(want)
        assert extra <= {"impl", "activation"}
        for key, parameter in want.items():
            assert (key in got) or options
            if key in got:
                assert (got[key].kind, got[key].default) == (parameter.kind, parameter.default)


def test_signature_of_attention():
    want, got = (inspect.signature(family.dot_product_attention).parameters for family in FAMILIES)
    assert list(got) == [*want, "impl"]
    assert [p.default for p in got.values()][:-1] == [p.default for p in want.values()]


@pytest.mark.parametrize("at_call", [None, False, True])
@pytest.mark.parametrize("at_construction", [None, False, True])
def test_deterministic(at_construction, at_call):
    def run(family):
        layer = family.Dropout(HALF, deterministic=at_construction, rngs=nnx.Rngs(0))
        return layer(jnp.ones((4, 5)), deterministic=at_call), state(layer)

    assert_alike_or_wrong(run)


def test_train_and_eval_and_views():
    def run(family):
        layer, x = family.Dropout(HALF, rngs=nnx.Rngs(0)), jnp.ones((4, 5))
        results = [layer(x)]
        layer.eval()
        results.append(layer(x))
        view = nnx.view(layer, deterministic=False)
        results += [view(x), layer(x), layer.rngs.count[...]]
        assert type(view) is family.Dropout
        layer.train()
        layer.set_view(deterministic=None)
        return [*results, layer(x), state(layer)]

    assert_alike(run)


SOURCES = {
    "none": lambda: None,
    "rngs": lambda: nnx.Rngs(3),
    "rngs of this stream": lambda: nnx.Rngs(params=1, noise=2),
    "rngs without it": lambda: nnx.Rngs(params=1),
    "stream": lambda: nnx.Rngs(5).noise,
    "key": lambda: jax.random.key(6),
    "legacy key": lambda: jax.random.PRNGKey(7),
    "rbg key": lambda: jax.random.key(6, impl="rbg"),
    "words": lambda: np.zeros(2, np.uint32),
    "int": lambda: 8,
}


@pytest.mark.parametrize("at_call", SOURCES)
@pytest.mark.parametrize("at_construction", ["none", "rngs", "rngs of this stream", "rngs without it", "stream", "int"])
def test_rngs(at_construction, at_call):
    """Which stream is drawn from, and how often."""

    def run(family):
        given, called = SOURCES[at_construction](), SOURCES[at_call]()
        layer = family.Dropout(HALF, rng_collection="noise", rngs=given)
        results = [layer(jnp.ones((4, 5)), rngs=called) for _ in range(2)]
        return results, state(layer), [state(s) for s in (given, called) if isinstance(s, (nnx.Rngs, nnx.RngStream))]

    assert_alike_or_wrong(run)


INPUTS = {
    **COMMON_INPUTS,
    "float16": jnp.ones((4, 5), jnp.float16),
    "bfloat16": jnp.ones((4, 5), jnp.bfloat16),
    "float8": jnp.ones((4, 5), jnp.float8_e4m3fn),
    "NumPy, float64": np.ones((4, 5)),
    "NumPy, read only": np.broadcast_to(np.float32(1), (4, 5)),
    "a list": [1.0],
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rate", [HALF, 0.0, 1.0])
def test_inputs(name, rate):
    x = INPUTS[name]

    def run(family):
        return family.Dropout(rate)(x, rngs=jax.random.key(1))

    assert_alike_or_wrong(run)
    if isinstance(x, jax.Array) and not isinstance(outcome(run, nnx), str):
        assert run(pyreg.nnx).weak_type == run(nnx).weak_type


def test_wide_inputs(x64):
    for x in (np.ones((4, 5)), jnp.ones((4, 5)), jnp.ones((4, 5), jnp.float32)):
        assert_alike(lambda family, x=x: family.Dropout(HALF)(x, rngs=jax.random.key(1)))


RATES = [0, 1, True, np.float32(0.5), np.float64(0.5), jnp.float32(0.5), np.float16(0.5), "a", None]


@pytest.mark.parametrize("rate", RATES, ids=repr)
def test_rates(rate):
    assert_alike_or_wrong(lambda family: family.Dropout(rate)(jnp.ones((4, 5)), rngs=jax.random.key(1)))


@pytest.mark.parametrize("rate", [1.5, -0.5, float("nan")])
def test_rates_that_flax_takes(rate):
    x, key = jnp.ones((4, 5)), jax.random.key(0)
    for call in (
        lambda: pyreg.nnx.Dropout(rate)(x, rngs=key),
        lambda: pyreg.nnx.dot_product_attention(x[None], x[None], x[None], dropout_rng=key, dropout_rate=rate),
    ):
        with pytest.raises(ValueError, match=r"rate is .*; wanted a probability .* in \[0, 1\] \(Flax does not check"):
            call()
    assert pyreg.nnx.Dropout(rate)(x, deterministic=True) is x


@pytest.mark.parametrize("dims", [(0,), (-1,), (0, 2), (1, -2), [0, 1, 2]])
def test_broadcast_dims(dims):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    assert_alike(lambda family: family.Dropout(HALF, broadcast_dims=dims)(x, rngs=jax.random.key(1)))


def test_options_are_checked():
    for call in (
        lambda: pyreg.nnx.Dropout(0.5, impl="threefry"),
        lambda: pyreg.nnx.convert(nnx.Dropout(0.5), impl="threefry"),
    ):
        with pytest.raises(ValueError, match="impl is 'threefry'; wanted 'auto' or 'philox'"):
            call()
    with pytest.raises(ValueError, match="activation is 'gelu'; wanted None or 'relu'"):
        pyreg.nnx.BatchNorm(3, activation="gelu", rngs=nnx.Rngs(0))


def test_philox():
    """The mask is that of pyreg.jax.dropout for the key that the stream gives."""
    x, rngs = jnp.ones((20, 5)), nnx.Rngs(0)
    layers = [
        pyreg.nnx.Dropout(0.3, broadcast_dims=(0,), rngs=rngs, impl="philox"),
        pyreg.nnx.convert(nnx.Dropout(0.3, broadcast_dims=(0,), rngs=nnx.Rngs(0)), impl="philox"),
    ]
    key = nnx.Rngs(0).dropout.fork()()
    for layer in layers:
        want = pyreg.jax.dropout(x, 0.3, key=key, broadcast_dims=(0,), impl="philox")
        assert_same(layer(x), want)
        assert (layer(x) != want).any()


# ---- Models ----------------------------------------------------------------------------------------------------------


class Residual(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return x + apart(self.inner(x))  # else XLA may fuse Flax's product with the sum, and round once


class Twice(nnx.Module):
    """A layer that the model has in two places."""

    def __init__(self, layer):
        self.first = nnx.Dict(again=layer)
        self.second = layer

    def __call__(self, x):
        return self.second(self.first["again"](x))


class Mixed(nnx.Module):
    """Layers in a list, with other things that a model has."""

    def __init__(self, layers):
        self.layers = nnx.List(layers)
        self.width, self.calls = 3, nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        for layer in self.layers:
            x = layer(x)
        return x


apart = jax.lax.optimization_barrier
WIDTH = 6
rates = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 1.0])
leaves = st.one_of(
    st.sampled_from(["linear", "norm", "relu"]).map(lambda kind: (kind,)),
    st.tuples(
        st.just("dropout"), rates, st.sampled_from([(), (0,), (-1,)]), st.sampled_from(["dropout", "noise", "params"])
    ),
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


def build(model, rngs):
    kind, *args = model
    match kind:
        case "linear":
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        case "norm":
            return nnx.LayerNorm(WIDTH, rngs=rngs)
        case "relu":
            return jax.nn.relu
        case "dropout":
            return nnx.Dropout(args[0], broadcast_dims=args[1], rng_collection=args[2], rngs=rngs)
        case "residual":
            return Residual(build(args[0], rngs))
        case "twice":
            return Twice(build(args[0], rngs))
        case "mixed":
            return Mixed([build(layer, rngs) for layer in args])
    raise AssertionError(kind)


@nnx.jit
def derivative(model, x):
    """Output, gradients by the parameters and by the input, and the state that is left."""

    def loss(model, x):
        y = model(x)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    (_, y), grads = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return y, grads


@settings(max_examples=10)
@given(models, st.integers(0, 9))
def test_random_models(model, seed):
    theirs, ours = pair(lambda: Mixed([build(model, nnx.Rngs(seed, noise=seed + 1))]))
    x = jnp.asarray(normal((3, WIDTH), np.float32, seed))
    want, got = ([derivative(m, x), derivative(m, x + 1)] for m in (theirs, ours))
    assert_same(raw(got), raw(want))
    assert_same(state(ours), state(theirs))


def mlp(rate=0.2, seed=0):
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(
        nnx.Linear(4, 16, rngs=rngs),
        jax.nn.relu,
        nnx.Dropout(rate, rngs=rngs),
        nnx.Linear(16, 16, rngs=rngs),
        nnx.Dropout(rate, rngs=rngs),  # with broadcast_dims XLA of JAX 0.9 fuses Flax's with the product
        nnx.Linear(16, 2, rngs=rngs),  # not 1, whose product XLA may fuse with Flax's dropout
    )


def test_training():
    """Fifty steps give the same parameters, bit for bit."""

    @nnx.jit
    def step(model, x, y):
        loss, grads = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads))
        return loss

    theirs, ours = pair(mlp)
    x = normal((50, 8, 4), np.float32)
    for batch in x:
        assert_same(step(ours, batch, batch[:, :2]), step(theirs, batch, batch[:, :2]))
    assert_same(state(ours), state(theirs))
    assert (state(mlp())["layers"][0]["kernel"][...] != ours.layers[0].kernel[...]).any()


def model_of(x):
    """A model for the transforms, whose sums are exact."""
    rngs = nnx.Rngs(0, noise=1)
    return Mixed([nnx.Dropout(HALF, rngs=rngs), Twice(nnx.Dropout(0.75, rng_collection="noise", rngs=rngs))])


def split_and_merge(model, x):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def call(params, rest, x):
        model = nnx.merge(graph, params, rest)
        return model(x), nnx.state(model)

    y, new = call(params, rest, x)
    nnx.update(model, new)
    return y


def vmap_over_streams(model, x):
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), 0))
    def call(model, x):
        return model.layers[0](x)

    return call(model, x)


def scan_over_streams(model, x):
    @nnx.split_rngs(splits=3)
    @nnx.scan(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), nnx.Carry), out_axes=nnx.Carry)
    def call(model, x):
        return model.layers[0](x)

    return call(model, x)


def scan_with_carry(model, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def call(model, x):
        return model, model(x)

    return call(model, x)[1]


def copied(make):
    def run(model, x):
        other = make(model)
        y = other(x)
        assert type(other.layers[0]) is type(model.layers[0])
        return y, state(other)

    return run


PROGRAMS = {
    "jit": lambda m, x: nnx.jit(lambda m, x: m(x))(m, x),
    "jit of a pytree": lambda m, x: [jax.jit(lambda m, x: (m(x), m))(m, x)[0]],
    "split and merge": split_and_merge,
    "vmap": vmap_over_streams,
    "vmap of a view": lambda m, x: jax.vmap(nnx.view(m.layers[0], deterministic=True))(x),
    "scan": scan_over_streams,
    "scan, carried": scan_with_carry,
    "remat": lambda m, x: nnx.grad(lambda m, x: (nnx.remat(lambda m, x: m(x))(m, x) ** 2).sum(), argnums=1)(m, x),
    "grad": lambda m, x: nnx.grad(lambda m, x: (m(x) ** 2).sum(), argnums=1)(m, x),
    "value_and_grad": lambda m, x: nnx.value_and_grad(lambda m, x: (m(x) ** 2).sum(), argnums=1)(m, x),
    "cond": lambda m, x: nnx.cond(True, lambda m, x: m(x), lambda m, x: x, m, x),
    "view": lambda m, x: (nnx.view(m, deterministic=True)(x), nnx.view(m, deterministic=False)(x)),
    "clone": copied(nnx.clone),
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda m: pickle.loads(pickle.dumps(m))),
    "reseed": lambda m, x: (nnx.reseed(m, dropout=7, noise=8), m(x))[1],
    "eval_shape": lambda m, x: jnp.zeros(nnx.eval_shape(lambda m: m(x), m).shape),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
    x = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (4, 6)).astype(np.float32))
    if name == "pickle" and isinstance(outcome(pickle.dumps, jax.random.key(0)), str):
        pytest.skip("JAX before 0.10 does not pickle keys")
    theirs, ours = pair(lambda: model_of(x))
    assert_same(PROGRAMS[name](ours, x), PROGRAMS[name](theirs, x))
    assert_same(state(ours), state(theirs))


# ---- Convert and revert ----------------------------------------------------------------------------------------------


class Scaled(nnx.Dropout):
    """A user's own."""

    def __call__(self, x, **options):
        return super().__call__(x, **options) * 2


def attention(q, k, v, **options):
    """A user's own."""
    return nnx.dot_product_attention(q, k, v, **options)


def everything():
    rngs = nnx.Rngs(0)
    shared = nnx.Dropout(0.1, rngs=rngs)
    own = Scaled(0.3, rngs=rngs)
    heads = functools.partial(nnx.MultiHeadAttention, 2, 4, dropout_rate=0.5, decode=False, rngs=rngs)
    bound = functools.partial(nnx.dot_product_attention, precision="highest")
    return Mixed(
        [
            shared,
            nnx.Dict(a=shared, b=nnx.BatchNorm(3, rngs=rngs, use_bias=False, momentum=0.5)),
            own,
            Twice(nnx.Sequential(nnx.Dropout(0.2, deterministic=True), nnx.BatchNorm(3, rngs=rngs))),
            heads(),
            heads(attention_fn=bound),
            heads(attention_fn=attention),
        ]
    )


def objects(model):
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, (nnx.Module, nnx.Variable))]


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_convert_and_revert(impl):
    model = everything()
    before, graph = state(model), nnx.graphdef(model)
    nodes, code = objects(model), hash(graph)
    settings = [dict(vars(n)) for n in nodes]
    bound = model.layers[5].attention_fn
    assert pyreg.nnx.convert(model, impl=impl) is model
    converted = nnx.graphdef(model)
    for _ in range(2):
        shared, group, own, twice, plain, partial, other = model.layers
        assert type(shared) is type(twice.first["again"].layers[0]) is pyreg.nnx.Dropout
        assert type(group["b"]) is type(twice.second.layers[1]) is pyreg.nnx.BatchNorm
        assert type(own) is Scaled
        assert not hasattr(own, "impl")
        assert shared is group["a"]
        assert shared.impl == impl
        assert group["b"].activation is None
        assert plain.attention_fn is pyreg.nnx._convert.ATTENTION[impl]
        assert partial.attention_fn.func is plain.attention_fn
        assert partial.attention_fn.keywords == {"precision": "highest"}
        assert other.attention_fn is attention
        assert all(a is b for a, b in zip(objects(model), nodes, strict=True))
        assert_same(state(model), before)
        assert graph != converted
        pyreg.nnx.convert(model, impl=impl)  # once more changes nothing
    assert pyreg.nnx.revert(model) is model
    assert model.layers[5].attention_fn.func is nnx.dot_product_attention
    assert model.layers[5].attention_fn.keywords == {"precision": "highest"}
    model.layers[5].attention_fn = bound  # partials are never equal
    assert nnx.graphdef(model) == graph
    assert hash(nnx.graphdef(model)) == code
    assert all(a is b for a, b in zip(objects(model), nodes, strict=True))
    assert [dict(vars(n)) for n in nodes] == settings
    assert_same(state(model), before)
    pyreg.nnx.revert(model)  # of Flax's model changes nothing
    assert type(model.layers[0]) is nnx.Dropout


@pytest.mark.parametrize("impl", ["auto", "philox"])
def test_converted_models_are_equal(impl):
    """So that jit compiles once for two of them, and for a copy."""
    heads = functools.partial(nnx.MultiHeadAttention, 2, 4, dropout_rate=0.5, decode=False, keep_rngs=False)
    a, b = (pyreg.nnx.convert(heads(rngs=nnx.Rngs(seed)), impl=impl) for seed in range(2))
    for other in (b, copy.deepcopy(a), pickle.loads(pickle.dumps(a)), nnx.clone(a)):
        assert nnx.graphdef(other) == nnx.graphdef(a)


def test_convert_to_the_other_mask():
    layer = pyreg.nnx.Dropout(0.5, impl="philox")
    assert pyreg.nnx.convert(layer).impl == "auto"
    heads = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    bound = functools.partial(pyreg.nnx.dot_product_attention, impl="philox")
    heads.attention_fn = bound
    assert pyreg.nnx.convert(heads).attention_fn is pyreg.nnx.dot_product_attention


def test_convert_sets_the_mask_of_layers_that_flax_lacks():
    model = nnx.List([pyreg.nnx.Dropout2d(0.5, rngs=nnx.Rngs(0))])
    assert pyreg.nnx.convert(model, impl="philox")[0].impl == "philox"
    assert type(pyreg.nnx.revert(model)[0]) is pyreg.nnx.Dropout2d


def test_convert_what_is_no_module():
    layers = [nnx.Dropout(0.5), {"a": nnx.Dropout(0.1)}, (nnx.BatchNorm(2, rngs=nnx.Rngs(0)),)]
    assert pyreg.nnx.convert(layers) is layers
    assert type(layers[0]) is type(layers[1]["a"]) is pyreg.nnx.Dropout
    assert type(layers[2][0]) is pyreg.nnx.BatchNorm
    assert type(pyreg.nnx.convert(nnx.Dropout(0.5))) is pyreg.nnx.Dropout


def test_activation_cannot_be_reverted():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        pyreg.nnx.Dropout(0.5), pyreg.nnx.BatchNorm(3, rngs=rngs), pyreg.nnx.BatchNorm(3, activation="relu", rngs=rngs)
    )
    with pytest.raises(ValueError, match="a BatchNorm has activation 'relu'; wanted None, as Flax's has none"):
        pyreg.nnx.revert(model)
    assert [type(layer).__module__ for layer in model.layers] == ["pyreg.nnx"] * 3
    assert pyreg.nnx.convert(model).layers[2].activation == "relu"


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def test_state_is_flax_s():
    """Parameters, statistics, streams, their types and metadata."""
    options = {"scale_metadata": {"tag": 1}, "bias_metadata": {"eager_sharding": False}, "param_dtype": jnp.bfloat16}
    theirs, ours = (family.BatchNorm(3, rngs=nnx.Rngs(0), **options) for family in FAMILIES)
    assert_same(state(ours), state(theirs))
    assert ours.scale.get_metadata() == theirs.scale.get_metadata()
    assert ours.scale.tag == 1
    theirs, ours = (family.Dropout(0.1, rngs=nnx.Rngs(3)) for family in FAMILIES)
    assert_same(state(ours), state(theirs))


def test_orbax(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orbax = pytest.importorskip("orbax.checkpoint")
        theirs, ours = everything(), pyreg.nnx.convert(everything())
        for i, (source, target) in enumerate([(theirs, ours), (ours, theirs)]):
            saved = jax.tree.map(lambda a, i=i: a + 1 + i if a.dtype == jnp.float32 else a, state(source))
            with orbax.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / str(i), nnx.to_pure_dict(saved))
                checkpointer.wait_until_finished()
                restored = checkpointer.restore(tmp_path / str(i), nnx.to_pure_dict(state(target)))
            params = nnx.state(target, (nnx.Param, nnx.BatchStat))
            nnx.replace_by_pure_dict(params, pick(restored, nnx.to_pure_dict(params)))
            nnx.update(target, params)
            assert_same(nnx.to_pure_dict(state(target)), nnx.to_pure_dict(saved))


def pick(tree, like):
    """The part of a nest of dicts that another one has."""
    return {k: pick(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in like.items()}


# ---- Attention -------------------------------------------------------------------------------------------------------


def heads(q_heads=4, k_heads=4, v_heads=4, batch=(2,), dtype=jnp.float32):
    shapes = [(*batch, 5, q_heads, 6), (*batch, 7, k_heads, 6), (*batch, 7, v_heads, 3)]
    return [jnp.asarray(normal(shape, np.float32, i), dtype) for i, shape in enumerate(shapes)]


BIAS, MASK = normal((2, 4, 5, 7), np.float32, 9), np.random.default_rng(0).random((2, 4, 5, 7)) < 0.7
ATTENTION = {  # options, and how the operands look
    "plain": ({}, {}),
    "float16": ({}, {"dtype": jnp.float16}),
    "bfloat16": ({}, {"dtype": jnp.bfloat16}),
    "to bfloat16": ({"dtype": jnp.bfloat16}, {}),
    "from float16": ({"dtype": jnp.float32}, {"dtype": jnp.float16}),
    "bias and mask": ({"bias": BIAS, "mask": MASK}, {}),
    "causal": ({"is_causal": True, "mask": MASK}, {}),
    "causal alone": ({"is_causal": True}, {}),
    "precision": ({"precision": "highest"}, {}),
    "grouped": ({}, {"k_heads": 2, "v_heads": 2}),
    "grouped values": ({}, {"v_heads": 1}),
    "grouped keys": ({}, {"k_heads": 2}),
    "no batch": ({}, {"batch": ()}),
}


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, broadcast):
    options, shape = ATTENTION[name]
    operands = heads(**shape)
    options = {**options, "dropout_rng": jax.random.key(3), "broadcast_dropout": broadcast}
    rate = 0.1 if broadcast else 0.3
    assert_alike(lambda family: family.dot_product_attention(*operands, dropout_rate=rate, **options))


@pytest.mark.parametrize("name", ["plain", "bfloat16", "grouped"])
def test_gradient_of_attention(name):
    options, shape = ATTENTION[name]
    options = {**options, "dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "broadcast_dropout": False}

    def run(family):
        y, vjp = jax.vjp(functools.partial(family.dot_product_attention, **options), *heads(**shape))
        return vjp(y)

    assert_alike(run)


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.filterwarnings("ignore:.*Module.sow:DeprecationWarning")
def test_attention_layer(dtype, broadcast):
    """Also what it sows, and with a cache."""

    def run(family):
        layer = nnx.MultiHeadAttention(
            2,
            4,
            dropout_rate=0.5,
            broadcast_dropout=broadcast,
            attention_fn=family.dot_product_attention,
            dtype=dtype,
            deterministic=False,
            decode=False,
            rngs=nnx.Rngs(0),
        )
        x = jnp.asarray(normal((3, 5, 4), np.float32))
        results = [layer(x, sow_weights=True), layer(x, deterministic=True), layer(x, mask=np.tri(5) > 0)]
        layer.init_cache((3, 5, 4), dtype=dtype)
        results += [layer(x[:, i : i + 1], decode=True) for i in range(2)]
        return results, state(layer)

    assert_alike(run)


Q, K, V = heads()
WRONG = {
    "no key": lambda f: f(Q, K, V, dropout_rate=0.5),
    "rate 1": lambda f: f(Q, K, V, dropout_rate=1.0, dropout_rng=jax.random.key(0)),
    "rate 0": lambda f: f(Q, K, K, dropout_rate=0.0, dropout_rng=jax.random.key(0)),
    "deterministic": lambda f: f(Q, K, V, dropout_rate=0.5, dropout_rng=jax.random.key(0), deterministic=True),
    "batch dims of v": lambda f: f(Q, K, V[:1], dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "rank of v": lambda f: f(Q, K, V[0], dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "length of v": lambda f: f(Q, K, V[:, :1], dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "heads of v": lambda f: f(Q, K, V[:, :, :3], dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "heads of k": lambda f: f(Q, K[:, :, :3], V, dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "depth of k": lambda f: f(Q, K[..., :3], V, dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "batch dims of k": lambda f: f(Q, K[:1], V[:1], dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "mask": lambda f: f(Q, K, V, mask=MASK[..., :2], dropout_rate=0.5, dropout_rng=jax.random.key(0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_attention_complains_as_flax_does(name):
    assert_alike_or_wrong(lambda family: WRONG[name](family.dot_product_attention))


@pytest.mark.parametrize("broadcast", [True, False])
def test_attention_with_philox(broadcast):
    rate, key = 0.3, jax.random.key(5)
    y = pyreg.nnx.dot_product_attention(
        Q, K, V, dropout_rng=key, dropout_rate=rate, broadcast_dropout=broadcast, impl="philox"
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", Q, K) / np.sqrt(6))
    shape = (1, 1, 5, 7) if broadcast else weights.shape
    multiplier = pyreg.jax.dropout(jnp.ones(shape), rate, key=key, impl="philox")
    np.testing.assert_allclose(y, jnp.einsum("bhqk,bkhd->bqhd", weights * multiplier, V), rtol=1e-4, atol=1e-6)
    model = pyreg.nnx.convert(
        nnx.MultiHeadAttention(2, 4, dropout_rate=0.5, deterministic=False, decode=False, rngs=nnx.Rngs(0)),
        impl="philox",
    )
    assert model(jnp.ones((3, 5, 4))).shape == (3, 5, 4)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


def assert_good(theirs, ours, want, bound=4):
    """Within 4 ulp of a float64 reference, and never further from it than Flax's by more than an ulp."""
    assert ulps(ours, want) <= min(bound, ulps(theirs, want) + 1)


def norm(family, x, options, channels=3, **call):
    layer = family.BatchNorm(channels, rngs=nnx.Rngs(0), **{"momentum": 0.9, **options})
    for name in ("scale", "bias"):
        if getattr(layer, name) is not None:
            values = normal(channels, np.float32, len(name)) + 2
            getattr(layer, name)[...] = jnp.asarray(values, getattr(layer, name).dtype)
    return layer(x, **call), layer


OPTIONS = {
    "plain": {},
    "channels first": {"axis": 1},
    "first axis": {"axis": 0},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_bias": False, "use_scale": False},
    "momentum and epsilon": {"momentum": 0.3, "epsilon": 0.1},
    "slow variance": {"use_fast_variance": False},
    "to float32": {"dtype": jnp.float32},
}


@pytest.mark.parametrize(
    ("name", "masked"),
    [(name, "") for name in OPTIONS]
    + [("plain", "masked"), ("neither", "masked"), ("channels first", "masked"), ("plain", "masked by slices")],
)
def test_batch_norm(name, masked):
    """Values and running statistics."""
    options, shape = OPTIONS[name], (3, 3, 3) if "axis" in OPTIONS[name] else (8, 5, 3)
    x, mask = normal(shape, np.float32) + 1, np.arange(np.prod(shape)).reshape(shape) % 5 > 1
    if masked != "masked":
        mask = mask.take([0], (options.get("axis", -1) + 1) % 3) if masked else None
    (theirs, flax), (ours, layer) = (norm(f, jnp.asarray(x), options, mask=mask) for f in FAMILIES)
    scale, bias = (p if p is None else np.asarray(p[...]) for p in (layer.scale, layer.bias))
    want, mean, var = reference.batch_norm(x, scale, bias, layer.axis, layer.epsilon, mask)
    assert_good(theirs, ours, want)
    m = layer.momentum
    for running, flaxs, new, start in ((layer.mean, flax.mean, mean, 0), (layer.var, flax.var, var, 1)):
        np.testing.assert_allclose(running[...], m * start + (1 - m) * new, rtol=3e-7, atol=1e-7)
        np.testing.assert_allclose(running[...], flaxs[...], rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(state(layer)) == jax.tree.structure(state(flax))
    by_running = [norm(f, jnp.asarray(x), options, use_running_average=True)[0] for f in FAMILIES]
    assert_same(*by_running)


def test_statistics_far_from_zero():
    """Where Flax's variance is wrong."""
    x = offset_normal(1e4, (4096, 2), 1)
    (theirs, flax), (ours, layer) = (norm(f, jnp.asarray(x), {"momentum": 0.0}, 2) for f in FAMILIES)
    want, mean, var = reference.batch_norm(x, np.asarray(layer.scale[...]), np.asarray(layer.bias[...]))
    np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-7)
    np.testing.assert_allclose(layer.var[...], var, rtol=1e-6)
    assert ulps(ours, want) < 4
    assert ulps(theirs, want) > 1000
    assert np.abs(flax.var[...] - var).max() > 0.1


def test_integer_mask():
    """Flax's nnx refuses it, its linen takes it."""
    x, mask = jnp.asarray(normal((8, 3), np.float32)), np.arange(24).reshape(8, 3) % 3 > 0
    want = norm(pyreg.nnx, x, {}, mask=mask)[0]
    for dtype in (np.int32, np.uint8, np.float32):
        assert_same(norm(pyreg.nnx, x, {}, mask=jnp.asarray(mask, dtype))[0], want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"param_dtype": jnp.float16, "dtype": jnp.float16},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32], ids=lambda d: d.__name__)
def test_dtypes_of_batch_norm(dtype, options):
    x = jnp.asarray(normal((40, 3), np.float32) * 4 + 2).astype(dtype)
    (theirs, flax), (ours, layer) = (norm(f, x, options) for f in FAMILIES)
    assert (ours.dtype, ours.weak_type) == (theirs.dtype, theirs.weak_type)
    a, b = (np.asarray(y, np.float64) for y in (ours, theirs))
    np.testing.assert_allclose(a, b, atol=2 * float(jnp.finfo(ours.dtype).eps) * np.abs(b).max())
    for p, q in ((layer.mean, flax.mean), (layer.var, flax.var)):
        assert p.dtype == q.dtype
        np.testing.assert_allclose(p[...], q[...], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")  # Flax's own
@pytest.mark.parametrize("x64", [True], indirect=True)
def test_wide_batch_norm(x64):
    for dtype in (np.float64, np.float32):
        for options in ({}, {"dtype": jnp.float32}, {"param_dtype": jnp.float64}, {"dtype": jnp.float64}):
            x = jnp.asarray(normal((40, 3), dtype) + 1)
            (theirs, flax), (ours, layer) = (norm(f, x, options) for f in FAMILIES)
            assert ours.dtype == theirs.dtype
            assert [layer.mean.dtype, layer.var.dtype] == [flax.mean.dtype, flax.var.dtype]
            tolerance = 1e-12 if ours.dtype == np.float64 else 1e-5
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


HANDED_OVER = {  # to Flax
    "tuple of axes": (jnp.ones((4, 3)) * jnp.arange(4.0)[:, None], {"axis": (-1,)}, {}),
    "complex": (jnp.asarray(normal((8, 3), np.float32) + 1j), {}, {}),
    "running": (jnp.asarray(normal((8, 3), np.float32)), {}, {"use_running_average": True}),
    "empty": (jnp.ones((0, 3)), {}, {}),
    "neither given": (jnp.ones((8, 3)), {"use_running_average": None}, {}),
    "NumPy's axis": (jnp.asarray(normal((8, 3), np.float32)), {"axis": np.int64(1)}, {}),
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_batch_norm_that_is_flax_s(name):
    x, options, call = HANDED_OVER[name]

    def run(family):
        y, layer = norm(family, x, options, **call)
        return y, state(layer)

    assert_alike_or_wrong(run)


@pytest.mark.parametrize("by_running", [False, True])
def test_activation(by_running):
    """Values, and gradients by all that has one."""
    x = jnp.asarray(normal((8, 3), np.float32))
    weights = jnp.asarray(normal((8, 3), np.float32, 1))

    def run(family, options, after):
        layer = norm(family, x, options)[1]

        def loss(layer, x):
            y = after(layer(x, use_running_average=by_running))
            return (y * weights).sum(), y

        (_, y), grads = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return [y, *jax.tree.leaves(grads)]

    got = run(pyreg.nnx, {"activation": "relu"}, lambda y: y)
    assert (np.asarray(got[0]) == 0).any()
    for a, b in zip(got, run(nnx, {}, jax.nn.relu), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def call(layer, x, mask=None):
    """A layer under jax.vmap: what it returns, and its new statistics."""
    graph, whole = nnx.split(layer)

    def one(state, x, mask):
        copy = nnx.merge(graph, state)
        return copy(x, mask=mask), copy.mean[...], copy.var[...]

    return jax.jit(jax.vmap(one, (None, 0, 0), axis_name="parts"))(whole, x, mask)


def test_axis_name():
    x = jnp.asarray(normal((4, 8, 3), np.float32) + np.arange(4, dtype=np.float32)[:, None, None])

    def run(family):
        layer = norm(family, x[0], {})[1]
        layer.axis_name = "parts"
        return call(layer, x), jax.grad(lambda x: (call(layer, x)[0] ** 3).sum())(x)

    for a, b in zip(jax.tree.leaves(run(pyreg.nnx)), jax.tree.leaves(run(nnx)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_axis_name_pools_by_elements():
    """A part with more of the mask counts for more; Flax takes the mean of the parts' means."""
    x, mask = normal((2, 8, 3), np.float32), np.arange(48).reshape(2, 8, 3) > 15
    layer = norm(pyreg.nnx, x[0], {})[1]
    layer.axis_name = "parts"
    parameters = np.asarray(layer.scale[...]), np.asarray(layer.bias[...])
    want = reference.batch_norm(x.reshape(16, 3), *parameters, mask=mask.reshape(16, 3))[0]
    assert ulps(call(layer, x, mask)[0].reshape(16, 3), want) < 4


class Normed(nnx.Module):
    """Batch-norm twice, with a layer that it shares nothing with, and running statistics that are carried on."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.BatchNorm(3, momentum=0.9, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.norms:
            x = jax.nn.relu(layer(x)) + x
        return x


def test_batch_norm_in_a_model():
    """Under jit, as a view, and its gradients by parameters and input, over several steps."""

    @nnx.jit
    def step(model, x):
        loss, (grads, dx) = nnx.value_and_grad(lambda model, x: (model(x) ** 3).mean(), argnums=(0, 1))(model, x)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads))
        return loss, dx

    theirs, ours = pair(lambda: Normed(nnx.Rngs(0)))
    for x in normal((4, 16, 3), np.float32):
        for a, b in zip(step(ours, x), step(theirs, x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(state(ours)) == jax.tree.structure(state(theirs))
    for a, b in zip(jax.tree.leaves(state(ours)), jax.tree.leaves(state(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    view = nnx.view(ours, use_running_average=True)
    before = state(ours)
    np.testing.assert_allclose(view(x), nnx.view(theirs, use_running_average=True)(x), rtol=1e-4, atol=1e-5)
    assert_same(state(ours), before)


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
    layers = [family.BatchNorm(shape[axis], axis=axis, momentum=0.0, rngs=nnx.Rngs(0)) for family in FAMILIES]
    theirs, ours = (layer(jnp.asarray(x)) for layer in layers)
    want, mean, var = reference.batch_norm(x, axis=axis)
    assert ours.dtype == theirs.dtype
    assert_good(theirs, ours, want)
    np.testing.assert_allclose(layers[1].mean[...], mean, rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(layers[1].var[...], var, rtol=1e-6, atol=1e-7)


DEVICES = """
import warnings
import jax, numpy as np
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from flax import linen, nnx
import pyreg.linen, pyreg.nnx
jnp, P = jax.numpy, jax.sharding.PartitionSpec
x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 3)) + np.arange(16)[:, None], jnp.float32)
groups = [[0, 1], [2, 3]]
mesh = jax.make_mesh((4,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))

def by_nnx(family):
    layer = family.BatchNorm(3, momentum=0.0, axis_name="parts", axis_index_groups=groups, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    def one(x):
        copy = nnx.merge(graph, jax.tree.map(lambda a: jax.lax.pcast(a, "parts", to="varying"), state))
        return copy(x), copy.mean[...], copy.var[...]
    return one

def by_linen(family):
    layer = family.BatchNorm(False, momentum=0.0, axis_name="parts", axis_index_groups=groups)
    variables = layer.init(jax.random.key(0), x)
    def one(x):
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]
    return one

for make, families in ((by_nnx, (nnx, pyreg.nnx)), (by_linen, (linen, pyreg.linen))):
    theirs, ours = (
        jax.jit(jax.shard_map(make(f), mesh=mesh, in_specs=P("parts"), out_specs=P("parts"), check_vma=False))(x)
        for f in families
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    y = np.asarray(ours[0])
    assert np.abs(y[:8].mean(0)).max() < 1e-5 < np.abs(y[:4].mean(0)).max()  # two devices are one group

for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("parts",), axis_types=(kind,))
    cut = jax.device_put(x, jax.NamedSharding(mesh, P("parts")))
    theirs, ours = (jax.jit(lambda x, f=f: f.Dropout(0.3)(x, rngs=jax.random.key(1)))(cut) for f in (nnx, pyreg.nnx))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.sharding.is_equivalent_to(cut.sharding, 2)
print("fine")
"""


def test_several_devices():
    """Groups of devices under shard_map, and arrays that are cut."""
    assert python(DEVICES, timeout=300, XLA_FLAGS=xla_flags(4)).endswith("fine")


# ---- Rates that are not Python's numbers -----------------------------------------------------------------------------

NUMBERS = [np.float32, np.float16, np.array, lambda rate: np.array(rate, np.float32)]


@pytest.mark.parametrize("number", NUMBERS)
def test_rates_of_numpy(number):
    """Flax's numbers, or the mask that was asked for; and a rate that is none is refused."""
    x, key = jnp.arange(64.0), jax.random.key(0)
    rate = number(0.5)
    ours, theirs = (layer(rate, rngs=nnx.Rngs(0))(x, rngs=key) for layer in (pyreg.nnx.Dropout, nnx.Dropout))
    assert_same(ours, theirs)
    native = pyreg.nnx.Dropout(rate, rngs=nnx.Rngs(0), impl="philox")(x, rngs=key)
    assert_same(native, pyreg.jax.dropout(x, 0.5, key=key, impl="philox"))
    with pytest.raises(ValueError, match="wanted a probability"):
        pyreg.nnx.Dropout(number(1.5), rngs=nnx.Rngs(0))(x)
