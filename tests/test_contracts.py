"""What a call leaves behind: no memory, and nothing at all where memory is refused; forks in any order.

And what the modules of pyreg take from each other.
"""

import ast
import itertools
import pathlib

import numpy as np
import pytest
from common import DTYPES, normal, python, same

import pyreg
from pyreg import _core

# ---- Memory is refused -----------------------------------------------------------------------------------------------

SHAPE = (3000, 40)
CALLS = {  # of x, dy and out
    "dropout": lambda x, dy, out: pyreg.dropout(x, 0.3, key=1, out=out),
    "dropout, columns": lambda x, dy, out: pyreg.dropout(x.T, 0.3, key=1, impl="threefry", out=out.T),
    "dropout, shared": lambda x, dy, out: pyreg.dropout(x, 0.3, key=1, broadcast_dims=1, out=out),
    "batch_norm": lambda x, dy, out: pyreg.batch_norm(x, out=out),
    "batch_norm, masked": lambda x, dy, out: pyreg.batch_norm(x, mask=dy > 0, activation="relu", residual=dy, out=out),
    "batch_norm_inference": lambda x, dy, out: pyreg.batch_norm_inference(x, np.ones(40), np.ones(40), out=out),
    "batch_norm_backward": lambda x, dy, out: pyreg.batch_norm_backward(dy, x, np.ones(40), np.ones(40), out=out),
    "batch_norm_backward, relu": lambda x, dy, out: pyreg.batch_norm_backward(
        dy, x, np.ones(40), np.ones(40), activation="relu", y=dy, out=out
    ),
}


@pytest.fixture
def failing_allocation():
    """A function that lets the n-th allocation from now fail."""
    yield _core.fail_allocation
    _core.fail_allocation(0)


@pytest.fixture
def shared_work(threads):
    """Calls of any size are shared among threads."""
    _core.set_gears(0)
    yield threads
    _core.set_gears()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_each_allocation_that_fails(failing_allocation, shared_work, name, count, dtype):
    shared_work(count)
    x, dy = normal(SHAPE, dtype), normal(SHAPE, dtype, 1)
    want = CALLS[name](x, dy, np.empty_like(x))
    want = want if isinstance(want, tuple) else (want,)
    before, failed = (x.copy(), dy.copy()), 0
    for n in itertools.count(1):
        out = np.full_like(x, 7)
        failing_allocation(n)
        try:
            got = CALLS[name](x, dy, out)
        except MemoryError:
            failed += 1
            assert (out == 7).all()
        else:
            break
        finally:
            failing_allocation(0)
    assert failed >= name.startswith("batch_norm")
    assert same(x, before[0])
    assert same(dy, before[1])
    for a, b in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
        assert same(a, b)


# ---- Leaks -----------------------------------------------------------------------------------------------------------

SMALL_CALLS = """
import gc, sys, numpy as np, ml_dtypes, pyreg
from pyreg import _core
rounds = {rounds}
x, dy, key = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), np.array([1, 2], np.uint32)
half, odd = x.astype(ml_dtypes.bfloat16), x.astype(">f4")
mean, mask = np.zeros(3), np.array([[True], [False]])
layers = [pyreg.Dropout(0.1), pyreg.DropPath(0.5), pyreg.WordDropout(0.5, rng=1), pyreg.Dropout1d(0.2)]
norm = pyreg.BatchNorm(3)

def fails(error, f, *args, **options):
    try: f(*args, **options)
    except error: return
    raise AssertionError(f)

def refused(f, *args):
    _core.fail_allocation(1)
    try: fails(MemoryError, f, *args)
    finally: _core.fail_allocation(0)

def calls():  # 30 of them
    pyreg.dropout(x, 0.5); pyreg.dropout(x, 0.5, key=key, out=dy); pyreg.dropout(half, 0.5, rng=1); pyreg.dropout(odd)
    pyreg.dropout(x, 0.5, broadcast_dims=(0, -1)); pyreg.dropout_backward(dy[::-1], 0.1, key=3, impl="threefry")
    pyreg.dropout_mask((2, 3), key=1); pyreg.dropout_mask(6, key=1, packed=True)
    y, m, v = pyreg.batch_norm(x, mean, mean, mask=mask, activation="relu", residual=dy)
    pyreg.batch_norm_inference(x, m, v, out=dy)
    pyreg.batch_norm_backward(dy, x, m, v, activation="relu", y=y)
    for layer in layers: layer.backward(layer(x))
    norm.backward(norm(x)); norm.eval()(x); norm.train().load_state_dict(norm.state_dict())
    fails(ValueError, pyreg.dropout, x, 2); fails(TypeError, pyreg.dropout, [1]); fails(ValueError, norm, x.T)
    fails(ValueError, pyreg.dropout, x, out=dy.T); fails(TypeError, pyreg.batch_norm, x, mask=x)
    refused(pyreg.batch_norm, x); refused(pyreg.batch_norm_backward, dy, x, m, v)
    with pyreg.num_threads(1): pyreg.get_num_threads()

def memory():
    gc.collect()
    with open("/proc/self/statm") as statm: return int(statm.read().split()[1]) * 4, sys.getallocatedblocks()

for _ in range(rounds // 10): calls()
kilobytes, blocks = memory()
for _ in range(rounds): calls()
after = memory()
assert after[0] - kilobytes < 1000, after[0] - kilobytes
assert after[1] - blocks < rounds // 10, after[1] - blocks
"""


@pytest.mark.parametrize("rounds", [3_000, pytest.param(35_000, marks=pytest.mark.slow)])
def test_small_calls_do_not_leak(rounds):
    python(SMALL_CALLS.format(rounds=rounds), timeout=600)


# ---- Forks -----------------------------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys, threading, warnings, numpy as np, pyreg
x = np.ones(4_000_000, np.float32)
with pyreg.num_threads(1): want = pyreg.dropout(x, 0.1, key=1)
pyreg.set_num_threads(2)
def right(): return bool((pyreg.dropout(x, 0.1, key=1) == want).all())

def fork(depth):
    "A child that is right, and whose own children are."
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        good = right()
        if depth: fork(depth - 1)
        os._exit(not (good and right()))
    assert os.waitpid(child, 0)[1] == 0

def run():
    if {before}: assert right()
    fork({depth})
    assert right()

if {thread}:
    done = []
    thread = threading.Thread(target=lambda: done.append(run()))
    thread.start(); thread.join()
    assert done == [None]
else:
    run()
assert right()
fork(0)
"""


@pytest.mark.parametrize("before", [False, True], ids=["first", "after a call"])
@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "other thread"])
@pytest.mark.parametrize("depth", [0, 2])
def test_forks(before, thread, depth):
    python(FORKS.format(before=before, thread=thread, depth=depth), warnings="ignore", timeout=200)


# ---- Modules ---------------------------------------------------------------------------------------------------------

PACKAGE = pathlib.Path(pyreg.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"_core", *(path.stem for path in FILES), *(path.parent.name for path in FILES)}


def private_names(tree):
    """Names with an underscore in front that a module takes from another one; those of modules do not count."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "pyreg").split(".")[0] == "pyreg":
            modules |= {name.asname or name.name for name in node.names if name.name in MODULES}
            yield from (name.name for name in node.names if name.name.startswith("_") and name.name not in MODULES)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Name(module), name) if module in modules and name.startswith("_"):
                yield f"{module}.{name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_keep_their_private_names(path):
    assert set(private_names(ast.parse(path.read_text()))) <= {"__version__"}


def test_private_names_are_seen():
    code = "from pyreg import _ops as ops, _core\nfrom pyreg._ops import _apply, dropout\nops._apply, _core.dropout"
    assert list(private_names(ast.parse(code))) == ["_apply", "ops._apply"]
