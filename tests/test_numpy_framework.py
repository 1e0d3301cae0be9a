"""examples/numpy_framework.py: layers of pyreg as layers of Thinc."""

from pathlib import Path

import numpy as np
import pytest
from common import example, normal, same

import pyreg

pytest.importorskip("sklearn")
pytest.importorskip("thinc")


@pytest.fixture(scope="module")
def framework():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples")  # it imports digits
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # which sets variables for NumPy, which is loaded already
        patch.delenv("OPENBLAS_CORETYPE", raising=False)
        yield example("numpy_framework")


def test_dropout_as_a_layer(framework):
    x, dy = normal((20, 30), np.float32), normal((20, 30), np.float32, seed=1)
    layer = pyreg.Dropout(0.4, rng=1)
    model = framework.with_pyreg(layer)
    y, backward = model.begin_update(x)
    keep = pyreg.dropout_mask(x.shape, 0.4, key=layer.key)
    scale = np.float32(1) / np.float32(0.6)
    assert same(y, np.where(keep, x * scale, np.float32(0)))
    assert same(backward(dy), np.where(keep, dy * scale, np.float32(0)))
    assert model.predict(x) is x


def test_batch_norm_as_a_layer(framework):
    x, dy = normal((20, 3), np.float32), normal((20, 3), np.float32, seed=1)
    layer = pyreg.BatchNorm(3)
    model = framework.with_pyreg(layer)
    scale, bias = normal(3, np.float32, seed=2), normal(3, np.float32, seed=3)
    model.set_param("scale", scale)
    model.set_param("bias", bias)
    y, backward = model.begin_update(x)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale + bias, rtol=1e-4, atol=1e-5)
    _, mean, var = pyreg.batch_norm(x)
    dx, dscale, dbias = pyreg.batch_norm_backward(dy, x, mean, var, scale)
    assert same(backward(dy), dx)
    assert same(model.get_grad("scale"), dscale)
    assert same(model.get_grad("bias"), dbias)
    assert same(model.predict(x), pyreg.batch_norm_inference(x, layer.mean, layer.var, scale, bias))


def test_it_trains(framework):
    choices = framework.regularisations(rate=0.5, seed=0)
    for name, least in (("pyreg.Dropout", 0.8), ("both of pyreg", 0.8)):
        framework.fix_random_seed(0)
        network = framework.make_network(*choices[name])
        assert framework.train(network, seed=0, epochs=5)[-1] > least
    norms = [model for model in network.walk() if model.name == "pyreg.BatchNorm"]
    assert len(norms) == 2
    for norm in norms:
        assert (norm.get_param("scale") != 1).mean() > 0.95  # Thinc's optimiser has moved them
