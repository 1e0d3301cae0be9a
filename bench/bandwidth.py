"""How fast this machine copies, reads and writes: NumPy's own loops, on data of each cache level.

A copy is the C library's memmove, through np.copyto.  A read is the maximum of int32.  A write is copyto of the same
page again and again.  NumPy releases the GIL in all of them, so each thread of a pool has a CPU of its own.  Passes
over data in a cache are repeated inside one call.  From which size on memmove stores around the cache is a setting that
glibc reads when a process starts, so the copy with non-temporal stores runs in another process.
"""

import contextlib
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
from numpy.lib.stride_tricks import as_strided

from bench import machine

PAGE = 4096
PASSES_BYTES = 32 << 20  # of small data, in one call
RELEASES_GIL_FROM = 500  # elements, however long they are


def levels():
    """Bytes of a working set for one thread in each level: half of a cache; for memory, four times the last cache.

    A small virtual machine may show the cache of a large host.  There every kernel, which has its own, gets less than
    four times: a 32nd of the machine's memory, but at least twice the last cache.
    """
    caches = machine.caches()
    last = max(caches.values())
    sets = {name: size // 2 for name, size in caches.items()}
    enough = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 32
    return {**sets, "memory": min(4 * last, max(2 * last, enough))}


def share(level, size, threads):
    """The part of a working set that a thread has.  L1 and L2 are its own, the last cache and memory are shared."""
    shared = level == "memory" or level == max(machine.caches())
    return size // threads if shared else size


def aligned(nbytes):
    """Bytes at the start of a page, written once, so that they are in memory."""
    raw = np.ones(nbytes + PAGE, np.uint8)
    return raw[-raw.ctypes.data % PAGE :][:nbytes]


class Loops:
    """The three loops over the bytes of one thread.  Each returns how many bytes it has moved."""

    def __init__(self, nbytes):
        nbytes -= nbytes % (2 * PAGE)
        self.whole = aligned(nbytes)
        self.source, self.target = self.whole[: nbytes // 2], self.whole[nbytes // 2 :]
        self.page = aligned(PAGE).view(f"V{PAGE}")
        self.passes = max(1, PASSES_BYTES // nbytes)

    def copy(self):
        if self.passes > RELEASES_GIL_FROM:
            # One element is as long as the array, and the stride is 0: so NumPy calls memmove once for each pass.
            x, y = (as_strided(a.view(f"V{a.size}"), (self.passes,), (0,)) for a in (self.source, self.target))
            np.copyto(y, x)
        else:
            for _ in range(self.passes):
                np.copyto(self.target, self.source)
        return 2 * self.passes * self.source.size

    def read(self):
        for _ in range(self.passes):
            self.whole.view(np.int32).max()
        return self.passes * self.whole.size

    def write(self):
        for _ in range(self.passes):
            np.copyto(self.whole.view(f"V{PAGE}"), self.page)
        return self.passes * self.whole.size


def kinds(level):
    """What can be measured: a pass over L1 is shorter than a call, and only copies can be repeated inside one call."""
    return ("copy",) if level == "L1" else ("copy", "read", "write")


class Team:
    """Threads that each run a loop over bytes of their own."""

    def __init__(self, threads, nbytes):
        self.pool = ThreadPoolExecutor(threads)
        self.loops = list(self.pool.map(Loops, [nbytes] * threads))  # a thread first touches what it will use

    def run(self, kind):
        return sum(self.pool.map(lambda loops: getattr(loops, kind)(), self.loops))


_teams = {}  # of the other process


def _elsewhere(threads, nbytes):
    if (threads, nbytes) not in _teams:
        _teams.clear()
        _teams[threads, nbytes] = Team(threads, nbytes)
    return _teams[threads, nbytes].run("copy")


class StreamingCopy:
    """Copies in another process, whose glibc stores around the cache from 16 kB on."""

    def __init__(self):
        tunables = os.environ.get("GLIBC_TUNABLES")
        os.environ["GLIBC_TUNABLES"] = "glibc.cpu.x86_non_temporal_threshold=0x4040"
        try:
            self.process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            self.process.submit(int).result()
        finally:
            del os.environ["GLIBC_TUNABLES"]
            if tunables is not None:
                os.environ["GLIBC_TUNABLES"] = tunables

    def run(self, threads, nbytes):
        return self.process.submit(_elsewhere, threads, nbytes).result()


@contextlib.contextmanager
def streaming_copy():
    copy = StreamingCopy()
    try:
        yield copy
    finally:
        copy.process.shutdown()


def contenders(level, size, threads, streaming):
    """Calls to be timed by name, and the bytes of each."""
    nbytes = share(level, size, threads)
    team = Team(threads, nbytes)
    calls = {kind: lambda kind=kind: team.run(kind) for kind in kinds(level)}
    calls["streaming copy"] = lambda: streaming.run(threads, nbytes)
    return calls, {name: call() for name, call in calls.items()}
