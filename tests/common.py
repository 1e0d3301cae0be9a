"""Names that the tests share."""

import ctypes.util
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pyreg import _core

DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
IMPLS = ["philox", "threefry", "threefry_x64"]
ISAS = _core.isa_available()
TILE, GROUP, CHUNK = 4096, 512, 65536  # of csrc: where the loops change gear


def bits(x):
    """x as unsigned integers: equal only if every bit is."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bool((bits(a) == bits(b)).all())


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layouts(x):
    """x in many memory layouts."""
    yield "C", x.copy("C")
    yield "F", np.asfortranarray(x)
    yield "inner step", np.repeat(x, 2, axis=-1)[..., ::2]
    yield "rows of a wider array", np.concatenate([x, x], axis=-1)[..., : x.shape[-1]]
    yield "negative inner", x[..., ::-1].copy()[..., ::-1]
    yield "negative outer", x[::-1].copy()[::-1]
    yield "transposed", np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0)
    raw = np.empty(x.nbytes + 64, np.uint8)
    aligned = raw[-raw.ctypes.data % 64 + x.itemsize :][: x.nbytes].view(x.dtype).reshape(x.shape)
    aligned[...] = x
    yield "off the cache line", aligned
    odd = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    odd[...] = x
    yield "odd address", odd


# For code that sets something of OpenMP's: pyreg need not be linked with an OpenMP library.
OPENMP = "import ctypes\nctypes.CDLL('libgomp.so.1')\n"
needs_openmp = pytest.mark.skipif(not ctypes.util.find_library("gomp"), reason="there is no libgomp")


def python(code, *, timeout=60, warnings="error", **environ):
    """Runs code in a fresh interpreter and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=os.path.dirname(__file__),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FUSION = "xla_cpu_use_fusion_emitters"  # a flag of XLA


def xla_flags(devices):
    """XLA_FLAGS of a process that has so many devices, which are parts of the CPU."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def example(name):
    """A program of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_threads(work, count):
    """Calls work(0), work(1), ... at the same time, each in a thread, and raises what they raised."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
