"""Drop-ins for Flax's nnx: the same arguments, state, random streams and numbers, computed by pyreg's kernels.

Each class is a subclass of Flax's that changes the computation only.  Where there is nothing for a kernel to do, or
something to complain about, Flax's own code answers.
"""

from pyreg._extras import needs as _needs

with _needs("flax", "jax", "flax"):
    from pyreg.nnx._attention import dot_product_attention
    from pyreg.nnx._attention import philox_attention as _philox_attention  # noqa: F401  # its name in older pickles
    from pyreg.nnx._convert import convert, revert
    from pyreg.nnx._layers import BatchNorm, Dropout, Dropout1d, Dropout2d, Dropout3d, DropPath, WordDropout

__all__ = [
    "BatchNorm",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "WordDropout",
    "convert",
    "dot_product_attention",
    "revert",
]


def __dir__() -> list[str]:
    return __all__


for _name in __all__:
    globals()[_name].__module__ = __name__  # as users and pickles know them
