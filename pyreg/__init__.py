"""Regularisation kernels for training on CPUs: dropout at the speed of a copy, and the same numbers as Flax."""

from pyreg import _load as _load  # before all that imports _core
from pyreg._config import show_config as show_config
from pyreg._ops import batch_norm as batch_norm
from pyreg._ops import batch_norm_backward as batch_norm_backward
from pyreg._ops import batch_norm_inference as batch_norm_inference
from pyreg._ops import dropout as dropout
from pyreg._ops import dropout_backward as dropout_backward
from pyreg._ops import dropout_mask as dropout_mask
from pyreg._ops import get_num_threads as get_num_threads
from pyreg._ops import num_threads as num_threads
from pyreg._ops import set_num_threads as set_num_threads
from pyreg._version import __version__ as __version__
from pyreg.channelwise import Dropout1d as Dropout1d
from pyreg.channelwise import Dropout2d as Dropout2d
from pyreg.channelwise import Dropout3d as Dropout3d
from pyreg.channelwise import DropPath as DropPath
from pyreg.channelwise import WordDropout as WordDropout
from pyreg.layers import BatchNorm as BatchNorm
from pyreg.layers import Dropout as Dropout
