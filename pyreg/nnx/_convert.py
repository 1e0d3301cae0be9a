"""Whole models of Flax's nnx: its layers become pyreg's, and back."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from pyreg._arguments import JaxImpl, check_jax_impl
from pyreg.nnx._attention import dot_product_attention, philox_attention
from pyreg.nnx._layers import BatchNorm, Dropout

Model = TypeVar("Model")

# Functions, because copies of a model share them.
ATTENTION = {"auto": dot_product_attention, "philox": philox_attention}


def convert(model: Model, *, impl: JaxImpl = "auto") -> Model:
    """Make every Flax Dropout and BatchNorm in a model pyreg's, in place.

    Parameters, running statistics, random streams and what the layers are set to stay as they are, and so do paths in
    the model's state and checkpoints.  Attention that uses `flax.nnx.dot_product_attention` uses pyreg's.  Subclasses
    of Flax's layers, which may compute something else, and other attention functions are left alone.

    Parameters
    ----------
    model : flax.nnx.Module
        Or any nest of lists, dicts and modules.
    impl : {"auto", "philox"}
        The mask of all of the model's dropout: see :class:`Dropout`.

    Returns
    -------
    The model itself.

    Raises
    ------
    ValueError
        If ``impl`` is out of range; nothing has changed then.

    See Also
    --------
    revert

    Examples
    --------
    >>> import pyreg.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(4, 16, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    >>> type(pyreg.nnx.convert(model).layers[1])
    <class 'pyreg.nnx.Dropout'>
    """
    check_jax_impl(impl)
    for node in _nodes(model):
        if type(node) is nnx.BatchNorm:
            _become(node, BatchNorm).activation = None
        if type(node) is nnx.Dropout:
            _become(node, Dropout)
        if isinstance(node, Dropout):
            node.impl = impl
        if isinstance(node, nnx.MultiHeadAttention):
            node.attention_fn = _attention(node.attention_fn, ATTENTION[impl])
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`, in place: every pyreg Dropout and BatchNorm in a model becomes Flax's.

    Layers that Flax has no counterpart of, such as :class:`Dropout2d`, stay.

    Parameters
    ----------
    model : flax.nnx.Module

    Returns
    -------
    The model itself.

    Raises
    ------
    ValueError
        If a BatchNorm has an activation, which Flax's has not; nothing has changed then.

    Examples
    --------
    >>> import pyreg.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(4, 16, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    >>> type(pyreg.nnx.revert(pyreg.nnx.convert(model)).layers[1]) is nnx.Dropout
    True
    """
    nodes = list(_nodes(model))
    for node in nodes:
        if type(node) is BatchNorm and node.activation is not None:
            raise ValueError(f"a BatchNorm has activation {node.activation!r}; wanted None, as Flax's has none")
    for node in nodes:
        if type(node) is BatchNorm:
            del node.activation
            _become(node, nnx.BatchNorm)
        if type(node) is Dropout:
            del node.impl
            _become(node, nnx.Dropout)
        if isinstance(node, nnx.MultiHeadAttention):
            node.attention_fn = _attention(node.attention_fn, nnx.dot_product_attention)
    return model


def _become(node: Any, kind: type) -> Any:
    """Another class for the same object: wherever the model refers to it, and with the same state."""
    object.__setattr__(node, "__class__", kind)
    return node


def _nodes(model: Any) -> list[Any]:
    return [node for _, node in nnx.iter_graph(model)]


def _attention(function: Any, wanted: Callable[..., Any]) -> Any:
    """`wanted` for Flax's attention function or ours, with what a partial binds; another function as it is."""
    base = function.func if isinstance(function, functools.partial) else function
    if base not in (nnx.dot_product_attention, *ATTENTION.values()):
        return function
    if base is function:
        return wanted
    bound = {name: value for name, value in function.keywords.items() if name != "impl"}
    return functools.partial(wanted, *function.args, **bound) if function.args or bound else wanted
