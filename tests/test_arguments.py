"""Any argument of any NumPy function or layer: it is right, or an error names it; nothing crashes, nothing changes."""

import inspect
import re
import tempfile
import warnings
from fractions import Fraction
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


# ---- out= ----------------------------------------------------------------------------------------------------------


def strided(memory, shape, steps, start=0):
    return np.lib.stride_tricks.as_strided(memory[start:], shape, [step * memory.itemsize for step in steps])


def places(shape, steps):
    """Where each element lies."""
    return [sum(i * step for i, step in zip(index, steps, strict=True)) for index in np.ndindex(*shape)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-12, 12)), max_size=4))
def test_out_that_overlaps_itself_is_refused(dims):
    shape, steps = [n for n, _ in dims], [step for _, step in dims]
    memory = np.zeros(400, F32)
    out, x = strided(memory, shape, steps, 200), normal(shape, F32)
    where = places(shape, steps)
    if len(set(where)) < len(where):
        with pytest.raises(ValueError, match="elements that share memory"):
            pyreg.dropout(x, 0.5, key=1, out=out)
        assert not memory.any()
    else:
        assert pyreg.dropout(x, 0.5, key=1, out=out) is out
        assert same(out, pyreg.dropout(x, 0.5, key=1))
        assert np.count_nonzero(memory) <= len(where)


def test_elements_that_share_some_bytes():
    memory = np.zeros(100, np.uint8)
    for step, good in ((3, False), (4, True), (5, True), (-3, False), (-5, True)):
        out = np.ndarray((5,), F32, memory, 40, (step,))
        if good:
            assert same(
                pyreg.dropout(X[:, 0].repeat(2)[:5], 0.5, key=1, out=out).copy(),
                pyreg.dropout(X[:, 0].repeat(2)[:5], 0.5, key=1),
            )
        else:
            with pytest.raises(ValueError, match="share memory"):
                pyreg.dropout(np.ones(5, F32), 0.5, key=1, out=out)


def test_interleaved_dims_share_nothing():
    """Rows that begin between the elements of others: 0 2 4 | 3 5 7 | 6 8 10 | 9 11 13."""
    out = strided(np.zeros(20, F32), (4, 3), (3, 2))
    assert same(pyreg.dropout(X, 0.5, key=1, out=out).copy(), pyreg.dropout(X, 0.5, key=1))
    with pytest.raises(ValueError, match="share memory"):
        pyreg.dropout(X, 0.5, key=1, out=strided(np.zeros(20, F32), (4, 3), (4, 2)))


@pytest.mark.parametrize("function", [pyreg.batch_norm, pyreg.batch_norm_inference, pyreg.batch_norm_backward])
def test_every_function_refuses_it(function):
    out = strided(np.zeros(6, F32), (4, 3), (1, 1))
    for name in ("out", "x"):  # also in place
        given = {**FUNCTIONS[function], "out": out, **({"x": out} if name == "x" else {})}
        with pytest.raises(ValueError, match="elements that share memory"):
            function(**given)
    assert not out.any()


VALUES = ["scale", "bias", "mean", "var"]
ALIASES = {
    pyreg.dropout: ["x"],
    pyreg.dropout_backward: ["dy"],
    pyreg.batch_norm: ["x", "scale", "bias", "residual"],
    pyreg.batch_norm_inference: ["x", "mean", "var", "scale", "bias", "residual"],
    pyreg.batch_norm_backward: ["dy", "x", "mean", "var", "scale", "y"],
}


@given(st.sampled_from(list(ALIASES)), st.sampled_from([(4, 3), (40, 1), (1, 6), (300, 5)]), st.data())
def test_out_may_overlap_every_operand(function, shape, data):
    """As with a copy of the memory, in which everything lies where it did."""
    starts = {name: data.draw(st.integers(0, 2 * np.prod(shape))) for name in [*ALIASES[function], "out"]}
    flips = {name: data.draw(st.sampled_from([1, -1])) for name in starts}
    memory = np.abs(normal(4 * np.prod(shape) + 10, F32)) + F32(0.5)

    def views(memory):
        for name, start in starts.items():
            array = memory[start:][: shape[-1]] if name in VALUES else memory[start:][: np.prod(shape)].reshape(shape)
            yield name, array[:: flips[name]]

    options = {"key": 5} if function in (pyreg.dropout, pyreg.dropout_backward) else {}
    if "residual" in starts or "y" in starts:
        options["activation"] = "relu"
    apart = dict(views(memory.copy()))
    del apart["out"]
    want = function(**apart, **options)
    given = dict(views(memory))
    got = function(**given, **options)
    want, got = (r if isinstance(r, tuple) else (r,) for r in (want, got))
    assert got[0] is given["out"]
    assert all(same(np.ascontiguousarray(g), w) for g, w in zip(got, want, strict=True))
    assert not any(np.shares_memory(g, memory) for g in got[1:])


def test_out_may_overlap_the_mask():
    for start in range(13):
        memory = np.zeros(64, np.uint8)
        mask = memory[start:][:12].view(bool).reshape(4, 3)
        mask[...] = [[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]]
        want = pyreg.batch_norm(X, mask=mask.copy())
        back = pyreg.batch_norm_backward(X, X, *want[1:], mask=mask.copy())
        kept = memory.copy()
        for function, others, results in (
            (pyreg.batch_norm, {"x": X}, want),
            (pyreg.batch_norm_backward, {"dy": X, "x": X, "mean": want[1], "var": want[2]}, back),
        ):
            memory[...] = kept
            got = function(**others, mask=mask, out=memory[:48].view(F32).reshape(4, 3))
            assert all(same(g, w) for g, w in zip(got, results, strict=True))


def test_in_place_by_a_view_needs_no_copy():
    memory = normal((64, 9), F32)
    want = pyreg.dropout(memory, 0.5, key=1)
    assert _core.can_write(memory[:, ::2], memory[:, ::2], (memory[:, ::2],), ())
    assert _core.can_write(memory.T, memory.T, (memory.T,), (np.ones(3, F32), None))
    assert not _core.can_write(memory, memory, (memory,), (memory[0],))
    pyreg.dropout(memory[:, :], 0.5, key=1, out=memory)
    assert same(memory, want)


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: make.__name__)
def test_layers_refuse_an_out_that_overlaps_itself(make):
    x, options = INPUTS[make]
    out = np.lib.stride_tricks.as_strided(np.zeros(x.size, F32), x.shape, (4,) * x.ndim)
    for training in (True, False):
        for inverted in (True, False):
            layer = make(**options, inverted=inverted).train(training)
            layer(x)
            for call in (layer, layer.backward):
                with pytest.raises(ValueError, match="elements that share memory"):
                    call(x, out=out)
    assert not out.any()


# ---- What is like an array -----------------------------------------------------------------------------------------

MASKED = np.ma.masked_greater(np.array([[1.0], [2.0], [3.0], [1e9]], F32), 1e8)


@pytest.mark.parametrize(
    ("function", "name"),
    [p for p in ARGUMENTS if p[0] is not pyreg.show_config],
    ids=lambda a: getattr(a, "__name__", a),
)
def test_masked_arrays_are_refused(function, name):
    given = {**FUNCTIONS[function], name: np.ma.masked_greater(FUNCTIONS[function].get(name, X), 0)}
    if name == "rng":
        del given["key"]
    if name == "y":
        given["activation"] = "relu"
    wanted = ValueError if name in ("impl", "activation") else TypeError
    with pytest.raises(wanted, match=name):
        function(**given)


def test_masked_arrays_can_be_given_in_parts():
    with pytest.raises(TypeError, match=r"wanted a plain one: x\.filled\(value\), and for batch-norm mask=~numpy\.ma"):
        pyreg.batch_norm(MASKED)
    mean = pyreg.batch_norm(MASKED.filled(0), mask=~np.ma.getmaskarray(MASKED))[1]
    assert mean == 2
    with pytest.raises(TypeError, match="x is a masked array, or has one in it"):
        pyreg.BatchNorm(1)(list(MASKED))
    for layer in (pyreg.BatchNorm(1), pyreg.BatchNorm(1).eval(), pyreg.Dropout(), pyreg.Dropout().eval()):
        with pytest.raises(TypeError, match="x is a masked array"):
            layer(MASKED)
    with pytest.raises(TypeError, match="out is a MaskedArray"):
        pyreg.dropout(np.ones((4, 1), F32), out=MASKED.copy())


class By:
    """An array, known by one protocol alone."""

    def __init__(self, array, *protocol):
        self.array, self.protocol = array, protocol

    def __getattr__(self, name):
        if name != "protocol" and name in self.protocol:
            return getattr(self.array, name)
        raise AttributeError(name)


class ByArray:
    def __array__(self, dtype=None, copy=None):
        return X


class ByDlpack:
    def __dlpack__(self, **options):
        return X.__dlpack__(**options)

    def __dlpack_device__(self):
        return X.__dlpack_device__()


def from_pandas(rows):
    return pytest.importorskip("pandas").DataFrame(rows)


def from_xarray(rows):
    return pytest.importorskip("xarray").DataArray(rows)


def from_torch(rows):
    return pytest.importorskip("torch").tensor(rows)


def from_jax(rows):
    return pytest.importorskip("jax").numpy.asarray(rows)


def on_disk(rows):
    with tempfile.TemporaryFile() as file:
        array = np.memmap(file, rows.dtype, "w+", shape=rows.shape)
        array[...] = rows
        return array


@pytest.mark.parametrize(
    "make",
    [
        from_pandas,
        from_xarray,
        from_torch,
        from_jax,
        on_disk,
        memoryview,
        lambda rows: rows.view(np.matrix),
        lambda rows: np.rec.fromarrays([rows, rows], names="a,b").a,
        lambda rows: By(rows, "__array_interface__"),
        lambda rows: By(rows, "__array_struct__"),
        lambda rows: ByArray(),
        lambda rows: ByDlpack(),
        lambda rows: [[F32(n) for n in row] for row in rows],
        lambda rows: [row for row in rows],
    ],
)
def test_arrays_of_others(make):
    x = make(X)
    for function in (pyreg.dropout, pyreg.dropout_backward):
        got, want = function(x, 0.5, key=1), function(X, 0.5, key=1)
        assert type(got) is np.ndarray
        assert same(got, want)
    for got, want in zip(pyreg.batch_norm(x, residual=x), pyreg.batch_norm(X, residual=X), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)  # another layout has another order of sums
    assert same(pyreg.batch_norm_inference(x, V, V, residual=x), pyreg.batch_norm_inference(X, V, V, residual=X))
    assert same(pyreg.BatchNorm(3).eval()(x), pyreg.BatchNorm(3).eval()(X))
    layer = pyreg.Dropout(0.5, rng=0)
    assert same(layer(x), layer.backward(x))
    out = on_disk(X)
    assert pyreg.dropout(x, 0.5, key=1, out=out) is out
    assert (out == pyreg.dropout(X, 0.5, key=1)).all()


def test_values_of_others():
    pandas = pytest.importorskip("pandas")
    want = pyreg.batch_norm(X, V, V)[0]
    for values in (pandas.Series(V), V.tolist(), V.astype(int), V.astype(">f8"), V.repeat(2)[::2], memoryview(V)):
        assert same(pyreg.batch_norm(X, values, values)[0], want)
    mask = np.arange(4)[:, None] > 1
    assert same(pyreg.batch_norm(X, mask=pandas.DataFrame(mask))[0], pyreg.batch_norm(X, mask=mask)[0])
    with pytest.raises(TypeError, match="scale has dtype bool; wanted real numbers"):
        pyreg.batch_norm(X, V > 0)
    with pytest.raises(TypeError, match="x has dtype object"):
        pyreg.batch_norm(pandas.DataFrame(X).astype("Float32").mask(X > 0))


def test_tensors_that_numpy_does_not_read():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        (TypeError, ValueError), match=r"x is of type Tensor, of which NumPy makes no array .*detach\(\)"
    ):
        pyreg.dropout(torch.ones(3, requires_grad=True))
    with pytest.raises((TypeError, ValueError), match=r"scale is of type Tensor, .*BFloat16"):
        pyreg.batch_norm(X, torch.ones(3, dtype=torch.bfloat16))


def test_arrays_and_keys_of_jax():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(X, "bfloat16")
    assert same(pyreg.dropout(x, 0.5, key=1), pyreg.dropout(np.asarray(x), 0.5, key=1))
    key = jax.random.key(3)
    with pytest.raises((TypeError, ValueError), match=r"key is of type .*jax\.random\.key_data"):
        pyreg.dropout(X, 0.5, key=key)
    assert same(pyreg.dropout(X, key=jax.random.key_data(key)), pyreg.dropout(X, key=3))


# ---- What is said --------------------------------------------------------------------------------------------------

SAID = [
    (pyreg.dropout, {"x": [[1.0], [2.0, 3.0]]}, ValueError, "x is of type list, of which NumPy makes no array"),
    (pyreg.dropout, {"rate": "0.5"}, TypeError, r"rate is of type str; wanted a probability of dropping in \[0, 1\]"),
    (pyreg.dropout, {"rate": np.array([0.5])}, TypeError, "rate is of type ndarray"),
    (pyreg.dropout, {"rate": 10**400}, ValueError, r"rate is 10000.*\.\.\.; wanted"),
    (pyreg.dropout, {"rate": None}, TypeError, "rate is None; wanted"),
    (pyreg.dropout, {"key": 10**30}, ValueError, r"key is 10+; wanted an int in \[0, 2\*\*64\)"),
    (pyreg.dropout, {"key": np.True_}, TypeError, "key is bool"),
    (pyreg.dropout, {"offset": 2**200}, ValueError, "offset is 16069.*; wanted an int in"),
    (pyreg.dropout, {"offset": "0"}, TypeError, "offset is of type str; wanted an int"),
    (pyreg.dropout, {"deterministic": "no"}, TypeError, "deterministic is of type str; wanted True or False"),
    (pyreg.dropout, {"key": None, "rng": "no"}, TypeError, "rng is 'no'; wanted an int or a numpy.random.Generator"),
    (pyreg.dropout, {"key": None, "rng": -1}, ValueError, "rng is -1; wanted"),
    (pyreg.dropout, {"broadcast_dims": None}, TypeError, "broadcast_dims is None; wanted an int or a sequence of ints"),
    (pyreg.dropout, {"broadcast_dims": "0"}, TypeError, "broadcast_dims is of type str"),
    (
        pyreg.dropout,
        {"broadcast_dims": (0.5,)},
        TypeError,
        "an element of broadcast_dims is of type float; wanted an int",
    ),
    (pyreg.dropout, {"broadcast_dims": 10**400}, ValueError, "broadcast_dims has 1000"),
    (pyreg.dropout_mask, {"shape": (2**40, 2**40)}, ValueError, "shape is .*; wanted at most 64 dims and fewer than 2"),
    (pyreg.dropout_mask, {"shape": (0, 2**63)}, ValueError, "shape is .*; wanted at most 64 dims and fewer than 2"),
    (pyreg.dropout_mask, {"shape": (1,) * 65, "packed": True}, ValueError, "shape is .*; wanted at most 64 dims"),
    (pyreg.dropout_mask, {"shape": 2.5}, TypeError, "shape is of type float; wanted an int or a sequence of ints"),
    (pyreg.dropout_mask, {"packed": "no"}, TypeError, "packed is of type str"),
    (pyreg.batch_norm, {"axis": (0,)}, TypeError, "axis is of type tuple; wanted an int"),
    (pyreg.batch_norm, {"axis": 10**400}, ValueError, "axis is 1000"),
    (pyreg.batch_norm, {"epsilon": 10**400}, ValueError, r"epsilon is 1000.*; wanted a finite number of 0 or more"),
    (pyreg.batch_norm, {"activation": ["relu"]}, ValueError, r"activation is \['relu'\]; wanted None or 'relu'"),
    (pyreg.batch_norm, {"scale": "a"}, ValueError, r"scale has shape \(\)"),
    (pyreg.batch_norm_backward, {"dy": None}, TypeError, "dy is None; wanted an array"),
    (pyreg.batch_norm_backward, {"x": None}, TypeError, "x is None; wanted an array"),
    (pyreg.BatchNorm, {"num_features": -1}, ValueError, "num_features is -1"),
    (pyreg.BatchNorm, {"num_features": 2**62}, ValueError, "num_features is 4611686018427387904"),
    (pyreg.BatchNorm, {"num_features": 2.5}, TypeError, "num_features is of type float; wanted an int"),
    (pyreg.BatchNorm, {"num_features": 3, "dtype": int}, TypeError, "dtype is int64; wanted a float dtype"),
    (pyreg.BatchNorm, {"num_features": 3, "dtype": "no"}, TypeError, "dtype is 'no'; wanted a float dtype"),
    (pyreg.BatchNorm, {"num_features": 3, "momentum": np.nan}, ValueError, "momentum is nan; wanted a weight"),
    (pyreg.BatchNorm, {"num_features": 3, "use_bias": "no"}, TypeError, "use_bias is of type str"),
    (pyreg.Dropout, {"inverted": None}, TypeError, "inverted is None; wanted True or False"),
    (pyreg.DropPath, {"rate": 0.5, "scale_by_keep": 2}, TypeError, "scale_by_keep is of type int"),
]


@pytest.mark.parametrize(("function", "change", "error", "message"), SAID)
def test_messages(function, change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        function(**{**FUNCTIONS.get(function, {}), **change})


def test_forms_of_numbers():
    want = pyreg.dropout(X, 0.5, key=1, broadcast_dims=(0,))
    for rate in (F32(0.5), np.array(0.5), np.float16(0.5), Fraction(1, 2)):
        assert same(pyreg.dropout(X, rate, key=np.int8(1), broadcast_dims=np.int64(0)), want)
    assert not pyreg.dropout(X, True, key=1).any()  # as in Flax
    for dims in (0, (0, 0), (0, -2), [0], {0}, range(1), np.array([0]), np.array(0), (np.int8(-2),)):
        assert same(pyreg.dropout(X, 0.5, key=1, broadcast_dims=dims), want)
        assert pyreg.dropout_mask((4, 3), 0.5, key=1, broadcast_dims=dims).shape == (1, 3)
    want = pyreg.dropout_mask((4, 3), 0.5, key=1)
    for shape in ([4, 3], np.array([4, 3]), (np.int64(4), np.uint8(3))):
        assert same(pyreg.dropout_mask(shape, 0.5, key=1, packed=0), want)
    assert same(pyreg.dropout_mask(np.int64(12), 0.5, key=1), want.ravel())
    assert same(pyreg.dropout(X, 0.5, deterministic=np.True_), X)
    assert same(pyreg.batch_norm(X, axis=np.int64(1), epsilon=np.array(1e-5))[0], pyreg.batch_norm(X)[0])


def test_a_packed_mask_needs_its_own_memory_only(monkeypatch):
    asked = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, dtype: asked.append(shape) or empty(shape, dtype))
    assert pyreg.dropout_mask((100, 81), 0.5, key=1, packed=True).shape == (1013,)
    assert asked == [1013]
    with pytest.raises(MemoryError):
        pyreg.dropout_mask(2**62, key=1)
    with pytest.raises(MemoryError):
        pyreg.dropout_mask((2**62, 1), key=1, packed=True)


def test_views_of_memory_with_two_dims():
    view = memoryview(np.zeros((2, 2), np.int64))
    with pytest.raises(TypeError, match="broadcast_dims"):
        pyreg.dropout(np.ones((2, 2)), key=1, broadcast_dims=view)
    with pytest.raises(TypeError, match="shape"):
        pyreg.dropout_mask(view, key=1)
