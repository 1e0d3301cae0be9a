"""Models in Flax nnx for train_step.py, written as for Flax alone, and one training step of each."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    def __init__(self, width: int, depth: int, rate: float, rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Sequential(nnx.Linear(width, width, rngs=rngs), nnx.relu, nnx.Dropout(rate, rngs=rngs))
            for _ in range(depth)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class ResidualBlock(nnx.Module):
    """Two convolutions, each with batch-norm (He et al., 2016), and dropout between them (Zagoruyko, 2016)."""

    def __init__(self, channels: int, rate: float, rngs: nnx.Rngs):
        self.convolutions = nnx.List(nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs) for _ in range(2))
        self.norms = nnx.List(nnx.BatchNorm(channels, rngs=rngs) for _ in range(2))
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.dropout(nnx.relu(self.norms[0](self.convolutions[0](x))))
        return nnx.relu(x + self.norms[1](self.convolutions[1](y)))


class CNN(nnx.Module):
    def __init__(self, channels: int, depth: int, rate: float, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, channels, (3, 3), rngs=rngs)
        self.blocks = nnx.List(ResidualBlock(channels, rate, rngs) for _ in range(depth))
        self.output = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.output(x.mean((1, 2)))


class Block(nnx.Module):
    """A layer of a transformer, with dropout on the attention weights, on the hidden layer and on both branches."""

    def __init__(self, width: int, rate: float, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            width // 64,
            width,
            dropout_rate=rate,
            broadcast_dropout=False,
            deterministic=False,
            decode=False,
            use_bias=False,
            rngs=rngs,
        )
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.dropouts = nnx.List(nnx.Dropout(rate, rngs=rngs) for _ in range(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.dropouts[0](self.attention(self.norms[0](x)))
        hidden = self.dropouts[1](nnx.gelu(self.up(self.norms[1](x))))
        return x + self.dropouts[2](self.down(hidden))


class Transformer(nnx.Module):
    def __init__(self, width: int, depth: int, rate: float, rngs: nnx.Rngs):
        self.blocks = nnx.List(Block(width, rate, rngs) for _ in range(depth))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class Model(NamedTuple):
    kind: Callable[..., nnx.Module]
    width: int
    depth: int
    rate: float
    shape: tuple[int, ...]  # of the input

    def build(self) -> nnx.Module:
        return self.kind(self.width, self.depth, self.rate, nnx.Rngs(0))


MODELS = {
    "transformer-256": Model(Transformer, width=256, depth=4, rate=0.1, shape=(16, 128, 256)),
    "transformer-128": Model(Transformer, width=128, depth=2, rate=0.1, shape=(64, 128, 128)),
    "mlp-1024": Model(MLP, width=1024, depth=3, rate=0.5, shape=(512, 1024)),
    "cnn-64": Model(CNN, width=64, depth=3, rate=0.3, shape=(16, 32, 32, 3)),
    "transformer-64": Model(Transformer, width=64, depth=1, rate=0.1, shape=(8, 32, 64)),
    "mlp-64": Model(MLP, width=64, depth=2, rate=0.5, shape=(32, 64)),
    "cnn-8": Model(CNN, width=8, depth=1, rate=0.3, shape=(4, 8, 8, 3)),
}
FULL = ("transformer-256", "transformer-128", "mlp-1024", "cnn-64")
QUICK = ("transformer-64", "mlp-64", "cnn-8")


def training_step(model: nnx.Module) -> tuple[Callable[[nnx.State, jax.Array], nnx.State], nnx.State]:
    """A step of gradient descent, which is a function of the state of the model and an input; and that state."""
    graph, state = nnx.split(model)

    def loss(model: nnx.Module, x: jax.Array) -> jax.Array:
        return jnp.mean(model(x) ** 2)

    def step(state: nnx.State, x: jax.Array) -> nnx.State:
        model = nnx.merge(graph, state)
        gradients = nnx.grad(loss)(model, x)
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients))
        return nnx.state(model)

    return step, state
