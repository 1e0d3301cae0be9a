"""pyreg.jax.dropout on several devices, which are four parts of the CPU, and on one core."""

import itertools
import os
import re
import sys
import warnings

import numpy as np
import pytest
from common import in_threads, normal
from jaxcommon import (
    FEW_PLACEMENTS,
    NamedSharding,
    assert_same,
    auto_mesh,
    explicit_mesh,
    flax_dropout,
    jax,
    meshes,
    placements,
    put,
    run_cases,
)
from jaxcommon import PartitionSpec as P

import pyreg
import pyreg.jax

jnp, lax = jax.numpy, jax.lax
SHAPE = (4, 8, 12)
RATE = 0.75  # the scale is 4: with small integers, sums are exact in any order
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def dropout(dims=(), impl="auto"):
    return lambda x, key: pyreg.jax.dropout(x, RATE, key=key, broadcast_dims=dims, impl=impl)


def integers(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32))


def value_and_grad(d):
    def f(x, key):
        y, vjp = jax.vjp(lambda x: d(x, key), x)
        return y, vjp(y * y)[0]

    return f


def run(f, *args):
    """What f gives without moving data between devices."""
    compiled = jax.jit(f).lower(*args).compile()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", compiled.as_text())
    return compiled(*args)


def everywhere(f, x, keys, spec, key_spec=(), on=None):
    """f gives on each mesh what it gives on one device, and the result stays where x is."""
    want = f(x, keys)
    for mesh in on or meshes():
        args = put(x, mesh, *spec), put(keys, mesh, *key_spec)
        got = run(f, *args)
        assert_same(got, want)
        for leaf in jax.tree.leaves(got):
            assert leaf.shape != x.shape or leaf.sharding.is_equivalent_to(args[0].sharding, x.ndim), (
                spec,
                leaf.sharding,
            )


# ---- Partitioned by XLA ----------------------------------------------------------------------------------------------


def layouts(dims, impl, specs, on=None):
    x, key = integers(), jax.random.key(3)
    f = value_and_grad(dropout(dims, impl))
    if impl == "auto":
        assert_same(f(x, key), value_and_grad(flax_dropout(RATE, dims))(x, key))
    for spec in specs:
        everywhere(f, x, key, spec, on=on)


@case
def layouts_auto():
    layouts((), "auto", placements(), [auto_mesh()])
    layouts((), "auto", FEW_PLACEMENTS, [explicit_mesh()])


@case
def layouts_philox():
    layouts((1,), "philox", FEW_PLACEMENTS)


@case
def every_layout():
    for dims, impl in (((), "auto"), ((1,), "philox")):
        layouts(dims, impl, placements())


@case
def broadcast_dims():
    x, key = integers(), jax.random.key(3)
    for dims, impl in [(0, "auto"), ((0, 2), "philox"), (-1, "auto"), ((0, 1, 2), "philox")]:
        for spec in ((("a", "b"), None, None), (None, "b", "a")):
            everywhere(dropout(dims, impl), x, key, spec, on=[auto_mesh()])


@case
def dtypes():
    for dtype in (np.float16, jnp.bfloat16, np.float64):
        with jax.enable_x64(dtype == np.float64):  # of this thread, and XLA has others
            x = jnp.asarray(normal(SHAPE, dtype))
            everywhere(value_and_grad(dropout()), x, jax.random.key(3), ("b", None, "a"))


@case
def keys_of_other_kinds():
    """The mask is drawn by jax.random, which may move bits between devices but not change them."""
    x = integers()
    for mesh, impl in itertools.product(meshes(), ("rbg", "unsafe_rbg")):
        key = jax.random.key(3, impl=impl)
        got = jax.jit(dropout(impl="philox"))(put(x, mesh, "a", "b"), put(key, mesh))
        assert_same(got, dropout(impl="philox")(x, key))
    mesh, key = auto_mesh(), jax.random.key(3)
    with jax.threefry_partitionable(False):
        assert_same(jax.jit(dropout())(put(x, mesh, "a", "b"), put(key, mesh)), flax_dropout(RATE)(x, key))


@case
def one_dim_and_none():
    key = jax.random.key(3)
    for spec in (("a",), (("a", "b"),), (None,), (("b", "a"),)):
        everywhere(value_and_grad(dropout()), integers(8), key, spec)
    everywhere(dropout(), integers(()), key, ())


@case
def uneven_parts():
    """Within a program XLA also cuts what cannot be cut evenly."""
    x, key, mesh = integers((5, 7)), jax.random.key(3), auto_mesh()
    specs = itertools.cycle([P("a", "b"), P(None, ("a", "b")), P(("b", "a"))])
    for dims, impl in itertools.product([(), 0, 1], ["auto", "philox"]):
        d, cut = dropout(dims, impl), NamedSharding(mesh, next(specs))

        def f(x, key):
            y = d(lax.with_sharding_constraint(x + 1, cut), key)  # noqa: B023
            return lax.with_sharding_constraint(y, cut) + 1  # noqa: B023

        assert_same(jax.jit(f)(x, key), d(x + 1, key) + 1)


@case
def vmap():
    x, keys = integers(), jax.random.split(jax.random.key(3), 4)
    d = dropout(impl="philox")
    for spec in (("a", "b"), (("a", "b"),), ("b", None, "a"), (None, "a", "b")):
        everywhere(jax.vmap(value_and_grad(d)), x, keys, spec, spec[:1])  # keys are cut as x is: JAX wants it
        everywhere(jax.vmap(d, (0, None)), x, keys[0], spec, on=[auto_mesh()])
    mesh, d = auto_mesh(), jax.vmap(dropout())
    assert_same(run(d, put(x, mesh, "a", "b"), put(keys, mesh)), d(x, keys))  # keys that every device has
    keys, d = jax.random.split(jax.random.key(3), 8), jax.vmap(dropout(), (1, 0), 1)
    assert_same(run(d, put(x, mesh, "a", "b"), put(keys, mesh)), d(x, keys))


@case
def scan():
    def f(x, keys):
        return lax.scan(lambda x, key: (dropout()(x, key) + 1, None), x, keys)[0]

    keys = jax.random.split(jax.random.key(3), 3)
    for spec in (("a", "b"), (None, None, ("a", "b"))):
        everywhere(f, integers(), keys, spec)
        everywhere(lambda x, keys: jax.vjp(lambda x: f(x, keys), x)[1](x)[0], integers(), keys, spec)


@case
def donation():
    want = dropout()(integers(), jax.random.key(3))
    for mesh in meshes():
        x, key = put(integers(), mesh, "a", None, "b"), put(jax.random.key(3), mesh)
        compiled = jax.jit(dropout(), donate_argnums=0).lower(x, key).compile()
        assert "input_output_alias" in compiled.as_text()
        assert_same(compiled(x, key), want)
        assert x.is_deleted()


@case
def training_step():
    """Gradients are summed over devices; the mask is that of the whole batch."""
    mesh, key = auto_mesh(), jax.random.key(3)
    x, w = integers((8, 6)), integers((6, 4), seed=1)

    def loss(w, x, key, d):
        return (d(x @ w, key) ** 2).sum()

    want = jax.grad(loss)(w, x, key, flax_dropout(RATE))
    f = jax.jit(jax.grad(lambda w, x, key: loss(w, x, key, dropout())))
    assert_same(f(put(w, mesh, None, "b"), put(x, mesh, "a"), put(key, mesh)), want)


# ---- Partitioned by hand ---------------------------------------------------------------------------------------------


@case
def shard_map_of_x():
    """Each part is an array of its own, with a mask of its own."""
    x, key = integers(), jax.random.key(3)
    d = value_and_grad(dropout())
    rows = [[d(part, key) for part in np.split(row, 2, 1)] for row in np.split(np.asarray(x), 2)]
    rows = [jax.tree.map(lambda *parts: np.concatenate(parts, 1), *row) for row in rows]
    want = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    for mesh in meshes():
        f = jax.shard_map(d, mesh=mesh, in_specs=(P("a", "b"), P()), out_specs=P("a", "b"))
        assert_same(jax.jit(f)(put(x, mesh, "a", "b"), put(key, mesh)), want)


@case
def shard_map_of_keys():
    """Each device drops others of the same elements; the gradient is the sum of theirs."""
    x, keys = integers(), jax.random.split(jax.random.key(3), 4)
    values = jnp.stack([flax_dropout(RATE)(x, key) for key in keys])
    gradient = sum(jax.grad(lambda x: (flax_dropout(RATE)(x, key) ** 2).sum())(x) for key in keys)  # noqa: B023
    for mesh in meshes():
        f = jax.shard_map(
            lambda x, keys: dropout()(x, keys[0])[None],
            mesh=mesh,
            in_specs=(P(), P(("a", "b"))),
            out_specs=P(("a", "b")),
        )
        args = put(x, mesh), put(keys, mesh, ("a", "b"))
        assert_same(jax.jit(f)(*args), values)
        assert_same(jax.jit(jax.grad(lambda x, keys: (f(x, keys) ** 2).sum()))(*args), gradient)  # noqa: B023

        def inner(x, keys):
            return lax.psum((dropout()(x, keys[0]) ** 2).sum(), ("a", "b"))

        f = jax.shard_map(inner, mesh=mesh, in_specs=(P(), P(("a", "b"))), out_specs=P())
        assert_same(jax.jit(jax.grad(f))(*args), gradient)


@case
def shard_map_of_some_axes():
    """By hand along a, by XLA along b."""
    x, keys = integers(), jax.random.split(jax.random.key(3), 2)
    d = value_and_grad(dropout())
    want = jax.tree.map(lambda *parts: jnp.concatenate(parts), *[d(x[2 * i : 2 * i + 2], keys[i]) for i in range(2)])
    mesh = auto_mesh()
    f = jax.shard_map(
        lambda x, keys: d(x, keys[0]), mesh=mesh, in_specs=(P("a"), P("a")), out_specs=P("a"), axis_names={"a"}
    )
    assert_same(jax.jit(f)(put(x, mesh, "a", "b"), put(keys, mesh, "a")), want)


@case
def pmap():
    if not hasattr(jax, "pmap"):
        return
    x, keys = integers(), jax.random.split(jax.random.key(3), 4)
    d = value_and_grad(dropout())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert_same(jax.pmap(d)(x, keys), jax.vmap(d)(x, keys))


# ---- Progress --------------------------------------------------------------------------------------------------------

LARGE = (1000, 1000)  # several threads of pyreg's


@case
def in_flight():
    """Many calls are queued, none is waited for."""
    x, key = integers(LARGE), jax.random.key(3)
    f = jax.jit(dropout(impl="philox"))
    want = np.asarray(f(x, key))
    for y in [f(x, key) for _ in range(50)]:
        np.testing.assert_array_equal(y, want)

    def chain(x, keys):
        return [dropout(impl="philox")(x, key) for key in keys]  # may run at the same time

    keys = jax.random.split(key, 8)
    for y, key in zip(jax.jit(chain)(x, keys), keys, strict=True):
        np.testing.assert_array_equal(y, f(x, key))


@case
def python_threads():
    """Several programs at once, NumPy's function among them."""
    x, key = integers(LARGE), jax.random.key(3)
    functions = [jax.jit(dropout(impl=impl)) for impl in ("auto", "philox")]
    functions.append(lambda x, key: pyreg.dropout(np.asarray(x), RATE, key=np.asarray(jax.random.key_data(key))))
    want = [np.asarray(f(x, key)) for f in functions]

    def work(i):
        for _ in range(5):
            np.testing.assert_array_equal(functions[i % 3](x, key), want[i % 3])

    in_threads(work, 6)


@case
def fork_after_use():
    """A child of a process that has used JAX cannot use JAX, but pyreg's NumPy functions."""
    x, key = integers(LARGE), jax.random.key(3)
    want = np.asarray(jax.jit(dropout(impl="philox"))(x, key))
    x, key = np.asarray(x), np.asarray(jax.random.key_data(key))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's own, of forks
        child = os.fork()
    if child == 0:
        os._exit(0 if (pyreg.dropout(x, RATE, key=key) == want).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- In processes ----------------------------------------------------------------------------------------------------


IN_FLIGHT = ["in_flight", "python_threads", "fork_after_use"]
BY_HAND = [name for name in CASES if name.startswith("shard_map") or name == "pmap"]
BY_XLA = [name for name in CASES if name not in [*BY_HAND, *IN_FLIGHT, "every_layout"]]
PIN = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"


@pytest.mark.parametrize("names", [BY_XLA, BY_HAND], ids=["by XLA", "by hand"])
def test_devices(names):
    run_cases("test_jax_devices", names)


@pytest.mark.slow
def test_every_layout():
    run_cases("test_jax_devices", ["every_layout"])


@pytest.mark.skipif(sys.platform != "linux", reason="affinity and fork are Linux's")
@pytest.mark.parametrize("before", ["", PIN], ids=["all cores", "one core"])
def test_progress(before):
    run_cases("test_jax_devices", IN_FLIGHT, devices=1, before=before)
