"""pyreg.equinox against Equinox: layers, converted trees, training, files."""

import copy
import inspect
import pickle
import warnings

import numpy as np
import pytest
import reference
from common import in_threads, normal, python
from jaxcommon import INPUTS, assert_same, jax, outcome

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages, while they are imported
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")

import pyreg.equinox
import pyreg.jax

jnp = jax.numpy
KEY = jax.random.key(3)
HALF = 0.5  # whose scale is exact, so that it is the same where XLA divides, as it does outside jit
CLASSES = [(eqx.nn.Dropout, pyreg.equinox.Dropout), (eqx.nn.BatchNorm, pyreg.equinox.BatchNorm)]


def arrays(tree):
    """Those of a tree, whose structure names classes."""
    return [leaf for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]


# ---- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours"), CLASSES)
def test_signatures(theirs, ours):
    assert issubclass(ours, theirs)
    for name in ("__init__", "__call__"):
        want, got = (inspect.signature(getattr(kind, name)).parameters for kind in (theirs, ours))
        assert [*got][: len(want)] == [*want]
        assert [(p.kind, p.default) for p in got.values()][: len(want)] == [(p.kind, p.default) for p in want.values()]
        assert set(got) - set(want) <= {"broadcast_dims", "impl"}


DRAWN = {
    "plain": lambda layer, x: layer(x, key=KEY),
    "vmap": lambda layer, x: jax.vmap(lambda row, key: layer(row, key=key))(x, jax.random.split(KEY, len(x))),
    "vmap over keys": lambda layer, x: jax.vmap(lambda key: layer(x, key=key))(jax.random.split(KEY, 3)),
    "grad": lambda layer, x: jax.grad(lambda x: (layer(x, key=KEY) * jnp.cos(x)).sum())(x),
    "jvp": lambda layer, x: jax.jvp(lambda x: layer(x, key=KEY), (x,), (jnp.sin(x),)),
    "checkpoint": lambda layer, x: jax.grad(jax.checkpoint(lambda x: (layer(x, key=KEY) * jnp.cos(x)).sum()))(x),
    "scan": lambda layer, x: jax.lax.scan(lambda c, key: (layer(c, key=key), c), x, jax.random.split(KEY, 3)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_numbers_under_jit(name):
    x = jnp.asarray(normal((40, 7), np.float32))
    p = 0.8132702392002724  # whose scale is not that of a division
    theirs, ours = (jax.jit(lambda x: DRAWN[name](kind(p), x))(x) for kind in CLASSES[0])  # noqa: B023
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["plain", "vmap", "grad"])
def test_numbers_outside_jit(name):
    x = jnp.asarray(normal((40, 7), np.float32))
    assert_same(*(DRAWN[name](kind(HALF), x) for kind in CLASSES[0]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("p", [0.1, 0.9127555772777217])
def test_dtypes(x64, dtype, p):
    x = jnp.asarray(normal((300,), np.float32)).astype(dtype if x64 or dtype != "float64" else "float32")
    theirs, ours = (jax.jit(lambda x: kind(p)(x, key=KEY))(x) for kind in CLASSES[0])  # noqa: B023
    assert_same(ours, theirs)
    assert (ours == 0).any()


KEYS = {
    "legacy": jax.random.PRNGKey(4),
    "rbg": jax.random.key(5, impl="rbg"),
    "none": None,
    "int": 3,
}


@pytest.mark.parametrize("name", KEYS)
def test_keys(name):
    theirs, ours = (outcome(lambda: kind(HALF)(jnp.ones((4, 5)), key=KEYS[name])) for kind in CLASSES[0])  # noqa: B023
    if name == "int":
        assert isinstance(theirs, str)
        assert "key is int; wanted a key" in ours
    else:
        assert_same_outcome(ours, theirs)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("p", [HALF, 0.0, 0, np.float32(0.5)])
def test_inputs(name, p):
    def run(kind):
        y = kind(p)(INPUTS[name], key=KEY)
        return y, jnp.bool(getattr(y, "weak_type", False))

    theirs, ours = (outcome(run, kind) for kind in CLASSES[0])
    assert_same_outcome(ours, theirs)


def assert_same_outcome(ours, theirs):
    if isinstance(theirs, str) or isinstance(ours, str):
        assert ours == theirs
    else:
        assert_same(ours, theirs)


@pytest.mark.parametrize("at_call", [None, False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_inference(inference, at_call):
    x = jnp.ones((4, 5))
    theirs, ours = (kind(HALF, inference)(x, key=KEY, inference=at_call) for kind in CLASSES[0])
    assert_same(ours, theirs)
    layer = eqx.nn.inference_mode(pyreg.equinox.Dropout(HALF))
    assert layer(x) is x
    assert layer.inference


def test_the_deprecated_name_of_inference():
    for kind in CLASSES[0]:
        with pytest.warns(UserWarning, match="deprecated in favour of Dropout"):
            layer = kind(HALF, deterministic=True)
        with pytest.warns(UserWarning, match="deprecated in favour of Dropout"):
            assert (layer(jnp.ones(50), key=KEY, deterministic=False) == 0).any()


def test_a_traced_flag_or_rate():
    """Equinox has no traced flag.  A rate has the mask of Equinox, which truly divides then."""
    x = jnp.asarray(normal((40, 7), np.float32))
    for kind in CLASSES[0]:
        with pytest.raises(jax.errors.TracerBoolConversionError):
            jax.jit(lambda flag, kind=kind: kind(HALF)(x, key=KEY, inference=flag))(True)

    @eqx.filter_jit
    def run(layer):
        return layer(x, key=KEY), jax.grad(lambda x: (layer(x, key=KEY) ** 2).sum())(x)

    for p in (0.2, 0.7):
        theirs, ours = (run(kind(jnp.float32(p))) for kind in CLASSES[0])
        for a, b in zip(theirs, ours, strict=True):
            np.testing.assert_array_equal(a == 0, b == 0)
            np.testing.assert_allclose(a, b, rtol=3e-7)
    gradient = eqx.filter_grad(lambda layer: layer(x, key=KEY).sum())(pyreg.equinox.Dropout(jnp.float32(0.2)))
    assert gradient.p == 0  # as Equinox has it


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_dtypes_of_a_traced_rate(x64, dtype):
    """jax.random.bernoulli draws in the dtype of the rate, so that each has another mask."""
    p, x = jnp.asarray(0.4, dtype if x64 or dtype != "float64" else "float32"), jnp.ones(300)
    theirs, ours = (outcome(eqx.filter_jit(lambda p: kind(p)(x, key=KEY)), p) for kind in CLASSES[0])  # noqa: B023
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        np.testing.assert_array_equal(ours == 0, theirs == 0)
        assert ours.dtype == theirs.dtype


def test_philox_and_shared_masks():
    x = jnp.asarray(normal((6, 5, 4), np.float32))
    layer = pyreg.equinox.Dropout(0.3, broadcast_dims=(1, 2), impl="philox")
    assert_same(layer(x, key=KEY), pyreg.jax.dropout(x, 0.3, key=KEY, broadcast_dims=(1, 2), impl="philox"))
    shared = pyreg.equinox.Dropout(HALF, broadcast_dims=-1)(x, key=KEY)
    assert_same(shared, pyreg.jax.dropout(x, HALF, key=KEY, broadcast_dims=-1))
    with pytest.raises(ValueError, match="a Dropout has broadcast_dims"):
        pyreg.equinox.revert({"a": layer})


def test_errors():
    x = jnp.ones(4)
    with pytest.raises(ValueError, match=r"rate is 1.5; wanted a probability .* \(Equinox does not check it"):
        pyreg.equinox.Dropout(1.5)(x, key=KEY)
    for wrong in (lambda: pyreg.equinox.Dropout(0.5, impl="x"), lambda: pyreg.equinox.convert([], impl="x")):
        with pytest.raises(ValueError, match="impl is 'x'; wanted 'auto' or 'philox'"):
            wrong()
    with pytest.raises(RuntimeError, match="requires a key"):
        pyreg.equinox.Dropout(0.5)(x)
    with pytest.raises(TypeError, match="x has dtype int32"):
        pyreg.equinox.Dropout(0.5, broadcast_dims=0)(jnp.arange(3), key=KEY)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


@eqx.filter_jit
def normalised(norm, state, x):
    """A batch and the state after it, and gradients."""

    def loss(norm_and_x):
        norm, x = norm_and_x
        y, new = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return (y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), (y, new)

    (_, result), gradients = eqx.filter_value_and_grad(loss, has_aux=True)((norm, x))
    return result, arrays(gradients)


def layers(mode, channels=3, **options):
    return [eqx.nn.make_with_state(kind)(channels, "batch", mode=mode, **options) for kind in CLASSES[1]]


@pytest.mark.parametrize(
    ("mode", "shape", "affine"),
    [("ema", (8, 3), True), ("ema", (1, 3, 4), False), ("batch", (4, 3, 2, 3), True)],
)
def test_batch_norm(mode, shape, affine):
    """Several steps, then by the running statistics."""
    pairs = layers(mode, channelwise_affine=affine)
    for step in range(3):
        x = jnp.asarray(2 * normal(shape, np.float32, step) + step)
        results = [normalised(norm, state, x) for norm, state in pairs]
        theirs, ours = results
        for a, b in zip(arrays(theirs), arrays(ours), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
        pairs = [(norm, state) for (norm, _), ((_, state), _) in zip(pairs, results, strict=True)]
    (theirs, _), (ours, _) = (normalised(eqx.nn.inference_mode(norm), state, x) for norm, state in pairs)
    np.testing.assert_allclose(theirs[0], ours[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float16", {"mode": "batch"}),
        ("bfloat16", {"mode": "batch", "channelwise_affine": False}),
        ("bfloat16", {"mode": "ema", "dtype": jnp.bfloat16}),  # Equinox's statistics have the dtype of the input
    ],
)
def test_dtypes_of_batch_norm(dtype, options):
    x = jnp.asarray(normal((16, 3, 4), np.float32)).astype(dtype)
    theirs, ours = (normalised(norm, state, x) for norm, state in layers(**options))
    for a, b in zip(arrays(theirs), arrays(ours), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("mode", "shape"), [("ema", (64, 3)), ("batch", (64, 3)), ("batch", (16, 3, 5))])
def test_batch_norm_far_from_zero(mode, shape):
    """Against float64; in float32 the mean itself is far from exact here."""
    x = normal(shape, np.float32) + np.float32(1e5)
    norm, state = layers(mode)[1]
    (y, state), _ = normalised(norm, state, jnp.asarray(x))
    want, mean, var = reference.batch_norm(np.moveaxis(x, 1, -1), np.ones(3), np.zeros(3), axis=-1)
    if mode == "batch":
        np.testing.assert_allclose(np.moveaxis(np.asarray(y), 1, -1), want, atol=2e-4)
        mean, var = 0.01 * mean, 0.99 + 0.01 * var
    found = state.get(norm.ema_state_index if mode == "ema" else norm.batch_state_index)
    np.testing.assert_allclose(found[0], mean, rtol=2e-7)
    np.testing.assert_allclose(found[1], var, rtol=1e-6)


def test_batch_norm_that_is_equinox_s():
    """Nothing to compute, another dtype, wrong shapes, no axis."""
    for x in (jnp.ones((2, 3), jnp.complex64), jnp.ones((2, 3, 0)), jnp.ones((2, 4))):
        theirs, ours = (outcome(lambda: arrays(normalised(*pair, x)[0])) for pair in layers("batch"))  # noqa: B023
        assert_same_outcome(ours, theirs)
    for norm, state in layers("batch"):
        for layer in (norm, eqx.tree_at(lambda norm: norm.axis_name, norm, None)):
            with pytest.raises(NameError, match="unbound axis name"):
                layer(jnp.ones((3, 4)), state)


def test_several_axes():
    x = jnp.asarray(normal((2, 3, 4, 5), np.float32))
    for axes in (("a", "b"), ["a", "b"]):
        results = []
        for kind in CLASSES[1]:
            norm, state = eqx.nn.make_with_state(kind)(4, axes, mode="batch")
            run = jax.vmap(norm, axis_name="b", in_axes=(0, None), out_axes=(0, None))
            run = jax.vmap(run, axis_name="a", in_axes=(0, None), out_axes=(0, None))
            results.append(arrays(jax.jit(run)(x, state)))
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- Whole models ----------------------------------------------------------------------------------------------------


class Block(eqx.Module):
    """All kinds of layers, in lists, dicts, other modules, twice, and in a wrapper."""

    attention: eqx.nn.MultiheadAttention
    layers: list
    named: dict
    shared: eqx.nn.Dropout
    again: eqx.nn.Dropout
    norm: eqx.nn.BatchNorm
    name: str = eqx.field(static=True)

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, 8, dropout_p=0.2, key=keys[0])
        self.layers = [eqx.nn.Linear(8, 8, key=keys[1]), eqx.nn.Dropout(0.1)]
        self.named = {"mlp": eqx.nn.MLP(8, 8, 8, 1, key=keys[2]), "drop": (eqx.nn.Dropout(0.3), None)}
        self.shared = self.again = eqx.nn.Dropout(0.4)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.name = "block"

    def __call__(self, x, state, key):
        keys = jax.random.split(key, 5)
        y = self.attention(x, x, x, key=keys[0])
        y = self.layers[1](jax.vmap(self.layers[0])(y), key=keys[1])
        y = self.named["drop"][0](jax.vmap(self.named["mlp"])(y), key=keys[2])
        y = self.again(self.shared(y, key=keys[3]), key=keys[4])
        y, state = self.norm(y.T, state)
        return y.T, state


@pytest.fixture(scope="module")
def model():
    return eqx.nn.make_with_state(Block)(KEY)


def kinds(tree):
    is_layer = lambda node: isinstance(node, (eqx.nn.Dropout, eqx.nn.BatchNorm))  # noqa: E731
    return [type(node) for node in jax.tree.leaves(tree, is_leaf=is_layer) if is_layer(node)]


def test_convert(model):
    """The same leaves in the same order; and back."""
    block, _ = model
    converted = pyreg.equinox.convert(block)
    assert {kind.__module__ for kind in kinds(converted)} == {"pyreg.equinox"}
    assert {kind.__module__.partition(".")[0] for kind in kinds(block)} == {"equinox"}  # they do not change
    assert len(kinds(converted)) == 6
    for before, after in zip(jax.tree.leaves(block), jax.tree.leaves(converted), strict=True):
        assert before is after
    paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in (block, converted)]
    assert paths[0] == paths[1]
    assert converted.name == "block"
    twice = pyreg.equinox.convert(converted, impl="philox")
    assert (twice.attention.dropout.impl, converted.attention.dropout.impl) == ("philox", "auto")
    assert jax.tree.structure(pyreg.equinox.convert(twice)) == jax.tree.structure(converted)
    reverted = pyreg.equinox.revert(twice)
    assert eqx.tree_equal(reverted, block)
    assert pyreg.equinox.convert(jax.nn.relu) is jax.nn.relu


def test_subclasses_are_left_alone():
    class Other(eqx.nn.Dropout):
        pass

    assert type(pyreg.equinox.convert([Other(0.5)])[0]) is Other


def test_what_takes_the_place_of_leaves(model):
    """Trees of shapes, of booleans and of nothing have the same structure."""
    block, _ = model
    parameters, static = eqx.partition(block, eqx.is_inexact_array)
    both = eqx.combine(*pyreg.equinox.convert((parameters, static)))
    assert eqx.tree_equal(both, pyreg.equinox.convert(block))
    shapes = eqx.filter_eval_shape(lambda: block)
    assert jax.tree.structure(pyreg.equinox.convert(shapes)) == jax.tree.structure(pyreg.equinox.convert(block))


@eqx.filter_jit
def train(model, state, optimiser_state, data, key, optimiser):
    def loss(model, x, state, key):
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        y, state = run(x, state, jax.random.split(key, len(x)))
        return ((y - x) ** 2).mean(), state

    for i, x in enumerate(data):
        (value, state), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(
            model, x, state, jax.random.fold_in(key, i)
        )
        updates, optimiser_state = optimiser.update(gradients, optimiser_state, model)
        model = eqx.apply_updates(model, updates)
    return model, state, optimiser_state, value


def test_training(model):
    """Equinox's model, the converted one, and one that is converted in the middle with its optimiser."""
    optax = pytest.importorskip("optax")
    block, state = model
    optimiser = optax.adam(1e-2)
    data = jnp.asarray(normal((2, 6, 5, 8), np.float32))

    def run(first, later):
        model = first(block)
        run_state = model, state, optimiser.init(eqx.filter(model, eqx.is_inexact_array))
        for part, change in ((data[:1], later), (data[1:], lambda tree: tree)):
            *run_state, value = train(*run_state, part, KEY, optimiser)
            run_state = change(tuple(run_state))
        return arrays(run_state[0]), value

    nothing = lambda tree: tree  # noqa: E731
    (theirs, loss), *others = (
        run(*how)
        for how in (
            (nothing, nothing),
            (pyreg.equinox.convert, nothing),
            (nothing, pyreg.equinox.convert),
            (pyreg.equinox.convert, pyreg.equinox.revert),
        )
    )
    for ours, value in others:
        np.testing.assert_allclose(value, loss, rtol=1e-4)
        for a, b in zip(theirs, ours, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_numbers_of_a_model(model):
    """Without batch-norm, which differs in the last places: bit for bit."""
    block, state = model
    plain = eqx.tree_at(lambda m: m.norm, block, eqx.nn.Identity())
    plain = eqx.tree_at(lambda m: m.norm, plain, lambda y, s: (y, s))
    x = jnp.asarray(normal((5, 8), np.float32))

    @eqx.filter_jit
    def run(model):
        gradient = eqx.filter_grad(lambda m: (m(x, state, KEY)[0] ** 2).sum())(model)
        return model(x, state, KEY)[0], arrays(eqx.filter(gradient, eqx.is_inexact_array))

    (y, gradients), (our_y, our_gradients) = run(plain), run(pyreg.equinox.convert(plain))
    assert_same(our_y, y)
    for a, b in zip(gradients, our_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # products fuse otherwise


def test_files_fit_both(model, tmp_path):
    block, state = model
    converted = pyreg.equinox.convert(block)
    changed = jax.tree.map(lambda leaf: leaf + 1 if eqx.is_inexact_array(leaf) else leaf, (block, state))
    ours = pyreg.equinox.convert(changed)
    for saved, like, want in ((changed, (converted, state), ours), (ours, (block, state), changed)):
        eqx.tree_serialise_leaves(tmp_path / "leaves.eqx", saved)
        assert eqx.tree_equal(eqx.tree_deserialise_leaves(tmp_path / "leaves.eqx", like), want)


def test_pickles_and_copies(model):
    converted = pyreg.equinox.convert(model[0], impl="philox")
    layer, x = converted.shared, jnp.ones(20)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert type(copied) is pyreg.equinox.Dropout
        assert_same(copied(x, key=KEY), layer(x, key=KEY))
    assert kinds(copy.deepcopy(converted)) == kinds(converted)


def test_changed_afterwards():
    layer, x = pyreg.equinox.convert(eqx.nn.Dropout(0.1)), jnp.ones(500)
    changed = eqx.tree_at(lambda d: d.p, layer, HALF)
    assert_same(changed(x, key=KEY), eqx.nn.Dropout(HALF)(x, key=KEY))
    assert eqx.tree_at(lambda d: d.inference, changed, True)(x) is x


def test_threads(model):
    x = jnp.asarray(normal((5, 8), np.float32))
    want = pyreg.equinox.Dropout(0.3)(x, key=KEY)

    def work(_):
        for _ in range(20):
            assert_same(pyreg.equinox.convert(eqx.nn.Dropout(0.3))(x, key=KEY), want)

    in_threads(work, 4)


def test_import_pyreg_imports_none_of_them():
    code = "import sys, pyreg, pyreg.jax; print({'equinox', 'haiku', 'keras', 'flax', 'torch'} & set(sys.modules))"
    assert python(code) == "set()"
