"""tests/fuzz.py: some of its cases, and whether it finds anything at all."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fuzz
import numpy as np
import pytest
import reference

from pyreg import _core, _ops


@pytest.mark.parametrize("impl", fuzz.IMPLS)
@pytest.mark.parametrize("base", fuzz.BASES)
def test_masks_are_the_references(impl, base):
    for key, rate in zip(fuzz.KEYS, (0.1, 0.5, 1e-3, 0.999, 0), strict=True):
        for offset in (base, base + 1001, base + fuzz.SPAN - 100):
            want = reference.mask(100, rate, key, impl, offset)
            assert (fuzz.mask(100, rate, key, impl, base, offset) == want).all()


def run(cases, timeout):
    program = Path(fuzz.__file__)
    done = subprocess.run(
        [sys.executable, program, "--cases", str(cases)], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cases():
    run(6000, 300)


@pytest.mark.slow
def test_many_cases():
    run(1_000_000, 3600)


def of_kind(kind, count):
    """Numbers of cases of one kind."""
    numbers = (n for n in range(100 * count) if fuzz.random.Random(n).choice(fuzz.KINDS) is kind)
    return [n for n, _ in zip(numbers, range(count), strict=False)]


def dropout_off_by_one(dtype, x, y, generator, key, rate, offset, *rest):
    _core.dropout(dtype, x, y, generator, key, rate, offset + (offset >= 2**31), *rest)


def dropout_that_writes_its_input(dtype, x, y, *rest):
    _core.dropout(dtype, x, y, *rest)
    if x.size > 100 and x.flags.writeable:
        x[...] = y


def batch_norm_with_another_mean(dtype, x, *rest):
    mean, var = _core.batch_norm(dtype, x, *rest)
    return mean * mean.dtype.type(1 + 1e-6), var


def batch_norm_that_writes_further(dtype, x, axis, epsilon, relu, scale, bias, mask, residual, y):
    result = _core.batch_norm(dtype, x, axis, epsilon, relu, scale, bias, mask, residual, y)
    if y.strides and y.base is not None and y.size and abs(y.strides[-1]) > y.itemsize:
        np.ndarray(1, np.uint8, y.base.base if y.base.base is not None else y.base, 0)[0] ^= 1
    return result


def gradients_by_the_other_mask(dtype, dy, x, axis, epsilon, relu, scale, mask, *rest):
    return _core.batch_norm_backward(dtype, dy, x, axis, epsilon, relu, scale, None, *rest)


@pytest.mark.parametrize(
    ("kind", "name", "broken"),
    [
        (fuzz.dropout, "dropout", dropout_off_by_one),
        (fuzz.dropout, "dropout", dropout_that_writes_its_input),
        (fuzz.batch_norm, "batch_norm", batch_norm_with_another_mean),
        (fuzz.batch_norm, "batch_norm", batch_norm_that_writes_further),
        (fuzz.batch_norm_backward, "batch_norm_backward", gradients_by_the_other_mask),
    ],
)
def test_it_finds_a_fault(monkeypatch, kind, name, broken):
    numbers = of_kind(kind, 300)
    with np.errstate(all="ignore"):
        before = [fuzz.find(n) for n in numbers]
        monkeypatch.setattr(_ops, "_core", SimpleNamespace(**{**vars(_core), name: broken}))
        after = [fuzz.find(n) for n in numbers]
    assert sum(a != b for a, b in zip(before, after, strict=True)) >= 3


def test_it_finds_a_crash_and_goes_on(tmp_path):
    with fuzz.Worker(str(tmp_path / "0"), 5, 1, 40) as worker:
        worker.process.kill()
        found, done = [], False
        while not done:
            new, done = worker.poll()
            found += new
        assert worker.at() == 40
    assert any("ends the process (-9)" in problem for _, problem in found)
