"""pyreg.Dropout, the layer."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import reference
from common import normal, python, same

import pyreg
from pyreg import _core


def test_training_and_evaluation():
    x = normal((50, 20), np.float32)
    layer = pyreg.Dropout(0.4, rng=1)
    assert layer.training
    y = layer(x)
    assert same(y, reference.dropout(x, 0.4, layer.key))
    assert not same(layer(x), y)  # a fresh mask each time
    assert layer.eval() is layer
    assert layer(x) is x
    assert layer.backward(x) is x
    assert layer.train() is layer
    assert not same(layer(x), x)


def test_backward_makes_the_mask_again():
    x, dy = normal((50, 20), np.float32), normal((50, 20), np.float32, seed=1)
    for impl in ("philox", "threefry"):
        layer = pyreg.Dropout(0.4, rng=1, impl=impl, broadcast_dims=(0,))
        layer(x)
        first = layer.key
        assert same(layer.backward(dy), reference.dropout(dy, 0.4, first, impl, broadcast_dims=(0,)))
        assert layer.key == first
        # Nothing but the key is kept: no array is an attribute.
        assert not any(isinstance(v, np.ndarray) for v in vars(layer).values())


def test_backward_needs_a_call():
    with pytest.raises(RuntimeError, match=r"backward\(\) before a call; wanted layer\(x\) first"):
        pyreg.Dropout().backward(np.ones(3))


def test_backward_is_that_of_the_last_call():
    x = np.ones(100)
    layer = pyreg.Dropout(0.5, rng=1)
    y = layer(x)
    assert same(layer.eval().backward(x), y)
    layer(x)
    assert layer.train().backward(x) is x


def test_gradient_by_finite_differences():
    x, dy = normal(30, np.float64), normal(30, np.float64, seed=1)
    layer = pyreg.Dropout(0.3, rng=2)
    layer(x)
    dx, key = layer.backward(dy), layer.key
    for i in range(30):
        h = np.zeros(30)
        h[i] = 1e-6
        numeric = dy @ (pyreg.dropout(x + h, 0.3, key=key) - pyreg.dropout(x - h, 0.3, key=key)) / 2e-6
        assert abs(dx[i] - numeric) < 1e-6


def test_not_inverted():
    x = np.ones(1000, np.float32)
    layer = pyreg.Dropout(0.25, rng=3, inverted=False)
    assert set(layer(x)) == {0.0, 1.0}
    assert set(layer.backward(x)) == {0.0, 1.0}
    layer.eval()
    assert set(layer(x)) == {0.75}
    assert set(layer.backward(x)) == {0.75}
    assert layer(x).dtype == np.float32


def test_out():
    x, out = np.ones(100), np.empty(100)
    layer = pyreg.Dropout(0.5, rng=4)
    for mode in (True, False):
        for inverted in (True, False):
            layer.train(mode).inverted = inverted
            assert layer(x, out=out) is out
            assert layer.backward(x, out=out) is out
    with pytest.raises(ValueError, match="out has shape"):
        layer(x, out=np.empty(3))


def test_state_copy_and_pickle():
    x = np.ones(100)
    layer = pyreg.Dropout(0.5, rng=5)
    layer(x)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), pyreg.Dropout(0.5)]
    twins[-1].load_state_dict(layer.state_dict())
    want = layer(x)
    for twin in twins:
        assert same(twin(x), want)
    layer.load_state_dict({})  # PyTorch's Dropout has no state
    with pytest.raises(ValueError, match=r"state has \['p'\]; wanted 'rng' only"):
        layer.load_state_dict({"p": 0.5})


def test_copies_go_on_by_themselves():
    x = np.ones(100)
    layer = pyreg.Dropout(0.5, rng=5)
    twin = copy.copy(layer)
    first = layer(x)
    assert same(twin(x), first)


def test_a_seed_gives_the_same_layer():
    x = np.ones(100)
    assert same(pyreg.Dropout(rng=6)(x), pyreg.Dropout(rng=6)(x))
    assert not same(pyreg.Dropout()(x), pyreg.Dropout()(x))


def test_errors():
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        pyreg.Dropout(1.5)
    with pytest.raises(ValueError, match="impl is 'x'"):
        pyreg.Dropout(impl="x")
    with pytest.raises(TypeError, match="x has dtype int64"):
        pyreg.Dropout(rng=0)(np.arange(3))
    with pytest.raises(TypeError, match="x has dtype int64"):
        pyreg.Dropout(rng=0).eval()(np.arange(3))


def test_repr():
    assert repr(pyreg.Dropout(0.1)) == "Dropout(rate=0.1, broadcast_dims=(), impl='philox', inverted=True)"


# ---- What changes between a call and its backward pass, or a call that fails ---------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0.2},
        {"rate": 0.0},
        {"impl": "threefry"},
        {"broadcast_dims": (0,)},
        {"inverted": False},
        {"key": 3},
        {"rng": 9},
        {"training": False},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inverted", [True, False])
def test_backward_takes_the_settings_of_its_call(change, training, inverted):
    x, dy = normal((20, 50), np.float32), normal((20, 50), np.float32, seed=1)
    layer = pyreg.Dropout(0.5, rng=0, inverted=inverted).train(training)
    layer(x)
    want = reference.dropout(dy, 0.5, layer.key, scaled=inverted) if training else dy * np.float32(inverted or 0.5)
    for name, value in change.items():
        setattr(layer, name, value)
    assert same(layer.backward(dy), want)
    assert same(layer.backward(dy, out=dy), want)


def test_a_list_of_dims_may_be_changed():
    dims, x = [0], np.ones((20, 50), np.float32)
    layer = pyreg.Dropout(0.5, rng=0, broadcast_dims=dims)
    y = layer(x)
    dims[0] = 1
    assert same(layer.backward(x), y)
    assert not same(layer(x), layer(x)[:1].repeat(20, 0))


@pytest.mark.parametrize(
    ("setting", "given", "error", "message"),
    [
        ({}, {"x": np.ones(64, int)}, TypeError, "x has dtype int64"),
        ({}, {"x": None}, TypeError, "x is None"),
        ({}, {"x": np.ones(64), "out": np.ones(3)}, ValueError, "out has shape"),
        ({}, {"x": np.ones(64), "out": [0.0] * 64}, TypeError, "out is a list"),
        ({"rate": 2}, {"x": np.ones(64)}, ValueError, r"rate is 2; wanted a probability of dropping in \[0, 1\]"),
        ({"rate": "0.5"}, {"x": np.ones(64)}, TypeError, "rate is of type str; wanted a probability"),
        ({"impl": "x"}, {"x": np.ones(64)}, ValueError, "impl is 'x'"),
        ({"broadcast_dims": 1}, {"x": np.ones(64)}, ValueError, "broadcast_dims has 1"),
        ({"inverted": "no"}, {"x": np.ones(64)}, TypeError, "inverted is of type str; wanted True or False"),
        ({"training": "no"}, {"x": np.ones(64)}, TypeError, "training is of type str"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_call_that_raises_changes_nothing(setting, given, error, message, training):
    x = np.ones(64)
    layer, twin = pyreg.Dropout(0.5, rng=0), pyreg.Dropout(0.5, rng=0)
    y = layer.train(training)(x)
    twin.train(training)(x)
    key, good = layer.key, {name: getattr(layer, name) for name in setting}
    for name, value in setting.items():
        setattr(layer, name, value)
    with pytest.raises(error, match=message):
        layer(**given)
    for name, value in good.items():
        setattr(layer, name, value)
    assert layer.key == key
    assert same(layer.backward(x), y)
    assert layer.state_dict() == twin.state_dict()
    assert same(layer(x), twin(x))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_call_changes_nothing(monkeypatch, error):
    def stop(*_):
        raise error

    long = np.ones(1 << 20, np.float32)  # shorter calls cannot be interrupted
    rng = np.random.default_rng(0)
    layer = pyreg.Dropout(0.5, rng=rng)
    y, key = layer(long), layer.key
    state = layer.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(_core, "dropout", stop)
        for call in (layer, layer.backward, lambda x: pyreg.dropout(x, rng=rng)):
            with pytest.raises(error):
                call(long)
    assert layer.state_dict() == state
    assert layer.key == key
    assert same(layer.backward(long), y)


def test_backward_wants_the_shape_of_x():
    layer = pyreg.Dropout(rng=0)
    layer(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"dy has 2 dims, shape \(3, 4\); wanted the shape that x had, \(4, 3\)"):
        layer.backward(np.ones((3, 4)))
    with pytest.raises(TypeError, match="dy has dtype int64"):
        layer.eval().backward(np.ones((4, 3), int))


def test_evaluation_writes_where_it_should():
    memory = normal(101, np.float32)
    for inverted in (True, False):
        layer = pyreg.Dropout(0.25, inverted=inverted).eval()
        want = memory[1:].copy() * np.float32(1 if inverted else 0.75)
        for out in (
            np.empty(100, np.float32),
            np.empty(200, np.float32)[::2],
            np.empty(100, ">f4"),
            memory.copy()[:-1],
        ):
            x = out.base[1:] if out.base is not None and out.base.size == 101 else memory[1:]
            assert layer(x, out=out) is out
            assert (out == want).all()
        assert layer(np.float32(4)).shape == ()
        assert type(layer(np.float32(4))) is np.ndarray
        with pytest.raises(ValueError, match="elements that share memory"):
            layer(np.ones((2, 3)), out=np.lib.stride_tricks.as_strided(np.ones(4), (2, 3), (8, 8)))


def test_states_that_do_not_fit():
    layer = pyreg.Dropout(rng=0)
    state = layer.state_dict()
    other = np.random.Generator(np.random.MT19937(0)).bit_generator.state
    broken = {**state["rng"], "state": {"state": 1, "inc": 3}}
    del broken["uinteger"]  # NumPy has set the rest by then
    for bad in (other, broken, {}, None, 7, {**state["rng"], "state": None}):
        with pytest.raises(
            (TypeError, ValueError), match=r"state\['rng'\] is not one of PCG64, this layer's generator"
        ):
            layer.load_state_dict({"rng": bad})
        assert layer.state_dict() == state
    for bad in (None, [], "rng"):
        with pytest.raises(TypeError, match="wanted a mapping, such as"):
            layer.load_state_dict(bad)


# ---- Copies and workers --------------------------------------------------------------------------------------------


def drawn(layer):
    return layer(np.ones(64, np.float32)).tobytes()


def in_workers(method, layers):
    with multiprocessing.get_context(method).Pool(len(layers)) as pool:
        return [result.get(60) for result in [pool.apply_async(drawn, [layer]) for layer in layers]]


def in_forks(layer, count):
    """What the layer draws in so many forks of this process, which make one fork each."""

    def work(queue, deeper):
        if deeper:
            child = context.Process(target=work, args=(queue, False))
            child.start()
            child.join()
        queue.put(drawn(layer))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=work, args=(queue, True)) for _ in range(count)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in range(2 * count)]
    for process in processes:
        process.join()
    return results


def in_a_process_of_its_own(check, *arguments):
    """Calls a function of this module where JAX, which may have been imported here, does not mind forks."""
    python(f"import test_layers; test_layers.{check.__name__}{arguments!r}", warnings="ignore")


@pytest.mark.parametrize("used", [False, True])
def test_forks_draw_different_masks(used):
    in_a_process_of_its_own(forks_draw_different_masks, used)


def forks_draw_different_masks(used):
    layer = pyreg.Dropout(0.5)
    before = [drawn(layer)] if used else []
    assert len({*before, *in_forks(layer, 3), drawn(layer)}) == 6 + 1 + used
    assert len(set(in_forks(pyreg.Dropout(0.5, rng=0), 2))) < 4  # with a seed the stream is the user's


@pytest.mark.parametrize("used", [False, True])
def test_copies_of_an_unseeded_layer_draw_different_masks(used):
    layer = pyreg.DropPath(0.5)
    if used:
        drawn(layer)
    pickled = pickle.dumps(layer)
    others = [copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickled), pickle.loads(pickled)]
    assert len({drawn(layer), *map(drawn, others)}) == 5
    assert len({drawn(twin) for twin in map(pickle.loads, [pickle.dumps(others[-1])] * 3)}) == 3
    layer.load_state_dict(pyreg.Dropout(rng=1).state_dict())  # now the user has seeded it
    assert drawn(copy.copy(layer)) == drawn(pyreg.DropPath(0.5, rng=1))


def test_an_unseeded_layer_can_be_restored():
    layer = pyreg.Dropout(0.5)
    state = layer.state_dict()
    first = drawn(layer)
    layer.load_state_dict(state)
    assert drawn(layer) == first


def test_rng_can_be_assigned():
    layer = pyreg.Dropout(0.5, rng=0)
    layer.rng = 1
    assert drawn(layer) == drawn(pyreg.Dropout(0.5, rng=1))
    assert drawn(layer) != drawn(pyreg.Dropout(0.5, rng=1))
    rng = np.random.default_rng(2)
    layer.rng = rng
    assert layer.rng is rng
    layer.rng = None
    assert drawn(copy.copy(layer)) != drawn(layer)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_spawned_layers_draw_for_themselves(method):
    in_a_process_of_its_own(spawned_layers_draw_for_themselves, method)


def spawned_layers_draw_for_themselves(method):
    layer = pyreg.WordDropout(0.5, rng=3, scale_by_keep=False).eval()
    layer(np.ones((2, 2)))
    spawned = layer.spawn(2)
    assert [repr(one) for one in spawned] == [repr(layer)] * 2
    assert not any(one.training for one in spawned)
    with pytest.raises(RuntimeError, match="before a call"):
        spawned[0].backward(np.ones((2, 2)))
    first = pyreg.Dropout(0.5, rng=3).spawn(2)
    want = [drawn(pyreg.Dropout(0.5, rng=rng)) for rng in np.random.default_rng(3).spawn(2)]
    assert len(set(want)) == 2
    assert in_workers(method, first) == want
    assert len(set(map(drawn, pyreg.Dropout(0.5).spawn(3)))) == 3
    assert layer.spawn(0) == []
    with pytest.raises(ValueError, match="n is -1"):
        layer.spawn(-1)
    with pytest.raises(TypeError, match="rng cannot spawn"):
        pyreg.Dropout(rng=np.random.Generator(np.random.RandomState(0)._bit_generator)).spawn(2)


@pytest.mark.parametrize(
    "bits", [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.SFC64, np.random.Philox]
)
def test_a_call_without_memory_draws_nothing(bits):
    """Whatever the generator, and also half a draw that is left over from something else."""
    rng = np.random.Generator(bits(3))
    rng.integers(1 << 30, dtype=np.uint32)
    layer, x = pyreg.Dropout(0.5, rng=rng), np.ones((300, 500), np.float32).T
    layer(x)
    key, state = layer.key, copy.deepcopy(layer.state_dict())
    for call in (layer, lambda x: pyreg.dropout(x, 0.5, rng=rng)):
        _core.fail_allocation(1)
        try:
            with pytest.raises(MemoryError):
                call(x)
        finally:
            _core.fail_allocation(0)
        np.testing.assert_equal(layer.state_dict(), state)
    assert layer.key == key


def test_pickles_that_hold_the_generator_itself():
    layer = pyreg.Dropout(0.5, rng=0)
    state = {"rate": 0.5, "broadcast_dims": (), "impl": "philox", "inverted": True, "rng": layer.rng, "key": None}
    old = pyreg.Dropout.__new__(pyreg.Dropout)
    old.__setstate__({**state, "_trained": None})
    x = np.ones(64, np.float32)
    assert (old(x) == pyreg.Dropout(0.5, rng=0)(x)).all()


def test_a_state_that_is_too_large():
    layer = pyreg.BatchNorm(1)
    state = {**layer.state_dict(), "mean": np.array([1e300])}
    with pytest.raises(ValueError, match="mean has numbers that are too large for float32"):
        layer.load_state_dict(state)
    layer.load_state_dict({**state, "mean": np.array([np.inf])})
