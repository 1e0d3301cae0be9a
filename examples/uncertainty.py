"""A small network that tells how sure it is: Monte-Carlo dropout, with a rate that follows a schedule.

    python examples/uncertainty.py [--steps 2000] [--samples 100]

The network learns sin(3 x) from noisy points in [-1, 1].  The rate of dropout rises from 0 during the first half of the
training (Morerio et al., "Curriculum dropout", 2017), inside one compiled `jax.lax.scan`: training with another final
rate compiles nothing.  Then the network is asked many times with dropout on, each time with another key, by `jax.vmap`;
the spread of the answers is small where there were points, and grows with the distance from them (Gal and Ghahramani,
"Dropout as a Bayesian approximation", 2016).
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import pyreg.jax

WIDTH, DEPTH = 64, 2

console = Console(highlight=False)
optimiser = optax.adam(3e-3)


def create_params(key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    sizes = [1, *[WIDTH] * DEPTH, 1]
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(k, (n, m)) * jnp.sqrt(2 / n), 0.1 * jax.random.normal(keys[-1], (m,)))
        for k, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]


def network(params: Any, x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """x has shape (n, 1)."""
    for i, (weight, bias) in enumerate(params[:-1]):
        x = jax.nn.relu(x @ weight + bias)
        x = pyreg.jax.dropout(x, rate, key=jax.random.fold_in(key, i))
    weight, bias = params[-1]
    return x @ weight + bias


@functools.partial(jax.jit, static_argnames="steps")
def train(params: Any, x: jax.Array, y: jax.Array, final_rate: jax.Array, key: jax.Array, steps: int) -> Any:
    """The trained parameters, and the rate and the loss of each step."""

    def step(carried: Any, i: jax.Array) -> Any:
        params, state = carried
        rate = final_rate * jnp.minimum(2 * i / steps, 1)

        def loss(params: Any) -> jax.Array:
            return jnp.mean((network(params, x, rate, jax.random.fold_in(key, i)) - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradients, state)
        return (optax.apply_updates(params, updates), state), (rate, value)

    (params, _), curve = jax.lax.scan(step, (params, optimiser.init(params)), jnp.arange(steps))
    return params, curve


@jax.jit
def ask(params: Any, x: jax.Array, rate: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the answers with each key's masks; x is not copied for each."""
    answers = jax.vmap(lambda key: network(params, x, rate, key))(keys)
    return answers.mean(0), answers.std(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=100)
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.uniform(keys[0], (200, 1), minval=-1, maxval=1)
    y = jnp.sin(3 * x) + 0.1 * jax.random.normal(keys[1], x.shape)
    start = create_params(keys[2])
    for rate in (0.05, 0.1):
        began = time.perf_counter()
        params, (rates, losses) = jax.block_until_ready(train(start, x, y, rate, keys[3], args.steps))
        seconds = time.perf_counter() - began
        console.print(
            f"rate from {rates[0]:.2f} to {rates[-1]:.2f}: loss {losses[-100:].mean():.4f} in {seconds:.2f} s"
        )
    console.print("The second training compiled nothing.\n")
    points = jnp.linspace(-2, 2, 17)[:, None]
    mean, spread = ask(params, points, rate, jax.random.split(jax.random.key(1), args.samples))
    table = Table(
        "x", "sin(3 x)", "answer", "spread", "", title=f"{args.samples} answers, learned from points in [-1, 1]"
    )
    for at, m, s in zip(points[:, 0].tolist(), mean[:, 0].tolist(), spread[:, 0].tolist(), strict=True):
        table.add_row(f"{at:.2f}", f"{jnp.sin(3 * at):.2f}", f"{m:.2f}", f"{s:.2f}", "*" * round(40 * s))
    console.print(table)


if __name__ == "__main__":
    main()
