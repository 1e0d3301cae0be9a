"""JAX ops: dropout and batch-norm under every transform, and a faster jax.random."""

from pyreg.jax import _backend
from pyreg.jax._backend import ffi_targets as ffi_targets
from pyreg.jax._backend import register as register
from pyreg.jax._batch_norm import batch_norm as batch_norm
from pyreg.jax._batch_norm import batch_norm_inference as batch_norm_inference
from pyreg.jax._dropout import dropout as dropout
from pyreg.jax._random import accelerate_random as accelerate_random

_backend.register_if_safe()
