"""pyreg.keras against Keras on its backend jax: layers, converted models, training, files.  On torch: test_keras_torch.

Keras reads its backend when it is imported.  If another test has imported it with another one, these are skipped.
"""

import copy
import os
import pickle
import warnings

import numpy as np
import pytest
import reference
from common import in_threads, normal, python
from jaxcommon import assert_same, jax

os.environ.setdefault("KERAS_BACKEND", "jax")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages, while they are imported
    keras = pytest.importorskip("keras", reason="keras is not installed")

if keras.backend.backend() != "jax":
    pytest.skip("Keras has another backend", allow_module_level=True)

import pyreg.jax
import pyreg.keras

jnp = jax.numpy
layers = keras.layers
# Of Keras's variables, in NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NAMES = ["Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "BatchNormalization"]


def is_converted(layer):
    return "call" in vars(layer)


def converted(model):
    return [layer for layer in model._flatten_layers() if is_converted(layer)]


# ---- Dropout ---------------------------------------------------------------------------------------------------------

CASES = {
    "Dropout": ("Dropout", (4, 6), {}),
    "Dropout with a shape": ("Dropout", (4, 6, 3), {"noise_shape": (None, 1, 3)}),
    "Dropout with a whole shape": ("Dropout", (4, 6, 1), {"noise_shape": (4, 6, 1)}),
    "Dropout with a shorter shape": ("Dropout", (4, 6, 3), {"noise_shape": (6, 3)}),  # Keras's
    "SpatialDropout1D": ("SpatialDropout1D", (4, 6, 3), {}),
    "SpatialDropout2D": ("SpatialDropout2D", (4, 2, 3, 5), {}),
    "SpatialDropout2D first": ("SpatialDropout2D", (4, 5, 2, 3), {"data_format": "channels_first"}),
    "SpatialDropout3D": ("SpatialDropout3D", (4, 2, 3, 2, 5), {}),
    "SpatialDropout3D first": ("SpatialDropout3D", (4, 5, 2, 3, 2), {"data_format": "channels_first"}),
}


def pair(kind, *args, **options):
    """Keras's layer and ours."""
    return [getattr(family, kind)(*args, **options) for family in (layers, pyreg.keras)]


def trained(layer, x):
    """A result of a compiled call, the state after it, and the gradient."""
    state = [v.value for v in layer.non_trainable_variables]

    def loss(x, weights, state):
        y, state = layer.stateless_call([], state, x, training=True)
        return (y * weights.astype(y.dtype)).sum(), (y, state)

    (_, result), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, jnp.cos(x), state)
    return result, gradient


@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    """Twice, with the gradient; and the state of the seed generator."""
    kind, shape, options = CASES[name]
    x = jnp.asarray(normal(shape, np.float32))
    theirs, ours = both = pair(kind, 0.37, seed=7, **options)
    assert is_converted(ours)
    assert type(ours) is type(theirs)
    want, got = (trained(layer, x) for layer in both)
    assert_same(got, want)
    assert (want[0][0] == 0).any()
    for _ in range(2):
        want, got = (layer(x, training=True) for layer in both)
        np.testing.assert_allclose(got, want, rtol=3e-7)  # where XLA truly divides
        assert_same(ours.seed_generator.state.value, theirs.seed_generator.state.value)
    assert_same(ours(x), x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(dtype):
    x = jnp.asarray(normal((40, 6), np.float32))
    want, got = (trained(layer, x) for layer in pair("Dropout", 0.3, seed=7, dtype=dtype))
    assert_same(got, want)


def test_inputs():
    """None to compute, other dtypes, rates without a draw."""
    for x in (np.ones((0, 3), np.float32), np.ones((2, 3), np.float64), np.float32(1)):
        for rate in (0.0, 0.5, 1.0):
            theirs, ours = (layer(x, training=True) for layer in pair("Dropout", rate, seed=7))
            assert_same(ours, theirs)
    for layer in pair("Dropout", 0.5, seed=7, dtype="int32"):
        with pytest.raises((TypeError, AttributeError)):  # JAX refuses what Keras asks of it
            layer(np.ones((2, 3), np.int32), training=True)
    for layer in pair("Dropout", 0.5, seed=7):
        with pytest.raises((jax.errors.TracerBoolConversionError, AttributeError)):  # which Keras makes of it
            jax.jit(lambda flag, layer=layer: layer(np.ones(3, np.float32), training=flag))(True)
        assert layer(np.ones(3, np.float32), training=None).sum() == 3


def test_a_shape_that_does_not_fit():
    for layer in pair("Dropout", 0.5, noise_shape=(2, 3)):
        with pytest.raises(ValueError, match=r"Incompatible .* for broadcasting"):
            layer(np.ones((4, 3), np.float32), training=True)


def test_philox():
    x = jnp.asarray(normal((6, 5, 4), np.float32))
    layer = pyreg.keras.Dropout(0.3, (None, 1, None), seed=7, impl="philox")
    key = layer.seed_generator.state.value
    got = layer(x, training=True)
    assert_same(got, pyreg.jax.dropout(x, 0.3, key=key, broadcast_dims=1, impl="philox"))


def test_changed_afterwards():
    x = np.ones((40, 6), np.float32)
    both = pair("Dropout", 0.1, seed=7)
    for layer in both:
        layer.rate, layer.noise_shape = 0.5, (40, 1)
    assert_same(*(layer(x, training=True) for layer in both))
    both[1].rate = 1.5
    with pytest.raises(ValueError, match=r"rate is 1.5; wanted a probability .* \(Keras does not check it"):
        both[1](x, training=True)


@pytest.mark.parametrize("name", NAMES)
def test_configuration(name):
    """What is written down is Keras's."""
    options = {} if name == "BatchNormalization" else {"rate": 0.3, "seed": 3}
    theirs, ours = pair(name, **options, name="a", dtype="bfloat16")
    assert ours.get_config() == theirs.get_config()
    assert keras.saving.serialize_keras_object(ours) == keras.saving.serialize_keras_object(theirs)


def test_errors():
    with pytest.raises(TypeError, match="model is of type list; wanted a Keras model or layer"):
        pyreg.keras.convert([])
    with pytest.raises(TypeError, match="model is None; wanted a Keras model or layer"):
        pyreg.keras.revert(None)
    with pytest.raises(ValueError, match="impl is 'x'; wanted 'auto' or 'philox'"):
        pyreg.keras.Dropout(0.5, impl="x")
    with pytest.raises(ValueError, match="Expected a float value between 0 and 1"):
        pyreg.keras.Dropout(1.5)


# ---- Batch normalization ---------------------------------------------------------------------------------------------


def normalised(layer, x, **options):
    """A training step with its gradients, and the state after it."""
    layer.build(x.shape)
    trainable, others = ([v.value for v in kind] for kind in (layer.trainable_variables, layer.non_trainable_variables))

    def loss(trainable, x):
        y, new = layer.stateless_call(trainable, others, x, training=True, **options)
        return (y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), (y, new)

    (_, result), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(trainable, x)
    return *result, gradients


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 3), {}),
        ((4, 3, 5), {"axis": 1, "scale": False, "momentum": 0.5}),
        ((2, 3, 2, 5), {"center": False, "epsilon": 1e-5}),
        ((16, 3), {"renorm": True}),  # Keras's
        ((16, 3), {"dtype": "mixed_bfloat16"}),
        ((16, 3), {"dtype": "float16"}),
    ],
)
def test_batch_normalization(shape, options):
    x = jnp.asarray(2 * normal(shape, np.float32) + 1)
    theirs, ours = (normalised(layer, x, **{}) for layer in pair("BatchNormalization", **options))
    tolerance = 0.1 if "dtype" in options else 1e-4
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axis", [-1, 1])
def test_masks(axis):
    """Also one that is nowhere true, which Keras takes for a mean of 0, and a wrong one."""
    x = jnp.asarray(normal((4, 5, 3), np.float32) + 2)
    mask = np.arange(20).reshape(4, 5) % 3 != 0
    for given in (mask, np.zeros_like(mask)) if axis == -1 else (mask,):
        theirs, ours = (normalised(layer, x, mask=given) for layer in pair("BatchNormalization", axis))
        for a, b in zip(jax.tree.leaves(theirs[1]), jax.tree.leaves(ours[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(ours)])).all()
        if given.any():
            for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for layer in pair("BatchNormalization"):
        with pytest.raises(ValueError, match="mask provided should be one dimension less"):
            layer(x, training=True, mask=mask[0])


def test_far_from_zero():
    x = normal((64, 3), np.float32) + np.float32(1e6)
    want, mean, var = reference.batch_norm(x, np.ones(3), np.zeros(3), axis=-1, epsilon=1e-3)
    layer = pyreg.keras.BatchNormalization(momentum=0.0)
    y = layer(x, training=True)
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-7)
    np.testing.assert_allclose(layer.moving_variance, var, rtol=1e-6)


def test_frozen_and_by_moving_statistics():
    x = jnp.asarray(normal((16, 3), np.float32) + 2)
    for change in ({}, {"trainable": False}):
        theirs, ours = pair("BatchNormalization", **change)
        for layer in (theirs, ours):
            layer(x, training=True)
        for training in (True, False, None):
            np.testing.assert_allclose(ours(x, training=training), theirs(x, training=training), rtol=1e-5, atol=1e-5)
    for make in (layers.BatchNormalization, pyreg.keras.BatchNormalization):
        with pytest.raises(ValueError, match="only supported with the TensorFlow backend"):
            make(synchronized=True)


# ---- Whole models ----------------------------------------------------------------------------------------------------


class Residual(layers.Layer):
    """A layer of its own, with layers in a list, in a dict, and made when it is built."""

    def __init__(self, **options):
        super().__init__(**options)
        self.drops = [layers.Dropout(0.2, seed=1)]
        self.norms = {"a": layers.BatchNormalization()}

    def build(self, shape):
        self.late = layers.Dropout(0.1, seed=2)
        super().build(shape)

    def call(self, x, training=None):
        return x + self.late(self.norms["a"](self.drops[0](x, training=training), training=training), training=training)


def network(norm=True, seed=0):
    keras.utils.set_random_seed(seed)
    x = first = keras.Input((5, 8))
    x = x + layers.MultiHeadAttention(2, 4, dropout=0.2, seed=1)(x, x)
    shared = layers.Dropout(0.1, seed=2)
    x = shared(layers.Dense(8, activation="relu")(shared(x)))
    x = Residual()(x) if norm else x
    x = keras.Sequential([layers.Dense(8), layers.SpatialDropout1D(0.2, seed=3)])(x)
    x = layers.TimeDistributed(layers.Dropout(0.1, seed=4))(x)
    model = keras.Model(first, layers.Dense(2)(layers.Flatten()(x)))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


X, Y = normal((12, 5, 8), np.float32), normal((12, 2), np.float32, 1)


def fit(model, epochs=2):
    return model.fit(X, Y, batch_size=6, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def test_convert_and_revert():
    model = network()
    assert pyreg.keras.convert(model) is model
    kinds = sorted(type(layer).__name__ for layer in converted(model))
    assert kinds == sorted([*["Dropout"] * 5, "SpatialDropout1D", "BatchNormalization"])
    calls = [layer.call for layer in converted(model)]
    assert {call.keywords["impl"] for call in calls} == {"auto"}
    pyreg.keras.convert(model, impl="philox")
    assert {layer.call.keywords["impl"] for layer in converted(model)} == {"philox"}
    assert pyreg.keras.revert(model) is model
    assert not converted(model)
    assert not converted(pyreg.keras.revert(model))


def test_what_is_left_alone():
    class Other(layers.Dropout):
        pass

    layer = layers.Dropout(0.5)
    layer.call = lambda x, training=False: x  # of somebody else
    own = vars(layer)["call"]
    model = keras.Sequential([keras.Input((3,)), Other(0.5), layers.GaussianDropout(0.5), layer])
    pyreg.keras.convert(model)
    assert [is_converted(layer) for layer in model.layers] == [False, False, True]
    assert pyreg.keras.revert(model).layers[2].call is own


def test_training_and_inference():
    """The same weights as by Keras, also when it is converted in the middle, compiled steps and all."""
    theirs, ours, changed = (network() for _ in range(3))
    pyreg.keras.convert(ours)
    losses = [fit(theirs), fit(ours)]
    losses.append(fit(changed, 1) + fit(pyreg.keras.convert(changed), 1))
    for model, loss in zip((ours, changed), losses[1:], strict=True):
        np.testing.assert_allclose(loss, losses[0], rtol=1e-4)
        for a, b in zip(theirs.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-3, atol=1e-3)
    for a, b in zip(theirs.non_trainable_variables, ours.non_trainable_variables, strict=True):
        if "seed" in a.path:
            assert_same(a.value, b.value)


def test_compiled_steps_are_made_anew():
    """Else another mask would not be seen."""
    x = np.ones((64, 6), np.float32)
    model = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5, seed=3)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    state = model.layers[0].seed_generator.state
    losses = []
    for change in (lambda m: m, lambda m: pyreg.keras.convert(m, impl="philox"), pyreg.keras.revert):
        change(model)
        state.assign([3, 0])
        losses.append(model.fit(x, x + 1, batch_size=64, verbose=0).history["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_numbers_of_a_model():
    """Without batch normalization, which differs in the last places, bit for bit."""
    results = []
    for change in (lambda model: model, pyreg.keras.convert):
        model = change(network(norm=False))
        values = [[v.value for v in kind] for kind in (model.trainable_variables, model.non_trainable_variables)]
        results.append(jax.jit(lambda a, b, model=model: model.stateless_call(a, b, X, training=True)[0])(*values))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_what_is_built_later():
    """Dropout inside attention and in other layers is made when they are built."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention, self.residual = layers.MultiHeadAttention(2, 4, dropout=0.2, seed=1), Residual()

        def call(self, x, training=None):
            return self.residual(self.attention(x, x, training=training), training=training)

    model = pyreg.keras.convert(pyreg.keras.convert(Model()))
    assert len(converted(model)) == 2
    model(X[:1])
    assert len(converted(model)) == 4
    assert is_converted(model.attention._dropout_layer)
    assert len(converted(pyreg.keras.revert(model))) == 0
    reverted = pyreg.keras.revert(pyreg.keras.convert(Model()))
    reverted(X[:1])
    assert not converted(reverted)


def test_files(tmp_path):
    """Models and weights that either has saved, the other loads."""
    custom = {"Residual": Residual}
    for change, later in ((pyreg.keras.convert, lambda m: m), (lambda m: m, pyreg.keras.convert)):
        model = change(network())
        model(X, training=True)
        want = model(X)
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=custom)
        assert not converted(loaded)
        np.testing.assert_allclose(later(loaded)(X), want, rtol=1e-6, atol=1e-6)
        other = later(network(seed=5))
        other.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_allclose(other(X), want, rtol=1e-6, atol=1e-6)


def test_files_load_without_pyreg(tmp_path):
    model = keras.Sequential([keras.Input((3,)), pyreg.keras.Dropout(0.5, seed=3), pyreg.keras.BatchNormalization()])
    model.save(tmp_path / "model.keras")
    code = f"""
import sys
sys.modules["pyreg"] = None
import keras
model = keras.models.load_model({str(tmp_path / "model.keras")!r})
print([type(layer).__name__ for layer in model.layers], keras.backend.backend())
"""
    assert python(code, warnings="ignore", KERAS_BACKEND="jax") == "['Dropout', 'BatchNormalization'] jax"


def test_clones_pickles_and_copies():
    """Are Keras's, with the same weights and seeds."""
    model = pyreg.keras.convert(keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dropout(0.5, seed=3)]))
    want = model(np.ones((4, 3), np.float32), training=True)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert not converted(copied)
        assert converted(pyreg.keras.convert(copied))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert not converted(clone)
    for layer in (clone, pyreg.keras.convert(keras.models.clone_model(clone))):
        layer.set_weights(model.get_weights())
        np.testing.assert_allclose(layer(np.ones((4, 3), np.float32), training=True), want, rtol=1e-6)


def test_threads():
    x = np.ones((40, 6), np.float32)

    def work(_):
        for _ in range(5):
            theirs, ours = pair("Dropout", 0.5, seed=7)
            assert_same(ours(x, training=True), theirs(x, training=True))

    in_threads(work, 4)


def test_another_backend():
    """On another backend convert says which it wants."""
    code = """
import keras, pyreg.keras
layer = keras.layers.Dropout(0.5)
try:
    pyreg.keras.convert(layer)
except RuntimeError as error:
    print(error)
"""
    wanted = "Keras's backend is 'numpy'; wanted 'jax' or 'torch'"
    assert python(code, warnings="ignore", KERAS_BACKEND="numpy") == wanted
