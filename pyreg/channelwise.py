"""NumPy layers that drop whole channels, samples or words: Dropout with a mask that is shared along some dims."""

import numpy as np

from pyreg import _arguments as arg
from pyreg._arguments import Dims, Impl
from pyreg.layers import Dropout

__all__ = ["DropPath", "Dropout1d", "Dropout2d", "Dropout3d", "WordDropout"]


# ---- Channels --------------------------------------------------------------------------------------------------------


class _ChannelDropout(Dropout):
    _settings = ("rate", "axis", "impl", "inverted")
    _spatial: int

    def __init__(
        self,
        rate: float = 0.5,
        *,
        axis: int = 1,
        rng: int | np.random.Generator | None = None,
        impl: Impl = "philox",
        inverted: bool = True,
    ) -> None:
        super().__init__(rate, rng=rng, impl=impl, inverted=inverted)
        arg.as_channel_axis(axis, self._spatial)
        self.axis = axis

    def _shared_dims(self, ndim: int) -> Dims:
        return arg.dims_of_channel(ndim, self.axis, self._spatial)


class Dropout1d(_ChannelDropout):
    """Dropout of whole channels of sequences, as :class:`torch.nn.Dropout1d`.

    Inputs have shape (N, C, L), or (C, L) without a batch; any other number of dims is a ValueError, in evaluation too.
    All else is as in :class:`pyreg.Dropout`.

    Parameters
    ----------
    rate : float
        Probability of dropping a channel of a sample, in [0, 1].
    axis : int
        The dim that counts the channels in a batch: -1 for (N, L, C) and (L, C).
    rng, impl, inverted
        As in :class:`pyreg.Dropout`.

    Raises
    ------
    TypeError, ValueError
        As :class:`pyreg.Dropout`, or if ``axis`` is no dim of such an input.

    Notes
    -----
    Tompson et al., "Efficient object localization using convolutional networks", 2015: neighbours within a channel are
    so much alike that dropping single ones hides nothing.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> layer = pyreg.Dropout1d(0.5, rng=5)
    >>> layer(np.ones((1, 4, 3), np.float32))
    array([[[2., 2., 2.],
            [0., 0., 0.],
            [0., 0., 0.],
            [2., 2., 2.]]], dtype=float32)
    """

    _spatial = 1


class Dropout2d(_ChannelDropout):
    """Dropout of whole channels of images, as :class:`torch.nn.Dropout2d`.

    Inputs have shape (N, C, H, W), or (C, H, W) without a batch.  PyTorch's layer still takes three dims for (N, C, L),
    warns, and announces (C, H, W); for (N, C, L) there is :class:`pyreg.Dropout1d`, which has the rest of the manual.

    Parameters
    ----------
    rate, rng, impl, inverted
        As in :class:`pyreg.Dropout1d`.
    axis : int
        The dim that counts the channels in a batch: -1 for (N, H, W, C) and (H, W, C).

    Raises
    ------
    TypeError, ValueError
        As :class:`pyreg.Dropout`, or if ``axis`` is no dim of such an input.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> images = np.ones((8, 28, 28, 16), np.float32)
    >>> y = pyreg.Dropout2d(0.25, axis=-1, rng=0)(images)
    >>> channels = y.reshape(8, -1, 16)
    >>> bool((channels == channels[:, :1]).all())
    True
    """

    _spatial = 2


class Dropout3d(_ChannelDropout):
    """Dropout of whole channels of volumes, as :class:`torch.nn.Dropout3d`.

    Inputs have shape (N, C, D, H, W), or (C, D, H, W) without a batch; the rest is as in :class:`pyreg.Dropout1d`.

    Parameters
    ----------
    rate, rng, impl, inverted
        As in :class:`pyreg.Dropout1d`.
    axis : int
        The dim that counts the channels in a batch: -1 for (N, D, H, W, C) and (D, H, W, C).

    Raises
    ------
    TypeError, ValueError
        As :class:`pyreg.Dropout`, or if ``axis`` is no dim of such an input.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> volumes = np.ones((2, 16, 4, 8, 8), np.float32)
    >>> y = pyreg.Dropout3d(0.25, rng=0)(volumes)
    >>> bool((y == y[:, :, :1, :1, :1]).all())
    True
    """

    _spatial = 3


# ---- Samples and words -----------------------------------------------------------------------------------------------


class _WholeDropout(Dropout):
    _settings = ("rate", "scale_by_keep", "impl", "inverted")

    def __init__(
        self,
        rate: float,
        *,
        scale_by_keep: bool = True,
        rng: int | np.random.Generator | None = None,
        impl: Impl = "philox",
        inverted: bool = True,
    ) -> None:
        super().__init__(rate, rng=rng, impl=impl, inverted=inverted)
        self.scale_by_keep: bool = arg.as_flag(scale_by_keep, "scale_by_keep")

    @property
    def _scaled(self) -> bool:
        return arg.as_flag(self.scale_by_keep, "scale_by_keep") and self.inverted


class DropPath(_WholeDropout):
    """Stochastic depth: drops whole samples, (N, ...), of what a residual branch adds; timm's DropPath.

    Parameters
    ----------
    rate : float
        Probability of dropping a sample, in [0, 1].
    scale_by_keep : bool
        If false, kept samples are not scaled in training, and nothing makes up for it in evaluation.
    rng, impl
        As in :class:`pyreg.Dropout`.
    inverted : bool
        If false, scale by ``1 - rate`` in evaluation instead of by ``1 / (1 - rate)`` in training, as in the paper.

    Raises
    ------
    TypeError, ValueError
        As :class:`pyreg.Dropout`.

    Notes
    -----
    Huang et al., "Deep networks with stochastic depth", 2016, who draw once for the whole batch.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> x, branch = np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)
    >>> x + pyreg.DropPath(0.5, rng=2)(branch)
    array([[2., 2.],
           [2., 2.],
           [0., 0.],
           [2., 2.]], dtype=float32)
    """

    def _shared_dims(self, ndim: int) -> Dims:
        return arg.dims_of_sample(ndim)


class WordDropout(_WholeDropout):
    """Drops whole words of embedded text, (..., length, features): all features of a position, or none.

    Each position draws for itself, as in Iyyer et al., "Deep unordered composition rivals syntactic methods for text
    classification", 2015.  (Gal and Ghahramani, 2016, drop words of the vocabulary, wherever they occur: that is
    dropout of the embedding's matrix, and this layer does it if it is given the matrix.)

    Parameters
    ----------
    rate : float
        Probability of dropping a word, in [0, 1].
    scale_by_keep : bool
        If false, kept words are not scaled in training, as in the layers of this name in flair and stanza, and nothing
        makes up for it in evaluation.
    rng, impl, inverted
        As in :class:`pyreg.Dropout`.

    Raises
    ------
    TypeError, ValueError
        As :class:`pyreg.Dropout`.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> pyreg.WordDropout(0.5, rng=2)(np.ones((1, 4, 3), np.float32))
    array([[[2., 2., 2.],
            [2., 2., 2.],
            [0., 0., 0.],
            [2., 2., 2.]]], dtype=float32)
    """

    def _shared_dims(self, ndim: int) -> Dims:
        return arg.dims_of_word(ndim)
