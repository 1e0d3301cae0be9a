"""How an op reaches the CPU: XLA's foreign function interface, plain JAX operations, or a callback to Python.

The callback shows how little a fallback takes that calls the kernels without XLA's interface.  It copies operands and
results, holds the GIL, and waits for ever on large arrays where XLA has one thread: only who asks for it gets it.
"""

import os
import re
import threading
import warnings
from pathlib import Path

import jax

from pyreg import _core

VARIABLE = "PYREG_JAX_BACKEND"
BACKENDS = ("ffi", "jax", "callback")  # by default the first that works, but not the last
THREADS_VARIABLE = "PYREG_JAX_THREADS"
THREADS = ("xla", "pyreg")  # whose threads help in a call from XLA; by default the first

_lock = threading.Lock()
_chosen: tuple[str, str] | None = None  # the backend, and why it is that one
_registered = False


def backend() -> str:
    """The backend in use, one of BACKENDS; chosen at the first call, which is the first time that an op is lowered."""
    global _chosen
    with _lock:
        if _chosen is None:
            _chosen = _choose(os.environ.get(VARIABLE) or "auto")
        return _chosen[0]


def register() -> None:
    """Make pyreg's kernels known to XLA, so that this process can run programs that another one compiled or exported.

    ``import pyreg.jax`` does it where it is sure that XLA takes them, and lowering an op does it, too.  Calling it
    again does nothing.

    Raises
    ------
    RuntimeError
        If XLA refuses pyreg's handlers; ops then compute with JAX operations.

    Notes
    -----
    XLA refuses kernels that were built for a newer interface than its own.  If it has not started yet it then does not
    start at all: "Unable to initialize backend 'cpu'".

    Examples
    --------
    >>> import pyreg.jax
    >>> pyreg.jax.register()
    """
    with _lock:
        problem = _register()
    if problem is not None:
        raise RuntimeError(f"programs that call pyreg's kernels cannot run here, because {problem}")


def register_if_safe() -> None:
    """At import: where XLA cannot refuse, because its interface is as new as the one that the kernels are built for."""
    ours, theirs = _core.ffi_api(), _api_of_xla()
    if theirs is not None and ours[0] == theirs[0] and ours[1] <= theirs[1]:
        with _lock:
            _register()


def _api_of_xla() -> tuple[int, int] | None:
    """The version of the running XLA's interface, as the header that comes with it says; None where there is none."""
    try:
        text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    except OSError:
        return None
    numbers = [re.search(rf"^#define XLA_FFI_API_{part} (\d+)$", text, re.MULTILINE) for part in ("MAJOR", "MINOR")]
    return (int(numbers[0][1]), int(numbers[1][1])) if numbers[0] and numbers[1] else None


def describe() -> str:
    """What :func:`pyreg.show_config` says about it."""
    return ": ".join(_chosen) if _chosen else "not used yet"


def ffi_targets() -> list[str]:
    """The names under which exported programs call pyreg's kernels; they stay as they are.

    `jax.export` wants to be told of them; whoever runs the program has to import `pyreg.jax`, or, where that is not
    enough, to call :func:`pyreg.jax.register`.

    Returns
    -------
    list of str

    Examples
    --------
    >>> import jax, pyreg.jax
    >>> checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in pyreg.jax.ffi_targets()]
    >>> f = jax.jit(lambda x, key: pyreg.jax.dropout(x, key=key))
    >>> exported = jax.export.export(f, disabled_checks=checks)(jax.numpy.ones(8), jax.random.key(0))
    """
    return list(_core.ffi_handlers())


def _choose(wanted: str) -> tuple[str, str]:
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"{VARIABLE} is {wanted!r}; wanted auto, {', '.join(BACKENDS)}")
    if wanted in ("jax", "callback"):
        return wanted, f"by {VARIABLE}"
    problem = _register()
    if problem is None:
        return "ffi", "XLA calls pyreg's kernels"
    if wanted == "ffi":
        raise RuntimeError(f"{VARIABLE} is 'ffi', but {problem}")
    warnings.warn(f"pyreg.jax computes with slower JAX operations, because {problem}", RuntimeWarning, stacklevel=2)
    return "jax", problem


def _register() -> str | None:
    """Makes the handlers known to XLA, once.  Returns what went wrong, or None."""
    global _registered
    handlers = _core.ffi_handlers()
    if _registered:
        return None
    threads = os.environ.get(THREADS_VARIABLE) or THREADS[0]
    if threads not in THREADS:
        raise ValueError(f"{THREADS_VARIABLE} is {threads!r}; wanted {' or '.join(THREADS)}")
    _core.ffi_use_xla_pool(threads == "xla")
    try:
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as error:  # whatever it is, JAX and the other ops must go on
        return f"XLA refused its handler ({str(error).splitlines()[0]})"
    _registered = True
    return None
