"""NumPy layers: state, and the functions of ``_ops`` applied to it."""

import copy
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from pyreg import _ops

__all__ = ["Dropout"]


class Layer:
    """What layers share: training or evaluation."""

    training = True

    def __copy__(self) -> Self:
        """A copy shares no state with its original."""
        return copy.deepcopy(self)

    def train(self, mode: bool = True) -> Self:
        """Switch to training (or, if ``mode`` is false, to evaluation); returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation; returns the layer."""
        return self.train(False)


class Dropout(Layer):
    """Dropout with a fresh mask at each call; the backward pass makes the mask again from its key.

    Parameters
    ----------
    rate : float
        Probability of dropping an element, in [0, 1].
    broadcast_dims : int or sequence of int
        Dims along which the mask is shared.
    rng : int or numpy.random.Generator, optional
        Source of the keys; by default one seeded by the operating system.
    impl : {"philox", "threefry", "threefry_x64"}
        Generator of the mask, as in :func:`pyreg.dropout`.
    inverted : bool
        If true, scale by ``1 / (1 - rate)`` in training.  If false, scale by ``1 - rate`` in evaluation instead, as in
        Srivastava et al., JMLR 15 (2014).

    Attributes
    ----------
    training : bool
        Set by :meth:`train` and :meth:`eval`; true at first.
    key : int or None
        Key of the last training call.

    Examples
    --------
    >>> import numpy as np, pyreg
    >>> layer = pyreg.Dropout(0.5, rng=0)
    >>> y = layer(np.ones((2, 3), np.float32))
    >>> dx = layer.backward(np.ones((2, 3), np.float32))
    >>> bool((dx == y).all())
    True
    >>> layer.eval()(np.ones(3))
    array([1., 1., 1.])
    """

    def __init__(
        self,
        rate: float = 0.5,
        *,
        broadcast_dims: _ops.Dims = (),
        rng: int | np.random.Generator | None = None,
        impl: _ops.Impl = "philox",
        inverted: bool = True,
    ) -> None:
        self.rate = _ops._check_rate(rate)
        self.broadcast_dims = broadcast_dims
        self.impl = impl
        self.inverted = inverted
        self.rng = np.random.default_rng(rng)
        self.key: int | None = None
        _ops._check_impl(impl)

    def __call__(self, x: ArrayLike, *, out: _ops.Array | None = None) -> _ops.Array:
        """Dropout of ``x`` in training; in evaluation ``x`` itself, or ``x * (1 - rate)`` if not ``inverted``."""
        if not self.training:
            self.key = None
            return self._evaluate(x, out)
        self.key = _ops.fresh_key(self.rng)
        return self._drop(x, out, "x")

    def backward(self, dy: ArrayLike, *, out: _ops.Array | None = None) -> _ops.Array:
        """Gradient of the last call with respect to its input."""
        if not self.training:
            return self._evaluate(dy, out)
        if self.key is None:
            raise RuntimeError("backward() before a call in training mode; wanted layer(x) first")
        return self._drop(dy, out, "dy")

    def _drop(self, x: ArrayLike, out: _ops.Array | None, name: str) -> _ops.Array:
        return _ops._apply(
            x, self.rate, self.key, None, self.broadcast_dims, self.impl, 0, out, scaled=self.inverted, name=name
        )

    def _evaluate(self, x: ArrayLike, out: _ops.Array | None) -> _ops.Array:
        x, _ = _ops._as_input(x)
        if out is not None:
            _ops._check_out(out, x)
        if self.inverted:
            if out is None:
                return x
            np.copyto(out, x)
            return out
        y: _ops.Array = np.multiply(x, x.dtype.type(1 - self.rate), out=out)
        return y

    def state_dict(self) -> dict[str, Any]:
        """The state of the key source, so that training can go on from a checkpoint with the same masks."""
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of another layer's :meth:`state_dict`.  An empty dict (PyTorch's) changes nothing."""
        unknown = set(state) - {"rng"}
        if unknown:
            raise ValueError(f"state has {sorted(unknown)}; wanted 'rng' only")
        if "rng" in state:
            self.rng.bit_generator.state = state["rng"]

    def __repr__(self) -> str:
        settings = ("rate", "broadcast_dims", "impl", "inverted")
        return f"Dropout({', '.join(f'{name}={getattr(self, name)!r}' for name in settings)})"
