"""Time one jitted training step of a transformer: dropout off, Flax's, and pyreg's.

    python bench/train_step.py [--quick] [--rounds 15]

Dropout 0.1 at attention weights, residual branches and the MLP's hidden layer.  The variants take turns; a ratio is
taken within each turn, and the table gives the medians.  Flax's is also run under pyreg.jax.accelerate_random().
Parameters after five steps are compared bit for bit with those of Flax's.
"""

import argparse
import contextlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table
from timing import console, environment, number_text, show_environment, summary, time_text, write_json

import pyreg.jax

RATE = 0.1
SHAPES = {  # width, layers, sequence, batch
    "d=256, 4 layers, s=128, b=16": (256, 4, 128, 16),
    "d=128, 2 layers, s=128, b=64": (128, 2, 128, 64),
}
QUICK = {"d=64, 1 layer, s=32, b=8": (64, 1, 32, 8)}

DROPOUTS = {
    "off": lambda x, key: x,
    "Flax": lambda x, key: nnx.Dropout(RATE, deterministic=False)(x, rngs=key),
    "Flax, accelerated": lambda x, key: nnx.Dropout(RATE, deterministic=False)(x, rngs=key),
    "pyreg": lambda x, key: pyreg.jax.dropout(x, RATE, key=key),
    "pyreg, philox": lambda x, key: pyreg.jax.dropout(x, RATE, key=key, impl="philox"),
}


# ---- The model -------------------------------------------------------------------------------------------------------


def parameters(width, layers):
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return jnp.asarray(rng.standard_normal((rows, columns)) / rows**0.5, jnp.float32)

    return [
        {"qkv": matrix(width, 3 * width), "out": matrix(width, width), "up": matrix(width, 4 * width)}
        | {"down": matrix(4 * width, width)}
        for _ in range(layers)
    ]


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def loss(params, x, target, key, dropout):
    batch, length, width = x.shape
    for i, layer in enumerate(params):
        keys = jax.random.split(jax.random.fold_in(key, i), 4)
        qkv = (layer_norm(x) @ layer["qkv"]).reshape(batch, length, 3, width // 64, 64)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        weights = jax.nn.softmax(jnp.einsum("bqhc,bkhc->bhqk", q, k) / 8)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", dropout(weights, keys[0]), v).reshape(x.shape)
        x = x + dropout(mixed @ layer["out"], keys[1])
        hidden = dropout(jax.nn.gelu(layer_norm(x) @ layer["up"]), keys[2])
        x = x + dropout(hidden @ layer["down"], keys[3])
    return jnp.mean((x - target) ** 2)


def compiled_step(name, params, x, target, key):
    """The step, and the seconds it took to compile."""

    def step(params, x, target, key):
        gradients = jax.grad(loss)(params, x, target, key, DROPOUTS[name])
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    with pyreg.jax.accelerate_random() if name.endswith("accelerated") else contextlib.nullcontext():
        lowered = jax.jit(step).lower(params, x, target, key)
        start = time.perf_counter()
        compiled = lowered.compile()
        return compiled, time.perf_counter() - start


# ---- The measurement -------------------------------------------------------------------------------------------------


def measure(shape, rounds):
    width, layers, length, batch = shape
    params, key = parameters(width, layers), jax.random.key(0)
    x, target = jax.random.normal(jax.random.key(1), (2, batch, length, width))
    steps, compile_seconds, after = {}, {}, {}
    for name in DROPOUTS:
        steps[name], compile_seconds[name] = compiled_step(name, params, x, target, key)
        p = params
        for i in range(5):
            p = steps[name](p, x, target, jax.random.fold_in(key, i))
        after[name] = jax.tree.leaves(p)
    seconds = {name: np.empty(rounds) for name in steps}
    for r in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params, x, target, key))
            seconds[name][r] = time.perf_counter() - start
    return {
        name: {
            "seconds": summary(seconds[name]),
            "over off": summary(seconds[name] / seconds["off"]),
            "compile seconds": compile_seconds[name],
            "temporary bytes": steps[name].memory_analysis().temp_size_in_bytes,
            "difference from Flax": max(
                float(jnp.max(jnp.abs(a - b))) for a, b in zip(after[name], after["Flax"], strict=True)
            ),
        }
        for name in steps
    }


def print_table(title, results):
    table = Table("dropout", "step", "/ off", "compile", "temporary", "parameters after 5 steps", title=title)
    for name, r in results.items():
        difference = r["difference from Flax"]
        table.add_row(
            name,
            time_text(r["seconds"]["median"]),
            f"{number_text(r['over off']['median'])} ({number_text(r['over off']['min'])})",
            time_text(r["compile seconds"]),
            f"{r['temporary bytes'] / 2**20:.0f} MiB",
            "" if name == "off" or "philox" in name else "Flax's bits" if difference == 0 else f"{difference:.1e} away",
        )
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, in seconds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file")
    args = parser.parse_args()

    env = environment(("numpy", "jax", "flax"))
    show_environment(env)
    records = {}
    for title, shape in (QUICK if args.quick else SHAPES).items():
        records[title] = measure(shape, args.rounds)
        print_table(title, records[title])
    write_json(args.out / "train_step.json", environment=env, records=records)


if __name__ == "__main__":
    main()
