"""Threads that are refused, pinned, limited, forked, or many: what an environment does to the pool."""

import asyncio
import contextlib
import contextvars
import os
import re
import threading

import numpy as np
import pytest
from common import OPENMP, in_threads, needs_openmp, python, same

import pyreg

LARGE = 4_000_000  # enough for several threads
CPUS = os.sched_getaffinity(0)
several_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")

START = f"""
import os, resource, signal, sys, threading, time
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's own threads would be counted
import numpy as np, pyreg
def tasks(): return len(os.listdir("/proc/self/task"))
def at_most(n):  # threads that have been joined may still be about to end
    for _ in range(1000):
        if tasks() <= n: return True
        time.sleep(0.01)
x = np.ones({LARGE}, np.float32)
with pyreg.num_threads(1): want = pyreg.dropout(x, 0.1, key=1)
out, equal = np.empty_like(x), np.empty(x.shape, bool)  # there may be no memory for more later
def right():
    out[:] = 7
    return bool(np.equal(pyreg.dropout(x, 0.1, key=1, out=out), want, out=equal).all())
"""


# ---- Refused -------------------------------------------------------------------------------------------------------

REFUSE = {
    "address space": """
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), resource.RLIM_INFINITY))
def allow(): resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
""",
    "processes": """
if os.getuid() == 0: os.setuid(65534)  # root has no limit
resource.setrlimit(resource.RLIMIT_NPROC, (1, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
def allow(): resource.setrlimit(resource.RLIMIT_NPROC, (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2)
""",
}


@pytest.mark.parametrize("refuse", REFUSE.values(), ids=REFUSE)
@pytest.mark.parametrize("count", [2, 7, 2**31 - 1])
def test_threads_refused(refuse, count):
    """Those that there are do the work, and others come when they may."""
    code = f"""{START}
pyreg.set_num_threads({count})
{refuse}
before = tasks()
assert right() and tasks() == before
allow()
assert right()
print(tasks() - before)
"""
    chunks = -(-LARGE // 65536)
    assert python(code) == str(min(count, chunks) - 1)


def test_some_threads_refused():
    """Room for some threads, not for all."""
    code = f"""{START}
pyreg.set_num_threads(60)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
stack = max(resource.getrlimit(resource.RLIMIT_STACK)[0], 1 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size + 5 * min(stack, 8 << 20), resource.RLIM_INFINITY))
before = tasks()
assert right() and right()
print(tasks() - before)
"""
    assert 1 <= int(python(code)) < 59


# ---- CPUs ----------------------------------------------------------------------------------------------------------

BINDING = [
    {"OMP_PROC_BIND": "true"},
    {"OMP_PROC_BIND": "close", "OMP_PLACES": "threads"},
    {"OMP_PROC_BIND": "spread"},
    {"OMP_PLACES": ",".join(f"{{{cpu}}}" for cpu in sorted(CPUS))},
    {"GOMP_CPU_AFFINITY": " ".join(map(str, sorted(CPUS)))},
]


@several_cpus
@pytest.mark.parametrize("environ", BINDING, ids=str)
@needs_openmp
@pytest.mark.parametrize("imports", ["", OPENMP], ids=["first", "after OpenMP"])
def test_openmp_binds_threads(environ, imports):
    """What OpenMP pins is not what the process may use; pyreg's import pins nothing, and what the user pins holds."""
    code = f"""{imports}import os
before = os.sched_getaffinity(0)
{START}
assert os.sched_getaffinity(0) == before
n = pyreg.get_num_threads()
assert right()
pinned = []
def in_thread():
    pinned.append(pyreg.get_num_threads())
    os.sched_setaffinity(0, {{max({CPUS})}})
    pinned.append(pyreg.get_num_threads())
t = threading.Thread(target=in_thread)
t.start(); t.join()
os.sched_setaffinity(0, {{max({CPUS})}})
pinned.append(pyreg.get_num_threads())
os.sched_setaffinity(0, {CPUS})
print(n, *pinned, pyreg.get_num_threads())
"""
    n = len(CPUS)
    assert python(code, **environ) == f"{n} {n} 1 1 {n}"


@several_cpus
def test_a_pin_holds_though_openmp_binds():
    """The CPU that OpenMP would have pinned to, chosen by the user: before, after, and from outside."""
    pin = f"os.sched_setaffinity(0, {{{min(CPUS)}}})"
    count = "pyreg.get_num_threads()"
    for code in (
        f"import os; {pin}; import pyreg; print({count})",
        f"import os, pyreg; {pin}; print({count})",
        f"import os, pyreg; a = {count}; {pin}; print({count})",
        f"import os, subprocess, pyreg; subprocess.run(['taskset', '-pc', '{min(CPUS)}', str(os.getpid())], "
        f"stdout=subprocess.DEVNULL); print({count})",
    ):
        assert python(code, OMP_PROC_BIND="true") == "1"
        assert python(code) == "1"


@several_cpus
def test_helpers_run_where_the_caller_may():
    """Also where that changes after they were started, and where the caller alone is pinned by OpenMP."""
    code = f"""{START}
def allowed():
    return [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task") if int(t) != os.getpid()]
pyreg.set_num_threads(3)
assert right() and allowed() == [{CPUS}] * 2, allowed()
for cpus in {{max({CPUS})}}, {{min({CPUS})}}, {CPUS}:
    os.sched_setaffinity(0, cpus)
    for _ in range(100):  # a helper that comes late takes no part
        assert right()
        if allowed() == [cpus] * 2: break
    else: raise AssertionError(allowed())
"""
    python(code)
    python("import ctypes; ctypes.CDLL('libgomp.so.1')" + code.split("for cpus")[0], OMP_PROC_BIND="true")


@several_cpus
def test_jax_is_not_pinned():
    pytest.importorskip("jax")
    code = """
import os, pyreg, jax, jax.numpy as jnp
jnp.ones((500, 500)).dot(jnp.ones((500, 500))).block_until_ready()
cpus = [len(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")]
assert len(cpus) > 2 and min(cpus) == len(os.sched_getaffinity(0)), cpus
"""
    python(code, OMP_PROC_BIND="true")


def test_quota_is_read_again(one_cpu_cgroup):
    code = f"""
import time, pyreg
before = pyreg.get_num_threads()
open({str(one_cpu_cgroup / "cgroup.procs")!r}, "w").write("0")
time.sleep(1.1)
print(before, pyreg.get_num_threads())
"""
    assert python(code) == f"{len(CPUS)} 1"


# ---- Limits --------------------------------------------------------------------------------------------------------


@needs_openmp
@pytest.mark.parametrize("environ", [{}, {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "3"}])
def test_limits_hold_on_both_sides_of_the_default(environ):
    default = int(environ.get("OMP_NUM_THREADS", len(CPUS)))
    limits = [limit for limit in range(1, 8) if limit != default]
    code = f"""
import pyreg, threadpoolctl
automatic = pyreg.get_num_threads()
for limit in {limits}:
    for set in (pyreg.set_num_threads, lambda n: None):
        set(9)
        with threadpoolctl.threadpool_limits(limit), pyreg.num_threads(9):
            assert pyreg.get_num_threads() == limit
    pyreg.set_num_threads(None)
    with threadpoolctl.threadpool_limits(limit):
        assert pyreg.get_num_threads() == min(limit, {len(CPUS)})
    pyreg.set_num_threads(2)
    with threadpoolctl.threadpool_limits(limit):
        assert pyreg.get_num_threads() == min(limit, 2)
    assert pyreg.get_num_threads() == 2
    pyreg.set_num_threads(None)
    assert pyreg.get_num_threads() == automatic
"""
    python(OPENMP + code, **environ)


def test_openmp_thread_limit():
    """A limit for the whole process, also of several calls at once."""
    code = f"""{START}
pyreg.set_num_threads(9)
n = pyreg.get_num_threads()
callers = [threading.Thread(target=lambda: [right() for _ in range(5)]) for _ in range(2)]
before = tasks()
for t in callers: t.start()
for t in callers: t.join()
assert n == 3 and at_most(before + 2), tasks()
"""
    python(code, OMP_THREAD_LIMIT="3")


BAD = [0, -1, -(2**63), 2**31, 2**63, 10**30, True, False, "2", 2.0, np.float32(2), np.True_, [2], 1j, np.array([2])]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_what_is_no_number_of_threads(bad, threads):
    threads(2)
    error = ValueError if type(bad) is int else TypeError
    shown = str(bad) if isinstance(bad, np.floating) else repr(bad)
    message = re.escape(f"number of threads is {shown}; wanted an int n from 1 to ")
    with pytest.raises(error, match=message):
        threads(bad)
    with pytest.raises(error, match=message), pyreg.num_threads(bad):
        pass
    assert pyreg.get_num_threads() == 2


def test_numbers_of_threads(threads):
    for n in (1, np.int64(2), np.uint8(3), 2**31 - 1):
        threads(n)
        assert pyreg.get_num_threads() == n
        with pyreg.num_threads(n):
            assert pyreg.get_num_threads() == n
    with pytest.raises(TypeError, match="number of threads is None"), pyreg.num_threads(None):
        pass


# ---- Tasks ---------------------------------------------------------------------------------------------------------


def test_a_task_has_its_own_number(threads):
    threads(9)
    seen = {}

    async def task(n, enter, leave):
        await asyncio.sleep(enter)
        with pyreg.num_threads(n):
            await asyncio.sleep(leave)
            seen[n] = pyreg.get_num_threads(), await asyncio.to_thread(pyreg.get_num_threads)
        seen[-n] = pyreg.get_num_threads()

    async def main():
        with pyreg.num_threads(4):
            inherits = asyncio.create_task(asyncio.sleep(0.03, None))
            inherited = asyncio.create_task(asyncio.to_thread(pyreg.get_num_threads))
        await asyncio.gather(task(7, 0, 0.02), task(5, 0.01, 0.02), task(3, 0.005, 0), inherits)
        assert await inherited == 4
        assert pyreg.get_num_threads() == 9

    asyncio.run(main())
    assert pyreg.get_num_threads() == 9
    assert seen == {7: (7, 7), 5: (5, 5), 3: (3, 3), -7: 9, -5: 9, -3: 9}


def test_numbers_that_end_out_of_order(threads):
    threads(9)
    a, b = pyreg.num_threads(2), pyreg.num_threads(3)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert pyreg.get_num_threads() == 3
    b.__exit__(None, None, None)
    assert pyreg.get_num_threads() == 9

    def generator(n):
        with pyreg.num_threads(n):
            yield pyreg.get_num_threads()
            yield pyreg.get_num_threads()

    two, three = generator(2), generator(3)
    assert [next(two), next(three), next(two), next(three)] == [2, 3, 3, 3]
    two.close()
    three.close()
    assert pyreg.get_num_threads() == 9
    with pytest.raises(KeyError), pyreg.num_threads(2), pyreg.num_threads(3):
        raise KeyError
    assert pyreg.get_num_threads() == 9

    @pyreg.num_threads(2)
    def decorated():
        return pyreg.get_num_threads()

    assert [decorated(), decorated(), pyreg.get_num_threads()] == [2, 2, 9]


def test_contexts_and_threads_are_apart(threads):
    threads(9)
    context = contextvars.copy_context()
    stack = context.run(contextlib.ExitStack)
    context.run(stack.enter_context, pyreg.num_threads(2))
    assert context.run(pyreg.get_num_threads) == 2
    assert pyreg.get_num_threads() == 9
    with pyreg.num_threads(3):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(pyreg.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [9]
        assert context.run(pyreg.get_num_threads) == 2
        assert pyreg.get_num_threads() == 3
    context.run(stack.close)
    assert context.run(pyreg.get_num_threads) == 9


def test_calls_take_the_number_of_their_task():
    """Not only what get_num_threads says: how many threads the process has."""
    code = f"""{START}
import asyncio
calls = [
    lambda: right(),
    lambda: pyreg.dropout_mask({LARGE}, 0.1, key=1),
    lambda: pyreg.batch_norm(x.reshape(-1, 40)),
    lambda: pyreg.batch_norm_inference(x.reshape(-1, 40), np.zeros(40), np.ones(40)),
    lambda: pyreg.batch_norm_backward(x.reshape(-1, 40), x.reshape(-1, 40), np.zeros(40), np.ones(40)),
]
async def one(call):
    with pyreg.num_threads(1):
        await asyncio.sleep(0)
        call()
        assert tasks() == 1
        await asyncio.sleep(0)
async def many(n):
    with pyreg.num_threads(n):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
async def main():
    for call in calls: await asyncio.gather(many(5), one(call), many(6))
    with pyreg.num_threads(3): calls[0]()
    assert tasks() == 3
asyncio.run(main())
"""
    python(code)


# ---- Many ----------------------------------------------------------------------------------------------------------


def test_32_threads_at_once(threads):
    threads(4)
    x = np.random.default_rng(0).standard_normal((3000, 300)).astype(np.float32)
    with pyreg.num_threads(1):
        want = [(pyreg.dropout(x, 0.1, key=k), *pyreg.batch_norm(x + k)) for k in range(32)]

    def work(k):
        for n in range(1, 7):
            with pyreg.num_threads(n) if n % 2 else contextlib.nullcontext():
                assert same(pyreg.dropout(x, 0.1, key=k), want[k][0])
                assert all(map(same, pyreg.batch_norm(x + k), want[k][1:]))

    in_threads(work, 32)


def test_threads_are_shared():
    """Many threads that call, one after the other and at once, have the helpers of one, and memory stays."""
    code = f"""{START}
def rss(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
pyreg.set_num_threads(3)
def call(): pyreg.dropout(x, 0.1, key=1, out=out)
def wave(n):
    threads = [threading.Thread(target=call) for _ in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
for _ in range(10): wave(1)
wave(10)
before = rss()
for _ in range(40): wave(1)
for _ in range(5): wave(10)
for _ in range(200): call()
assert rss() - before < 16e6, rss() - before
assert at_most({max(3, len(CPUS))}), tasks()
"""
    python(code)


def test_xla_threads_share_the_helpers():
    pytest.importorskip("jax")
    code = """
import os, jax, jax.numpy as jnp, pyreg.jax
def tasks(): return len(os.listdir("/proc/self/task"))
def step(x, op): return [op(x + i, i) for i in range(8)]
plain = jax.jit(lambda x: step(x, lambda x, i: jnp.sin(x) * i))
drop = jax.jit(lambda x: step(x, lambda x, i: pyreg.jax.dropout(x, 0.1, key=jax.random.key(i), impl="philox")))
x = jnp.ones((1000, 1000))
for _ in range(5): jax.block_until_ready(plain(x))
jax.block_until_ready(drop.lower(x).compile()(x))
pyreg.set_num_threads(3)
before = tasks()
for _ in range(10): jax.block_until_ready([drop(x) for _ in range(12)])  # programs at the same time, too
print(tasks() - before)
"""
    assert int(python(code, warnings="ignore")) <= 3


def test_signals_during_calls():
    """A timer's signals, a thousand a second, in calls of every kind: results stay right, and handlers run."""
    code = f"""{START}
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(pyreg.get_num_threads()))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
pyreg.set_num_threads(3)
end = time.monotonic() + 1
while time.monotonic() < end: assert right()
signal.setitimer(signal.ITIMER_REAL, 0)
assert seen and set(seen) == {{3}}
"""
    python(code)


LONG = """
from pyreg import _core
row = np.ones(1 << 20, np.float32)
def long_call(rows):  # one row again and again: the input and the output of a call that lasts
    shape = rows, row.size
    again = np.empty_like(row)
    x, out = np.broadcast_to(row, shape), np.lib.stride_tricks.as_strided(again, shape, (0, 4))
    _core.dropout(_core.F32, x, out, _core.THREEFRY, 1, 0.1, 0, True, (0, 1))  # pyreg.dropout refuses such an output
    return bool((again == pyreg.dropout(row, 0.1, key=1, impl="threefry")).all())
"""


@pytest.mark.parametrize("count", [1, 3])
def test_calls_from_a_handler_in_a_call(count):
    code = f"""{START}{LONG}
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(right()))
signal.setitimer(signal.ITIMER_REAL, 0.02)
pyreg.set_num_threads({count})
assert long_call(200)
assert seen == [True]
"""
    python(code)


# ---- Fork ----------------------------------------------------------------------------------------------------------

WAIT = """
def finish(child):
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("before", ["", "right()"], ids=["before any call", "after a call"])
def test_a_child_has_threads_of_its_own(before):
    """And its children, too."""
    code = f"""{START}{WAIT}
pyreg.set_num_threads(3)
{before}
def generation(n):
    child = os.fork()
    if child:
        return finish(child)
    signal.alarm(20)
    ok = tasks() == 1 and pyreg.get_num_threads() == 3 and right() and tasks() == 3
    if ok and n: generation(n - 1)
    os._exit(not ok)
generation(2)
assert right() and tasks() == 3
"""
    python(code, warnings="ignore")


def test_fork_beside_large_calls():
    code = f"""{START}{WAIT}
pyreg.set_num_threads(3)
stop = False
def busy():
    y = np.empty_like(x)
    while not stop: pyreg.dropout(x, 0.1, key=1, out=y)
threads = [threading.Thread(target=busy) for _ in range(3)]
for t in threads: t.start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(not (right() and tasks() == 3))
    finish(child)
stop = True
for t in threads: t.join()
assert right()
"""
    python(code, warnings="ignore")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_fork_by_a_handler_in_a_call(count, nested):
    """Parent and child return from the handler into the call, and finish it."""
    fork = "signal.setitimer(signal.ITIMER_REAL, 0.02); signal.signal(signal.SIGALRM, fork); assert long_call(200)"
    code = f"""{START}{LONG}{WAIT}
pyreg.set_num_threads({count})
child = None
def fork(*_):
    global child
    child = os.fork()
    if child == 0: signal.alarm(0); signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.alarm(40)
signal.signal(signal.SIGALRM, {"lambda *_: outer()" if nested else "fork"})
def outer():
    {fork}
signal.setitimer(signal.ITIMER_REAL, 0.02)
assert long_call(200)
assert child is not None
assert right() and tasks() == {count}
if child == 0: os._exit(0)
finish(child)
"""
    python(code, warnings="ignore")


def test_fork_in_place():
    """No element of a call in place is scaled twice or never because a helper was lost with it half done."""
    code = f"""{START}{WAIT}
pyreg.set_num_threads(4)
big = np.empty(60_000_000, np.float16)
child = None
def fork(*_):
    global child
    child = os.fork()
signal.signal(signal.SIGALRM, fork)
for _ in range(2):
    big[:] = 1
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    pyreg.dropout(big, 0.5, key=1, impl="threefry", out=big)
    ok = ((big == 0) | (big == 2)).all()
    if child == 0: os._exit(not ok)
    assert ok
    finish(child)
"""
    python(code, warnings="ignore")


def test_daemon_threads_may_compute_when_python_ends():
    """They never get the interpreter back; the threads that help them must not mind."""
    code = """
import threading, time, numpy as np, pyreg
pyreg.set_num_threads(8)
x, z = np.ones((64, 1_500_000), np.float32), np.zeros(64, np.float32)
def compute():
    while True:
        pyreg.batch_norm_inference(x, z, z + 1, axis=0, out=x)
for _ in range(6):
    threading.Thread(target=compute, daemon=True).start()
time.sleep(0.4)
"""
    for _ in range(3):
        python(code, warnings="ignore")


def test_the_configuration_is_of_the_context():
    with pyreg.num_threads(1):
        assert pyreg.show_config("dicts")["threads"] == 1
    with pyreg.num_threads(7):
        assert pyreg.show_config("dicts")["threads"] == 7


def test_imported_while_pinned():
    """What the loading thread may use is no wish."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    code = """
import os
cpus = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(cpus)})
import pyreg
print(pyreg.get_num_threads())
os.sched_setaffinity(0, cpus)
print(pyreg.get_num_threads() == len(cpus))
"""
    assert python(code).split() == ["1", "True"]


def test_a_number_too_long_to_print():
    with pytest.raises(ValueError, match="number of threads is"):
        pyreg.set_num_threads(10**5000)
