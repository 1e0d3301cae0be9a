"""Batch-norm by oneDNN, through its C API (version 3), if the library is found.

`pip install onednn-cpu-gomp` puts it into the folder lib of the environment; ONEDNN_LIBRARY names another file.
"""

import ctypes
import os
import sys
from pathlib import Path

import numpy as np

# dnnl_types.h
F32, CPU, IN_ORDER = 3, 1, 1
TRAINING, INFERENCE, BACKWARD = 64, 96, 128
GLOBAL_STATISTICS, SCALE_AND_SHIFT = 1, 2 | 4
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT, DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = (
    1,
    17,
    49,
    50,
    51,
    52,
    129,
    145,
    255,
    256,
)


class Argument(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("memory", ctypes.c_void_p))


def find():
    path = os.environ.get("ONEDNN_LIBRARY") or Path(sys.prefix, "lib", "libdnnl.so.3")
    return str(path) if Path(path).exists() else None


class OneDNN:
    """Calls for one x: forward(), inference(), backward().  oneDNN sees the NumPy arrays with the channels as dim 1."""

    def __init__(self, x, dy, axis, epsilon=1e-5):
        self.library = ctypes.CDLL(find())
        self.keep = []
        self.engine, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("engine_create", ctypes.byref(self.engine), CPU, ctypes.c_size_t(0))
        self.call("stream_create", ctypes.byref(self.stream), self.engine, IN_ORDER)
        x, dy, y, dx = (np.moveaxis(a, axis, 1) for a in (x, dy, np.zeros_like(x), np.zeros_like(x)))
        self.y = np.moveaxis(y, 1, axis)
        data = self.describe(x)
        mean, var, scale, shift, dscale, dshift = (np.ones(x.shape[1], np.float32) for _ in range(6))
        vectors = {MEAN: mean, VARIANCE: var, SCALE: scale, SHIFT: shift}
        eps, flags = ctypes.c_float(epsilon), SCALE_AND_SHIFT
        hint = self.create("forward", TRAINING, data, data, eps, flags, None)
        self.forward = self.primitive(hint, {SRC: x, DST: y, **vectors})
        given = self.create("forward", INFERENCE, data, data, eps, flags | GLOBAL_STATISTICS, None)
        self.inference = self.primitive(given, {SRC: x, DST: y, **vectors})
        back = self.create("backward", BACKWARD, data, data, data, eps, flags, hint, None)
        vectors.pop(SHIFT)
        out = {DIFF_SRC: dx, DIFF_SCALE: dscale, DIFF_SHIFT: dshift}
        self.backward = self.primitive(back, {SRC: x, DIFF_DST: dy, **vectors, **out})

    def call(self, name, *arguments):
        status = getattr(self.library, "dnnl_" + name)(*arguments)
        if status:
            raise RuntimeError(f"dnnl_{name} returned {status}")

    def describe(self, array):
        dims, strides = ((ctypes.c_int64 * 12)(*v) for v in (array.shape, [s // 4 for s in array.strides]))
        description = ctypes.c_void_p()
        self.call("memory_desc_create_with_strides", ctypes.byref(description), array.ndim, dims, F32, strides)
        return description

    def create(self, direction, kind, *arguments):
        made = ctypes.c_void_p()
        self.call(
            f"batch_normalization_{direction}_primitive_desc_create", ctypes.byref(made), self.engine, kind, *arguments
        )
        return made

    def primitive(self, description, arrays):
        primitive, arguments = ctypes.c_void_p(), (Argument * len(arrays))()
        self.call("primitive_create", ctypes.byref(primitive), description)
        for argument, (kind, array) in zip(arguments, arrays.items(), strict=True):
            memory = ctypes.c_void_p()
            self.call(
                "memory_create",
                ctypes.byref(memory),
                self.describe(array),
                self.engine,
                ctypes.c_void_p(array.ctypes.data),
            )
            argument.kind, argument.memory = kind, memory
        self.keep.append((arguments, arrays))
        execute, wait = self.library.dnnl_primitive_execute, self.library.dnnl_stream_wait

        def run():
            if execute(primitive, self.stream, len(arrays), arguments) or wait(self.stream):
                raise RuntimeError("oneDNN could not execute a primitive")

        return run
