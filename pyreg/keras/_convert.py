"""Whole models of Keras: pyreg computes the layers of a model, and Keras again.

A layer gets a ``call`` of its own, in front of that of its class.  Another class would be in the saved model, which
could not be loaded without pyreg.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from pyreg._arguments import JaxImpl, check_jax_impl, kind

Model = TypeVar("Model")

_MARK = "_pyreg_build"  # of a build that converts: the one that it took the place of


def convert(model: Model, *, impl: JaxImpl = "auto") -> Model:
    """Let pyreg compute the dropout and batch normalization of a model, in place.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        Its ``Dropout``, ``SpatialDropout1D/2D/3D`` and ``BatchNormalization`` layers are reached wherever they are
        nested, and so is the dropout inside ``MultiHeadAttention``; also what is built later.  Subclasses of these
        layers, which may compute something else, are left alone.
    impl : {"auto", "philox"}
        The mask of all of the model's dropout.  ``"auto"``: that of Keras.  ``"philox"``: another one for the same
        seed, several times faster; see :func:`pyreg.jax.dropout`.  On the backend torch it makes no difference.

    Returns
    -------
    The model itself.

    Raises
    ------
    TypeError
        If ``model`` is no layer.
    RuntimeError
        If Keras's backend is neither jax nor torch.

    See Also
    --------
    revert

    Notes
    -----
    What is saved, cloned, copied or pickled is Keras's, and to be converted again.  Compiled functions of the model are
    made anew when they are next called; those of a model that contains this one are not.

    Examples
    --------
    >>> import keras, pyreg.keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dropout(0.5)])
    >>> pyreg.keras.convert(model) is model
    True
    """
    check_jax_impl(impl)
    calls = _calls()
    for layer in _layers(model):
        call = calls.get(type(layer))
        if call is not None and ("call" not in vars(layer) or _is_ours(layer)):
            layer.call = functools.partial(call, layer, impl=impl)
        if not layer.built:
            _convert_when_built(layer, impl)
    _forget_compiled(model)
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`, in place: Keras computes the layers of a model again.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer

    Returns
    -------
    The model itself.

    Raises
    ------
    TypeError
        If ``model`` is no layer.

    Examples
    --------
    >>> import keras, pyreg.keras
    >>> layer = pyreg.keras.Dropout(0.5)
    >>> pyreg.keras.revert(layer) is layer
    True
    """
    for layer in _layers(model):
        if _is_ours(layer):
            del layer.call
        layer.build = getattr(layer.build, _MARK, layer.build)
    _forget_compiled(model)
    return model


def _calls() -> dict[type, Callable[..., Any]]:
    """What takes the place of ``call`` for each class of layers, on the backend that Keras has."""
    backend = keras.backend.backend()
    if backend == "jax":
        from pyreg.keras import _jax

        channels = [getattr(keras.layers, f"SpatialDropout{n}D") for n in (1, 2, 3)]
        return {
            keras.layers.Dropout: _jax.drop,
            keras.layers.BatchNormalization: _jax.normalise,
            **dict.fromkeys(channels, _jax.drop_channels),
        }
    if backend == "torch":
        from pyreg.keras import _torch

        return {keras.layers.Dropout: _torch.drop, keras.layers.BatchNormalization: _torch.normalise}
    raise RuntimeError(f"Keras's backend is {backend!r}; wanted 'jax' or 'torch'")


def _layers(model: Any) -> list[Any]:
    """The layer and all in it."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model is {kind(model)}; wanted a Keras model or layer")
    return list(model._flatten_layers())  # Keras has no public name for it


def _is_ours(layer: Any) -> bool:
    """Whether the layer's ``call`` is one that convert gave it."""
    return getattr(getattr(vars(layer).get("call"), "func", None), "__module__", "").startswith("pyreg.keras.")


def _convert_when_built(layer: Any, impl: JaxImpl) -> None:
    """Attention has no dropout layer before, and other layers may make theirs then, too."""
    build = getattr(layer.build, _MARK, layer.build)

    @functools.wraps(build)
    def build_and_convert(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        layer.build = build
        convert(layer, impl=impl)

    setattr(build_and_convert, _MARK, build)
    layer.build = build_and_convert


def _forget_compiled(model: Any) -> None:
    """What Keras has compiled of a model's steps."""
    for layer in _layers(model):
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
