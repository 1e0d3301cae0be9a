"""A faster CPU lowering of JAX's Threefry2x32, which all of ``jax.random`` draws from."""

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from pyreg.jax import _compat

__all__ = ["accelerate_random", "threefry2x32"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry2x32(k0: jax.Array, k1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry2x32 with 20 rounds (Salmon et al., SC 2011), without a loop, so that XLA fuses it with what follows."""
    keys = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (lax.shift_left(x1, np.uint32(r)) | lax.shift_right_logical(x1, np.uint32(32 - r)))
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + (keys[(i + 2) % 3] + np.uint32(i + 1))
    # Divided by 1, which only LLVM sees, and drops.  XLA takes a division for expensive and does not fuse it where it
    # would be computed again for each element of a broadcast: 2000 draws added to 2000 rows took 11 ms, now 2.4.
    one = lax.shift_right_logical(lax.population_count(k0), np.uint32(6)) + np.uint32(1)
    return x0 // one, x1 // one


# ---- Switching -------------------------------------------------------------------------------------------------------

_clear_caches: Callable[[], None] = jax.clear_caches  # it has no type hints
_lock = threading.Lock()
_calls: set[object] = set()  # of accelerate_random, that are not undone
_restore: Callable[[], None]
_warned = False


def _switch() -> Callable[[], None] | None:
    """Register the lowering.  Returns what undoes it; None, after a warning, where JAX has not the names for that."""
    global _warned
    try:
        from jax.extend.random import threefry2x32_p
        from jax.interpreters import mlir

        rules = _compat.cpu_lowerings()
        stock = rules[threefry2x32_p]
        # For all sizes: with JAX's loop kept for keys, a model of 12 layers compiled no faster, and ran slower.
        # inline=False: traced once for each shape in a program, not once for each call.
        lowering = mlir.lower_fun(threefry2x32, multiple_results=True)
        mlir.register_lowering(threefry2x32_p, lowering, platform="cpu", inline=False)
        ours = rules[threefry2x32_p]
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        if not _warned:
            _warned = True
            warnings.warn(
                f"accelerate_random does nothing: jax {jax.__version__} lacks what it needs ({error}); "
                "jax.random works as before",
                stacklevel=3,
            )
        return None

    def restore() -> None:
        if rules.get(threefry2x32_p) is ours:  # else someone has registered another since
            rules[threefry2x32_p] = stock
            _clear_caches()

    _clear_caches()
    return restore


class _Handle:
    """What :func:`accelerate_random` returns."""

    def __init__(self) -> None:
        self._call = object()  # the same one in a copy of the handle

    def undo(self) -> None:
        """Take this call back.  JAX's own lowering returns with the last one; calling it again does nothing."""
        with _lock:
            if self._call in _calls:
                _calls.remove(self._call)
                if not _calls:
                    _restore()

    def __deepcopy__(self, memo: Any) -> "_Handle":
        return copy.copy(self)

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.undo()


def accelerate_random() -> _Handle:
    """Make all of ``jax.random`` faster on CPUs, with the same bits.

    JAX compiles its generator, Threefry2x32, on CPUs to a loop whose every round goes through memory.  This registers
    the 20 rounds written out, which XLA fuses with what uses the bits: 4 million draws of ``jax.random.bernoulli`` took
    a twentieth of the time, of ``uniform`` a ninth, of ``normal`` a quarter to a third (the rest of it is the inverse
    error function).  Keys of other generators, and other platforms, are not touched.

    Returns
    -------
    handle
        ``handle.undo()`` takes it back.  Also a context manager, which does that at its end.  Where several handles are
        active, the last one undone brings JAX's own lowering back.

    Notes
    -----
    Switching on or off calls ``jax.clear_caches()``, so that every jitted function is compiled anew at its next call;
    so call it once, at the start.  What ``jax.jit(f).lower(...).compile()`` has returned stays as it was compiled.

    XLA now computes the bits where they are used, which is not always faster: ``jax.random.categorical`` and programs
    that gather from fresh draws or sum them with ``cumsum`` took up to twice as long.

    JAX has no public way to read the lowering that is to be restored.  Where the private one is missing, a warning says
    so and nothing changes.

    Examples
    --------
    >>> import jax, pyreg.jax
    >>> with pyreg.jax.accelerate_random():
    ...     x = jax.random.normal(jax.random.key(0), (1000,))
    """
    global _restore
    handle = _Handle()
    with _lock:
        if not _calls:
            restore = _switch()
            if restore is None:
                return handle
            _restore = restore
        _calls.add(handle._call)
    return handle
