"""pyreg as part of a process: threads, forks, signals, memory bounds, the environment."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from common import ISAS, OPENMP, in_threads, needs_openmp, python, same

import pyreg
from pyreg import _core

KEY = 12345
LARGE = 4_000_000  # enough for several threads


# ---- Threads -------------------------------------------------------------------------------------------------------


def workers(code, before="", **environ):
    """Number of threads that the process has after a large call."""
    start = f"import os, numpy as np, pyreg\nx = np.ones({LARGE}, np.float32)\n"
    count = "print(len(os.listdir('/proc/self/task')))"
    one = python(start + count, **environ)
    return int(python(f"{before}{start}{code}\n{count}", **environ)) - int(one) + 1


def test_number_of_threads(threads):
    assert pyreg.get_num_threads() >= 1
    threads(7)
    assert pyreg.get_num_threads() == 7
    with pyreg.num_threads(3):
        assert pyreg.get_num_threads() == 3
        with pyreg.num_threads(2):
            assert pyreg.get_num_threads() == 2
        seen = []
        other = threading.Thread(target=lambda: seen.append(pyreg.get_num_threads()))
        other.start()
        other.join()
        assert seen == [7]  # the context is the calling thread's own
    assert pyreg.get_num_threads() == 7
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"number of threads is {bad}"):
            threads(bad)
        with pytest.raises(ValueError, match=f"number of threads is {bad}"), pyreg.num_threads(bad):
            pass


def test_threads_that_start():
    assert workers("pyreg.set_num_threads(1); pyreg.dropout(x)") == 1
    assert workers("pyreg.set_num_threads(5); pyreg.dropout(x)") == 5
    assert workers("pyreg.set_num_threads(5); pyreg.dropout(x[:300_000])") == 1  # below what threads pay for


def test_omp_num_threads():
    assert workers("pyreg.dropout(x)", OMP_NUM_THREADS="1") == 1
    assert python("import pyreg; print(pyreg.get_num_threads())", OMP_NUM_THREADS="1") == "1"


def test_affinity():
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert python(f"{pin}; import pyreg; print(pyreg.get_num_threads())") == "1"
    assert python(f"import pyreg; {pin}; print(pyreg.get_num_threads())") == "1"


def test_cpu_quota(one_cpu_cgroup):
    join = f"open({str(one_cpu_cgroup / 'cgroup.procs')!r}, 'w').write('0')"
    assert python(f"{join}; import pyreg; print(pyreg.get_num_threads())") == "1"
    assert python(f"{join}; import pyreg; print(pyreg.get_num_threads())", OMP_NUM_THREADS="8") == "1"


@needs_openmp
def test_threadpoolctl():
    code = """
import pyreg, threadpoolctl
pyreg.set_num_threads(4)
with threadpoolctl.threadpool_limits(1):
    print(pyreg.get_num_threads())
print(pyreg.get_num_threads())
"""
    assert python(OPENMP + code).split() == ["1", "4"]
    code = "import threadpoolctl\nwith threadpoolctl.threadpool_limits(1): pyreg.dropout(x)"
    assert workers(code, before=OPENMP) == 1
    assert workers("import threadpoolctl\npyreg.dropout(x)", before=OPENMP) == len(os.sched_getaffinity(0))


def test_idle_threads_sleep():
    """After a call no thread goes on spinning: CPU time is that of the work, not of the pauses."""
    code = f"""
import time, numpy as np, pyreg
x = np.ones({LARGE}, np.float32)
pyreg.set_num_threads(2)
pyreg.dropout(x, out=x)
spent = []
for _ in range(20):
    pyreg.dropout(x, out=x)
    before = time.process_time()
    time.sleep(0.02)
    spent.append(time.process_time() - before)
print(np.median(spent))
"""
    assert float(python(code)) < 1e-3


def test_eight_threads_at_once():
    x = np.random.default_rng(0).standard_normal(1_500_000).astype(np.float32)
    want = [pyreg.dropout(x, 0.1, key=k) for k in range(8)]

    def work(k):
        for _ in range(10):
            assert same(pyreg.dropout(x, 0.1, key=k), want[k])

    in_threads(work, 8)


def test_the_gil_is_released():
    x = np.ones(60_000_000, np.float32)
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=tick)
    with pyreg.num_threads(1):
        other.start()
        start = time.perf_counter()
        pyreg.dropout(x, 0.1, key=1, impl="threefry", out=x)
        end = time.perf_counter()
        done.set()
        other.join()
    assert sum(start < t < end for t in ticks) >= 5


# ---- Fork ----------------------------------------------------------------------------------------------------------

FORK = f"""
import os, warnings, signal, sys, numpy as np, pyreg
if {{torch}}: import torch; torch.ones({LARGE}).sqrt()
pyreg.set_num_threads(2)
x = np.ones({LARGE}, np.float32)
want = pyreg.dropout(x, 0.1, key=1)
child = os.fork()
if child == 0:
    signal.alarm(10)
    os._exit(0 if (pyreg.dropout(x, 0.1, key=1) == want).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert (pyreg.dropout(x, 0.1, key=1) == want).all()
"""


def test_fork():
    python(FORK.format(torch=False))


def test_fork_with_torch():
    pytest.importorskip("torch")
    python(FORK.format(torch=True))


def large_dropout(key):
    return int((pyreg.dropout(np.ones(LARGE, np.float32), 0.1, key=key) != 0).sum())


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method):
    want = [large_dropout(k) for k in range(3)]
    code = f"""
import multiprocessing
from test_process import large_dropout
if __name__ == "__main__":
    large_dropout(0)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        print(pool.map_async(large_dropout, range(3)).get(30))
"""
    assert python(code, warnings="ignore") == str(want)


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_interrupt(threads, count):
    """A call of seconds stops within 0.2 s of the signal (a slow machine is given more), and the next one is right."""
    threads(count)
    row = np.ones(1 << 20, np.float32)
    x = np.broadcast_to(row, (20_000, 1 << 20))  # 80 GB of input, and an output that is one row again and again
    out = np.lib.stride_tricks.as_strided(np.empty_like(row), x.shape, (0, 4))
    sent = []

    def send():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        timer = threading.Timer(0.3, send)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            _core.dropout(_core.F32, x, out, _core.PHILOX, 1, 0.1, 0, True, None)
    finally:
        signal.signal(signal.SIGINT, old)
    late = time.perf_counter() - sent[0]
    timer.join()
    assert late < 1
    assert same(pyreg.dropout(row, 0.1, key=1), pyreg.dropout(row.copy(), 0.1, key=1))


def test_a_handler_that_returns_does_not_interrupt():
    x = np.ones(200_000_000, np.float16)
    seen = []
    old = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pyreg.num_threads(1):
            y = pyreg.dropout(x, 0.1, key=1, impl="threefry", out=x)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert y is x
    assert seen == [1]
    assert same(x[-1000:], pyreg.dropout(np.ones(1000, np.float16), 0.1, key=1, impl="threefry", offset=x.size - 1000))


# ---- Floating-point mode -------------------------------------------------------------------------------------------


def test_the_callers_mode_holds_in_all_threads(threads):
    """torch.set_flush_denormal makes the calling thread flush subnormals: then every element is flushed, or none."""
    torch = pytest.importorskip("torch")
    threads(3)
    x = np.full(LARGE, 1e-40, np.float32)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    y, h = pyreg.dropout(x, 0.1, key=1), pyreg.dropout(half, 0.1, key=1)
    assert set(np.unique(y)) == {np.float32(0), np.float32(x[0] * (np.float32(1) / np.float32(0.9)))}
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush")
    try:
        flushed = pyreg.dropout(x, 0.1, key=1)
        with pyreg.num_threads(1):
            assert not pyreg.dropout(x[:100], 0.1, key=1).view(np.uint32).any()
        flushed_half = pyreg.dropout(half, 0.1, key=1)
    finally:
        torch.set_flush_denormal(False)
    assert not flushed.view(np.uint32).any()
    assert same(flushed_half, h)  # float16's subnormals are normal floats
    assert same(pyreg.dropout(x, 0.1, key=1), y)


def test_no_floating_point_exceptions_are_left():
    libm = ctypes.CDLL("libm.so.6")
    x = np.array([np.nan, np.inf, 1e-45, 3e38] * 100, np.float32)
    half = np.array([np.nan, np.inf, 6e-8, 65504] * 100, np.float16)
    libm.feclearexcept(0x3F)
    pyreg.dropout(x, 0.3, key=1)
    pyreg.dropout(half, 0.3, key=1)
    assert libm.fetestexcept(0x1F) == 0


# ---- Memory --------------------------------------------------------------------------------------------------------

GUARDED = """
import ctypes, mmap, numpy as np, ml_dtypes, pyreg
from pyreg import _core
from common import DTYPES, IMPLS, ISAS
libc = ctypes.CDLL(None, use_errno=True)

def guarded(pages=2):
    "Writable memory between two pages that may not be touched."
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    return np.frombuffer(memory, np.uint8, pages * mmap.PAGESIZE, mmap.PAGESIZE), memory

(a, m1), (b, m2) = guarded(), guarded()
for isa in ISAS:
    _core.use_isa(isa)
    for dtype in DTYPES:
        for n in range(1026):
            bytes = n * dtype.itemsize
            if bytes > a.size: break
            start, end = slice(0, bytes), slice(a.size - bytes, a.size)
            for where in (start, end):
                x, out = a[where].view(dtype), b[where].view(dtype)
                pyreg.dropout(x, 0.1, key=n, impl=IMPLS[n % 3], offset=n % 67, out=out)
                if dtype.itemsize == 4 and n % 8 == 0:
                    pyreg.dropout(x[::-1], 0.1, key=n, out=out[::-1])
                    pyreg.dropout(x[::2], 0.1, key=n, out=out[::2])
print("ok")
"""


def test_guard_pages():
    assert python(GUARDED) == "ok"


def test_guard_pages_do_guard():
    code = GUARDED.split("(a, m1)")[0] + "a, m = guarded()\nctypes.string_at(a.ctypes.data + a.size, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=os.path.dirname(__file__), check=False)
    assert done.returncode == -signal.SIGSEGV


def test_nothing_leaks():
    """Memory of the process after many calls, in the megabytes that it had before."""
    code = """
import numpy as np, pyreg
x = np.ones(1_000_000, np.float32)
layer = pyreg.Dropout(0.1)
def rss(): return int(open("/proc/self/statm").read().split()[1]) * 4096
for _ in range(5): layer.backward(layer(x)); pyreg.dropout_mask(1000, key=1)
before = rss()
for _ in range(300): layer.backward(layer(x)); pyreg.dropout_mask(1000, key=1)
assert rss() - before < 16e6, rss() - before
"""
    python(code)


def test_out_needs_no_memory():
    """Strided input is not copied behind the scenes: peak memory stays that of the arrays."""
    code = """
import resource, numpy as np, pyreg
x = np.ones((4000, 4000), np.float32)
out = np.ones_like(x)
pyreg.dropout(x[:10], key=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pyreg.dropout(x[:, :3000], key=1, out=out[:, :3000])
pyreg.dropout(x[::2], key=1, out=out[::2])
pyreg.dropout(x.T, key=1, out=out.T)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(python(code)) < 8000  # KiB; a copy of x would be 64,000


# ---- Environment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_pyreg_isa(isa):
    assert python("import pyreg; print(pyreg.show_config('dicts')['isa'])", PYREG_ISA=isa) == isa


def test_pyreg_isa_unknown():
    code = "try: import pyreg\nexcept ImportError as e: print(e)"
    message = python(code, PYREG_ISA="sse9")
    assert message.startswith("PYREG_ISA='sse9' is not an instruction set that this machine can run and pyreg was ")
    assert "baseline" in message


def test_show_config(capsys):
    pyreg.show_config()
    printed = capsys.readouterr().out
    config = pyreg.show_config("dicts")
    assert config["isa"] == ISAS[0]
    assert config["version"] == pyreg.__version__
    for value in ("version", "compiler", "isa"):
        assert config[value] in printed
    assert python("import runpy; runpy.run_module('pyreg')").startswith("pyreg ")
    with pytest.raises(ValueError, match="mode is 'json'"):
        pyreg.show_config("json")


def test_import_is_light():
    """NumPy alone: neither JAX nor anything else large."""
    code = "import sys, pyreg; print([m for m in ('jax', 'flax', 'torch', 'ml_dtypes', 'scipy') if m in sys.modules])"
    assert python(code) == "[]"


def test_a_front_end_says_what_it_lacks():
    code = """
import importlib, sys
extras = {name: name for name in ("jax", "equinox", "haiku", "keras", "torch")} | {"nnx": "flax", "linen": "flax"}
sys.modules |= dict.fromkeys(extras.values())  # None: not to be found
for module, extra in extras.items():
    try:
        importlib.import_module(f"pyreg.{module}")
    except ModuleNotFoundError as error:
        print(error.name in (extra, "jax") and f'wanted pyreg with it: pip install "pyreg[{extra}]"' in str(error))
"""
    assert python(code).split() == ["True"] * 7
