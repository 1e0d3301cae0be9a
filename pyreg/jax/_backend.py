"""How an op reaches the CPU: XLA's foreign function interface, plain JAX operations, or a callback to NumPy."""

import os
import threading
import warnings

import jax

from pyreg import _core

VARIABLE = "PYREG_JAX_BACKEND"
BACKENDS = ("ffi", "jax", "callback")  # the first that works, but a callback only if it is asked for

_lock = threading.Lock()
_chosen: tuple[str, str] | None = None  # the backend, and why it is that one


def backend() -> str:
    """The backend in use, one of BACKENDS; chosen at the first call, which is the first time that an op is lowered.

    Handlers are registered then and not when pyreg is imported: where XLA refuses one before it has started, it does
    not start at all.
    """
    global _chosen
    with _lock:
        if _chosen is None:
            _chosen = _choose(os.environ.get(VARIABLE, "auto"))
        return _chosen[0]


def describe() -> str:
    """What :func:`pyreg.show_config` says about it."""
    return ": ".join(_chosen) if _chosen else "not used yet"


def ffi_targets() -> list[str]:
    """The names under which exported programs call pyreg's kernels; they stay as they are.

    `jax.export` wants to be told of them, and whoever runs the program must have lowered an op before, or registered
    them.

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
    """Makes the handlers known to XLA.  Returns what went wrong, or None."""
    handlers = _core.ffi_handlers()
    if not handlers:
        return "pyreg was built without XLA's headers"
    try:
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as error:  # whatever it is, JAX and the other ops must go on
        return f"XLA refused its handler ({str(error).splitlines()[0]})"
    return None
