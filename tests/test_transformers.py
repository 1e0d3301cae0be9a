"""The same small transformer in Flax's nnx and linen, Equinox, Haiku and Keras: by pyreg it has the framework's bits.

Bits of whole programs are compared without most of XLA's optimisations, as these fuse the framework's operations with
what is around them; and with a rate whose scale is exact, as XLA then truly divides in some gradients.  Batch-norm,
which agrees to rounding, is in the tests of each framework.
"""

import importlib
import os
import warnings

import numpy as np
import pytest
from common import normal
from jaxcommon import FUSED, assert_same, jax, nnx

jnp = jax.numpy
KEY = jax.random.key(3)
X = normal((2, 5, 8), np.float32)
HEADS, WIDTH, RATE = 2, 8, 0.5


def package(name):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, while they are imported
        return pytest.importorskip(name, reason=f"{name} is not installed")


def result(function, parameters):
    """Of function(parameters, x), and its gradients."""

    def loss(parameters, x):
        y = function(parameters, x)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=FUSED)
    (_, y), gradients = step(parameters, jnp.asarray(X))
    return y, jax.tree.leaves(gradients)


def by_nnx(ours):
    import pyreg.nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(
                HEADS, WIDTH, dropout_rate=RATE, deterministic=False, decode=False, rngs=rngs
            )
            self.wide, self.narrow = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
            self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
            self.drops = nnx.List([nnx.Dropout(RATE, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            x = self.norms[0](x + self.drops[0](self.attention(x)))
            return self.norms[1](x + self.drops[1](self.narrow(nnx.gelu(self.wide(x)))))

    model = Block(nnx.Rngs(0))
    if ours:
        pyreg.nnx.convert(model)
    static, parameters, rest = nnx.split(model, nnx.Param, ...)
    return result(lambda parameters, x: nnx.merge(static, parameters, rest, copy=True)(x), parameters)


def by_linen(ours):
    from flax import linen

    import pyreg.linen

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            drop = linen.Dropout(RATE, deterministic=False)
            attention = linen.MultiHeadDotProductAttention(HEADS, dropout_rate=RATE, deterministic=False)
            x = linen.LayerNorm()(x + drop(attention(x)))
            return linen.LayerNorm()(x + drop(linen.Dense(WIDTH)(linen.gelu(linen.Dense(4 * WIDTH)(x)))))

    def apply(parameters, x):
        with pyreg.linen.accelerate():
            return Model().apply(parameters, x, rngs=rngs)

    rngs = {"params": KEY, "dropout": KEY}
    parameters = jax.jit(Model().init)(rngs, X)
    return result(apply if ours else lambda parameters, x: Model().apply(parameters, x, rngs=rngs), parameters)


def by_equinox(ours):
    eqx = package("equinox")
    import pyreg.equinox

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        layers: list
        norms: list
        drop: eqx.nn.Dropout

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, dropout_p=RATE, key=keys[0])
            self.layers = [
                eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1]),
                eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2]),
            ]
            self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]
            self.drop = eqx.nn.Dropout(RATE)

        def __call__(self, x, key):
            keys = jax.random.split(key, 3)
            x = jax.vmap(self.norms[0])(x + self.drop(self.attention(x, x, x, key=keys[0]), key=keys[1]))
            y = jax.vmap(lambda word: self.layers[1](jax.nn.gelu(self.layers[0](word))))(x)
            return jax.vmap(self.norms[1])(x + self.drop(y, key=keys[2]))

    model = Block(KEY)
    parameters, static = eqx.partition(pyreg.equinox.convert(model) if ours else model, eqx.is_inexact_array)
    keys = jax.random.split(KEY, len(X))
    return result(lambda parameters, x: jax.vmap(eqx.combine(parameters, static))(x, keys), parameters)


def by_haiku(ours):
    """Haiku's attention has no dropout."""
    hk = package("haiku")
    import pyreg.haiku

    drop = pyreg.haiku.dropout if ours else hk.dropout

    def network(x):
        def norm(y):
            return hk.LayerNorm(-1, True, True)(y)

        attention = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=hk.initializers.RandomNormal(0.3))
        x = norm(x + drop(hk.next_rng_key(), RATE, attention(x, x, x)))
        return norm(x + drop(hk.next_rng_key(), RATE, hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(4 * WIDTH)(x)))))

    model = hk.transform(network)
    return result(lambda parameters, x: model.apply(parameters, KEY, x), jax.jit(model.init)(KEY, X))


def by_keras(ours):
    keras = package("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras has another backend")
    import pyreg.keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = first = keras.Input(X.shape[1:])
    attended = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, dropout=RATE, seed=1)(x, x)
    x = layers.LayerNormalization()(x + layers.Dropout(RATE, seed=2)(attended))
    y = layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="gelu")(x))
    model = keras.Model(first, layers.LayerNormalization()(x + layers.Dropout(RATE, seed=3)(y)))
    if ours:
        pyreg.keras.convert(model)
    parameters, state = ([v.value for v in kind] for kind in (model.trainable_variables, model.non_trainable_variables))
    return result(lambda parameters, x: model.stateless_call(parameters, state, x, training=True)[0], parameters)


@pytest.mark.parametrize("run", [by_nnx, by_linen, by_equinox, by_haiku, by_keras], ids=lambda run: run.__name__[3:])
def test_bits_of_a_transformer(monkeypatch, run):
    """Outputs and gradients; and pyreg is really in it."""
    theirs = run(False)
    calls = []
    module = importlib.import_module("pyreg.jax._dropout")
    monkeypatch.setattr(module, "_words_of", lambda *args, of=module._words_of: calls.append(args) or of(*args))
    ours = run(True)
    assert_same(ours, theirs)
    assert len(calls) >= (2 if run is by_haiku else 3)
    assert all((gradient != 0).any() for gradient in ours[1])
