"""JAX ops: dropout and batch-norm under every transform."""

from pyreg.jax._dropout import dropout as dropout
