"""Random calls of the NumPy functions and layers against the reference.

    python tests/fuzz.py --cases 1000000 --seed 3 --jobs 2
    python tests/fuzz.py --case 12884901900        # one of them again, in words
    python tests/fuzz.py --jax --cases 2000        # the same of pyreg.jax: fuzz_jax.py

A case is a function of its number: operands of any dtype, shape and memory layout, options, an `out=` that may lie upon
any of them.  Each is computed twice, with other threads, another instruction set, other thresholds and another `out=`:
the results are right, both have the same bits, and nothing else in memory has changed.  Now and then an argument is
bad: then there is an error that names it, and nothing has changed at all.  A worker that crashes or hangs is a finding.
"""

import argparse
import collections
import contextlib
import faulthandler
import functools
import inspect
import math
import mmap
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from fractions import Fraction

import numpy as np
import reference
from common import DTYPES, IMPLS, ISAS

import pyreg
from pyreg import _core

F64 = np.dtype(np.float64)
NAMES = [d.name for d in DTYPES]


def expect(ok, *what):
    if not ok:
        raise AssertionError(" ".join(map(str, what)))


# ---- Masks: the numbers of a few stretches of a few keys, each drawn once and then looked up -------------------------

SPAN = 80_000
BASES = [0, 2**31 - SPAN // 2, 2**32 - SPAN // 2, 2**63 - SPAN // 2, 0x123456789ABCDEF, 2**64 - SPAN]
KEYS = [0, 2**64 - 1, 2**63, 0x0000_0001_8000_0000, 0x9E37_79B9_7F4A_7C15]


@functools.cache
def numbers(threefry, key, base):
    """For index base, base + 1, ...: philox's u * 2**64, threefry's two words in one."""
    key = divmod(key, 2**32)
    if threefry:
        i = np.uint64(base) + np.arange(SPAN, dtype=np.uint64)
        a, b = reference.threefry2x32_20((i >> 32, i & reference.MASK32), key)
        return a << 32 | b
    first, skip = divmod(base, 32)
    block = np.uint64(first) + np.arange(SPAN // 32 + 2, dtype=np.uint64)
    q = np.arange(16, dtype=np.uint64)[:, None]
    words = reference.philox4x32_10((block & reference.MASK32, block >> 32, q, 0), key)
    digits = np.unpackbits(np.stack(words, 1).astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    u = np.packbits(digits.reshape(64, -1), axis=0)  # digit p is row p, most significant first
    return np.ascontiguousarray(u.T).view(">u8")[:, 0].astype(np.uint64)[skip : skip + SPAN]


def mask(n, rate, key, impl, base, offset):
    """True where kept: reference.mask."""
    if rate in (0, 1):
        return np.full(n, rate == 0)
    u = numbers(impl != "philox", key, base)[offset - base : offset - base + n]
    if impl == "philox":
        return u >= np.uint64(round(Fraction(rate) * 2**64))
    if impl == "threefry":
        return (u >> 32 ^ u & reference.MASK32) >> 9 < np.uint64(math.ceil(float(np.float32(1 - rate)) * 2**23))
    return u >> 12 < np.uint64(math.ceil((1 - rate) * 2**52))


# ---- Operands --------------------------------------------------------------------------------------------------------


def allocate(size, skip=0):
    """Bytes from the start of a cache line on."""
    memory = np.full(size + 64, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


class Operand:
    """An array somewhere in memory of its own; other arrays may lie there, too."""

    def __init__(self, memory, dtype, shape, offset, strides):
        self.memory, self.dtype, self.shape, self.offset, self.strides = memory, dtype, shape, offset, strides
        self.array = np.ndarray(shape, dtype, memory, offset, strides)

    def in_memory(self, memory, shift=0):
        return Operand(memory, self.dtype, self.shape, self.offset + shift, self.strides)

    def copy(self):
        memory = allocate(self.memory.size)
        memory[:] = self.memory
        return self.in_memory(memory)

    def __repr__(self):
        where = f", offset={self.offset}, strides={self.strides}" if self.array.ndim else ""
        text = np.array2string(self.array, threshold=8, precision=9) if self.array.size else "[]"
        return f"{self.dtype}{list(self.shape)}{where}: {' '.join(text.split())}"


def lay_out(r, dtype, shape, repeat=True):
    """An uninitialised Operand of some layout."""
    size, ndim = dtype.itemsize, len(shape)
    kind = r.random()
    order = list(range(ndim))
    gaps = kind > 0.4
    if kind > 0.7:
        r.shuffle(order)
    strides, step = [0] * ndim, size * (r.choice((1, 1, 2, 3)) if gaps else 1)
    low = high = 0
    for d in reversed(order):
        n = max(shape[d], 1)
        if repeat and gaps and r.random() < 0.05:
            continue
        strides[d] = -step if gaps and r.random() < 0.2 else step
        if strides[d] < 0:
            low += step * (n - 1)
        else:
            high += step * (n - 1)
        step *= n
        if gaps and r.random() < 0.2:
            step += size * r.randint(1, 20)
    start = r.choice((0, 0, size, 5 * size, 64 - size, 1 if r.random() < 0.2 else 0))
    if dtype.name != "bfloat16" and r.random() < 0.05:
        dtype = dtype.newbyteorder(">")
    return Operand(allocate(start + low + high + size + 8), dtype, shape, start + low, tuple(strides))


@functools.cache
def pool(kind):
    """Values to take a stretch of: standard normals, small integers, or any bits."""
    rng = np.random.default_rng(["normal", "integers", *NAMES, "bool"].index(kind))
    if kind == "normal":
        return rng.standard_normal(1 << 17)
    if kind == "integers":
        return rng.integers(-4, 5, 1 << 17).astype(np.float64)
    if kind == "bool":
        return rng.random(1 << 17) < 0.7
    dtype = DTYPES[NAMES.index(kind)]
    return rng.integers(0, 256, (1 << 17) * dtype.itemsize, np.uint8).view(dtype)


def stretch(r, kind, n):
    start = r.randrange((1 << 17) - n)
    return pool(kind)[start : start + n]


SUBNORMAL = {"float32": 2.0**-140, "float64": 2.0**-1060, "float16": 2.0**-22, "bfloat16": 2.0**-130}
LARGEST = {"float32": 3e38, "float64": 1e70, "float16": 6e4, "bfloat16": 3e38}


def values(r, dtype, n, bits=False):
    """n numbers of some kind."""
    if bits:
        return stretch(r, dtype.name, n)
    kind = r.random()
    if kind < 0.35:
        x = stretch(r, "normal", n)
    elif kind < 0.7:
        far = {"float16": 60, "bfloat16": 8}.get(dtype.name, 1e7)
        x = (stretch(r, "normal", n) + r.uniform(-1, 1) * far ** r.random()) * 2.0 ** r.randint(-6, 6)
    elif kind < 0.8:
        x = stretch(r, "integers", n)
    elif kind < 0.85:
        x = np.full(n, r.choice((0.0, -0.0, 1.0, 3.3, -1e4, r.gauss(0, 1))))
    elif kind < 0.9:
        x = stretch(r, "normal", n) * LARGEST[dtype.name] * r.choice((0.2, 1e-3, 1e-6))
    elif kind < 0.95:
        tiny = 2.0**-500 if dtype == F64 else SUBNORMAL[dtype.name]  # its square is not 0
        x = stretch(r, "normal", n) * tiny * r.choice((1, 8, 1e3, 1e6))
    else:
        x = stretch(r, "normal", n).copy()
        for _ in range(r.randint(1, 3)):
            if n:
                x[r.randrange(n)] = r.choice((np.nan, np.inf, -np.inf))
    return x.astype(dtype)


def operand(r, dtype, shape, numbers=None, **options):
    """An Operand of some layout and values; numbers(n) gives them."""
    made = lay_out(r, dtype, shape)
    distinct = tuple(1 if s == 0 else n for n, s in zip(shape, made.strides, strict=True))
    n = math.prod(distinct)
    made.array[...] = (values(r, dtype, n, **options) if numbers is None else numbers(n)).reshape(distinct)
    return made


def some_shape(r, least=0):
    """From 0 to 5 dims, with 0, 1, few, or about as many elements as where loops change gear."""
    ndim, kind = max(r.choice((0, 1, 1, 2, 2, 3, 3, 4, 5)), least), r.random()
    if kind < 0.6 or ndim == 0:
        return tuple(r.choice((0, 1, 1, 2, 3, 4, 5, 8)) if r.random() < 0.3 else r.randint(1, 6) for _ in range(ndim))
    many = r.choice((512, 4096)) + r.randint(-3, 3) if kind < 0.72 else r.randint(1, 1000)
    if kind > 0.995:
        many = r.choice((65_536, 32_768)) + r.randint(-3, 3)
    shape = [1] * ndim
    for d in r.sample(range(ndim), ndim - 1):
        if r.random() < 0.6:
            shape[d] = r.randint(1, max(1, min(7, many)))
            many //= shape[d]
    long = r.randrange(ndim)
    shape[long] *= max(many, 1)
    return tuple(shape)


# ---- Settings: no result depends on them -----------------------------------------------------------------------------


class Setting:
    def __init__(self, r):
        self.isa = r.choice(ISAS)
        self.threads = r.choice((2, 3)) if r.random() < 0.15 else 1
        self.cache_bytes = 1 if r.random() < 0.2 else 0

    def __enter__(self):
        _core.use_isa(self.isa)
        _core.set_gears(0 if self.threads > 1 else -1, self.cache_bytes)
        pyreg.set_num_threads(self.threads)

    def __exit__(self, *_):
        _core.set_gears()
        pyreg.set_num_threads(None)

    def __repr__(self):
        return f"{self.threads} threads, {self.isa}, cache_bytes={self.cache_bytes}"


# ---- A call, twice ---------------------------------------------------------------------------------------------------

Call = collections.namedtuple("Call", "function operands options main check")


def alike(a, b):
    """The same bits, but which NaN."""
    if a.shape != b.shape or a.dtype.newbyteorder("=") != b.dtype.newbyteorder("="):
        return False
    if np.array_equal(a, b):
        return bool((np.signbit(a) == np.signbit(b))[a == 0].all()) if a.dtype.kind not in "bu" else True
    return bool(((a == b) & (np.signbit(a) == np.signbit(b)) | ((a != a) & (b != b))).all())


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def invoke(function, operands, options, out=None):
    arguments = {name: o.array if isinstance(o, Operand) else o for name, o in operands.items()} | options
    return as_tuple(function(**arguments) if out is None else function(**arguments, out=out.array))


def memories(operands):
    return {id(o.memory): o.memory for o in operands if isinstance(o, Operand)}.values()


def some_out(r, operands, main):
    """Where to write, and the operands, one of which may have moved to share its memory."""
    like = operands[main]
    dtype, kind = like.dtype.newbyteorder("="), r.random()
    if kind < 0.25:
        return None, operands, "out=None"
    if kind < 0.4 and all(s != 0 or n < 2 for s, n in zip(like.strides, like.shape, strict=True)):
        return like, operands, f"out={main}"
    out = lay_out(r, dtype, like.shape, repeat=False)
    there = [name for name, o in operands.items() if isinstance(o, Operand) and o.array.size]
    if kind < 0.6 or not there:
        return out, operands, f"out={out.dtype}, offset={out.offset}, strides={out.strides}"
    name = r.choice(there)
    old = operands[name]
    step = max(old.dtype.itemsize, out.dtype.itemsize)
    old_at, out_at = (r.randrange(0, m // step + 1) * step for m in (out.memory.size, old.memory.size))
    if r.random() < 0.5:
        old_at = 0
    memory = allocate(max(old_at + old.memory.size, out_at + out.memory.size))
    moved = old.in_memory(memory, old_at)
    moved.array[...] = old.array
    out = out.in_memory(memory, out_at)
    where = f"offset={out.offset}, strides={out.strides}"
    return out, {**operands, name: moved}, f"out upon {name} at {moved.offset}: {out.dtype}, {where}"


def perform(r, call, say):
    say(f"pyreg.{call.function.__name__}", {**call.operands, **call.options})
    if r.random() < 0.06 and bad_argument(r, call, say):
        return
    operands = call.operands
    before = [m.copy() for m in memories(operands.values())]
    setting = Setting(r)
    say(setting)
    with setting:
        want = invoke(call.function, operands, call.options)
    for memory, old in zip(memories(operands.values()), before, strict=True):
        expect(np.array_equal(memory, old), "an operand has changed")
        expect(not any(np.may_share_memory(memory, a) for a in want), "a result lies in an operand")
    call.check(*want)

    copies = {name: o.copy() if isinstance(o, Operand) else o for name, o in operands.items()}
    out, copies, text = some_out(r, copies, call.main) if call.main else (None, copies, "")
    setting = Setting(r)
    say(setting, text)
    all_memories = list(memories([*copies.values(), out]))
    before = [m.copy() for m in all_memories]
    with setting:
        got = invoke(call.function, copies, call.options, out)
    expect(out is None or got[0] is out.array, "out is not what was returned")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        expect(alike(a, b), f"result {i} differs:", a, "and before:", b)
    for memory, old in zip(all_memories, before, strict=True):
        if out is not None and memory is out.memory:
            wanted = out.in_memory(old)
            wanted.array[...] = out.array
        expect(np.array_equal(memory, old), "memory around out or of an operand has changed")


# ---- Bad arguments ---------------------------------------------------------------------------------------------------

NO_ARRAYS = ["abc", {}, 1j, np.zeros(3, int), np.zeros(2, object), np.array(["a"]), ["a"], print]
BAD = {
    "x": [*NO_ARRAYS, None],
    "rate": [-0.1, 1.5, math.nan, -math.inf, "0.5", None, [0.5], 10**400, 1j],
    "key": [-1, 2**64, 10**30, "a", 1.5, np.zeros(3, np.uint32), [], 1j],
    "offset": [-1, 2**64 + 1, 2**200, 1.5, None, "1"],
    "impl": ["sha", None, 3, [], b"philox"],
    "broadcast_dims": [99, (-99,), 1.5, ("a",), [None], None, 2**70],
    "shape": [-1, (2, -1), 1.5, None, "a", (1.5,)],
    "axis": [99, -99, 1.5, None, "a", 2**70],
    "epsilon": [-1, math.nan, math.inf, "a", None, 10**400, [1], 1j],
    "activation": ["gelu", 1, [], True],
    "mask": [np.ones(3), np.ones((2, 99, 7), bool), "abc", np.ones(3, object)],
    "out": ["abc", [1.0], 1.0, np.zeros(3, int), np.float32(1)],
    "scale": [*NO_ARRAYS[:3], np.ones(4096 * 7), np.zeros(99, complex), [[1.0]]],
    "residual": [*NO_ARRAYS, np.ones((7, 99, 11)), np.ones((7, 99, 11), np.float32)],
}
BAD["dy"] = [*BAD["residual"], None]
BAD["y"] = BAD["residual"]
BAD["bias"] = BAD["scale"]
BAD["mean"] = BAD["var"] = [*BAD["scale"], None]


def self_overlapping(r, like):
    """An out of which elements lie upon each other."""
    long = [d for d, n in enumerate(like.shape) if n > 1]
    if not long or not like.array.size:
        return None
    size, d = like.dtype.itemsize, r.choice(long)
    strides = [size * math.prod(like.shape[k + 1 :]) for k in range(len(like.shape))]
    strides[d] = r.choice((0, size * r.randint(0, max(0, math.prod(like.shape[d + 1 :]) - 1))))
    if d == len(like.shape) - 1:
        strides[d] = 0
    return Operand(allocate(like.array.size * size + 64), like.dtype.newbyteorder("="), like.shape, 0, tuple(strides))


def bad_argument(r, call, say):
    """Calls with one bad argument; False if there is none to be bad."""
    names = [n for n in inspect.signature(call.function).parameters if n in BAD]
    if call.function in (pyreg.batch_norm_backward, pyreg.dropout_backward):
        names = [n for n in names if n != "y" or call.options.get("activation")]
    name = r.choice(names)
    operands = {n: o.copy() if isinstance(o, Operand) else o for n, o in call.operands.items()}
    if name == "out" and (out := self_overlapping(r, operands[call.main])) and r.random() < 0.7:
        value, memory = out.array, [out]
    else:
        value, memory = r.choice(BAD["x" if name == call.main else name]), []
    arguments = {n: o.array if isinstance(o, Operand) else o for n, o in operands.items()} | call.options
    if name == "key":
        arguments.pop("rng", None)
    arguments[name] = value
    if name != "out" and call.main and r.random() < 0.5:
        memory.append(lay_out(r, operands[call.main].dtype.newbyteorder("="), operands[call.main].shape, False))
        arguments["out"] = memory[0].array
    say("but", name, "=", value)
    everything, what = list(memories([*operands.values(), *memory])), f"{call.function.__name__}'s {name}"
    before = [m.copy() for m in everything]
    try:
        call.function(**arguments)
    except (TypeError, ValueError) as error:
        expect(re.search(rf"\b{name}\b", str(error)), f"{what} =", value, "is not named by:", error)
    except Exception as error:
        raise AssertionError(f"{what} = {value!r}: {type(error).__name__}: {error}") from error
    else:
        expect(False, f"{what} =", value, "is no error")
    for memory, old in zip(everything, before, strict=True):
        expect(np.array_equal(memory, old), f"{what} =", value, "has changed something")
    return True


# ---- Dropout ---------------------------------------------------------------------------------------------------------

RATES = [0, 1, 0.5, 0.1, 0.25, 1 / 3, 0.9, 1e-9, 1 - 1e-6, 2.0**-53, 5e-324, math.nextafter(1, 0)]


def some_mask(r, n):
    """rate, key, impl, base and offset of n elements."""
    rate = r.choice(RATES) if r.random() < 0.5 else r.random()
    base = 0 if r.random() < 0.4 else r.choice(BASES)
    offset = 0 if base == 0 and r.random() < 0.6 else base + r.choice((r.randrange(SPAN - n + 1), SPAN - n))
    return rate, r.choice(KEYS), r.choice(IMPLS), base, offset


def some_dims(r, ndim):
    """broadcast_dims, and the same in a set."""
    if ndim == 0 or r.random() < 0.7:
        return (), set()
    dims = [d - ndim if r.random() < 0.3 else d for d in r.sample(range(ndim), r.randint(1, ndim))]
    chosen = {d % ndim for d in dims}
    return (dims[0] if len(dims) == 1 and r.random() < 0.5 else r.choice((tuple, list))(dims)), chosen


def some_key(r, key):
    return key if r.random() < 0.7 else np.array(divmod(key, 2**32), np.uint32)


def dropped(x, keep, rate, scaled=True):
    """What dropout makes of x."""
    zero = x.dtype.type(0)
    x = x.astype(x.dtype.newbyteorder("="))
    if rate in (0, 1):
        return np.where(keep, x, zero)
    wide = x.astype(np.float32) if x.dtype.itemsize == 2 else x
    y = (wide * wide.dtype.type(reference.scale(x.dtype, rate) if scaled else 1)).astype(x.dtype)
    return np.where(keep, y, zero)


def broadcast(shape, dims):
    return tuple(1 if d in dims else n for d, n in enumerate(shape))


def dropout(r, say):
    dtype, shape = r.choice(DTYPES), some_shape(r)
    function, name = r.choice(((pyreg.dropout, "x"), (pyreg.dropout, "x"), (pyreg.dropout_backward, "dy")))
    x = operand(r, dtype, shape, bits=r.random() < 0.7)
    dims, chosen = some_dims(r, len(shape))
    mask_shape = broadcast(shape, chosen)
    rate, key, impl, base, offset = some_mask(r, max(x.array.size, math.prod(mask_shape)))
    options = {"rate": rate, "key": some_key(r, key), "impl": impl, "broadcast_dims": dims, "offset": offset}
    if name == "x" and r.random() < 0.05:
        options["deterministic"], rate = True, 0

    def check(y):
        keep = mask(math.prod(mask_shape), rate, key, impl, base, offset).reshape(mask_shape)
        want = dropped(x.array, keep, rate)
        expect(y.dtype == dtype, "dtype", y.dtype)
        expect(alike(y, want), "y is", y, "wanted", want)

    perform(r, Call(function, {name: x}, options, name, check), say)


def dropout_mask(r, say):
    shape = some_shape(r)
    dims, chosen = some_dims(r, len(shape))
    mask_shape = broadcast(shape, chosen)
    n = math.prod(mask_shape)
    rate, key, impl, base, offset = some_mask(r, n)
    packed = r.random() < 0.5
    given = shape[0] if len(shape) == 1 and r.random() < 0.5 else shape
    options = {"shape": given, "rate": rate, "key": some_key(r, key), "impl": impl, "broadcast_dims": dims}
    options |= {"offset": offset, "packed": packed}

    def check(got):
        want = mask(n, rate, key, impl, base, offset)
        want = np.packbits(want, bitorder="little") if packed else want.reshape(mask_shape)
        expect(alike(got, want), "the mask is", got, "wanted", want)

    perform(r, Call(pyreg.dropout_mask, {}, options, None, check), say)


LAYERS = {  # the dims that share a mask, of so many dims
    "Dropout": lambda ndim: (),
    "Dropout1d": lambda ndim: range(ndim - 1, ndim),
    "Dropout2d": lambda ndim: range(ndim - 2, ndim),
    "Dropout3d": lambda ndim: range(ndim - 3, ndim),
    "DropPath": lambda ndim: range(1, ndim),
    "WordDropout": lambda ndim: (ndim - 1,),
}


def dropout_layer(r, say):
    name = r.choice(list(LAYERS))
    spatial = int(name[7]) if name[-1] == "d" else None
    shape = some_shape(r, least=1)
    dtype, rate, impl = r.choice(DTYPES), r.choice(RATES) if r.random() < 0.5 else r.random(), r.choice(IMPLS)
    options, scaled, inverted = {"impl": impl, "rng": r.getrandbits(32)}, True, r.random() < 0.7
    if spatial:
        shape = tuple(r.randint(1, 5) for _ in range(spatial + r.randint(1, 2)))
    shared = set(LAYERS[name](len(shape)))
    if name == "Dropout":
        options["broadcast_dims"], shared = some_dims(r, len(shape))
    elif name in ("DropPath", "WordDropout") and r.random() < 0.3:
        options["scale_by_keep"] = scaled = False
    options["inverted"] = inverted
    say(f"pyreg.{name}({rate}, {options}), x of shape {shape}")
    layer = getattr(pyreg, name)(rate, **options)
    x, dy = (operand(r, dtype, shape, bits=r.random() < 0.5) for _ in range(2))
    before = [o.memory.copy() for o in (x, dy)]
    training = r.random() < 0.8
    with Setting(r):
        y = layer.train(training)(x.array)
        key = layer.key
        dx = layer.backward(dy.array)
    with Setting(r):
        again = layer.backward(dy.array, out=np.empty(shape, dtype))
    for o, old in zip((x, dy), before, strict=True):
        expect(np.array_equal(o.memory, old), "an operand has changed")
    expect(alike(again, dx), "backward differs with out: ", again, "and", dx)
    for got, o in ((y, x), (dx, dy)):
        if training:
            function = pyreg.dropout if rate < 1 else pyreg.dropout_backward
            mask_shape = broadcast(shape, shared)
            n = math.prod(mask_shape)
            keep = pyreg.dropout_mask(mask_shape, rate, key=key, impl=impl) if n else np.ones(mask_shape, bool)
            want = dropped(o.array, keep, rate, inverted and scaled)
            if inverted and scaled:
                dims = tuple(shared)
                same = function(o.array, rate, key=key, impl=impl, broadcast_dims=dims)
                expect(alike(same, want), "the function gives", same, "wanted", want)
        elif inverted:
            want = o.array
        else:
            want = (o.array.astype(dtype) * dtype.type(1 - rate)).astype(dtype)
        expect(alike(got, want), "the layer gives", got, "wanted", want)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------

# Rounding of results, and of the arithmetic and the statistics; the sums are in double.
OF_RESULT = dict(zip(NAMES, (2.0**-23, 2.0**-52, 2.0**-10, 2.0**-7), strict=True))


def of_arithmetic(dtype, n):
    """Of float64 the sums over n elements lose some digits, too."""
    return 2.0**-49 + of_sums(n) if dtype == F64 else 2.0**-23


def of_sums(n):
    """In double.  Linear in n, because elements that are repeated are rounded in the same direction."""
    return 2.0**-50 + 2.0**-53 * n


def close(what, got, want, bound, trusted=True, which=True):
    """got is within bound of want; where that is not finite, got is the same, or if not `which` another of them."""
    expect(got.shape == want.shape, what, "has shape", got.shape)
    name = got.dtype.name
    wide = got.astype(np.float64)
    bound = bound + np.abs(want) * OF_RESULT[name] + SUBNORMAL[name] * 2
    ok = np.abs(wide - want) <= bound
    ok |= (wide == want) | ((wide != wide) & (want != want) if which else ~np.isfinite(wide) & ~np.isfinite(want))
    if not ok.all():
        # What is added on the way to a number near the largest may be beyond that.
        largest = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028234e38}.get(name, math.inf)
        near = np.abs(want) + bound > largest * (1 if name == "float16" else 0.25)
        ok |= near & (np.abs(wide) >= largest * (1 - OF_RESULT[name])) & (wide * want > 0)
        ok |= ~np.broadcast_to(trusted, ok.shape)
    if not ok.all():
        at = tuple(int(i) for i in np.argwhere(~ok)[0])
        raise AssertionError(
            f"{what}{list(at)} is {wide[at]!r}; wanted {want[at]!r} within {(bound + 0 * want)[at]:.3g}"
        )


class BatchNormCase:
    """What batch_norm, batch_norm_inference and batch_norm_backward are given."""

    def __init__(self, r, masked=True):
        self.dtype, self.shape = r.choice(DTYPES), some_shape(r, least=1)
        self.ndim = len(self.shape)
        self.axis = r.randrange(self.ndim)
        if math.prod(self.shape) == 0 and self.shape[self.axis] != 0:
            self.shape = tuple(n or 2 for n in self.shape)
        self.channels = self.shape[self.axis]
        self.of = F64 if self.dtype == F64 else np.dtype(np.float32)
        self.epsilon = r.choice((1e-5, 1e-3, 1e-12, 0.0 if r.random() < 0.3 else 1.0))
        self.relu = r.random() < 0.3
        self.operands = {"x": operand(r, self.dtype, self.shape)}
        self.options = {"axis": self.axis - self.ndim if r.random() < 0.5 else self.axis, "epsilon": self.epsilon}
        if self.relu:
            self.options["activation"] = "relu"
        self.mask = None
        if masked and r.random() < 0.25 and self.channels:
            self.add_mask(r)

    def add_mask(self, r):
        shape = [1 if r.random() < 0.3 else n for n in self.shape]
        full = stretch(r, "bool", math.prod(shape)).reshape(shape).copy()
        full[tuple(slice(None) if d == self.axis else r.randrange(n) for d, n in enumerate(shape))] = True
        drop = r.choice((0, 0, self.ndim - 1)) if all(n == 1 for n in shape[:-1]) else 0
        shape = tuple(shape[drop:])
        laid = lay_out(r, np.dtype(bool), shape, repeat=False)
        laid.array[...] = full.reshape(shape)
        self.operands["mask"], self.mask = laid, full

    def add_statistic(self, r, name, numbers=None, optional=False):
        """A value a channel, in some dtype and layout, of which float32 is one that may lose digits."""
        if optional and r.random() < 0.4:
            setattr(self, name, None)
            return
        kind = r.random()
        dtype = self.of if kind < 0.8 else r.choice(DTYPES[:2]) if numbers is None else F64
        n = self.channels
        if numbers is None:
            numbers = stretch(r, "normal", n) * 0.5 + (name in ("scale", "var")) * 1.5
        if name == "var":
            numbers = np.abs(numbers)
        made = lay_out(r, dtype, (n,), repeat=False) if kind > 0.4 else None
        if made is None:
            made = Operand(allocate(n * dtype.itemsize + 8), dtype, (n,), 0, (dtype.itemsize,))
        made.array[...] = numbers
        self.operands[name] = made
        setattr(self, name, made.array.astype(self.of))

    def statistics(self):
        return reference.batch_statistics(self.operands["x"].array, self.axis, self.mask)

    def by_channel(self, values):
        return reference._by_channel(values, self.operands["x"].array, self.axis)

    def others(self):
        return tuple(d for d in range(self.ndim) if d != self.axis)

    def trusted(self, mean, var):
        """Channels of which the definition says something: they can be divided by their deviation, which can be told
        from the rounding of x."""
        eps = var + self.epsilon
        smallest = 1e-280 if self.dtype == F64 else 1e-60
        return (eps > smallest) & np.isfinite(var) & ((var == 0) | (np.abs(mean) < 2e7 * np.sqrt(var)))


def batch_norm(r, say):
    c = BatchNormCase(r)
    x = c.operands["x"].array
    c.add_statistic(r, "scale", optional=True)
    c.add_statistic(r, "bias", optional=True)
    residual = None
    if r.random() < 0.3:
        c.operands["residual"] = operand(r, c.dtype, c.shape)
        residual = c.operands["residual"].array

    def check(y, mean, var):
        expect(y.dtype == c.dtype and mean.dtype == var.dtype == c.of, "dtypes", y.dtype, mean.dtype, var.dtype)
        want_mean, want_var, n = c.statistics()
        check_statistics(c, x, mean, var, want_mean, want_var, n)
        check_y(c, x, y, want_mean, want_var, residual)

    perform(r, Call(pyreg.batch_norm, c.operands, c.options, "x", check), say)


def check_statistics(c, x, mean, var, want_mean, want_var, n):
    eps = of_arithmetic(c.dtype, x.size)
    largest = largest_of(c, x)
    usable = np.isfinite(want_var) | ~np.isfinite(largest)
    finite = np.isfinite(want_mean) & np.isfinite(want_var)
    expect(not np.isfinite(mean + var)[~finite & usable].any(), "mean and var are finite:", mean, var)
    usable &= finite
    close("mean", mean, want_mean, eps * np.abs(want_mean) + rounding_of_sums(c, x), usable)
    ratio = np.abs(want_mean) / np.sqrt(np.maximum(want_var, 1e-300))
    within = 4e-7 if c.of != F64 else 2 * eps
    close(
        "var",
        var,
        want_var,
        within * want_var + (2.0**-49 * largest) ** 2,
        usable & ((want_var == 0) | (ratio < 1e7)),
    )


def rounding_of_sums(c, x):
    """How far the mean of a channel can be off, in double."""
    return largest_of(c, x) * of_sums(x.size)


def largest_of(c, x):
    """Of what counts, in each channel."""
    wide = np.abs(x.astype(np.float64))
    return (wide if c.mask is None else np.where(c.mask, wide, 0)).max(c.others(), initial=0)


def check_y(c, x, y, mean, var, residual, inference=False):
    want = reference.normalise(x, mean, var, c.scale, c.bias, c.axis, c.epsilon, "relu" if c.relu else None, residual)
    eps = of_arithmetic(c.dtype, x.size)
    gain = np.abs(c.by_channel((1 if c.scale is None else c.scale) / np.sqrt(var + c.epsilon)))
    wide, by_mean = x.astype(np.float64), c.by_channel(mean)
    bound = 4 * eps * gain * np.abs(wide - by_mean)
    bound = bound + gain * (np.abs(by_mean) * 2.0**-50 if inference else c.by_channel(rounding_of_sums(c, x)))
    if c.bias is not None:
        bound = bound + 3 * eps * np.abs(c.by_channel(c.bias))
    if residual is not None:
        bound = bound + 3 * eps * np.abs(residual.astype(np.float64))
    trusted = np.isfinite(var) & (var + c.epsilon > 0) if inference else c.trusted(mean, var)
    bad = ~np.isfinite(mean) if not inference else False  # NaN or Inf in a channel of x: then all of it is NaN
    close("y", y, want, bound, c.by_channel(trusted | bad) != 0)


def batch_norm_inference(r, say):
    c = BatchNormCase(r, masked=False)
    x = c.operands["x"].array
    for name in ("mean", "var"):
        c.add_statistic(r, name)
    for name in ("scale", "bias"):
        c.add_statistic(r, name, optional=True)
    residual = None
    if r.random() < 0.3:
        c.operands["residual"] = operand(r, c.dtype, c.shape)
        residual = c.operands["residual"].array

    def check(y):
        expect(y.dtype == c.dtype, "dtype", y.dtype)
        check_y(c, x, y, c.mean.astype(np.float64), c.var.astype(np.float64), residual, inference=True)

    perform(r, Call(pyreg.batch_norm_inference, c.operands, c.options, "x", check), say)


def batch_norm_backward(r, say):
    c = BatchNormCase(r)
    x = c.operands["x"].array
    c.operands["dy"] = operand(r, c.dtype, c.shape)
    dy, y = c.operands["dy"].array, None
    if c.relu:
        c.operands["y"] = operand(r, c.dtype, c.shape)
        y = c.operands["y"].array
    c.add_statistic(r, "scale", optional=True)
    mean, var, n = c.statistics()
    c.add_statistic(r, "mean", mean)
    c.add_statistic(r, "var", var)

    def check(*got):
        expect(len(got) == 3 + c.relu, len(got), "results")
        expect(got[0].dtype == c.dtype and got[1].dtype == got[2].dtype == c.of, "dtypes", [g.dtype for g in got])
        check_gradients(c, x, dy, y, got, mean, var, n)

    perform(r, Call(pyreg.batch_norm_backward, c.operands, c.options, "x", check), say)


def check_gradients(c, x, dy, y, got, mean, var, n):
    activation = "relu" if c.relu else None
    want = reference.batch_norm_backward(dy, x, c.scale, c.axis, c.epsilon, c.mask, activation, y)
    if c.relu:
        close("dresidual", got[3], want[3], 0)
    eps, others, in_sums = of_arithmetic(c.dtype, x.size), c.others(), of_sums(x.size)
    g = np.abs(want[3])
    xhat = np.abs(reference.normalise(x, mean, var, axis=c.axis, epsilon=c.epsilon))
    if c.mask is not None:
        xhat = np.where(c.mask | np.isfinite(xhat), xhat, 0)
    doubtful = c.by_channel(rounding_of_sums(c, x) / np.sqrt(var + c.epsilon)) + 4 * eps * xhat
    of_sum, of_product, unsure = (a.sum(others) for a in (g, g * xhat, g * doubtful))
    trusted = c.trusted(mean, var) | ~np.isfinite(mean)
    close("dbias", got[2], want[2], in_sums * of_sum + eps * np.abs(want[2]), which=False)
    close("dscale", got[1], want[1], in_sums * of_product + unsure, trusted, which=False)
    gain = np.abs((1 if c.scale is None else c.scale) / np.sqrt(var + c.epsilon))
    limit = 1e300 if c.dtype == F64 else 1e30  # of products on the way
    on_the_way = np.maximum(gain, xhat.max(others, initial=1)) * gain * g.max(others, initial=0)
    trusted &= ~(on_the_way > limit)
    in_sums = max(in_sums / eps, 1)
    through = in_sums * c.by_channel(of_sum / n) + xhat * c.by_channel((in_sums * of_product + unsure / eps) / n)
    through = through + c.by_channel(of_product / n) * (doubtful / eps)
    if c.mask is not None:
        through = np.where(c.mask, through, 0)
    close("dx", got[0], want[0], 8 * eps * c.by_channel(gain) * (g + through), c.by_channel(trusted) != 0, which=False)


def batch_norm_layer(r, say):
    c = BatchNormCase(r)
    x, dy = c.operands["x"].array, operand(r, c.dtype, c.shape).array
    momentum = r.choice((0.0, 0.9, 0.99, 1.0))
    use_scale, use_bias, training = r.random() < 0.8, r.random() < 0.8, r.random() < 0.7
    options = {"axis": c.options["axis"], "epsilon": c.epsilon}
    say(f"pyreg.BatchNorm({c.channels}, {options}, momentum={momentum})", c.operands)
    layer = pyreg.BatchNorm(
        c.channels, momentum=momentum, use_scale=use_scale, use_bias=use_bias, dtype=c.of, **options
    )
    for name in ("scale", "bias"):
        if getattr(layer, name) is not None:
            getattr(layer, name)[:] = stretch(r, "normal", c.channels)
        setattr(c, name, getattr(layer, name))
    layer.mean[:], layer.var[:] = stretch(r, "normal", c.channels), stretch(r, "normal", c.channels) ** 2 + 0.1
    old = layer.mean.copy(), layer.var.copy()
    layer.train(training)
    given = c.operands["mask"].array if training and c.mask is not None else None
    with Setting(r):
        y = layer(x, mask=given)
        dx = layer.backward(dy)
    c.relu = False
    if training:
        want_y, mean, var = pyreg.batch_norm(x, c.scale, c.bias, mask=given, **options)
        want_dx, dscale, dbias = pyreg.batch_norm_backward(dy, x, mean, var, c.scale, mask=given, **options)
        for name, new, was in (("mean", mean, old[0]), ("var", var, old[1])):
            stepped = (momentum * was + (1 - momentum) * new).astype(c.of)
            expect(alike(getattr(layer, name), stepped), f"{name} has gone to {getattr(layer, name)}, not to {stepped}")
        grads = {"scale": dscale, "bias": dbias}
    else:
        c.mask = None
        check_y(c, x, y, *(a.astype(np.float64) for a in old), None, inference=True)
        want_y = pyreg.batch_norm_inference(x, *old, c.scale, c.bias, **options)
        want_dx = pyreg.batch_norm_inference(dy, np.zeros_like(old[0]), old[1], c.scale, **options)
        grads = None
    expect(alike(y, want_y), "the layer gives", y, "the function", want_y)
    expect(alike(dx, want_dx), "the layer's backward gives", dx, "the function", want_dx)
    for name in ("scale", "bias"):
        expect((name in layer.grads) == (getattr(c, name) is not None), "grads has", list(layer.grads))
        if grads and name in layer.grads:
            expect(alike(layer.grads[name], grads[name]), f"grads of {name} is", layer.grads[name], "not", grads[name])


# ---- Cases -----------------------------------------------------------------------------------------------------------

KINDS = [dropout] * 9 + [dropout_mask] * 2 + [dropout_layer] * 3 + [batch_norm] * 4 + [batch_norm_inference] * 3
KINDS += [batch_norm_backward] * 4 + [batch_norm_layer] * 2


def run_case(number, say=lambda *_: None):
    """Raises an error if something is wrong."""
    r = random.Random(number)
    r.choice(KINDS)(r, say)


def find(number, run_case=run_case):
    """What is wrong with a case, in one line; None if nothing is."""
    try:
        run_case(number)
    except AssertionError as error:
        return " ".join(str(error).split())[:400]
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({os.path.basename(at.filename)}:{at.lineno})"[:400]


# ---- Workers: processes that may end or hang -------------------------------------------------------------------------

LIMIT = 300  # seconds without a case done: it hangs


def cases_of(jax):
    """run_case, of NumPy or of JAX."""
    if not jax:
        return run_case
    import fuzz_jax

    return fuzz_jax.run_case


def work(jax, path, first, step, end):
    """Runs cases; says in a file that the parent reads along which one it is at, and prints what is wrong."""
    faulthandler.enable()
    run_case = cases_of(jax)
    with open(path, "r+b") as file:
        at = mmap.mmap(file.fileno(), 8)
    with np.errstate(all="ignore"):
        for number in range(first, end, step):
            at[:] = struct.pack("q", number)
            if problem := find(number, run_case):
                print(number, problem, flush=True)
    at[:] = struct.pack("q", end)


class Worker:
    """Every step-th case from first on; starts again behind a case that it did not survive."""

    def __init__(self, path, first, step, end, jax=False):
        self.path, self.step, self.end, self.jax = path, step, end, jax
        self.file = open(path, "w+b")  # noqa: SIM115
        self.begin(first)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end_process()
        self.file.close()

    def end_process(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def begin(self, number):
        self.file.seek(0)
        self.file.write(struct.pack("q", number))
        self.file.flush()
        self.seen, self.since = number, time.monotonic()
        command = [sys.executable, os.path.abspath(__file__), *["--jax"] * self.jax]
        command += ["--work", self.path, *map(str, (number, self.step, self.end))]
        self.errors = open(self.path + ".errors", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        os.set_blocking(self.process.stdout.fileno(), False)

    def at(self):
        return struct.unpack("q", os.pread(self.file.fileno(), 8, 0))[0]

    def poll(self):
        """Pairs of a case and what is wrong with it; and whether all is done."""
        found, code, at = [], self.process.poll(), self.at()
        if at != self.seen:
            self.seen, self.since = at, time.monotonic()
        hangs = code is None and time.monotonic() - self.since > LIMIT
        if hangs:
            self.process.kill()
            code = self.process.wait()
        for line in self.process.stdout:
            number, problem = line.split(" ", 1)
            found.append((int(number), problem.strip()))
        if code is None or at >= self.end:
            return found, code is not None
        self.errors.seek(0)
        said = [line.strip() for line in self.errors if "fuzz.py" in line or "Error" in line or "Fatal" in line]
        found.append((at, f"{'hangs' if hangs else f'ends the process ({code})'}: {'; '.join(said)[:300]}"))
        self.end_process()
        self.begin(at + self.step)
        return found, at + self.step >= self.end


def fuzz(first, cases, jobs, jax, show):
    """What is wrong with cases first, first + 1, ...: pairs of number and problem.

    Calls show(done, None) now and then, and show(None, pair) at once.
    """
    found, end = [], first + cases
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workers = [stack.enter_context(Worker(f"{folder}/{j}", first + j, jobs, end, jax)) for j in range(jobs)]
        running = list(workers)
        while running:
            time.sleep(0.1)
            for worker in list(running):
                new, done = worker.poll()
                if done:
                    running.remove(worker)
                for problem in new:
                    show(None, problem)
                found += new
            show(sum((min(w.at(), end) - first) // jobs for w in workers), None)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="another one: other cases")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at once")
    parser.add_argument("--case", type=int, help="one case alone, in words")
    parser.add_argument("--jax", action="store_true", help="pyreg.jax under stacks of transforms, instead of NumPy")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.jax, arguments.work[0], *map(int, arguments.work[1:]))
        return 0
    if arguments.case is not None:
        faulthandler.enable()
        with np.errstate(all="ignore"):
            cases_of(arguments.jax)(arguments.case, lambda *words: print(*words, flush=True))
        print("nothing is wrong")
        return 0

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(highlight=False, soft_wrap=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:,.0f} a second"), TimeElapsedColumn()
    start, first = time.monotonic(), arguments.seed << 32
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=arguments.cases, rate=0)

        def show(done, found):
            if found:
                command = f"{os.path.relpath(sys.executable)} tests/fuzz.py{' --jax' * arguments.jax} --case {found[0]}"
                console.print(f"{command}\n    {found[1]}", markup=False)
            else:
                progress.update(task, completed=done, rate=done / (time.monotonic() - start))

        found = fuzz(first, arguments.cases, arguments.jobs, arguments.jax, show)
    rate = arguments.cases / (time.monotonic() - start)
    print(f"{arguments.cases} cases, {rate:.0f} a second with {arguments.jobs} jobs; {len(found)} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
