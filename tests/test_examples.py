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
