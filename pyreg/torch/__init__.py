"""PyTorch on CPUs: dropout, batch-norm and attention that a model gets by one line."""

from pyreg.torch._accelerate import Accelerated as Accelerated
from pyreg.torch._accelerate import accelerate as accelerate
from pyreg.torch._batch_norm import batch_norm as batch_norm
from pyreg.torch._functional import dropout as dropout
from pyreg.torch._functional import dropout1d as dropout1d
from pyreg.torch._functional import dropout2d as dropout2d
from pyreg.torch._functional import dropout3d as dropout3d
from pyreg.torch._functional import scaled_dot_product_attention as scaled_dot_product_attention
from pyreg.torch._modules import BatchNorm1d as BatchNorm1d
from pyreg.torch._modules import BatchNorm2d as BatchNorm2d
from pyreg.torch._modules import BatchNorm3d as BatchNorm3d
from pyreg.torch._modules import Dropout as Dropout
from pyreg.torch._modules import Dropout1d as Dropout1d
from pyreg.torch._modules import Dropout2d as Dropout2d
from pyreg.torch._modules import Dropout3d as Dropout3d
from pyreg.torch._modules import convert as convert
from pyreg.torch._modules import revert as revert
from pyreg.torch._transformers import attention_forward as attention_forward
from pyreg.torch._transformers import register_attention as register_attention

for _thing in list(globals().values()):
    if getattr(_thing, "__module__", "").startswith(f"{__name__}._"):
        _thing.__module__ = __name__  # as users and pickles know it
