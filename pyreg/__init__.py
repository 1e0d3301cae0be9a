"""Regularisation kernels for training on CPUs: dropout at the speed of a copy, and the same numbers as Flax."""

from pyreg import _load as _load  # before all that imports _core
from pyreg._config import show_config
from pyreg._ops import (
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    dropout,
    dropout_backward,
    dropout_mask,
    get_num_threads,
    num_threads,
    set_num_threads,
)
from pyreg._version import __version__
from pyreg.channelwise import Dropout1d, Dropout2d, Dropout3d, DropPath, WordDropout
from pyreg.layers import BatchNorm, Dropout

__all__ = [
    "BatchNorm",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "WordDropout",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "dropout",
    "dropout_backward",
    "dropout_mask",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
    "show_config",
]


def __dir__() -> list[str]:
    return __all__
