"""JAX ops: dropout and batch-norm under every transform, and a faster jax.random."""

from pyreg._extras import needs as _needs

with _needs("jax", "jax"):
    from pyreg.jax import _backend
    from pyreg.jax._backend import ffi_targets, register
    from pyreg.jax._batch_norm import batch_norm, batch_norm_inference
    from pyreg.jax._dropout import dropout
    from pyreg.jax._random import accelerate_random

__all__ = ["accelerate_random", "batch_norm", "batch_norm_inference", "dropout", "ffi_targets", "register"]


def __dir__() -> list[str]:
    return __all__


_backend.register_if_safe()
