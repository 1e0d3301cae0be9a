"""Keras 3 on its backends jax and torch: layers of Keras's own classes whose numbers pyreg's kernels compute.

Configuration, weights, masks and seed generators are Keras's, and so is what is saved: files of models load with and
without pyreg.  Where there is nothing for a kernel to do, or something to complain about, Keras's own code answers.
"""

from pyreg._extras import needs as _needs

with _needs("keras", "keras"):
    from pyreg.keras._convert import convert, revert
    from pyreg.keras._layers import BatchNormalization, Dropout, SpatialDropout1D, SpatialDropout2D, SpatialDropout3D

__all__ = [
    "BatchNormalization",
    "Dropout",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "convert",
    "revert",
]


def __dir__() -> list[str]:
    return __all__


for _name in __all__:
    globals()[_name].__module__ = __name__  # as users know them
