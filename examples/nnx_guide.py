"""Dropout and batch-norm in a Flax nnx model: training and evaluation, and the same numbers from pyreg's layers.

    python examples/nnx_guide.py [--steps 100]

A model of two linear layers is built twice from the same seed, and one of the two is handed to pyreg.nnx.convert.  They
give the same bits, call by call; and after some training on scikit-learn's irises their parameters are still the same.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_iris

import pyreg.nnx

console = Console(highlight=False)


class Model(nnx.Module):
    """Four measurements in, ten classes out; 80 % of the input is dropped, then half of the output."""

    def __init__(self, rngs: nnx.Rngs):
        self.drop_input = nnx.Dropout(0.8, rngs=rngs)
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.output = nnx.Linear(16, 10, rngs=rngs)
        self.drop_output = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.hidden(self.drop_input(x)))
        return self.drop_output(self.output(x))


class Normalised(nnx.Module):
    """The same with batch-norm behind the hidden layer, and less dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.output = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array) -> jax.Array:
    def loss(model: nnx.Module) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def accuracy(model: nnx.Module, x: jax.Array, labels: jax.Array) -> float:
    return float((model(x).argmax(-1) == labels).mean())


def same_bits(a: object, b: object) -> bool:
    """Whether two models hold the same parameters, statistics and random streams."""
    return bool(
        jax.tree.all(
            jax.tree.map(lambda a, b: (a == b).all(), nnx.to_pure_dict(nnx.state(a)), nnx.to_pure_dict(nnx.state(b)))
        )
    )


def show_modes(x: jax.Array) -> None:
    """What train() and eval() do."""
    flax, ours = Model(nnx.Rngs(0)), pyreg.nnx.convert(Model(nnx.Rngs(0)))
    table = Table(
        "mode", "call", "zeros in the output", "the same bits from Flax's layers", title="One model, two calls"
    )
    for mode in ("train", "eval"):
        for call in (1, 2):
            getattr(flax, mode)()
            getattr(ours, mode)()
            y = ours(x)
            table.add_row(mode, str(call), f"{float((y == 0).mean()):.0%}", str(bool((y == flax(x)).all())))
    console.print(table)
    console.print("Each call in training draws its own mask from the layer's stream; evaluation draws none.\n")


def show_training(x: jax.Array, labels: jax.Array, steps: int) -> None:
    table = Table("model", "layers", "loss at first", "at the end", "accuracy", title=f"{steps} steps on 150 irises")
    for kind in (Model, Normalised):
        trained = {}
        for layers in ("Flax", "pyreg"):
            model = kind(nnx.Rngs(0))
            if layers == "pyreg":
                pyreg.nnx.convert(model)
            optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
            model.train()
            losses = [float(train_step(model, optimizer, x, labels)) for _ in range(steps)]
            model.eval()
            table.add_row(
                kind.__name__, layers, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{accuracy(model, x, labels):.1%}"
            )
            trained[layers] = model
        if kind is Model:
            console.print(f"Dropout only: parameters equal bit for bit: {same_bits(*trained.values())}")
    console.print(table)
    norm = trained["pyreg"].norm
    console.print(f"Running statistics of the batch-norm, first channels: mean {norm.mean[:3]}, var {norm.var[:3]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    x, labels = load_iris(return_X_y=True)
    x, labels = jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32), jnp.asarray(labels)
    show_modes(x)
    show_training(x, labels, args.steps)


if __name__ == "__main__":
    main()
