"""Drop-ins for Equinox: the same fields, leaves, state and numbers, computed by pyreg's kernels.

Each class is a subclass of Equinox's that changes the computation only.  Where there is nothing for a kernel to do, or
something to complain about, Equinox's own code answers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from pyreg._arguments import JaxImpl, as_integers, check_jax_impl, is_supported
from pyreg._extras import needs

with needs("equinox", "jax", "equinox"):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from pyreg._flax import as_rate_for, draws, draws_traced, step
    from pyreg.jax import batch_norm, dropout
    from pyreg.jax._primitive import flag

__all__ = ["BatchNorm", "Dropout", "convert", "revert"]


def __dir__() -> list[str]:
    return __all__


Array = jax.Array
Tree = TypeVar("Tree")


class Dropout(eqx.nn.Dropout):
    """`equinox.nn.Dropout`: for the same key the same values and gradients, bit for bit.

    Parameters
    ----------
    p : float or scalar array
        Probability of dropping an element.  A number outside [0, 1] is an error here; a traced value is not checked.
    inference, deterministic
        As for Equinox's class.
    broadcast_dims : int or sequence of int
        Dims along which the mask is shared, which Equinox has not: for example ``(1, 2)`` to drop whole channels of
        (channels, height, width).
    impl : {"auto", "philox"}
        ``"auto"``: Equinox's mask.  ``"philox"``: another one for the same key, several times faster; see
        :func:`pyreg.jax.dropout`.

    Raises
    ------
    TypeError, ValueError
        If ``impl`` or ``broadcast_dims`` is out of range; when the layer is called, also if ``p`` is.
    RuntimeError
        When it is called without a key in training, by Equinox.

    Notes
    -----
    The mask is always Equinox's.  Where Equinox truly divides by ``1 - p``, which is for a traced ``p`` and outside
    `jax.jit`, values are within one unit in the last place of Equinox's.

    Examples
    --------
    >>> import equinox as eqx, jax, pyreg.equinox
    >>> key, x = jax.random.key(0), jax.numpy.ones((2, 3))
    >>> y = pyreg.equinox.Dropout(0.5)(x, key=key)
    >>> bool((y == eqx.nn.Dropout(0.5)(x, key=key)).all())
    True
    """

    broadcast_dims: tuple[int, ...] = eqx.field(static=True)
    impl: JaxImpl = eqx.field(static=True)

    def __init__(
        self,
        p: Any = 0.5,
        inference: bool = False,
        *,
        deterministic: bool | None = None,
        broadcast_dims: int | Sequence[int] = (),
        impl: JaxImpl = "auto",
    ) -> None:
        check_jax_impl(impl)
        super().__init__(p, inference, deterministic=deterministic)
        self.broadcast_dims = as_integers(broadcast_dims, "broadcast_dims")
        self.impl = impl

    def __call__(
        self,
        x: Any,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Dropout of ``x``, as Equinox's: what is given here goes before what the constructor was given."""
        off = self.inference if inference is None else inference
        if deterministic is not None or off or key is None or not (self.broadcast_dims or self._draws(x)):
            return super().__call__(x, key=key, inference=inference, deterministic=deterministic)
        rate = jax.lax.stop_gradient(self.p) if isinstance(self.p, jax.core.Tracer) else _as_rate(self.p)
        return dropout(x, rate, key=key, broadcast_dims=self.broadcast_dims, impl=self.impl)

    def _draws(self, x: Any) -> bool:
        if isinstance(self.p, jax.core.Tracer):
            return draws_traced(x, self.p, self.impl)
        return draws(x, self.p, self.impl, "Equinox")


def _as_rate(p: Any) -> float:
    """The rate of the keep probability that Equinox computes, without x64 in float32."""
    rate = as_rate_for("Equinox", p)
    return rate if flag("jax_enable_x64") else 1.0 - float(np.float32(1) - np.float32(rate))


class BatchNorm(eqx.nn.BatchNorm):
    """`equinox.nn.BatchNorm`, with mean and variance that are right at any ratio of mean to standard deviation.

    Parameters
    ----------
    input_size, axis_name, eps, channelwise_affine, momentum, inference, dtype, mode
        As for Equinox's class, in both of its modes.

    Raises
    ------
    ValueError
        As Equinox's class.

    Examples
    --------
    >>> import equinox as eqx, jax, pyreg.equinox
    >>> norm, state = eqx.nn.make_with_state(pyreg.equinox.BatchNorm)(2, "batch", mode="batch")
    >>> x = jax.numpy.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, state = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    """

    def __call__(
        self, x: Any, state: eqx.nn.State, *, key: Array | None = None, inference: bool | None = None
    ) -> tuple[Array, eqx.nn.State]:
        """Batch-norm of ``x`` of shape (channels, ...), as Equinox's: by the batch's statistics, or by the state's."""
        off = self.inference if inference is None else inference
        if off or self.axis_name is None or not is_supported(x) or x.size == 0 or x.shape[0] != self.input_size:
            return super().__call__(x, state, key=key, inference=inference)
        affine = (self.weight, self.bias) if self.channelwise_affine else ()
        a = x.astype(jnp.result_type(x, *affine))
        y, *statistics = batch_norm(a, *affine, axis=0, epsilon=self.eps, axis_name=self.axis_name)
        index = self.ema_state_index if self.mode == "ema" else self.batch_state_index
        assert index is not None
        old = state.get(index)
        new = [
            step(self.momentum, running, batch).astype(jnp.result_type(running, x))
            for running, batch in zip(old, statistics, strict=True)
        ]
        if self.mode == "batch":
            assert self.batch_counter is not None
            state = state.set(self.batch_counter, state.get(self.batch_counter) + 1)
            return y, state.set(index, tuple(new))
        assert self.ema_first_time_index is not None
        first = state.get(self.ema_first_time_index)
        state = state.set(self.ema_first_time_index, jnp.array(False))
        new = [jnp.where(first, batch.astype(n.dtype), n) for batch, n in zip(statistics, new, strict=True)]
        return super().__call__(x, state.set(index, tuple(new)), inference=True)


# ---- Whole models ----------------------------------------------------------------------------------------------------


def convert(tree: Tree, *, impl: JaxImpl = "auto") -> Tree:
    """A tree in which every Equinox Dropout and BatchNorm is pyreg's.

    Its leaves are those of the tree that is given, in the same order, and so is its state; the layers inside
    `equinox.nn.MultiheadAttention` are reached, too.  Subclasses of Equinox's layers, which may compute something else,
    are left alone.

    Parameters
    ----------
    tree : pytree
        A model, or a tuple of a model and what has its structure, such as the state of an optimiser.
    impl : {"auto", "philox"}
        The mask of all of the tree's dropout: see :class:`Dropout`.

    Returns
    -------
    pytree
        A new tree: Equinox's modules do not change.  Its structure names other classes, so convert a model before the
        state of its optimiser is made, or both together.

    Raises
    ------
    ValueError
        If ``impl`` is out of range.

    See Also
    --------
    revert

    Examples
    --------
    >>> import equinox as eqx, jax, pyreg.equinox
    >>> model = eqx.nn.Sequential([eqx.nn.Linear(4, 16, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])
    >>> type(pyreg.equinox.convert(model).layers[1])
    <class 'pyreg.equinox.Dropout'>
    """
    check_jax_impl(impl)

    def ours(node: Any) -> Any:
        if type(node) is eqx.nn.Dropout:
            return _as(Dropout, node, broadcast_dims=(), impl=impl)
        if type(node) is Dropout:
            return _as(Dropout, node, impl=impl)
        return _as(BatchNorm, node) if type(node) is eqx.nn.BatchNorm else node

    return _map(ours, tree, eqx.nn.Dropout, eqx.nn.BatchNorm, Dropout)


def revert(tree: Tree) -> Tree:
    """Undo :func:`convert`: a tree in which every pyreg Dropout and BatchNorm is Equinox's.

    Parameters
    ----------
    tree : pytree

    Returns
    -------
    pytree
        A new tree with the same leaves.

    Raises
    ------
    ValueError
        If a Dropout has dims that share a mask, which Equinox's has not.

    Examples
    --------
    >>> import equinox as eqx, pyreg.equinox
    >>> type(pyreg.equinox.revert(pyreg.equinox.Dropout(0.5))) is eqx.nn.Dropout
    True
    """

    def theirs(node: Any) -> Any:
        if type(node) is BatchNorm:
            return _as(eqx.nn.BatchNorm, node)
        if type(node) is not Dropout:
            return node
        if node.broadcast_dims:
            raise ValueError(
                f"a Dropout has broadcast_dims {node.broadcast_dims}; wanted none, as Equinox's has no shared masks"
            )
        return _as(eqx.nn.Dropout, node)

    return _map(theirs, tree, Dropout, BatchNorm)


def _map(change: Callable[[Any], Any], tree: Tree, *kinds: type) -> Tree:
    """The tree with other nodes in the place of those of exactly these classes."""
    mapped: Tree = jax.tree.map(change, tree, is_leaf=lambda node: type(node) in kinds)
    return mapped


def _as(kind: type, node: Any, **more: Any) -> Any:
    """A module of another class with the fields of this one, whatever takes the place of values in them."""
    module: Any = object.__new__(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        value = more[name] if name in more else getattr(node, name)
        object.__setattr__(module, name, value)
    return module
