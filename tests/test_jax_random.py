"""accelerate_random changes how fast jax.random is on CPUs, and not one bit."""

import copy
import os
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from common import in_threads, same, xla_flags

jax = pytest.importorskip("jax")
jnp, random = jax.numpy, jax.random
mlir = pytest.importorskip("jax.interpreters.mlir")
threefry2x32_p = pytest.importorskip("jax.extend.random").threefry2x32_p

import pyreg.jax  # noqa: E402
from pyreg.jax import _random  # noqa: E402

KEY = random.key(7)


def arrays(tree):
    """The leaves as NumPy arrays; those of a key are its words."""
    words = (random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree))
    return [np.asarray(x) for x in words]


def check_same(draw):
    want = arrays(jax.jit(draw)(KEY))
    with pyreg.jax.accelerate_random():
        got = arrays(jax.jit(draw)(KEY))
    assert all(map(same, got, want))


def loops(draw=random.uniform):
    """Whether draw compiles to a loop, as JAX's own lowering does."""
    return " while(" in jax.jit(draw).lower(KEY).compile().as_text()


# ---- The bits --------------------------------------------------------------------------------------------------------

DRAWS = {
    "bits": lambda k: [random.bits(k, (3, 5), f"uint{n}") for n in (8, 16, 32)],
    "uniform": lambda k: [random.uniform(k, (65,), t) for t in ("float32", "float16", "bfloat16")],
    "normal": lambda k: random.normal(k, (3, 7)),
    "bernoulli": lambda k: random.bernoulli(k, 0.3, (101,)),
    "randint": lambda k: random.randint(k, (33,), -5, 1000),
    "permutation": lambda k: random.permutation(k, 1001),
    "choice": lambda k: random.choice(k, jnp.arange(9.0), (4,), p=jnp.linspace(0, 1, 9)),
    "categorical": lambda k: random.categorical(k, jnp.zeros((3, 50))),
    "gamma": lambda k: random.gamma(k, 2.5, (5,)),
    "truncated_normal": lambda k: random.truncated_normal(k, -1, 2, (17,)),
    "split": lambda k: [random.split(k, n) for n in (1, 2, 5)],
    "fold_in": lambda k: random.fold_in(k, 12345),
    "raw key": lambda k: random.uniform(random.PRNGKey(3), (9,)),
    "sizes": lambda k: [random.bits(k, shape) for shape in ((), (1,), (0, 3), (2, 1, 3), (4097,))],
    "vmap over keys": lambda k: jax.vmap(lambda k: random.uniform(k, (3,)))(random.split(k, 5)),
    "vmap of split": lambda k: jax.vmap(jax.vmap(random.split))(random.split(k, (2, 3))),
    "scan": lambda k: jax.lax.scan(lambda k, _: (random.split(k)[0], random.normal(k, (3,))), k, length=4),
    "operands that broadcast": lambda k: threefry2x32_p.bind(*random.bits(k, (2, 3, 1)), *random.bits(k, (2, 1, 4))),
}


@pytest.mark.parametrize("name", DRAWS)
def test_same_bits(name):
    check_same(DRAWS[name])


@pytest.fixture
def config():
    """A function that sets an option of JAX until the test ends."""
    before = {}

    def update(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield update
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(("x64", "partitionable"), [(True, True), (True, False), (False, False)])
def test_modes(config, x64, partitionable):
    config("jax_enable_x64", x64)
    config("jax_threefry_partitionable", partitionable)
    widths = [8, 16, 32] + [64] * x64
    check_same(lambda k: [random.bits(k, (7,), f"uint{n}") for n in widths])
    check_same(lambda k: [random.normal(k, (5,)), random.split(k, 3), random.fold_in(k, 2)])


def test_known_answers():
    rows = [  # of Random123: two words of the key, of the counter, of the result
        (0x00000000, 0x00000000, 0x00000000, 0x00000000, 0x6B200159, 0x99BA4EFE),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0x1CB996FC, 0xBB002BE7),
        (0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3, 0xC4923A9C, 0x483DF7A0),
    ]
    *words, want0, want1 = np.array(rows, np.uint32).T
    got = jax.jit(_random.threefry2x32)(*words)
    assert (np.array(got) == [want0, want1]).all()


def run(code, **env):
    subprocess.run([sys.executable, "-P", "-W", "error", "-c", code], check=True, env={**os.environ, **env})


def test_sharded():
    run(
        """if True:
        import jax, numpy as np, pyreg.jax
        from jax.sharding import NamedSharding, PartitionSpec as P
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        words, split = np.arange(8, dtype=np.uint32).reshape(4, 2), P(("a", "b"))
        def draw(spec):
            f = jax.jit(lambda k: jax.random.normal(k, (8, 6)), out_shardings=NamedSharding(mesh, spec))
            return np.asarray(f(jax.random.key(1)))
        def draw_shards():
            f = lambda key: jax.random.normal(jax.random.wrap_key_data(key[0]), (1, 5))
            return np.asarray(jax.jit(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split))(words))
        want, shards = draw(P()), draw_shards()
        with pyreg.jax.accelerate_random():
            for spec in (P(), P("a", "b"), P(None, "b"), split):
                assert (draw(spec) == want).all(), spec
            assert (draw_shards() == shards).all()
        """,
        XLA_FLAGS=xla_flags(4),
    )


# ---- The programs ----------------------------------------------------------------------------------------------------


def test_draws_are_not_repeated_along_a_broadcast():
    x = jnp.zeros((40, 50))
    with pyreg.jax.accelerate_random():
        text = jax.jit(lambda k: x + random.uniform(k, (50,))).lower(KEY).compile().as_text()
    loops = [loop for loop in text.split("\n\n") if "f32[40,50]" in loop]
    assert loops
    assert not any("shift-left(" in loop for loop in loops)


def test_lets_go_of_compiled_programs(monkeypatch):
    jitted = jax.jit(lambda k: random.bits(k, (3,)))
    want = arrays([jitted(KEY), random.bits(KEY, (3,)), random.split(KEY)])
    monkeypatch.setattr(_random, "threefry2x32", lambda k0, k1, x0, x1: (x0 * 0 + k0 * 0, x0 * 0 + k0 * 0))
    with pyreg.jax.accelerate_random():
        assert not any(x.any() for x in arrays([jitted(KEY), random.bits(KEY, (3,)), random.split(KEY)]))
    assert all(map(same, arrays([jitted(KEY), random.bits(KEY, (3,)), random.split(KEY)]), want))


# ---- On and off ------------------------------------------------------------------------------------------------------


def test_undo():
    assert loops()
    first = pyreg.jax.accelerate_random()
    assert not loops()
    second = pyreg.jax.accelerate_random()
    first.undo()
    first.undo()
    assert not loops()
    with pyreg.jax.accelerate_random():
        second.undo()
        assert not loops()
    assert loops()


def test_undone_after_an_exception():
    with pytest.raises(KeyError), pyreg.jax.accelerate_random():
        raise KeyError
    assert loops()


def test_keeps_what_others_registered_since():
    rules = mlir._platform_specific_lowerings["cpu"]
    stock = rules[threefry2x32_p]
    try:
        with pyreg.jax.accelerate_random():
            rules[threefry2x32_p] = other = object()
        assert rules[threefry2x32_p] is other
    finally:
        rules[threefry2x32_p] = stock


def test_threads(monkeypatch):
    monkeypatch.setattr(_random, "_clear_caches", lambda: time.sleep(1e-3))  # lets other threads in
    rules = mlir._platform_specific_lowerings["cpu"]
    stock, seen = rules[threefry2x32_p], []

    def work(_):
        for _ in range(10):
            with pyreg.jax.accelerate_random():
                seen.append(rules[threefry2x32_p])

    in_threads(work, 4)
    assert len(seen) == 40
    assert stock not in seen
    assert rules[threefry2x32_p] is stock


@pytest.mark.parametrize("name", ["_platform_specific_lowerings", "lower_fun", "register_lowering", "threefry2x32_p"])
def test_without_the_names(monkeypatch, name):
    monkeypatch.setattr(_random, "_warned", False)
    monkeypatch.delattr(jax.extend.random if name == "threefry2x32_p" else mlir, name)
    with pytest.warns(UserWarning, match=f"does nothing: jax {jax.__version__} lacks .*{name}"):
        handle = pyreg.jax.accelerate_random()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyreg.jax.accelerate_random().undo()
    assert loops()
    handle.undo()


def test_import_changes_nothing():
    run(
        """if True:
        import sys, pyreg
        assert "jax" not in sys.modules
        from jax.interpreters import mlir
        from jax.extend.random import threefry2x32_p
        stock = mlir._platform_specific_lowerings["cpu"][threefry2x32_p]
        import pyreg.jax
        assert mlir._platform_specific_lowerings["cpu"][threefry2x32_p] is stock
        """
    )


def test_copies_of_a_handle():
    """Are one call: JAX's lowering returns once, and the next call works."""
    x, key = jax.random.normal(jax.random.key(1), (8,)), jax.random.key(1)
    handle = pyreg.jax.accelerate_random()
    others = copy.copy(handle), copy.deepcopy(handle)
    assert not loops()
    for h in (*others, handle):
        h.undo()
    assert loops()
    with pyreg.jax.accelerate_random():
        assert not loops()
        np.testing.assert_array_equal(jax.random.normal(key, (8,)), x)
    assert loops()
