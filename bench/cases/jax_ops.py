"""JAX ops against Flax's layers: what is run, what is compared with what, and whether the results are right."""

import contextlib
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import pyreg.jax

RATE = 0.1
TABLE_BY = ("dtype",)
PACKAGES = ("numpy", "jax", "flax")
PEERS = ("Flax",)  # JAX always uses all threads

SUBJECTS = ("forward", "gradient")
COLUMNS = (
    ("same bits", "pyreg {}", None),
    ("Flax /", "Flax {}", "pyreg {}"),
    ("accelerated /", "Flax accelerated {}", "pyreg {}"),
    ("philox", "philox {}", None),
    ("Flax /", "Flax {}", "philox {}"),
    ("same bits / negate", "pyreg {}", "negate"),
)
MARKDOWN = {
    "`-x`": "negate",
    "pyreg forward": "pyreg forward",
    "philox forward": "philox forward",
    "Flax forward": "Flax forward",
    "Flax forward, accelerated": "Flax accelerated forward",
    "pyreg gradient": "pyreg gradient",
    "philox gradient": "philox gradient",
    "Flax gradient": "Flax gradient",
    "Flax gradient, accelerated": "Flax accelerated gradient",
}
NOTES = (
    "Calls of compiled programs, which allocate their results. gradient is a program that returns the output and, for "
    "a given gradient of the output, that of the input. negate is -x, one XLA operation. accelerated is Flax's layer "
    "under pyreg.jax.accelerate_random(). batch-norm has no random bits; there 'same bits' is the op itself."
)


def parse(text):
    """The op, and the shape of x."""
    op, _, sizes = text.partition(" ")
    return op, tuple(map(int, sizes.split(",")))


def elements(shape):
    return math.prod(parse(shape)[1])


def layers(op, channels):
    """The function of each contender: (x, key) -> y."""
    if op == "dropout":
        flax = nnx.Dropout(RATE, deterministic=False)
        return {
            "pyreg": lambda x, key: pyreg.jax.dropout(x, RATE, key=key),
            "philox": lambda x, key: pyreg.jax.dropout(x, RATE, key=key, impl="philox"),
            "Flax": lambda x, key: flax(x, rngs=key),
            "Flax accelerated": lambda x, key: flax(x, rngs=key),
        }
    norm, ones, zeros = linen.BatchNorm(use_running_average=False), jnp.ones(channels), jnp.zeros(channels)
    state = norm.init(jax.random.key(0), jnp.ones((2, channels)))
    return {
        "pyreg": lambda x, _: pyreg.jax.batch_norm(x, ones, zeros)[0],
        "Flax": lambda x, _: norm.apply(state, x, mutable=["batch_stats"])[0],
    }


def functions_of(case):
    """Functions to compile by name, and their operands."""
    op, shape = parse(case)
    x, dy = jax.random.normal(jax.random.key(0), (2, *shape))
    key = jax.random.key(1)
    programs = {"negate": (jax.jit(lambda x: -x), (x,))}
    for name, layer in layers(op, shape[-1]).items():

        def gradient(x, dy, key, layer=layer):
            y, back = jax.vjp(lambda x: layer(x, key), x)
            return y, back(dy)[0]

        programs[f"{name} forward"] = jax.jit(layer), (x, key)
        programs[f"{name} gradient"] = jax.jit(gradient), (x, dy, key)
    return programs


@functools.cache
def compile_all(case):
    """(name, compiled program, operands, seconds to compile)"""
    found = []
    for name, (program, operands) in functions_of(case).items():
        with pyreg.jax.accelerate_random() if "accelerated" in name else contextlib.nullcontext():
            lowered = program.lower(*operands)
            start = time.perf_counter()
            found.append((name, lowered.compile(), operands, time.perf_counter() - start))
    return found


def contenders(dtype, shape, threads, peers=()):
    """The calls to be timed, by name."""
    pyreg.set_num_threads(threads)
    return {
        name: lambda program=program, operands=operands: jax.block_until_ready(program(*operands))
        for name, program, operands, _ in compile_all(shape)
        if "Flax" in peers or "Flax" not in name
    }


def saved_bytes(layer, shape):
    """Bytes that the forward pass keeps for the backward pass."""
    key = jax.random.key(1)
    _, back = jax.vjp(lambda x: layer(x, key), jnp.ones(shape))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(back))


def details(cases):
    """What the time of a call does not show: bytes kept for the backward pass, temporary memory, time to compile."""
    for case in cases:
        op, shape = parse(case)
        saved = {name: saved_bytes(layer, shape) for name, layer in layers(op, shape[-1]).items()}
        for name, program, _, seconds in compile_all(case):
            yield {
                "shape": case,
                "program": name,
                "kept for backward": saved.get(name.removesuffix(" gradient")) if "gradient" in name else None,
                "temporary bytes": program.memory_analysis().temp_size_in_bytes,
                "compile seconds": seconds,
            }


def check(dtype):
    """Raises if a result is wrong.  Yields what was found right."""
    x, dy = jax.random.normal(jax.random.key(0), (2, 1000, 37))
    key = jax.random.key(1)
    functions = layers("dropout", None)

    def values(name):
        y, back = jax.jit(lambda x: jax.vjp(lambda x: functions[name](x, key), x))(x)
        return np.stack([y, jax.jit(back)(dy)[0]])

    assert (values("pyreg") == values("Flax")).all()
    yield "dropout and its gradient are Flax's, bit for bit"
    functions = layers("batch_norm", 37)
    np.testing.assert_allclose(values("pyreg"), values("Flax"), rtol=1e-4, atol=1e-5)
    yield "batch-norm and its gradient equal Flax's"
