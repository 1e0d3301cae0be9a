"""Random stacks of JAX's transforms over pyreg.jax's ops: `python tests/fuzz.py --jax`.

Each case is an op, operands and a stack of transforms, all by its number; the same stack over Flax's Dropout or over
batch-norm as one writes it down in jnp gives the same.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import random

import numpy as np
from common import normal
from jaxcommon import flax_dropout, jax
from test_jax_batchnorm import formula
from test_jax_dropout import keys, masked

import pyreg.jax
from pyreg.jax import _backend

jnp, lax = jax.numpy, jax.lax

# ---- Transforms ------------------------------------------------------------------------------------------------------
# A program is f(x, k): x, a tree, has derivatives, k has none.  A transform makes another of it, and of its arguments.


def weights(tree):
    return jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape).astype(a.dtype), tree)


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


def mean_of(tree):
    """A scalar that is linear in no element."""
    means = ((a.astype(jnp.float32) ** 2 * weights(a)).mean() for a in jax.tree.leaves(tree) if a.size)
    return sum(means, start=jnp.float32(0))


def batched(tree, n, axis):
    """n of each array, all different."""

    def several(a):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jnp.moveaxis(jnp.stack([keys(k, n) for k in a.ravel()], -1).reshape(n, *a.shape), 0, axis)
        if a.dtype == bool:
            return jnp.stack([a] * n, axis)
        return jnp.stack([a * (1 + i / 4) for i in range(n)], axis).astype(a.dtype)

    return jax.tree.map(several, tree)


def vmap(of):
    def transform(r, f, x, k):
        n, x_axis, k_axis, out = r.choice((1, 2, 3)), *(r.choice((0, -1)) for _ in range(3))
        if of == "k" and jax.tree.leaves(k):
            x_axis = None
        if of == "x":
            k_axis = None
        x = x if x_axis is None else batched(x, n, x_axis)
        k = k if k_axis is None else batched(k, n, k_axis)
        return jax.vmap(f, (x_axis, k_axis), out), x, k

    return transform


def of_x(make):
    """make(f of x alone, x) gives the program's result."""
    return lambda r, f, x, k: (lambda x, k: make(lambda x: f(x, k), x), x, k)


def scan(r, f, x, k):
    def program(x, k):
        def step(s, i):
            return add(s, f(jax.tree.map(lambda a: a * i.astype(a.dtype), x), k)), None

        return lax.scan(step, f(x, k), jnp.arange(2))[0]

    return program, x, k


def cond(r, f, x, k):
    yes = r.random() < 0.7

    def program(x, k):
        shapes = jax.eval_shape(f, x, k)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        some = jax.tree.leaves(x)[0].sum()
        return lax.cond((some == some) == yes, f, lambda *_: zeros, x, k)

    return program, x, k


TRANSFORMS = {
    "jit": lambda r, f, x, k: (jax.jit(f), x, k),
    "vmap x": vmap("x"),
    "vmap k": vmap("k"),
    "vmap both": vmap("xk"),
    "grad": of_x(lambda f, x: jax.grad(lambda x: mean_of(f(x)))(x)),
    "value_and_grad": of_x(lambda f, x: jax.value_and_grad(lambda x: mean_of(f(x)))(x)),
    "jvp": of_x(lambda f, x: jax.jvp(f, (x,), (weights(x),))),
    "vjp": of_x(lambda f, x: (lambda y, back: (y, back(weights(y))[0]))(*jax.vjp(f, x))),
    "linearize": of_x(lambda f, x: jax.linearize(f, x)[1](weights(x))),
    "checkpoint": lambda r, f, x, k: (jax.checkpoint(f), x, k),
    "scan": scan,
    "cond": cond,
}

# ---- Ops -------------------------------------------------------------------------------------------------------------


def some_shape(r, least=0):
    return tuple(r.choice((0, 1, 2, 3, 3, 4, 5)) for _ in range(r.randint(least, 3)))


def dropout(r, dtype):
    """pyreg's program, another, and x and k."""
    shape = some_shape(r)
    rate = r.choice((0.5, 0.25, 0.1, 0.9))
    dims = tuple(d - len(shape) if r.random() < 0.5 else d for d in range(len(shape)) if r.random() < 0.25)
    impl = "philox" if r.random() < 0.3 else "auto"
    key = jax.random.key(r.randrange(2**31), impl=r.choice(("threefry2x32", "threefry2x32", "rbg")))
    if impl == "philox":
        key = jax.random.key(r.randrange(2**31))
    same = masked(rate, dims) if impl == "philox" else flax_dropout(rate, dims)
    x = jnp.asarray(normal(shape, dtype, r.randrange(99)))
    return (lambda x, k: pyreg.jax.dropout(x, rate, key=k, broadcast_dims=dims, impl=impl), same, (x, key))


def batch_norm(r, dtype):
    shape = tuple(n or 2 for n in some_shape(r, least=1))
    axis = r.randrange(-len(shape), len(shape))
    channels = shape[axis]
    options = {"axis": axis, "epsilon": r.choice((1e-2, 1.0)), "activation": r.choice((None, "relu"))}
    seed = r.randrange(99)
    x = {"x": jnp.asarray(normal(shape, dtype, seed))}
    of = np.float64 if dtype == np.float64 else np.float32
    for i, name in enumerate(("scale", "bias")):
        if r.random() < 0.7:
            x[name] = jnp.asarray(normal(channels, of, seed + i + 1))
    if r.random() < 0.4:
        x["residual"] = jnp.asarray(normal(shape, dtype, seed + 3))
    k = {}
    if r.random() < 0.4:
        mask = np.random.default_rng(seed).random(shape) < 0.7
        np.moveaxis(mask, axis, 0)[(slice(None), *[0] * (len(shape) - 1))] = True
        k["mask"] = jnp.asarray(mask)
    return (lambda x, k: pyreg.jax.batch_norm(**x, **k, **options), lambda x, k: formula(**x, **k, **options), (x, k))


# ---- Cases -----------------------------------------------------------------------------------------------------------

TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "float16": 3e-2, "bfloat16": 0.2}


def run_case(number, say=lambda *_: None):
    r = random.Random(number)
    x64 = r.random() < 0.3
    op = r.choice((dropout, batch_norm))
    backend = "jax" if _backend._register() else r.choice(("ffi", "ffi", "jax"))
    names = r.choices(list(TRANSFORMS), k=r.choice((0, 1, 2, 2, 3, 3, 4)))
    dtype = np.dtype(np.float64 if x64 and r.random() < 0.5 else np.float32)
    jax.config.update("jax_enable_x64", x64)
    jax.config.update("jax_disable_most_optimizations", True)
    chosen = _backend._chosen
    _backend._chosen = backend, "by the fuzzer"
    jax.clear_caches()
    try:
        mine, same, (x, k) = op(r, dtype)
        if op is dropout and sum(name in ("vmap k", "vmap both") for name in names) > 1:
            # What rbg draws for a batch of keys is not what it draws for each: the order of batching would show.
            k = k if jax.random.key_impl(k) == "threefry2x32" else jax.random.key(r.randrange(2**31))
        say(op.__name__, "under", names, f"on {backend}, x64: {x64};", jax.tree.map(lambda a: a.aval, (x, k)))
        for name in names:
            state = r.getstate()
            mine, _, _ = TRANSFORMS[name](r, mine, x, k)
            r.setstate(state)
            same, x, k = TRANSFORMS[name](r, same, x, k)
        compare((jax.jit(mine) if r.random() < 0.7 else mine)(x, k), jax.jit(same)(x, k))
    finally:
        _backend._chosen = chosen
        jax.config.update("jax_enable_x64", False)
        jax.config.update("jax_disable_most_optimizations", False)


def compare(got, want):
    """The same trees of arrays of the same shapes, dtypes and, but for rounding, values."""
    assert jax.tree.structure(got) == jax.tree.structure(want), (got, want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.dtype}{a.shape}; wanted {b.dtype}{b.shape}"
        a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
        bound = TOLERANCE[a.dtype.name] * np.abs(b64[np.isfinite(b64)]).max(initial=1e-2)
        ok = (np.abs(a64 - b64) <= bound) | (a64 == b64) | ((a64 != a64) & (b64 != b64))
        assert ok.all(), f"{a64[~ok][0]}; wanted {b64[~ok][0]} within {bound:.2g}"
