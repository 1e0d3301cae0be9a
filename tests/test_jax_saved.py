"""Programs that outlive their process: the persistent compilation cache, export, compiled programs in files."""

import json

import numpy as np
import pytest
from common import python
from jaxcommon import EXPORTABLE, assert_same, jax

import pyreg.jax
from pyreg.jax import _backend

jnp = jax.numpy

# ---- The persistent compilation cache --------------------------------------------------------------------------------

# Each differs from the first of its op in one thing that only a parameter says.
PROGRAM = """
import json, sys
import jax, numpy as np, pyreg.jax
jnp = jax.numpy
key, x = jax.random.key(0), np.random.default_rng(0).standard_normal((64, 16)).astype("f4")
drop, norm = pyreg.jax.dropout, pyreg.jax.batch_norm
programs = {
    "dropout": lambda x: drop(x, 0.1, key=key),
    "rate": lambda x: drop(x, 0.9, key=key),
    "impl": lambda x: drop(x, 0.1, key=key, impl="philox"),
    "broadcast_dims": lambda x: drop(x, 0.1, key=key, broadcast_dims=1),
    "batch_norm": lambda x: norm(x)[0],
    "epsilon": lambda x: norm(x, epsilon=0.5)[0],
    "activation": lambda x: norm(x, activation="relu")[0],
    "axis": lambda x: norm(x, axis=0)[0],
}
hits = []
jax.monitoring.register_event_listener(lambda e, **_: hits.append(e) if e.endswith("/cache_hits") else None)
shards = jax.device_put(x, jax.NamedSharding(jax.make_mesh((2,), ("d",)), jax.P("d")))
found, right = {}, {}
for name in sys.argv[1:]:
    want = programs[name](x)
    hits.clear()
    got = jax.jit(lambda x: programs[name](x))(shards)
    found[name] = bool(hits)
    right[name] = bool(np.allclose(got, want, atol=1e-5))
print(json.dumps([found, right]))
"""


@pytest.mark.parametrize("removed", ["0", "1"])
def test_persistent_cache(tmp_path, removed):
    """Another process finds the programs that are the same ones, and no others."""

    def run(*names):
        environ = {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
            "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": removed,
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        program = f"import sys; sys.argv = ['', *{names!r}]\n{PROGRAM}"
        return json.loads(python(program, warnings="ignore", timeout=120, **environ).splitlines()[-1])

    found, right = run("dropout", "batch_norm")
    assert all(right.values())
    assert not any(found.values())
    others = ("rate", "impl", "broadcast_dims", "epsilon", "activation", "axis")
    found, right = run(*others, "dropout", "batch_norm")
    assert all(right.values())
    assert found == {**dict.fromkeys(others, False), "dropout": True, "batch_norm": True}


# ---- Export ----------------------------------------------------------------------------------------------------------


def both(x):
    y = pyreg.jax.dropout(x * 2, 0.25, key=jax.random.key(1))
    return pyreg.jax.batch_norm(y.reshape(8, -1), activation="relu")[0]


def test_two_platforms():
    x = jnp.arange(40.0)
    exported = jax.export.export(jax.jit(both), platforms=("cpu", "cuda"), disabled_checks=EXPORTABLE)(x)
    assert "pyreg_dropout_v2" in str(exported.mlir_module())
    assert_same(exported.call(x), jax.jit(both)(x))
    other = jax.export.export(jax.jit(both), platforms=("cuda",), disabled_checks=EXPORTABLE)(x)
    assert "pyreg_dropout_v2" not in str(other.mlir_module())


def test_in_a_fresh_process(tmp_path):
    """`import pyreg.jax` is enough to run what another process exported or compiled."""
    x = jnp.arange(40.0)
    want = np.asarray(jax.jit(both)(x))
    (tmp_path / "exported").write_bytes(
        jax.export.export(jax.jit(both), disabled_checks=EXPORTABLE)(x).serialize(vjp_order=1)
    )
    code = f"""
import jax, numpy as np
import pyreg.jax
exported = jax.export.deserialize(bytearray(open({str(tmp_path / "exported")!r}, "rb").read()))
x = jax.numpy.arange(40.0)
print(np.asarray(exported.call(x)).tobytes().hex())
jax.grad(lambda x: exported.call(x).sum())(x)
"""
    assert python(code, warnings="ignore") == want.tobytes().hex()


def test_first_version():
    """Programs that were exported when the rate and epsilon were attributes give what they gave."""
    x, words = jnp.linspace(-1, 1, 600).reshape(20, 30), jax.random.key_data(jax.random.key(2))
    pyreg.jax.register()
    window = jnp.asarray([[0, 0], [20, 30]], jnp.int32)
    call = jax.ffi.ffi_call("pyreg_dropout_v1", [jax.typeof(x)])
    want = pyreg.jax.dropout(x, 0.3, key=words)
    assert_same(call(x, words, window, generator=1, rate=0.3)[0], want)
    call = jax.ffi.ffi_call("pyreg_dropout_mask_v1", [jax.ShapeDtypeStruct((75,), jnp.uint8)])
    bits = call(words, window, generator=1, rate=0.3)[0]
    call = jax.ffi.ffi_call("pyreg_dropout_packed_v1", [jax.typeof(x)])
    assert_same(call(x, bits, window, rate=0.3)[0], want)
    scale, none = jnp.ones(30), jnp.zeros(0)
    results = [jax.typeof(x), jax.typeof(scale), jax.typeof(scale)]
    call = jax.ffi.ffi_call("pyreg_batch_norm_forward_v1", results)
    y, mean, var = call(x, scale, none, jnp.zeros(0, bool), none, axis=1, epsilon=1e-5, relu=False)
    assert_same([y, mean, var], list(pyreg.jax.batch_norm(x)))
    call = jax.ffi.ffi_call("pyreg_batch_norm_backward_v1", [*results, jax.typeof(none)])
    dx, *_ = call(y, scale * 0, scale * 0, x, mean, var, scale, jnp.zeros(0, bool), none, axis=1, epsilon=1e-5)
    assert_same(dx, jax.vjp(lambda x: pyreg.jax.batch_norm(x)[0], x)[1](y)[0])


# ---- Registration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    """The names that XLA is told of, as if it had not been told of any."""
    names = []
    monkeypatch.setattr(_backend, "_registered", False)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda name, *args, **options: names.append(name))
    return names


def test_register(registered):
    pyreg.jax.register()
    assert registered == pyreg.jax.ffi_targets()
    pyreg.jax.register()
    assert registered == pyreg.jax.ffi_targets()


def test_register_that_is_refused(registered, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("no such version\nand more")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    with pytest.raises(RuntimeError, match=r"cannot run here, because XLA refused its handler \(no such version\)"):
        pyreg.jax.register()


@pytest.mark.parametrize(
    ("ours", "theirs", "safe"),
    [
        ((0, 1), (0, 3), True),
        ((0, 3), (0, 3), True),
        ((0, 4), (0, 3), False),
        ((0, 1), (1, 3), False),
        ((0, 1), None, False),
    ],
)
def test_import_registers_where_it_is_safe(registered, monkeypatch, ours, theirs, safe):
    monkeypatch.setattr(_backend._core, "ffi_api", lambda: ours)
    monkeypatch.setattr(_backend, "_api_of_xla", lambda: theirs)
    _backend.register_if_safe()
    assert bool(registered) == safe


def test_the_version_is_in_xlas_header():
    api = _backend._api_of_xla()
    assert api is not None
    assert api >= (0, 2)


def test_a_refused_handler_breaks_nothing():
    """Even if XLA refuses while pyreg.jax is imported, JAX starts."""
    code = """
import jax
def refuse(*args, **options):
    raise ValueError("no such version")
jax.ffi.register_ffi_target = refuse
import pyreg.jax
print(float(jax.numpy.ones(3).sum()))
"""
    assert python(code, warnings="ignore") == "3.0"
