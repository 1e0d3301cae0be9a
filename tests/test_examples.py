"""The programs of examples/ that use Flax, on small sizes: what they show holds."""

import numpy as np
import pytest
from common import example
from jaxcommon import jax, nnx

import pyreg.linen
import pyreg.nnx

for _name in ("matplotlib", "sklearn"):
    pytest.importorskip(_name)


def test_nnx_guide(capsys):
    guide = example("nnx_guide")
    x, labels = jax.numpy.ones((6, 4)), jax.numpy.arange(6)
    guide.show_modes(x)
    table = capsys.readouterr().out
    assert (table.count("True"), table.count("False"), table.count("0%")) == (4, 0, 2)
    guide.show_training(x, labels, steps=2)
    assert "equal bit for bit: True" in capsys.readouterr().out


def test_nnx_guide_sees_a_difference():
    guide = example("nnx_guide")
    a, b = guide.Model(nnx.Rngs(0)), guide.Model(nnx.Rngs(0))
    assert guide.same_bits(a, b)
    b.hidden.bias[...] += 1
    assert not guide.same_bits(a, b)


def test_linen_guide():
    guide = example("linen_guide")
    ours, theirs = (np.array(guide.train(layers, epochs=3)) for layers in (pyreg.linen, guide.linen))
    assert ours[-1, 0] < 0.7 * ours[0, 0]
    assert ours[-1, 1] > 0.8
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=1e-4)


def test_uncertainty():
    """Rates rise, the loss falls, another rate compiles nothing, and answers spread far from the points."""
    program = example("uncertainty")
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(keys[0], (100, 1), minval=-1, maxval=1)
    start, y = program.create_params(keys[1]), jax.numpy.sin(3 * x)
    for rate in (0.05, 0.2):
        params, (rates, losses) = program.train(start, x, y, rate, keys[2], 300)
        np.testing.assert_allclose(rates[jax.numpy.array([0, 75, 150, -1])], [0, rate / 2, rate, rate], rtol=1e-6)
        assert losses[-50:].mean() < 0.3 * losses[:10].mean()
    assert program.train._cache_size() == 1
    points = jax.numpy.array([[-2.0], [0.0], [0.5], [2.0]])
    mean, spread = program.ask(params, points, rate, jax.random.split(keys[0], 50))
    assert mean.shape == (4, 1)
    assert spread[jax.numpy.array([0, 3])].min() > spread[1:3].max() > 0.01
    jaxpr = str(jax.make_jaxpr(program.ask)(params, points, rate, jax.random.split(keys[0], 50)))
    assert "f32[50,4,1]" not in jaxpr.split("pyreg_dropout")[0]  # before the first mask there is nothing fifty times


def test_dropout_from_scratch(capsys, tmp_path):
    scratch = example("dropout_from_scratch")
    scratch.compare()
    table = capsys.readouterr().out
    assert (table.count("True"), table.count("False")) == (3, 0)
    curves = scratch.measure(seeds=2, epochs=15)
    gaps = {rate: curve[:, -1, 1] - curve[:, -1, 0] for rate, curve in curves.items()}
    assert (gaps[0.5] < gaps[0.0]).all()
    scratch.plot(curves, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 10_000
