"""PyTorch on CPUs: dropout, batch-norm and attention that a model gets by one line."""

from pyreg._extras import needs as _needs

with _needs("torch", "torch"):
    from pyreg.torch._accelerate import Accelerated, accelerate
    from pyreg.torch._batch_norm import batch_norm
    from pyreg.torch._functional import dropout, dropout1d, dropout2d, dropout3d, scaled_dot_product_attention
    from pyreg.torch._modules import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        Dropout,
        Dropout1d,
        Dropout2d,
        Dropout3d,
        convert,
        revert,
    )
    from pyreg.torch._transformers import attention_forward, register_attention

__all__ = [
    "Accelerated",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "accelerate",
    "attention_forward",
    "batch_norm",
    "convert",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "register_attention",
    "revert",
    "scaled_dot_product_attention",
]


def __dir__() -> list[str]:
    return __all__


for _name in __all__:
    globals()[_name].__module__ = __name__  # as users and pickles know them
