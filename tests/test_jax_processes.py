"""Several JAX processes: masks are those of one, and the example trains as one process does."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pyreg

pytest.importorskip("jax")

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed.py"
ENV = {**{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}, "JAX_PLATFORMS": "cpu"}

PROGRAM = """
import hashlib, json, sys
import jax
port, process = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import pyreg.jax

mesh = Mesh(np.array(jax.devices()), ("i",))
x = np.random.default_rng(0).standard_normal((6, 8, 10)).astype(np.float32)
digests = {}
for spec in ("i", None, None), (None, "i", None), (None, None, "i"):
    shards = jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda at: x[at])
    for impl in "auto", "philox":
        y = jax.jit(lambda x: pyreg.jax.dropout(x, 0.3, key=jax.random.key(5), impl=impl))(shards)
        (shard,) = y.addressable_shards
        assert shard.data.size == x.size // 2
        digests[f"{spec} {impl}"] = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
far = (1e7 * np.arange(1, 9) + 9 * np.random.default_rng(1).standard_normal((64, 8))).astype(np.float32)
shards = jax.make_array_from_callback(far.shape, NamedSharding(mesh, PartitionSpec("i")), lambda at: far[at])
y, mean, var = jax.jit(pyreg.jax.batch_norm)(shards)
wide = far.astype(np.float64)
want = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
(shard,) = y.addressable_shards
digests["var"] = float(np.abs(np.asarray(var.addressable_data(0)) / wide.var(0) - 1).max())
off = np.abs(np.asarray(shard.data) - want[shard.index]).max()
digests["ulps of y"] = float(off / np.spacing(np.float32(want.max())))
print(json.dumps(digests))
"""


def run_two(program):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-P", "-c", program, str(port)]
    children = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=ENV, cwd=Path.home())
        for i in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=180)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_masks_and_statistics():
    import jax

    x = np.random.default_rng(0).standard_normal((6, 8, 10)).astype(np.float32)
    words = np.asarray(jax.random.key_data(jax.random.key(5)))
    digests = run_two(PROGRAM)
    for d in digests:
        assert d["var"] < 4e-7
        assert d["ulps of y"] < 4
    for dim in range(3):
        spec = tuple("i" if d == dim else None for d in range(3))
        for name, impl in ("auto", "threefry"), ("philox", "philox"):
            halves = np.split(pyreg.dropout(x, 0.3, key=words, impl=impl), 2, axis=dim)
            want = [hashlib.sha256(half.tobytes()).hexdigest() for half in halves]
            assert [d[f"{spec} {name}"] for d in digests] == want


def test_example():
    command = [sys.executable, "-P", EXAMPLE, "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV, check=True)
    assert "2 processes" in done.stdout
    assert len(done.stdout.splitlines()) == 5


THREADS = """
import os, sys
import jax, numpy as np
import pyreg.jax

def threads():
    return len(os.listdir("/proc/self/task"))

x = jax.numpy.ones(1 << 22)
f = jax.jit(lambda x: pyreg.jax.dropout(x, 0.1, key=jax.random.key(0), impl="philox"))
g = jax.jit(lambda x: x * 2)
jax.block_until_ready(g(x))
before = threads()
y = [np.asarray(f(x)) for _ in range(10)]
print(threads() - before, all((a == y[0]).all() for a in y))
print((y[0] == pyreg.dropout(np.asarray(x), 0.1, key=np.asarray(jax.random.key_data(jax.random.key(0))))).all())
"""


def run_with(threads):
    env = {**ENV, "PYREG_JAX_THREADS": threads}
    command = [sys.executable, "-P", "-c", THREADS]
    return subprocess.run(command, env=env, cwd=Path.home(), capture_output=True, text=True)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs")
def test_xla_has_no_more_threads_than_without_pyreg():
    for threads, more in (("", 0), ("xla", 0), ("pyreg", 1)):
        result = run_with(threads)
        assert result.returncode == 0, result.stderr
        grown, same, right = result.stdout.split()
        assert (same, right) == ("True", "True")
        assert int(grown) >= more if more else int(grown) == 0, (threads, result.stdout)


def test_a_wrong_name_of_threads_is_refused():
    result = run_with("mine")
    assert result.returncode == 1
    assert "PYREG_JAX_THREADS is 'mine'; wanted xla or pyreg" in result.stderr
