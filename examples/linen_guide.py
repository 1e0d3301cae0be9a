"""Dropout and batch-norm in a Flax linen model: keys, the training state, and a training step.

    python examples/linen_guide.py [--epochs 10] [--layers pyreg]

The model learns scikit-learn's 8 x 8 digits.  `--layers flax` trains it with Flax's own Dropout and BatchNorm: the
masks are the same, so the losses agree to rounding.
"""

import argparse
from typing import Any

import jax
import numpy as np
import optax
from flax import linen
from flax.training import train_state
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pyreg.linen

BATCH = 100

console = Console(highlight=False)


class Model(linen.Module):
    layers: Any  # the module that Dropout and BatchNorm come from: flax.linen or pyreg.linen

    @linen.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        for _ in range(2):
            x = linen.Dense(128)(x)
            x = linen.relu(self.layers.BatchNorm(use_running_average=not training, momentum=0.9)(x))
            x = self.layers.Dropout(0.5, deterministic=not training)(x)
        return linen.Dense(10)(x)


class TrainState(train_state.TrainState):
    """Parameters and optimiser, and beside them the running statistics and the key that dropout's keys come from."""

    batch_stats: Any
    key: jax.Array


def create_state(layers: Any, parameter_key: jax.Array, dropout_key: jax.Array, x: jax.Array) -> TrainState:
    model = Model(layers)
    variables = model.init(parameter_key, x, training=False)  # no dropout here, so no key for it
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        key=dropout_key,
        tx=optax.adam(1e-3),
    )


@jax.jit
def train_step(state: TrainState, x: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    key = jax.random.fold_in(state.key, state.step)  # another mask in each step, the same when the step is repeated

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            training=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=updates["batch_stats"]), value


@jax.jit
def accuracy(state: TrainState, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, training=False)
    return (logits.argmax(-1) == labels).mean()


def train(layers: Any, epochs: int, seed: int = 0) -> list[tuple[float, float]]:
    """Mean loss and accuracy on the test images after each epoch."""
    x, labels = load_digits(return_X_y=True)
    x, x_test, labels, labels_test = train_test_split((x / 16).astype(np.float32), labels, random_state=seed)
    parameter_key, dropout_key, order_key = jax.random.split(jax.random.key(seed), 3)
    state = create_state(layers, parameter_key, dropout_key, x[:1])
    curve = []
    for epoch in range(epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), len(x)))
        losses = []
        for batch in order[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
            state, value = train_step(state, x[batch], labels[batch])
            losses.append(float(value))
        curve.append((float(np.mean(losses)), float(accuracy(state, x_test, labels_test))))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--layers", choices=["pyreg", "flax"], default="pyreg")
    args = parser.parse_args()
    table = Table("epoch", "loss", "accuracy on test images", title=f"Digits, {args.layers}'s layers")
    curve = train(pyreg.linen if args.layers == "pyreg" else linen, args.epochs)
    for epoch, (value, right) in enumerate(curve, 1):
        table.add_row(str(epoch), f"{value:.6f}", f"{right:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
