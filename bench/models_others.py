"""The transformer of models.py in linen, Equinox, Haiku and Keras, written as for each alone, and a training step.

Each function takes the sizes of a model and what its dropout is to be: "off", "stock", "pyreg" or "philox".  It returns
a step of gradient descent, a function of a state and an input; the state to begin with; and what takes the parameters
out of a state.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.models import Model

State = Any
Made = tuple[Callable[[State, jax.Array], State], State, Callable[[State], Any]]


def descend(params: Any, gradients: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)


def step_of(loss: Callable[..., jax.Array], params: Any) -> Made:
    """For a loss of parameters, an input and a key: each step has another key."""

    def step(state: State, x: jax.Array) -> State:
        params, i = state
        gradients = jax.grad(loss)(params, x, jax.random.fold_in(jax.random.key(1), i))
        return descend(params, gradients), i + 1

    return step, (params, jnp.uint32(0)), lambda state: state[0]


# ---- linen -----------------------------------------------------------------------------------------------------------


def linen(sizes: Model, dropout: str) -> Made:
    import functools

    from flax import linen as nn

    import pyreg.linen

    family = nn if dropout in ("off", "stock") else pyreg.linen
    impl = {"impl": "philox"} if dropout == "philox" else {}
    attend = functools.partial(family.dot_product_attention, **impl) if impl else family.dot_product_attention

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            drop = functools.partial(family.Dropout, sizes.rate, deterministic=dropout == "off", **impl)
            y = nn.MultiHeadDotProductAttention(
                sizes.width // 64,
                dropout_rate=sizes.rate,
                broadcast_dropout=False,
                deterministic=dropout == "off",
                use_bias=False,
                attention_fn=attend,
            )(nn.LayerNorm()(x))
            x = x + drop(name="first")(y)
            hidden = drop(name="second")(nn.gelu(nn.Dense(4 * sizes.width)(nn.LayerNorm()(x))))
            return x + drop(name="third")(nn.Dense(sizes.width)(hidden))

    model = nn.Sequential([Block() for _ in range(sizes.depth)])
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.jit(model.init)(rngs, jnp.ones(sizes.shape))
    return step_of(lambda p, x, key: jnp.mean(model.apply(p, x, rngs={"dropout": key}) ** 2), params)


# ---- Equinox ---------------------------------------------------------------------------------------------------------


def equinox(sizes: Model, dropout: str) -> Made:
    import equinox as eqx

    import pyreg.equinox

    class Block(eqx.Module):
        norms: list[eqx.nn.LayerNorm]
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear
        dropouts: list[eqx.nn.Dropout]

        def __init__(self, key: jax.Array):
            keys, width = jax.random.split(key, 3), sizes.width
            self.norms = [eqx.nn.LayerNorm(width) for _ in range(2)]
            self.attention = eqx.nn.MultiheadAttention(width // 64, width, dropout_p=sizes.rate, key=keys[0])
            self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
            self.down = eqx.nn.Linear(4 * width, width, key=keys[2])
            self.dropouts = [eqx.nn.Dropout(sizes.rate) for _ in range(3)]

        def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
            keys = jax.random.split(key, 4)
            y = jax.vmap(self.norms[0])(x)
            x = x + self.dropouts[0](self.attention(y, y, y, key=keys[0]), key=keys[1])
            hidden = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[1])(x)))
            return x + self.dropouts[2](jax.vmap(self.down)(self.dropouts[1](hidden, key=keys[2])), key=keys[3])

    model = [Block(key) for key in jax.random.split(jax.random.key(0), sizes.depth)]
    if dropout == "off":
        model = eqx.nn.inference_mode(model)
    elif dropout != "stock":
        model = pyreg.equinox.convert(model, impl="philox" if dropout == "philox" else "auto")
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        def one(x: jax.Array, key: jax.Array) -> jax.Array:
            for i, block in enumerate(eqx.combine(params, static)):
                x = block(x, jax.random.fold_in(key, i))
            return x

        return jnp.mean(jax.vmap(one)(x, jax.random.split(key, len(x))) ** 2)

    return step_of(loss, params)


# ---- Haiku -----------------------------------------------------------------------------------------------------------


def haiku(sizes: Model, dropout: str) -> Made:
    """Haiku's own attention has no dropout."""
    import haiku as hk

    import pyreg.haiku

    def drop(x: jax.Array) -> jax.Array:
        key = hk.next_rng_key()  # also without dropout, so that parameters are the same
        if dropout == "off":
            return x
        if dropout == "stock":
            return hk.dropout(key, sizes.rate, x)
        return pyreg.haiku.dropout(key, sizes.rate, x, impl="philox" if dropout == "philox" else "auto")

    def attention(x: jax.Array) -> jax.Array:
        n, length, width = x.shape
        q, k, v = (hk.Linear(width, with_bias=False)(x).reshape(n, length, width // 64, 64) for _ in range(3))
        weights = drop(jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / 8))
        return hk.Linear(width, with_bias=False)(jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(x.shape))

    def network(x: jax.Array) -> jax.Array:
        for _ in range(sizes.depth):
            x = x + drop(attention(hk.LayerNorm(-1, True, True)(x)))
            hidden = drop(jax.nn.gelu(hk.Linear(4 * sizes.width)(hk.LayerNorm(-1, True, True)(x))))
            x = x + drop(hk.Linear(sizes.width)(hidden))
        return x

    model = hk.transform(network)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones(sizes.shape))
    return step_of(lambda p, x, key: jnp.mean(model.apply(p, key, x) ** 2), params)


# ---- Keras -----------------------------------------------------------------------------------------------------------


def keras(sizes: Model, dropout: str) -> Made:
    """Without dropout Keras's attention computes in another way.  The state of the seed generators is in the state."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    import pyreg.keras

    if keras.backend.backend() != "jax":
        raise SystemExit(f"Keras's backend is {keras.backend.backend()!r}; wanted 'jax': KERAS_BACKEND=jax")
    keras.utils.set_random_seed(0)
    layers, rate, seeds = keras.layers, 0.0 if dropout == "off" else sizes.rate, iter(range(10**6))
    x = first = keras.Input(sizes.shape[1:])
    for _ in range(sizes.depth):
        y = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(sizes.width // 64, 64, dropout=rate, use_bias=False, seed=next(seeds))
        x = x + layers.Dropout(rate, seed=next(seeds))(attention(y, y))
        hidden = layers.Dense(4 * sizes.width, activation="gelu")(layers.LayerNormalization()(x))
        hidden = layers.Dense(sizes.width)(layers.Dropout(rate, seed=next(seeds))(hidden))
        x = x + layers.Dropout(rate, seed=next(seeds))(hidden)
    model = keras.Model(first, x)
    if dropout in ("pyreg", "philox"):
        pyreg.keras.convert(model, impl="philox" if dropout == "philox" else "auto")

    def step(state: State, x: jax.Array) -> State:
        params, others = state

        def loss(params: Any) -> Any:
            y, new = model.stateless_call(params, others, x, training=True)
            return jnp.mean(y**2), new

        gradients, others_after = jax.grad(loss, has_aux=True)(params)
        return descend(params, gradients), others_after

    state = tuple([v.value for v in kind] for kind in (model.trainable_variables, model.non_trainable_variables))
    return step, state, lambda state: state[0]


FRAMEWORKS = {"linen": linen, "equinox": equinox, "haiku": haiku, "keras": keras}
