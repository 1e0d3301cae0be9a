"""Any argument of any NumPy function or layer: it is right, or an error names it; nothing crashes, nothing changes."""

import inspect
import re
import warnings
from functools import partial

import numpy as np
import pytest
from common import normal, same
from hypothesis import given
from hypothesis import strategies as st

import pyreg
from pyreg import _core

F32 = np.float32
X, V = normal((4, 3), F32), np.full(3, 2, F32)
LAYERS = [pyreg.Dropout, pyreg.Dropout1d, pyreg.Dropout2d, pyreg.Dropout3d, pyreg.DropPath, pyreg.WordDropout]
INPUTS = {  # of each layer, and what its constructor wants
    pyreg.Dropout: (X, {}),
    pyreg.Dropout1d: (normal((2, 4, 3), F32), {}),
    pyreg.Dropout2d: (normal((2, 4, 3, 3), F32), {}),
    pyreg.Dropout3d: (normal((2, 4, 3, 3, 2), F32), {}),
    pyreg.DropPath: (X, {"rate": 0.5}),
    pyreg.WordDropout: (X, {"rate": 0.5}),
    pyreg.BatchNorm: (X, {"num_features": 3}),
}


# ---- Everything that is wrong somewhere ----------------------------------------------------------------------------


class Unreadable:
    """Raises whatever it is asked."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array")

    def __index__(self):
        raise ValueError("no index")

    def __float__(self):
        raise ValueError("no float")

    def __repr__(self):
        raise RuntimeError("no repr")


def itself():
    endless = []
    endless.append(endless)
    return endless


ANYTHING = {
    "None": lambda: None,
    "str": lambda: "0.5",
    "empty str": lambda: "",
    "bytes": lambda: b"\1\2",
    "list": lambda: [1.0, 2.0],
    "empty list": lambda: [],
    "list of None": lambda: [None],
    "ragged list": lambda: [[1.0], [2.0, 3.0]],
    "list of itself": itself,
    "int": lambda: 3,
    "negative": lambda: -5,
    "401 digits": lambda: 10**400,
    "5001 digits": lambda: -(10**5000),
    "list of 401 digits": lambda: [10**400],
    "float": lambda: 0.5,
    "nan": lambda: np.nan,
    "inf": lambda: np.inf,
    "bool": lambda: True,
    "complex": lambda: 1j,
    "object": object,
    "class": lambda: int,
    "array's class": lambda: np.ndarray,
    "generator": lambda: (i for i in range(2)),
    "dict": lambda: {0: 1},
    "set": lambda: {0, "a"},
    "slice": lambda: slice(2),
    "function": lambda: len,
    "unreadable": Unreadable,
    "np.bool": lambda: np.bool_(False),
    "np.float32": lambda: F32(0.25),
    "np.int64": lambda: np.int64(1),
    "np.str": lambda: np.str_("relu"),
    "datetime": lambda: np.datetime64("2024-01-01"),
    "0-d": lambda: np.array(0.5),
    "0-d str": lambda: np.array("0.5"),
    "0-d object": lambda: np.array(None, object),
    "empty array": lambda: np.empty(0, F32),
    "array of one": lambda: np.array([0.5]),
    "array of objects": lambda: np.array([None, 1, "a"], object),
    "array of int": lambda: np.ones((4, 3), int),
    "array of complex": lambda: np.ones((4, 3), np.complex64),
    "array of bool": lambda: np.ones((4, 3), bool),
    "array of str": lambda: np.array(["a", "b"]),
    "structured": lambda: np.zeros(3, [("a", "f4")]),
    "longdouble": lambda: np.ones((4, 3), np.longdouble),
    "one dim more": lambda: np.ones((4, 3, 1), F32),
    "masked": lambda: np.ma.masked_greater(X, 0),
    "masked constant": lambda: np.ma.masked,
    "list of masked": lambda: [np.ma.masked_greater(row, 0) for row in X],
    "matrix": lambda: X.view(np.matrix),
    "read-only": lambda: np.broadcast_to(F32(1), (4, 3)),
    "overlapping": lambda: np.lib.stride_tricks.as_strided(np.ones(9, F32), (4, 3), (4, 4)),
}


def names(error, *wanted):
    return any(re.search(rf"\b{name}\b", str(error)) for name in wanted)


def accepts_or_names(call, *wanted):
    """Whether the call works; if it does not, the error says what is wrong."""
    try:
        call()
    except (TypeError, ValueError) as error:
        if not names(error, *wanted):
            raise AssertionError(f"the error names none of {wanted}") from error
        return False
    return True


FUNCTIONS = {
    pyreg.dropout: {"x": X, "rate": 0.5, "key": 7},
    pyreg.dropout_backward: {"dy": X, "rate": 0.5, "key": 7},
    pyreg.dropout_mask: {"shape": (4, 3), "rate": 0.5, "key": 7},
    pyreg.batch_norm: {"x": X, "scale": V, "bias": V},
    pyreg.batch_norm_inference: {"x": X, "mean": V, "var": V, "scale": V, "bias": V},
    pyreg.batch_norm_backward: {"dy": X, "x": X, "mean": V, "var": V, "scale": V},
    pyreg.show_config: {"mode": "dicts"},
}
ARGUMENTS = [(function, name) for function in FUNCTIONS for name in inspect.signature(function).parameters]


def each_value(test):
    """The test with one value after the other, which a failure names."""

    def tests(*args, **kwargs):
        for value, make in ANYTHING.items():
            try:
                test(*args, **kwargs, value=make)
            except Exception as error:
                error.add_note(f"with {value}")
                raise

    signature = inspect.signature(test)
    tests.__signature__ = signature.replace(parameters=[p for n, p in signature.parameters.items() if n != "value"])
    return tests


each_argument = pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda a: getattr(a, "__name__", a))


@each_argument
@each_value
def test_functions(function, name, value):
    given = dict(FUNCTIONS[function])
    if name == "rng":
        del given["key"]
    if name == "y":
        given["activation"] = "relu"
    given[name] = value()
    before = {key: a.copy() for key, a in given.items() if isinstance(a, np.ndarray)}
    allowed = {"x": ("x", "axis", "channels"), "dy": ("dy", "x")}.get(name, (name,))
    if not accepts_or_names(lambda: function(**given), *allowed):
        for key, a in before.items():
            assert a.dtype.kind == "O" or np.array_equal(
                np.asarray(given[key]), np.asarray(a), equal_nan=a.dtype.kind in "fc"
            )


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
@each_value
def test_constructors(make, value):
    for name in inspect.signature(make).parameters:
        options = {**INPUTS[make][1], name: value()}
        accepts_or_names(partial(make, **options), name)


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
@each_value
def test_methods(make, value):
    """What raises leaves the layer as it was."""
    x, options = INPUTS[make]
    options = options if make is pyreg.BatchNorm else {**options, "rng": 0}
    for training in (True, False):
        layer = make(**options).train(training)
        layer(x)
        state, dx = layer.state_dict(), layer.backward(x)
        calls = {
            (layer.__call__, "x"): {},
            (layer.backward, "dy"): {},
            (layer.train, "mode"): {},
            (layer.load_state_dict, "state"): {},
        }
        if make is pyreg.BatchNorm:
            calls[layer.__call__, "mask"] = {"x": x}
        else:
            calls[layer.spawn, "n"] = {}
            calls[layer.__call__, "out"] = {"x": x}
            calls[layer.backward, "out"] = {"dy": x}
        for (method, name), others in calls.items():
            call = partial(method, **others, **{name: value()})
            allowed = (name, "axis", "channels", "array has 0 dims", "array has . dims") if name == "x" else (name,)
            works = accepts_or_names(call, *allowed)
            if not works:
                np.testing.assert_equal(layer.state_dict(), state)
                assert same(layer.backward(x), dx)
                assert layer.training is training
            else:
                layer.train(training).load_state_dict(state)
                layer(x)
                layer.load_state_dict(state)
                dx = layer.backward(x)


SETTINGS = {
    pyreg.BatchNorm: ["training", "axis", "momentum", "epsilon", "scale", "bias", "mean", "var", "num_features"],
    pyreg.Dropout: ["training", "rate", "broadcast_dims", "impl", "inverted", "rng"],
    pyreg.Dropout2d: ["training", "rate", "axis", "impl", "inverted"],
    pyreg.DropPath: ["training", "rate", "scale_by_keep", "impl", "inverted"],
}


@pytest.mark.parametrize("make", SETTINGS, ids=lambda make: make.__name__)
@each_value
def test_settings_are_checked_when_they_are_used(make, value):
    x, options = INPUTS[make]
    options = options if make is pyreg.BatchNorm else {**options, "rng": 0}
    for name in SETTINGS[make]:
        for training in (True, False):
            layer = make(**options).train(training)
            y = layer(x)
            dx, state, good = layer.backward(x), layer.state_dict(), getattr(layer, name)
            with_bad = value()

            def use(layer=layer, name=name, with_bad=with_bad):
                setattr(layer, name, with_bad)
                layer(x)

            if not accepts_or_names(use, name, *(["channels"] if name in ("axis", "num_features") else [])):
                setattr(layer, name, good)
                assert same(layer.backward(x), dx)
                np.testing.assert_equal(layer.state_dict(), state)
            assert y.shape == x.shape


@each_value
def test_values_of_states(value):
    norm, drop = pyreg.BatchNorm(3), pyreg.Dropout(rng=0)
    for layer, name in [(norm, name) for name in ("scale", "bias", "mean", "var")] + [(drop, "rng")]:
        before = layer.state_dict()
        if not accepts_or_names(partial(layer.load_state_dict, {**before, name: value()}), name):
            np.testing.assert_equal(layer.state_dict(), before)


def _none_for_arrays():
    x, y, v = X, np.empty_like(X), V
    calls = {
        _core.empty_like: [x],
        _core.apart: [x],
        _core.can_write: [y, x, (x,), ()],
        _core.is_like: [x, x],
        _core.dropout: [_core.F32, x, y, _core.PHILOX, 1, 0.5, 0, True, None],
        _core.dropout_mask: [12, np.empty(12, bool), False, _core.PHILOX, 1, 0.5, 0],
        _core.batch_norm: [_core.F32, x, 1, 1e-5, False, v, v, None, None, y],
        _core.batch_norm_inference: [_core.F32, x, 1, 1e-5, False, v, v, None, v, v, y],
        _core.batch_norm_backward: [_core.F32, x, x, 1, 1e-5, False, v, None, None, v, v, y, None],
    }
    optional = {_core.batch_norm: {5, 6}, _core.batch_norm_inference: {5, 6}, _core.batch_norm_backward: {6}}
    for function, arguments in calls.items():
        for k, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray) and not (function in (_core.can_write, _core.is_like) and k == 0):
                for bad in ("a", [1.0], *([] if k in optional.get(function, ()) else [None])):
                    yield pytest.param(
                        function, [*arguments[:k], bad, *arguments[k + 1 :]], id=f"{function.__name__}-{k}-{bad}"
                    )


@pytest.mark.parametrize(("function", "arguments"), list(_none_for_arrays()))
def test_the_border_to_c_takes_arrays_only(function, arguments):
    with pytest.raises(TypeError):
        function(*arguments)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([0.25, "relu", "philox", X, V, X.astype(np.float64), V.astype(int), F32(0.5), np.int8(1)]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(st.sampled_from([pair for pair in ARGUMENTS if pair[1] != "rng"]), anything)
def test_functions_with_anything(pair, value):
    function, name = pair
    given = {**FUNCTIONS[function], **({"activation": "relu"} if name == "y" else {}), name: value}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered in cast", RuntimeWarning)
        accepts_or_names(
            lambda: function(**given), *{"x": ("x", "axis", "channels"), "dy": ("dy", "x")}.get(name, (name,))
        )
