"""Names that the tests of pyreg.jax share.  Tests that import it are skipped where JAX or Flax is missing."""

import itertools
import os
import warnings

import numpy as np
import pytest
from common import FUSION, bits, python, xla_flags

jax = pytest.importorskip("jax")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages, while they are imported
    nnx = pytest.importorskip("flax.nnx")
from jax.test_util import check_grads  # noqa: E402, F401

import pyreg.jax  # noqa: E402

NamedSharding, PartitionSpec = jax.sharding.NamedSharding, jax.sharding.PartitionSpec
EXPORTABLE = [jax.export.DisabledSafetyCheck.custom_call(name) for name in pyreg.jax.ffi_targets()]
CHECKPOINTS = {  # options of jax.checkpoint
    "": {},
    " of everything": {"policy": jax.checkpoint_policies.everything_saveable},
    " of nothing": {"policy": jax.checkpoint_policies.nothing_saveable},
    " of products": {"policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable},
    " kept whole": {"prevent_cse": False},
}
INPUTS = {  # that dropout of each framework takes or refuses in its own way
    "integers": jax.numpy.ones((4, 5), jax.numpy.int32),
    "complex": jax.numpy.ones((4, 5), jax.numpy.complex64),
    "NumPy": np.ones((4, 5), np.float32),
    "weak": jax.numpy.full((4, 5), 1.0),
    "scalar": jax.numpy.float32(1),
    "empty": jax.numpy.ones((4, 0, 5)),
    "number": 1.0,
}


# Compiler options with which XLA fuses loops as it does for users, and does not optimise what is in them.
FUSED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if f"--{FUSION}=false" in os.environ.get("XLA_FLAGS", ""):  # by conftest.py, where XLA knows that
    FUSED[FUSION] = True


def has_key_impl(name):
    try:
        jax.random.key(0, impl=name)
    except ValueError:
        return False
    return True


KEY_IMPLS = ["threefry2x32", "rbg", "unsafe_rbg", "threefry4x32", "philox2x32", "philox4x32"]  # the last from JAX 0.10
KEY_IMPLS = [name for name in KEY_IMPLS if has_key_impl(name)]


def flax_dropout(rate, dims=()):
    """Flax's Dropout as a function of x and a key."""
    layer = nnx.Dropout(rate, broadcast_dims=dims, deterministic=False)
    return lambda x, key: layer(x, rngs=key)


def eagerly(dropout, **options):
    """A framework's dropout to be called outside jit, where XLA of JAX 0.9 would divide by 1 - rate."""
    return jax.jit(dropout, **options) if jax.__version_info__ < (0, 10) else dropout


def eager_flax_dropout(rate, dims=()):
    return eagerly(flax_dropout(rate, dims))


def assert_same(got, want):
    """Two trees of arrays are equal in every bit, in shape and in dtype."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(bits(a), bits(b))


# ---- Several devices, which are four parts of the CPU ----------------------------------------------------------------


def auto_mesh():
    """XLA chooses shardings."""
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def explicit_mesh():
    """Shardings are part of a type."""
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)


def meshes():
    return auto_mesh(), explicit_mesh()


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def placements():
    """Every way to cut three dims along two mesh axes."""
    for where in itertools.product((None, 0, 1, 2), repeat=2):
        for order in ("ab", "ba") if where[0] == where[1] is not None else ("ab",):
            yield [tuple(a for a in order if where["ab".index(a)] == d) or None for d in range(3)]


FEW_PLACEMENTS = (("a", "b", None), (("b", "a"), None, None), (None, ("a", "b"), None), ("b", None, "a"))


def run_cases(module, names, devices=4, before=""):
    """Calls some of a test module's CASES in a process of their own: XLA is told of devices before it starts."""
    code = f"""{before}
import warnings
from {module} import CASES
warnings.simplefilter("error")
for name in {names}:
    CASES[name]()
"""
    python(code, warnings="ignore", timeout=300, XLA_FLAGS=xla_flags(devices))


def outcome(f, *args):
    """What a function returns, or its error as text."""
    try:
        return f(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def assert_alike(f, families):
    """A function of Flax's family of layers or ours returns the same."""
    theirs, ours = families
    assert_same(f(ours), f(theirs))


def assert_alike_or_wrong(f, families):
    """A function of Flax's family of layers or ours returns the same, or complains the same."""
    theirs, ours = (outcome(f, family) for family in families)
    if isinstance(theirs, str) or isinstance(ours, str):
        assert ours == theirs
    else:
        assert_same(ours, theirs)


def ulps(y, want):
    """The largest error, in units in the last place of the largest value in float32."""
    y, want = np.asarray(y, np.float64), np.asarray(want, np.float64)
    return np.abs(y - want).max() / np.spacing(np.abs(want).max().astype(np.float32))
