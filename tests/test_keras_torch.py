"""pyreg.keras on Keras's backend torch, in a process of its own: Keras has one backend for each."""

import importlib.util

import pytest
from common import python

BEFORE = """
import warnings
warnings.simplefilter("ignore")
import keras, torch, numpy as np, pyreg.keras, pyreg.torch
layers = keras.layers
x = np.random.default_rng(0).standard_normal((64, 5, 3)).astype("f4")
numpy = keras.ops.convert_to_numpy
"""

CASES = {
    "dropout": """
layer = pyreg.keras.Dropout(0.3)
torch.manual_seed(0)
y = layer(x, training=True)
torch.manual_seed(0)
assert torch.equal(y, pyreg.torch.dropout(torch.from_numpy(x), 0.3))
assert torch.equal(layer(x), torch.from_numpy(x))
assert not layer(x, training=True).equal(y)
""",
    "dropout that is Keras's": """
for options in ({"seed": 7}, {"noise_shape": (None, 1, 3)}):
    both = layers.Dropout(0.3, **options), pyreg.keras.Dropout(0.3, **options)
    both[1].seed_generator.state.assign(both[0].seed_generator.state)
    assert torch.equal(*(layer(x, training=True) for layer in both))
for rate in (0.0, 1.0):
    assert torch.equal(*(family.Dropout(rate)(x, training=True) for family in (layers, pyreg.keras)))
assert torch.equal(*(family.SpatialDropout1D(0.3, seed=1)(x, training=True) for family in (layers, pyreg.keras)))
""",
    "batch normalization": """
for axis, shape, options in (
    (-1, (64, 3), {}), (1, (4, 3, 3), {"scale": False}), (-1, (4, 3, 2, 5), {"center": False}),
    (-1, (2, 3, 2, 4, 5), {}), (0, (3, 8), {}), (-1, (16, 3), {"dtype": "bfloat16"}), (-1, (16, 3), {"renorm": True}),
):
    results, tolerance = [], 0.1 if "dtype" in options else 1e-4
    for family in (layers, pyreg.keras):
        layer = family.BatchNormalization(axis, **options)
        a = torch.from_numpy(np.random.default_rng(1).standard_normal(shape).astype("f4") + 1).requires_grad_()
        y = layer(a, training=True)
        (y.float() * torch.arange(y.numel()).reshape(y.shape).cos()).sum().backward()
        values = [y, a.grad, *(v.value for v in layer.variables), *(v.value.grad for v in layer.trainable_variables)]
        results.append([v.dtype for v in values] + [tuple(v.shape) for v in values])
        results.append([numpy(v.detach().float()) for v in values])
    assert results[0] == results[2]
    for got, want in zip(results[3], results[1], strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
""",
    "far from zero": """
errors = []
for family in (layers, pyreg.keras):
    layer = family.BatchNormalization(momentum=0.0)
    layer(x[:, 0] + np.float32(1000), training=True)
    errors.append(abs(numpy(layer.moving_variance) / x[:, 0].astype("f8").var(0) - 1).max())
assert errors[1] < 1e-4 < 1e-3 < errors[0], errors
""",
    "masks, frozen layers, one element": """
results = []
for family in (layers, pyreg.keras):
    layer, other = family.BatchNormalization(), family.BatchNormalization()
    y = [layer(x, training=True, mask=np.arange(320).reshape(64, 5) % 3 > 0)]
    layer.trainable = False
    y += [layer(x, training=True), other(x[:1, 0], training=True), layer.moving_mean.value, other.moving_variance.value]
    results.append([numpy(a) for a in y])
for got, want in zip(*results, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
""",
    "a model": """
def network():
    keras.utils.set_random_seed(0)
    a = keras.Input((5, 3))
    y = layers.Flatten()(layers.MultiHeadAttention(2, 4, dropout=0.2)(a, a))
    model = keras.Model(a, layers.Dense(2)(layers.BatchNormalization()(layers.Dropout(0.2)(y))))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model

model = pyreg.keras.convert(network())
assert sum("call" in vars(layer) for layer in model._flatten_layers()) == 3
losses = model.fit(x, x[:, 0, :2], epochs=5, verbose=0).history["loss"]
assert losses[-1] < losses[0]
pyreg.keras.revert(model)
assert not any("call" in vars(layer) for layer in model._flatten_layers())
""",
}


def test_on_torch():
    """All in one process: the imports take longest."""
    for package in ("keras", "torch"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    code = (
        BEFORE
        + f"""
for name, code in {CASES!r}.items():
    exec(compile(code, name, "exec"), dict(globals()))
    print(name)
"""
    )
    printed = python(code, warnings="ignore", timeout=300, KERAS_BACKEND="torch")
    assert printed.splitlines() == list(CASES)
